"""The tile list: its invariants, its inverse, and what it says when it is too narrow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jsparse as js
from jsparse.types.inverse_list import from_runs
from jsparse.types.mask import Runs
from jsparse.types.pytree import flatten_batch
from tests.inputs import on_device

TILES = {"block_q": 8, "block_kv": 8}
SIZES = {"q_len": 40, "kv_len": 50, **TILES}


def random_tiles(seed=0, shape=(2, 3, 5, 7), density=0.4):
    return np.random.default_rng(seed).random(shape) < density


def plan_of(tiles, **changes):
    return js.BlockMask.from_dense(on_device(tiles), **{**SIZES, **changes})


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


def test_a_plan_carries_its_inverse_until_it_is_another_plan():
    plan = plan_of(random_tiles())
    carrying = plan.with_inverse()
    assert plan.turned is None
    jax.tree.map(np.testing.assert_array_equal, carrying.turned, plan.inverse())
    assert jax.jit(lambda p: p)(carrying).inverse().offsets.shape == plan.inverse().offsets.shape
    # what is asked for is what is carried
    told = jax.tree.map(jnp.zeros_like, carrying.turned)
    assert plan.with_inverse(told).inverse() is told
    flat = flatten_batch(jax.tree.map(lambda x: x[None], carrying), (1, 2))
    jax.tree.map(np.testing.assert_array_equal, flat.turned, carrying.turned)
    fewer = dataclasses.replace(carrying, kv_num_blocks=jnp.minimum(plan.kv_num_blocks, 1))
    assert fewer.turned is None
    assert (fewer.inverse().q_num_blocks <= plan.inverse().q_num_blocks).all()
    assert (carrying | carrying).turned is None
    jax.tree.map(
        np.testing.assert_array_equal, carrying.without_missing_blocks().turned, carrying.turned
    )


def test_runs_of_rows_are_what_either_or_both_have():
    """Also of what was combined before, whose runs do not ascend."""
    rng = np.random.default_rng(0)

    def runs(count):
        first = np.sort(rng.integers(0, 30, count))
        return Runs(first, first + rng.integers(0, 12, count))

    def rows(runs):
        inverse = from_runs(*(on_device(x, jnp.int32)[None] for x in runs), 60)
        return set(np.asarray(inverse.q_indices[0, : inverse.offsets[0, 1]]).tolist())

    for _ in range(30):
        a, b, c, d = (runs(count) for count in (3, 4, 2, 3))
        has = [set().union(*map(range, *x)) for x in (a, b, c, d)]
        found = a.common(b).common(c.united(d))
        assert rows(found) == has[0] & has[1] & (has[2] | has[3])


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


def test_lists_in_any_order_count_each_tile_once(without_shape_checks):
    tiles = random_tiles(shape=(3, 5, 7))
    width = 11
    lists, counts = np.full((3, 5, width), -(2**31)), np.zeros((3, 5), int)
    rng = np.random.default_rng(3)
    for at in np.ndindex(3, 5):
        blocks = np.flatnonzero(tiles[at])
        # every tile, some of them twice, and padding in between
        entries = np.concatenate([blocks, blocks[:2], [-1]])
        counts[at] = len(entries)
        lists[at][: len(entries)] = rng.permutation(entries)
        lists[at][len(entries) :] = rng.integers(-(2**31), 2**31 - 1, width - len(entries))
    expected = plan_of(tiles)
    for dtype in (jnp.int32, jnp.uint32, np.int64):
        plan = js.BlockMask.from_lists(lists.astype(dtype), counts.astype(dtype), **SIZES)
        np.testing.assert_array_equal(plan.to_dense(), tiles)
        np.testing.assert_array_equal(plan.kv_num_blocks, expected.kv_num_blocks)
        assert plan.kv_indices.dtype == plan.kv_num_blocks.dtype == jnp.int32
        assert not plan.overflowed.any()
    traced = jax.jit(lambda a, b: js.BlockMask.from_lists(a, b, **SIZES))(
        on_device(lists), on_device(counts)
    )
    np.testing.assert_array_equal(traced.kv_indices, plan.kv_indices)
    np.testing.assert_array_equal(traced.inverse().q_num_blocks, tiles.sum(-2))


def test_small_integers_hold_lists_too(without_shape_checks):
    lists, counts = on_device([[[4, 0]] * 5], jnp.int8), jnp.full((1, 5), 2, jnp.uint8)
    plan = js.BlockMask.from_lists(lists, counts, **SIZES)
    assert plan.kv_indices[0, 0].tolist() == [0, 4]


def test_integers_that_int32_lacks_name_no_block(without_shape_checks):
    """A cast would make block 0 of the first, and block 1 of the second."""
    for entry in (2**32, 2**32 + 1):
        lists = np.array([[[2, entry], [0, 1]]])
        with pytest.raises(ValueError, match=rf"kv_indices\[0, 0, 1\] holds block {entry};"):
            js.BlockMask.from_lists(lists, np.full((1, 2), 2), q_len=16, kv_len=24, **TILES)
        # behind the count it is padding, as what is negative is anywhere
        for row, count in (([2, entry], 1), ([2, -entry], 2)):
            lists = np.array([[row, [0, 1]]])
            counts = np.array([[count, 2]])
            plan = js.BlockMask.from_lists(lists, counts, q_len=16, kv_len=24, **TILES)
            assert plan.kv_num_blocks.tolist() == [[1, 2]]
            assert plan.to_dense().tolist() == [[[False, False, True], [True, True, False]]]
    counts = np.array([[2**32, 2]])
    plan = js.BlockMask.from_lists(
        np.array([[[0, 1], [0, 1]]]), counts, q_len=16, kv_len=24, **TILES
    )
    assert plan.overflowed.all()
    assert plan.kv_num_blocks.tolist() == [[2, 2]]


def test_a_list_that_lacks_tiles_says_so():
    lists = on_device([[[0, 1]] * 5, [[0, 6]] * 5, [[0, 7]] * 5])
    counts = on_device([[2, 2, 3, 2, 2], [2] * 5, [2] * 5])
    plan = jax.jit(lambda a, b: js.BlockMask.from_lists(a, b, **SIZES))(lists, counts)
    assert plan.overflowed.tolist() == [True, False, True]
    assert plan.kv_num_blocks.max() == 2


def test_a_list_of_no_width_is_an_empty_plan():
    plan = js.BlockMask.from_lists(jnp.zeros((1, 5, 0), int), jnp.zeros((1, 5), int), **SIZES)
    assert not plan.to_dense().any()
    assert not plan.overflowed.any()
    assert plan.inverse().offsets.max() == 0


def test_plans_of_different_heads_combine():
    shared, grouped, single = (random_tiles(n, (heads, 5, 7)) for n, heads in enumerate((1, 2, 4)))
    both = plan_of(grouped) | plan_of(single)
    np.testing.assert_array_equal(both.to_dense(), np.repeat(grouped, 2, 0) | single)
    both = plan_of(single) & plan_of(shared)
    np.testing.assert_array_equal(both.to_dense(), single & shared)


def test_density_counts_more_tiles_than_an_int32_holds():
    rows = 2**17
    lists = jnp.broadcast_to(jnp.arange(2**5), (1, rows, 2**5))
    plan = js.BlockMask(lists, jnp.full((1, rows), 2**15), jnp.zeros((1,), bool), rows, rows, 1, 1)
    np.testing.assert_allclose(plan.density(), [0.25])


def test_under_jit_and_vmap():
    tiles = on_device(random_tiles())
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


def test_known_tiles_have_a_tight_width_under_jit_too():
    tiles = np.zeros((1, 3, 4), bool)
    tiles[0, :, 1:3] = True
    sizes = {"q_len": 12, "kv_len": 16, "block_q": 4, "block_kv": 4}
    known = on_device(tiles)
    plan = jax.jit(lambda: js.BlockMask.from_dense(known, **sizes))()
    assert plan.width == 2
    np.testing.assert_array_equal(plan.to_dense(), tiles)
