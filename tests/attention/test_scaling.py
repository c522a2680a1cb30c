"""Memory of the tile executor, from what XLA reserves: nothing is run, so nothing is noisy."""

import jax
import jax.numpy as jnp
import pytest

import jsparse as js

HEADS, DIM, BLOCK, TILES_PER_ROW = 4, 64, 128, 4


def _inputs(length):
    tokens = jax.ShapeDtypeStruct((1, length, HEADS, DIM), jnp.float32)
    blocks = length // BLOCK
    plan = js.BlockMask.from_lists(
        jnp.zeros((1, HEADS, blocks, TILES_PER_ROW), jnp.int32),
        jnp.zeros((1, HEADS, blocks), jnp.int32),
        q_len=length,
        kv_len=length,
        block_q=BLOCK,
        block_kv=BLOCK,
    )
    return tokens, plan


def _forward(q, k, v, plan):
    return js.attend(q, k, v, plan, implementation="xla").sum()


def _temporary_bytes(function, length):
    tokens, plan = _inputs(length)
    compiled = jax.jit(function).lower(tokens, tokens, tokens, plan).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "function", [_forward, jax.grad(_forward, argnums=(0, 1, 2))], ids=["forward", "gradient"]
)
def test_memory_is_a_few_arrays_of_the_size_of_q(function):
    # one number per pair of tokens would be 512 such arrays
    length = 2**15
    array = length * HEADS * DIM * 4
    assert _temporary_bytes(function, length) < 3 * array


@pytest.mark.parametrize(
    "function", [_forward, jax.grad(_forward, argnums=(0, 1, 2))], ids=["forward", "gradient"]
)
def test_memory_grows_with_the_length_at_most_in_proportion(function):
    short, long = (_temporary_bytes(function, length) for length in (2**14, 2**16))
    assert long <= 4.01 * short
