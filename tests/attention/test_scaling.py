"""Memory of the tile executor, from what XLA reserves: nothing is run, so nothing is noisy."""

from collections.abc import Callable
from typing import NamedTuple

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


class Kind(NamedTuple):
    """A kind of lists whose own way XLA goes; `arrays` like q are what its passes may take."""

    attention: Callable[..., jax.Array]
    block_q: int
    block_kv: int
    width: int
    arrays: tuple[int, int]
    heads: int = HEADS
    list_heads: int = HEADS


def _skipping(q, k, v, plan):
    out, lse, _ = js.attend_skipping(q, k, v, plan, threshold=0.1, implementation="xla")
    return out.sum() + lse.sum()


KINDS = {
    "columns": Kind(_forward, BLOCK, 1, 256, (2, 3)),
    # the heads of a group are the rows of a tile
    "packed rows": Kind(_forward, 1, 64, 4, (3, 4), heads=16, list_heads=1),
    "skipping": Kind(_skipping, BLOCK, BLOCK, 8, (2, 3)),
    # what is gathered for each entry of the lists, some of them at a time
    "keys first": Kind(_forward, 1, 64, 4, (6, 10)),
}


@pytest.mark.parametrize(
    ("name", "backward"),
    [
        # a gradient computes the forward pass too; that of the last kind is in test_kv_major
        pytest.param(name, backward, id=f"{name}, {('forward', 'gradient')[backward]}", marks=marks)
        for name in KINDS
        for backward in (False, True)
        for marks in [[] if backward and name != "keys first" else [pytest.mark.slow]]
    ],
)
def test_no_kind_of_lists_takes_memory_for_all_pairs(name, backward):
    """A bool per pair of one head would be 32 arrays of the size of q, 8 where heads are 16."""
    kind, length = KINDS[name], 2**15
    q = jax.ShapeDtypeStruct((1, length, kind.heads, DIM), jnp.float32)
    k = jax.ShapeDtypeStruct((1, length, kind.list_heads, DIM), jnp.float32)
    lists = 1, kind.list_heads, length // kind.block_q
    sizes = {"block_q": kind.block_q, "block_kv": kind.block_kv}
    plan = js.BlockMask.from_lists(
        jnp.zeros((*lists, kind.width), jnp.int32),
        jnp.zeros(lists, jnp.int32),
        q_len=length,
        kv_len=length,
        **sizes,
    )
    function = jax.grad(kind.attention, argnums=(0, 1, 2)) if backward else kind.attention
    memory = jax.jit(function).lower(q, k, k, plan).compile().memory_analysis()
    assert memory.temp_size_in_bytes < kind.arrays[backward] * q.size * 4
