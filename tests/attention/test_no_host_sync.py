"""Nothing on the way from q, k, v to the output waits for a device to tell the host a number."""

import jax
import jax.numpy as jnp
import pytest

import jsparse as js
from tests.inputs import on_device, qkv

READS = ("__array__", "__bool__", "__int__", "__float__", "__index__", "item", "tolist")


@pytest.fixture
def unreadable_arrays(monkeypatch):
    """The host cannot read what an array holds."""

    def refuse(self, *args, **kwargs):
        pytest.fail("an array is read on the host")

    for name in READS:
        monkeypatch.setattr(type(jnp.zeros(1)), name, refuse)
    with pytest.raises(pytest.fail.Exception):
        bool(jnp.ones(()))


def calls():
    """Attention over given tiles; what makes tiles outside of `jit` reads how many there are."""
    q, k, v = qkv(60, dim=8)
    mask = js.masks.causal() & js.masks.segments(jnp.repeat(jnp.arange(3), 20))
    plan = js.block_mask(mask, 60, 60, block_q=16, block_kv=16)
    options = {
        "bias": jnp.ones((4, 60, 60)),
        "score_mod": lambda s, b, h, i, j: s - 0.1 * h,
        "sinks": jnp.zeros(4),
        "softcap": 5.0,
        "scale": on_device(0.3),
        "return_lse": True,
    }

    def gradient():
        return jax.grad(lambda q: js.attend(q, k, v, plan, mask=mask).sum())(q)

    compiled = jax.jit(lambda q: js.sparse_attention(q, k, v, js.xattention(), mask=mask))
    return {
        "plain": lambda: js.attend(q, k, v, plan),
        "options": lambda: js.attend(q, k, v, plan, mask=mask, **options),
        "gradient": gradient,
        "compiled": lambda: compiled(q),
    }


CALLS = calls()


@pytest.mark.parametrize("name", CALLS)
def test_no_array_is_read_on_the_host(name, unreadable_arrays):
    CALLS[name]()
