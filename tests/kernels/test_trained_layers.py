"""Parameters serve every implementation: a layer trained on one device is used on another."""

from collections.abc import Callable
from typing import Any, NamedTuple

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


def to_all(q, k, v, *, mask, x, positions):
    return js.attend(q, k, v, mask=mask)


def to_all_regions(q, k, v, *, mask, x, positions):
    return js.biformer(top_k=None).attend((), q, k, v, mask=mask)[0]


class Case(NamedTuple):
    """A method, the kernels that take all its tiles, and what it would be if it chose nothing."""

    method: js.Method
    kernels: tuple[str, ...] = ("triton", "mosaic")
    heads: int = 2
    mask: Any = CAUSAL
    everything: Callable[..., Any] = to_all


NSA = js.nsa(
    **{"compression_size": 16, "stride": 8, "block_kv": 16, "top_k": 2},
    **{"num_init": 0, "num_local": 1, "window": 16},
)
METHODS = {
    # which chooses by a kernel of Mosaic's as well
    "nsa": Case(NSA),
    "flashmoba": Case(js.flashmoba(block_kv=16, top_k=2, taps=3)),
    "seerattention": Case(js.seerattention(block_size=16, density=0.4, gate_dim=16, dense_rows=0)),
    "seerattention_r": Case(
        js.seerattention_r(block_size=16, token_budget=32, gate_dim=16), ("triton",)
    ),
    # single tokens make tiles of 16 rows, where so many heads share them
    "hisa": Case(js.hisa(top_k=16, block_kv=8, block_top_k=3, **INDEXER), ("triton",), heads=16),
    "routing_transformer": Case(js.routing_transformer(clusters=5, window=16)),
    "biformer": Case(
        js.biformer(regions=5, top_k=2), ("triton",), mask=None, everything=to_all_regions
    ),
}
LENGTH = 40
# kernels round what a row's gradients leave of each other; over more tokens that evens out
LENGTH_OF_GRADIENTS = 80
# whose gradients take few seconds; flashmoba's convolution has some of its own
QUICK = {("biformer", "triton"), ("flashmoba", "triton"), ("routing_transformer", "mosaic")}
INTERPRETERS = {"triton": _compat.triton_interpreter, "mosaic": _compat.interpreter}
# of the norm: half a unit of bf16 for probabilities and outputs of either, and as much again
TOLERANCE = 2.0**-6


def trained(method: js.Method, heads: int = 2) -> js.nn.SparseAttention:
    """A layer with none of its parameters as they are at first."""
    layer = js.nn.SparseAttention(
        32, num_heads=heads, num_kv_heads=1, head_dim=16, method=method, dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    return moved(layer)


def moved(layer):
    """With none of its parameters as they are at first."""
    rng = np.random.default_rng(1)
    state = nnx.state(layer, nnx.Param)
    other = jax.tree.map(lambda x: x + on_device(0.3 * rng.normal(size=x.shape), x.dtype), state)
    nnx.update(layer, other)
    return layer


@nnx.jit
def run(layer, x, mask):
    return layer(x, mask=mask)


def outputs(layer, x, implementation, mask=CAUSAL):
    layer.implementation = implementation
    return jax.block_until_ready(run(layer, x, mask))


def gradients(layer, x, implementation, mask):
    """By parameters and hidden states, of the output times some numbers."""
    layer.implementation = implementation
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    weights = on_device(np.random.default_rng(3).normal(size=x.shape), jnp.float32)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            out = nnx.merge(graph, params, rest)(x, mask=mask)
            return (out.astype(jnp.float32) * weights).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    return jax.block_until_ready(run(params, x))


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
    method, kernels, heads, mask, everything = METHODS[name]
    layer = trained(method, heads)
    x = jax.random.normal(jax.random.key(2), (LENGTH, 32), jnp.bfloat16)
    portable = outputs(layer, x, "xla", mask)
    for backend in kernels:
        with INTERPRETERS[backend]():
            assert difference(outputs(layer, x, backend, mask), portable) < TOLERANCE, backend
    # the method matters here, and so do its parameters
    every = js.nn.with_attention(layer, everything)
    assert difference(outputs(every, x, "xla", mask), portable) > 4 * TOLERANCE
    if jax.tree.leaves(layer.method_params):
        assert difference(outputs(untrained(layer), x, "xla", mask), portable) > 4 * TOLERANCE


@pytest.mark.newest
def test_and_so_is_one_of_latents_that_all_heads_share():
    layer = moved(
        js.nn.LatentAttention(
            32, num_heads=16, head_dim=16, v_dim=16, rope_dim=16, q_lora_rank=16, kv_lora_rank=48,
            method=METHODS["hisa"].method, dtype=jnp.bfloat16, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(2), (LENGTH, 32), jnp.bfloat16)
    portable = outputs(layer, x, "xla")
    with INTERPRETERS["triton"]():
        assert difference(outputs(layer, x, "triton"), portable) < TOLERANCE
    every = js.nn.with_attention(layer, to_all)
    assert difference(outputs(every, x, "xla"), portable) > 4 * TOLERANCE
    assert difference(outputs(untrained(layer), x, "xla"), portable) > 4 * TOLERANCE


@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=() if (name, backend) in QUICK else pytest.mark.slow)
        for name, case in METHODS.items()
        for backend in case.kernels
    ],
)
def test_and_so_are_its_gradients(name, backend):
    method, _, heads, mask, _ = METHODS[name]
    layer = trained(method, heads)
    x = jax.random.normal(jax.random.key(2), (LENGTH_OF_GRADIENTS, 32), jnp.bfloat16)
    expected = gradients(layer, x, "xla", mask)
    with INTERPRETERS[backend]():
        got = gradients(layer, x, backend, mask)
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, ours), its in pairs:
        if np.asarray(its, np.float32).any():
            assert difference(ours, its) < TOLERANCE, path
        else:
            # an indexer and a gate learn by losses of their own
            assert "method_params" in jax.tree_util.keystr(path)
            assert not np.asarray(ours, np.float32).any(), path


@pytest.mark.newest
def test_lists_of_single_tokens_are_those_of_triton_and_refused_by_mosaic():
    layer = trained(js.hisa(top_k=8, block_kv=8, block_top_k=3, **INDEXER))
    x = jax.random.normal(jax.random.key(2), (LENGTH, 32), jnp.bfloat16)
    portable = outputs(layer, x, "xla")
    with INTERPRETERS["mosaic"]():
        with pytest.raises(NotImplementedError, match="implementation='mosaic': .*tiles of"):
            outputs(layer, x, "mosaic")
        np.testing.assert_array_equal(outputs(layer, x, None), portable)
    with INTERPRETERS["triton"]():
        assert difference(outputs(layer, x, "triton"), portable) <= TOLERANCE
    assert difference(outputs(untrained(layer), x, "xla"), portable) > 4 * TOLERANCE
