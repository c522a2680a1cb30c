"""From a mask to lists: widths, the flag of a list that is too narrow, batch axes and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.tiling import visible_tiles, with_inverse
from jsparse.masks.lengths import in_room
from jsparse.masks.powerattention import powers_of_two
from jsparse.masks.s2_attention import sharded_blocks
from jsparse.masks.streaming import sink_and_window
from jsparse.types import Frame, TileGrid
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


def closed_forms(offset):
    """Masks that name the tiles that a row can need, for queries that start at `offset`."""
    at = {"offset": offset}
    causal, blocks = js.masks.causal(**at), {"block_size": 8, **at}
    spans = {"num_sink": [8, 0, 16], "window": [16, 40, 24], "right": 0}
    shares = {"heads": 4, "kv_heads": 4, "local_blocks": 2, "vert_stride": 4}
    return {
        "powerattention": powers_of_two(**blocks, window_size=2) & causal,
        "s2_attention": sharded_blocks(**blocks, **shares) & causal,
        "moa": js.masks.head_windows(**blocks, **spans) & causal,
        "streaming": sink_and_window(num_sink=5, window=21, **at) & causal,
    }


@pytest.mark.parametrize("name", closed_forms(0))
@pytest.mark.parametrize(
    "grid",
    [
        pytest.param((64, 400, 8, 8), id="tiles are blocks"),
        pytest.param((61, 397, 4, 4), id="smaller tiles", marks=pytest.mark.slow),
        pytest.param((70, 601, 16, 3), id="tiles across blocks"),
    ],
)
def test_tiles_by_closed_form_are_those_by_classification(name, grid):
    """At any place among the keys, before the first and past the last included."""
    grid = TileGrid(*grid)
    starts = np.r_[-9:26, 100, 325:345, 400, 900]

    @jax.jit
    def both(starts):
        mask = closed_forms(starts)[name]
        plan = js.block_mask(mask, **grid._asdict())
        tiles = visible_tiles(mask.flatten_batch(starts.shape), grid)
        if grid.block_q == grid.block_kv:  # the others are seen below
            return plan, tiles, None, None
        return plan, tiles, with_inverse(plan, mask).turned, plan.inverse()

    mask = closed_forms(0)[name]
    named = mask.flatten_batch(()).candidates(0, grid, Frame(grid.q_len, grid.kv_len))
    assert named is not None
    assert len(named) < grid.kv_blocks
    plan, tiles, turned, expected = both(on_device(starts, jnp.int32))
    # as are columns, without counting or sorting any
    jax.tree.map(np.testing.assert_array_equal, turned, expected)
    np.testing.assert_array_equal(plan.to_dense(), tiles)
    # a width that is known without the offset is enough, and hardly more than what is needed
    most = int(tiles.sum(-1).max())
    assert not plan.overflowed.any()
    assert plan.width < grid.kv_blocks
    if name in ("s2_attention", "streaming") and grid.block_kv == 8:
        assert plan.width == most
    assert plan.width <= 2 * most


def random_mask(rng, kind):
    """A mask of some kind with random numbers, with and without an offset."""
    size = int(rng.choice([1, 4, 6]))
    at = {} if rng.random() < 0.5 else {"offset": int(rng.integers(-20, 200))}
    near = js.masks.sliding_window(
        left=[None, int(rng.integers(0, 50))][rng.integers(2)],
        right=[None, int(rng.integers(0, 50))][rng.integers(2)],
        **at,
    )
    blocks = {"block_size": size, **at}
    if kind == "power":
        sizes = {"window_size": int(rng.integers(1, 5)), "num_sink_blocks": int(rng.integers(0, 3))}
        mask = powers_of_two(**sizes, **blocks)
    elif kind == "shares":
        sizes = {"local_blocks": int(rng.integers(1, 6)), "vert_stride": int(rng.integers(1, 6))}
        mask = sharded_blocks(heads=3, kv_heads=3, num_dense_heads=1, **sizes, **blocks)
    elif kind == "spans":
        mask = js.masks.head_windows(
            num_sink=rng.integers(0, 30, 3).tolist(),
            window=[None, *rng.integers(1, 60, 2).tolist()],
            right=[None, 0, 7][rng.integers(3)],
            **blocks,
        )
    else:
        mask = js.masks.sinks(int(rng.integers(0, 30)))
    # several runs of rows on either side
    mask = (mask | near) & (powers_of_two(block_size=2, window_size=1) | near) & near
    return mask & js.masks.causal(**at) if rng.random() < 0.5 else mask


@pytest.mark.parametrize("kind", ["power", "shares", "spans", "sinks"])
def test_columns_by_closed_form_are_the_lists_turned_round(kind):
    for seed in range(2):
        rng = np.random.default_rng(seed)
        mask = random_mask(rng, kind)
        if seed == 1:
            mask = in_room(mask, on_device([50, 131]))
        lengths, blocks = rng.integers(40, 200, 2), rng.choice([1, 3, 4, 8, 16], 2)
        grid = TileGrid(*map(int, (*lengths, *blocks)))

        @jax.jit
        def both(mask, grid=grid):
            tiles = visible_tiles(mask.flatten_batch(mask.batch_shape), grid)
            tiles = tiles.reshape(*mask.batch_shape, *tiles.shape[1:])
            plan = js.BlockMask.from_dense(tiles, **grid._asdict(), width=grid.kv_blocks)
            return tiles, with_inverse(plan, mask).turned

        tiles, turned = both(mask)
        for at in np.ndindex(tiles.shape[:-2]):
            columns, rows = np.nonzero(np.asarray(tiles[at]).T)
            assert len(rows)
            np.testing.assert_array_equal(np.trim_zeros(turned.q_indices[at][len(rows) :]), [])
            np.testing.assert_array_equal(turned.q_indices[at][: len(rows)], rows)
            ends = np.searchsorted(columns, np.arange(grid.kv_blocks + 1))
            np.testing.assert_array_equal(turned.offsets[at], ends)


def test_a_mask_of_arrays_has_no_closed_form():
    mask = js.masks.causal() & js.masks.segments(jnp.arange(40) // 9)
    plan = js.block_mask(mask, 40, 40, **SIZES)
    assert with_inverse(plan, mask) is plan


def shapes_in(jaxpr):
    """Of every array that a program makes, those of its loops included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(value, "jaxpr"):
                yield from shapes_in(value.jaxpr)


