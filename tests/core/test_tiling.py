"""From a mask to lists: widths, the flag of a list that is too narrow, batch axes and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import on_device

SIZES = {"block_q": 8, "block_kv": 8}


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
def test_a_narrow_list_keeps_the_first_and_says_so(traced):
    def build(mask):
        return js.block_mask(mask, 40, 40, width=2, **SIZES)

    rows = np.arange(5)
    causal = rows <= rows[:, None]
    mask = js.masks.causal(offset=0)
    plan = (jax.jit(build) if traced else build)(mask)
    assert plan.width == 2
    np.testing.assert_array_equal(plan.overflowed, [True])
    np.testing.assert_array_equal(plan.kv_num_blocks[0], [1, 2, 2, 2, 2])
    np.testing.assert_array_equal(plan.to_dense()[0], causal & (rows < 2))
    # what is wide enough for every row did not overflow
    enough = js.block_mask(js.masks.sliding_window(left=7), 40, 40, width=2, **SIZES)
    assert not enough.overflowed.any()


def test_the_flag_is_per_list():
    ids = np.stack([np.zeros(40, int), np.arange(40) // 8])  # one segment, and one per tile
    plan = js.block_mask(js.masks.segments(on_device(ids)), 40, 40, width=3, **SIZES)
    np.testing.assert_array_equal(plan.overflowed, [[True], [False]])


def test_the_width_is_what_the_mask_needs():
    assert js.block_mask(js.masks.sliding_window(left=9), 80, 80, **SIZES).width == 3
    # a traced mask has its static bound, one that knows none all columns
    bound = jax.jit(lambda: js.block_mask(js.masks.sliding_window(left=9), 80, 80, **SIZES))()
    assert bound.width in (3, 4)
    ids = jnp.repeat(jnp.arange(10), 8)
    build = jax.jit(lambda ids: js.block_mask(js.masks.segments(ids), 80, 80, **SIZES))
    assert build(ids).width == 10
    assert js.block_mask(js.masks.segments(ids), 80, 80, **SIZES).width == 1


def test_lists_per_sequence_and_head():
    """Batch axes and heads of the mask become those of the plan, each with its own tiles."""
    rng = np.random.default_rng(0)
    pairs = rng.random((2, 3, 4, 24, 16)) < 0.03
    plan = js.block_mask(js.masks.dense(on_device(pairs)), 24, 16, **SIZES)
    assert plan.batch_shape == (2, 3)
    assert plan.list_heads == 4
    tiles = pairs.reshape(2, 3, 4, 3, 8, 2, 8).any((4, 6))
    np.testing.assert_array_equal(jax.jit(lambda p: p.to_dense())(plan), tiles)
    assert 0 < tiles.mean() < 1


def test_more_rows_than_are_classified_at_once():
    plan = js.block_mask(js.masks.causal(), 200, 200, block_q=2, block_kv=8)
    rows, columns = np.arange(100)[:, None], np.arange(25)
    np.testing.assert_array_equal(plan.to_dense()[0], columns * 8 <= rows * 2 + 1)
