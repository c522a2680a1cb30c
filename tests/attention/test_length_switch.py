"""A method from some length on: dense below, above the method with all that belongs to it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.types import Method
from tests.inputs import qkv

CAUSAL = js.masks.causal()


class Counted(NamedTuple):
    state: int


def scaled():
    """A method with parameters and state: values times a number, steps counted."""

    def init(key, *, num_heads, num_kv_heads, dim, features):
        return jnp.full((num_heads, 1), 3.0)

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        tiles = js.block_mask(mask, q.shape[-3], k.shape[-3], block_q=8, block_kv=8)
        return tiles, Counted(state + 1)

    def attend(params, q, k, v, *, state=None, mask=None, return_lse=False, **given):
        tiles, info = plan(params, q, k, mask=mask, state=state)
        return js.attend(q, k, v, tiles, mask=mask, implementation="reference") * params, info

    return Method(init, plan, attend)


def test_below_it_is_dense_and_from_there_on_the_method():
    method = js.mean_pooled(block_size=8, density=0.2)
    switched = js.from_length(method, min_length=48)
    weights = jnp.cos(jnp.arange(16.0))

    def value_and_gradient(run):
        # the plainest executor: what it computes is not in question here
        run = functools.partial(run, implementation="reference")
        return jax.jit(jax.value_and_grad(lambda *x: (run(*x) * weights).sum(), argnums=(0, 1, 2)))

    for length, same in ((47, None), (48, method)):
        q, k, v = qkv(length, batch=(2,))

        def expected(q, k, v, same=same, **options):
            if same is None:
                return js.attend(q, k, v, mask=CAUSAL, **options)
            return js.sparse_attention(q, k, v, same, mask=CAUSAL, **options)

        def got(q, k, v, **options):
            return js.sparse_attention(q, k, v, switched, mask=CAUSAL, **options)

        jax.tree.map(
            np.testing.assert_array_equal,
            value_and_gradient(got)(q, k, v),
            value_and_gradient(expected)(q, k, v),
        )
    assert switched.plan((), *qkv(48)[:2], mask=CAUSAL)[0].block_q == 8
    tiles, _ = switched.plan((), *qkv(47)[:2], mask=CAUSAL)
    np.testing.assert_array_equal(tiles.to_dense(), js.block_mask(CAUSAL, 47, 47).to_dense())
    assert switched.plan((), *qkv(47)[:2])[0] is None


def test_keys_decide_not_queries():
    switched = js.from_length(js.mean_pooled(block_size=8), min_length=48)
    q, k, _ = qkv(8, 48)
    assert switched.plan((), q, k, mask=CAUSAL)[0].block_q == 8


def test_parameters_and_state_are_the_methods():
    switched = js.from_length(scaled(), min_length=16)
    params = switched.init(jax.random.key(0), num_heads=4, num_kv_heads=2, dim=16, features=64)
    np.testing.assert_array_equal(params, np.full((4, 1), 3.0))
    for length, factor, state in ((16, 3.0, 6), (15, 1.0, 5)):
        q, k, v = qkv(length)
        assert switched.plan(params, q, k, mask=CAUSAL, state=5)[1].state == state
        out, info = switched.attend(params, q, k, v, mask=CAUSAL, state=5)
        assert info.state == state
        dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
        np.testing.assert_allclose(out, factor * dense, atol=6e-6)


def test_what_the_method_alone_is_given_is_left_alone_below_and_reaches_it_from_there_on():
    q, k, v = qkv(16)
    own = {"local": qkv(16, seed=1), "compressed": qkv(16, seed=2)}
    # of another such method too
    switched = js.from_length(js.from_length(js.nsa(), min_length=17), min_length=2)
    out, _ = switched.attend((), q, k, v, mask=CAUSAL, implementation="reference", **own)
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    np.testing.assert_array_equal(out, dense)
    tiles, _ = switched.plan((), q, k, mask=CAUSAL, **own)
    np.testing.assert_array_equal(tiles.to_dense(), js.block_mask(CAUSAL, 16, 16).to_dense())
    # what neither knows is no method's own
    with pytest.raises(TypeError, match="lokal"):
        switched.attend((), q, k, v, lokal=own["local"])
    with pytest.raises(TypeError, match="lokal"):
        switched.plan((), q, k, lokal=own["local"])

    def plan(params, q, k, *, local=None, **given):
        return local, Counted(0)

    def attend(params, q, k, v, *, local=None, **given):
        return local, Counted(0)

    told = js.from_length(Method(lambda *_, **sizes: (), plan, attend), min_length=16)
    assert told.plan((), q, k, local="seen")[0] == "seen"
    assert told.attend((), q, k, v, local="seen")[0] == "seen"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="min_length=0 must be a positive int"):
        js.from_length(js.xattention(), min_length=0)