@pytest.mark.parametrize(
    "method",
    [
        js.powerattention(),
        js.s2_attention(block_size=128, local_blocks=4, vert_stride=4),
        js.moa(
            rules=[js.ElasticRule(4096, 0.0), js.ElasticRule(1000, 0.0)] * 2,
            block_size=128,
            num_sink=128,
            min_span=256,
        ),
        js.streaming(),
    ],
    ids=["powerattention", "s2_attention", "moa", "streaming"],
)
def test_a_million_tokens_are_planned_by_what_is_listed(method):
    """Where positions are traced; neither all tiles nor all of one row are ever looked at."""
    q = jax.ShapeDtypeStruct((2**19, 4, 1), jnp.float32)
    k = jax.ShapeDtypeStruct((2**20, 4, 1), jnp.float32)
    positions = jax.ShapeDtypeStruct((2**19,), jnp.int32)
    program, plan = jax.make_jaxpr(
        lambda q, k, p: method.plan((), q, k, positions=p)[0], return_shape=True
    )(q, k, positions)
    shapes = set(shapes_in(program.jaxpr))
    assert len(shapes) > 10
    assert plan.grid.kv_blocks == 2**13
    assert plan.width < 2**13 // 3
    assert not any(2**13 in shape for shape in shapes)
    assert max(map(np.prod, shapes)) <= plan.kv_indices.size
