"""The tile list: its invariants, its inverse, and what it says when it is too narrow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jsparse as js

SIZES = {"q_len": 40, "kv_len": 50, "block_q": 8, "block_kv": 8}


def random_tiles(seed=0, shape=(2, 3, 5, 7), density=0.4):
    return np.random.default_rng(seed).random(shape) < density


def plan_of(tiles, **changes):
    return js.BlockMask.from_dense(jnp.asarray(tiles), **{**SIZES, **changes})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_dense_round_trip(seed, density):
    tiles = random_tiles(seed, density=density)
    plan = plan_of(tiles)
    np.testing.assert_array_equal(plan.to_dense(), tiles)
    assert plan.width == max(1, tiles.sum(-1).max())
    np.testing.assert_allclose(plan.density(), tiles.mean((-1, -2)), rtol=1e-6)
    lists, counts = np.asarray(plan.kv_indices), np.asarray(plan.kv_num_blocks)
    for at in np.ndindex(counts.shape):
        np.testing.assert_array_equal(lists[at][: counts[at]], np.flatnonzero(tiles[at]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_inverse_lists_the_queries_of_each_column(seed, density):
    tiles = random_tiles(seed, density=density)
    inverse = plan_of(tiles).inverse()
    ids, offsets = np.asarray(inverse.q_indices), np.asarray(inverse.offsets)
    for at in np.ndindex(2, 3, 7):
        first, last = offsets[at[:2]][at[2]], offsets[at[:2]][at[2] + 1]
        expected = np.flatnonzero(tiles[at[:2]][:, at[2]])
        np.testing.assert_array_equal(ids[at[:2]][first:last], expected)
    np.testing.assert_array_equal(inverse.q_num_blocks, tiles.sum(-2))


def test_union_and_intersection():
    left, right = random_tiles(1), random_tiles(2)
    np.testing.assert_array_equal((plan_of(left) | plan_of(right)).to_dense(), left | right)
    np.testing.assert_array_equal((plan_of(left) & plan_of(right)).to_dense(), left & right)


def test_a_narrow_list_keeps_the_first_and_says_so():
    tiles = random_tiles()
    plan = plan_of(tiles, width=2)
    np.testing.assert_array_equal(plan.overflowed, (tiles.sum(-1) > 2).any(-1))
    assert plan.overflowed.any()
    kept = np.asarray(plan.to_dense())
    np.testing.assert_array_equal(kept.sum(-1), np.minimum(tiles.sum(-1), 2))
    np.testing.assert_array_equal(kept, tiles & (np.cumsum(tiles, -1) <= 2))
    # what was lost stays known to be lost
    assert (plan | plan_of(tiles)).overflowed.any()
    assert (plan & plan_of(tiles)).overflowed.any()


def test_under_jit_and_vmap():
    tiles = jnp.asarray(random_tiles())
    build = jax.jit(lambda t: js.BlockMask.from_dense(t, **SIZES))
    plan = build(tiles)
    assert plan.width == 7  # nothing static says less
    np.testing.assert_array_equal(plan.to_dense(), tiles)
    mapped = jax.vmap(build)(tiles)
    np.testing.assert_array_equal(mapped.to_dense(), tiles)
    np.testing.assert_array_equal(jax.vmap(lambda p: p.density())(mapped), plan.density())


def test_drawing():
    tiles = np.zeros((1, 5, 7), bool)
    tiles[0, 1] = True
    assert plan_of(tiles).draw() == "[0]\n·······\n███████\n·······\n·······\n·······"
    shaded = plan_of(tiles).draw(max_columns=4)
    assert shaded == "[0]\n▒▒▒▒\n····\n····"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_of(random_tiles(shape=(1, 5, 6))), "tiles has 5 x 6 tiles"),
        (lambda: plan_of(random_tiles(shape=(5, 7))), r"tiles has shape \(5, 7\)"),
        (lambda: plan_of(np.ones((1, 5, 7))), "must hold bools"),
        (lambda: plan_of(random_tiles(), block_q=0), "block_q=0 must be a positive int"),
        (lambda: plan_of(random_tiles(), block_kv=-8), "block_kv=-8"),
        (lambda: plan_of(random_tiles(), q_len=2.5), "q_len=2.5"),
        (
            lambda: js.BlockMask.from_lists(jnp.zeros((1, 5, 3)), jnp.zeros((1, 5), int), **SIZES),
            "kv_indices holds float32; it must hold integers",
        ),
        (
            lambda: js.BlockMask.from_lists(
                jnp.zeros((1, 4, 3), int), jnp.zeros((1, 4), int), **SIZES
            ),
            "kv_indices has 4 rows",
        ),
        (
            lambda: js.BlockMask.from_lists(
                jnp.zeros((1, 5, 3), int), jnp.zeros((1, 4), int), **SIZES
            ),
            "kv_num_blocks has shape",
        ),
        (
            lambda: plan_of(random_tiles()) | plan_of(random_tiles(shape=(1, 5, 4)), kv_len=32),
            "differ in lengths or tiles",
        ),
    ],
)
def test_bad_input_is_named(call, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        call()
