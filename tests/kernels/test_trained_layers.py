"""Parameters serve every implementation: a layer trained on one device is used on another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jsparse as js
import jsparse.nn
from pallas_kernels import _compat
from tests.inputs import on_device

CAUSAL = js.masks.causal()
INDEXER = {"index_heads": 2, "index_dim": 16, "rotary_dim": 8}
# the method, and the kernels that take all its tiles
METHODS = {
    "nsa": (
        js.nsa(
            **{"compression_size": 16, "stride": 8, "block_kv": 16, "top_k": 2},
            **{"num_init": 0, "num_local": 1, "window": 16},
        ),
        "triton",
    ),
    "flashmoba": (js.flashmoba(block_kv=16, top_k=2, taps=3), "triton"),
    "seerattention": (
        js.seerattention(block_size=16, density=0.4, gate_dim=16, dense_rows=0),
        "mosaic",
    ),
}
LENGTH = 80
INTERPRETERS = {"triton": _compat.triton_interpreter, "mosaic": _compat.interpreter}
# of the norm: half a unit of bf16 for probabilities and outputs of either, and as much again
TOLERANCE = 2.0**-6


def trained(method: js.Method) -> js.nn.SparseAttention:
    """A layer with none of its parameters as they are at first."""
    layer = js.nn.SparseAttention(
        32, num_heads=2, num_kv_heads=1, head_dim=16, method=method, dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    rng = np.random.default_rng(1)
    state = nnx.state(layer, nnx.Param)
    moved = jax.tree.map(lambda x: x + on_device(0.3 * rng.normal(size=x.shape), x.dtype), state)
    nnx.update(layer, moved)
    return layer


def to_all(q, k, v, *, mask, x, positions):
    return js.attend(q, k, v, mask=mask)


def outputs(layer, x, implementation):
    layer.implementation = implementation
    return jax.block_until_ready(nnx.jit(lambda layer, x: layer(x, mask=CAUSAL))(layer, x))


def untrained(layer: js.nn.SparseAttention) -> js.nn.SparseAttention:
    """The same layer with the method's parameters at zero."""
    copy = nnx.merge(*nnx.split(layer))
    copy.method_params = nnx.data(jax.tree.map(jnp.zeros_like, layer.method_params))
    return copy


def difference(got, want) -> float:
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.newest
@pytest.mark.parametrize("name", METHODS)
def test_a_trained_layer_is_the_same_by_xla_and_by_the_kernels(name):
    method, kernels = METHODS[name]
    layer = trained(method)
    x = jax.random.normal(jax.random.key(2), (LENGTH, 32), jnp.bfloat16)
    portable = outputs(layer, x, "xla")
    with INTERPRETERS[kernels]():
        assert difference(outputs(layer, x, kernels), portable) < TOLERANCE
    # the method matters here, and so do its parameters
    dense = js.nn.with_attention(layer, to_all)
    assert difference(outputs(dense, x, "xla"), portable) > 4 * TOLERANCE
    assert difference(outputs(untrained(layer), x, "xla"), portable) > 4 * TOLERANCE


@pytest.mark.newest
@pytest.mark.parametrize("kernels", INTERPRETERS)
def test_lists_of_single_tokens_are_refused_by_the_kernels_and_served_by_xla(kernels):
    layer = trained(js.hisa(top_k=8, block_kv=8, block_top_k=3, **INDEXER))
    x = jax.random.normal(jax.random.key(2), (LENGTH, 32), jnp.bfloat16)
    portable = outputs(layer, x, "xla")
    with INTERPRETERS[kernels]():
        with pytest.raises(NotImplementedError, match=f"implementation='{kernels}': .*tiles of"):
            outputs(layer, x, kernels)
        np.testing.assert_array_equal(outputs(layer, x, None), portable)
    assert difference(outputs(untrained(layer), x, "xla"), portable) > 4 * TOLERANCE
