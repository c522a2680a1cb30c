"""Where the scale of logits is applied, and that nothing is lost by it."""

import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention.logits import LogitRule
from tests.inputs import on_device

RULE = LogitRule(q_len=3, kv_len=3, scale=0.125, softcap=None, score_mod=None)


@pytest.mark.parametrize(
    ("dtype", "scale", "inside"),
    [
        (jnp.float32, 0.3, True),
        (jnp.float32, None, False),  # there is none, or it is an array
        (jnp.bfloat16, 0.125, True),
        (jnp.bfloat16, -4.0, True),
        (jnp.bfloat16, 0.3, False),  # would round the queries once more
        (jnp.float16, 0.125, False),  # would lose bits of small ones
    ],
)
def test_queries_take_the_scale_where_nothing_is_lost(dtype, scale, inside):
    numbers = on_device(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32).astype(dtype)
    queries, rest = RULE._replace(scale=scale).scale_in(numbers)
    assert queries.dtype == dtype
    assert rest == RULE._replace(scale=None if inside else scale)
    exact = np.float64(numbers) * (scale if inside else 1.0)
    # of the scale and of the products
    rounding = 2.0**-23 if dtype == jnp.float32 else 0.0
    np.testing.assert_allclose(np.float64(queries), exact, rtol=rounding, atol=0)


def test_small_float16_queries_keep_their_bits():
    """Scaled they would be subnormal, and keys that are large bring that to light."""
    rng = np.random.default_rng(1)
    q, k, v = (on_device(rng.normal(size=(1, 16, 1, 64)), jnp.float32) for _ in range(3))
    q, k = (q * 2.0**-13).astype(jnp.float16), (k * 2.0**9).astype(jnp.float16)
    q, k, v = q, k, v.astype(jnp.float16)
    plan = js.block_mask(js.masks.causal(), 16, 16, block_q=8, block_kv=8)
    _, lse = js.attend(
        q, k, v, plan, mask=js.masks.causal(), implementation="xla", return_lse=True, scale=2.0**-6
    )
    logits = np.einsum("qd,kd->qk", *(np.float64(x[0, :, 0]) for x in (q, k))) * 2.0**-6
    expected = np.log(np.where(np.tri(16, dtype=bool), np.exp(logits), 0).sum(1))
    np.testing.assert_allclose(lse[0, 0], expected, atol=4e-6)
