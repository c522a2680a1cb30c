"""MInference against its oracle, and the checks of its specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse import _compat
from jsparse.attention.reference import visible
from jsparse.estimators.minference import (
    AShape,
    BlockSparse,
    Budget,
    VerticalSlash,
    tiles_and_columns,
    vertical_slash_scores,
)
from jsparse.types import Frame, TileGrid, parts_of
from tests.inputs import on_device, qkv
from tests.oracles import minference as oracle

CAUSAL = js.masks.causal()
MIXED = AShape(3, 40), VerticalSlash(40, 60), BlockSparse(2), VerticalSlash(33, 55)
SMALL = {"block_size": 8, "last_q": 20, "forced_vertical": 4, "forced_slash": 50}


def pairs_of(plan, mask, heads, q_len, kv_len):
    """How often each pair is attended to, [heads, q_len, kv_len], per part."""
    frame = Frame(q_len, kv_len, 0, jnp.arange(heads)[:, None, None])
    seen = mask.visible(jnp.arange(q_len)[:, None], jnp.arange(kv_len), frame)
    return [np.asarray(visible(part, heads) & seen) for part in parts_of(plan)]


def dense(q, k, v, mask=CAUSAL):
    return js.attend(q, k, v, mask=mask, implementation="reference")


def test_worked_scores_of_zero_queries():
    zeros = jnp.zeros((8, 1, 4))
    expected = [0.634524] * 5 + [0.434524, 0.267857, 0.125]
    for found in vertical_slash_scores(zeros, zeros, last_q=4):
        np.testing.assert_allclose(found[0], expected, atol=1e-6)


@pytest.mark.parametrize(("q_len", "kv_len", "last_q"), [(29, 29, 7), (20, 33, 8), (5, 12, 64)])
def test_scores_equal_the_oracle(q_len, kv_len, last_q):
    q, k, _ = qkv(q_len, kv_len, dim=8)
    found = vertical_slash_scores(q, k, last_q=last_q)
    for a, b in zip(found, oracle.scores(q, k, last_q=last_q), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "distances", "offsets", "kept"),
    [
        ({0, 5}, {0, 6}, [6, 12], [0, 5]),
        ({0, 5}, {0, 1, 6}, [6, 11, 15], [0, 5]),
        ({0, 5, 13}, {0, 1, 6, 15}, [0, 6, 11, 15], [5]),
    ],
)
def test_worked_index_of_the_authors(columns, distances, offsets, kept):
    assert oracle.official_index(columns, distances, 3, 4) == (offsets, kept)
    assert oracle.official_index(columns, {0, 6}, 0, 4) == ([0], [])


def test_every_pair_of_the_authors_pattern_is_in_ours_once():
    """Random sets of columns and distances, a head for each: the aligned form is a superset."""
    length, block, cases = 34, 4, 40
    rng = np.random.default_rng(0)
    share = rng.choice([0.05, 0.2, 0.6], (2, cases, 1))
    columns, distances = rng.random((2, cases, length)) < share
    distances[:, 0] = True  # forced first, it always is
    grid = TileGrid(length, length, block, block)
    below = np.tri(grid.q_blocks, dtype=bool)
    build = functools.partial(
        tiles_and_columns,
        visible=jnp.broadcast_to(below, (cases, *below.shape)),
        mask=CAUSAL,
        heads=(0,) * cases,
        first=on_device(0),
        grid=grid,
        width=length,
    )
    tiles, lists, counts = jax.jit(build)(on_device(distances), on_device(columns))
    lost = jnp.zeros((cases,), bool)
    plan = (
        js.BlockMask.from_dense(tiles, **grid._asdict()),
        js.BlockMask(lists, counts, lost, length, length, block, 1),
    )
    ours = sum(x.astype(int) for x in pairs_of(plan, CAUSAL, cases, length, length))
    assert ours.max() == 1
    for case in range(cases):
        sets = [set(np.flatnonzero(x[case])) for x in (columns, distances)]
        wanted = oracle.wanted_pairs(*sets, length, block)
        theirs = oracle.official_pairs(*sets, length, block)
        assert theirs.max() == 1
        # merging ranges to whole blocks adds keys to theirs, whole tiles add keys to ours
        assert not (wanted & (theirs == 0)).any()
        assert not (wanted & (ours[case] == 0)).any()
        np.testing.assert_array_equal(
            ours[case] > 0, oracle.aligned_pairs(*sets, length, length, block)
        )


def test_heads_of_all_patterns_equal_the_oracle():
    q_len, kv_len = 90, 163
    q, k, v = qkv(q_len, kv_len, dim=8, seed=1)
    block = SMALL["block_size"]
    method = js.minference(patterns=MIXED, **SMALL)
    out, info = jax.jit(lambda q, k, v: method.attend((), q, k, v, mask=CAUSAL))(q, k, v)
    vertical, slash = oracle.scores(q, k, last_q=20)
    np.testing.assert_allclose(info.vertical, vertical[[1, 3]], rtol=2e-5, atol=1e-6)
    pairs = []
    for head, pattern in enumerate(MIXED):
        if isinstance(pattern, AShape):
            found = oracle.a_shape_pairs(pattern.n_init, pattern.n_local, q_len, kv_len)
        elif isinstance(pattern, BlockSparse):
            found = oracle.block_sparse_pairs(q, k, head, top_k=pattern.top_k, block=block)
        else:
            columns = oracle.best(vertical[head], pattern.vertical_size, fewest=30, forced=4)
            distances = oracle.best(slash[head], pattern.slash_size, fewest=50, forced=50)
            found = oracle.aligned_pairs(columns, distances, q_len, kv_len, block)
            assert found.sum() < oracle.a_shape_pairs(0, kv_len, q_len, kv_len).sum()
        pairs.append(found)
    np.testing.assert_allclose(out, oracle.attention(q, k, v, pairs), atol=2e-5)


def test_of_more_forced_distances_than_fit_the_nearest_are_taken():
    # every query's largest logit is with the key 75 before it, one of those that are forced
    length, block = 256, 16
    rng = np.random.default_rng(3)
    k = rng.normal(size=(length, 1, 64)).astype(np.float32)
    q = 4 * np.roll(k, 75, axis=0)
    pattern = VerticalSlash(30, 50)
    method = js.minference(patterns=pattern, block_size=block)
    plan = jax.jit(lambda q, k: method.plan((), q, k, mask=CAUSAL))
    (tiles, _), info = plan(on_device(q), on_device(k))
    distances = oracle.best(np.asarray(info.slash[0]), pattern.slash_size, fewest=50, forced=100)
    assert distances == set(range(50))
    expected = oracle.aligned_pairs(set(), distances, length, length, block)
    expected = expected.reshape(length // block, block, length // block, block).any((1, 3))
    np.testing.assert_array_equal(tiles.to_dense()[0], expected)


def test_budgets_of_everything_are_dense():
    """All columns, all distances, all tiles, all keys: a head each."""
    q, k, v = qkv(300)
    everything = VerticalSlash(300, 50), VerticalSlash(30, 300), BlockSparse(5), AShape(0, 300)
    method = js.minference(patterns=everything)
    out = jax.jit(lambda q, k, v: js.sparse_attention(q, k, v, method, mask=CAUSAL))(q, k, v)
    np.testing.assert_allclose(out, dense(q, k, v), atol=4e-6)


LENGTH = 1024


@jax.jit
def chosen(q, k):
    """Of the only head the tiles, the columns of the last row of tiles, and the scores."""
    method = js.minference(patterns=VerticalSlash(35, 120))
    (tiles, columns), info = method.plan((), q, k, mask=CAUSAL)
    return tiles.to_dense()[0], columns.to_dense()[0, -1], info.vertical[0], info.slash[0]


def test_first_columns_and_recent_distances_are_always_there():
    # the last queries look at the middle alone
    q, k, _ = qkv(LENGTH, heads=1, kv_heads=1, dim=32, seed=4)
    q = q.at[-64:, :, 0].set(9.0)
    tiles, columns, vertical, slash = chosen(q, k.at[200:360, :, 0].set(9.0))
    assert vertical[:30].sum() + vertical[-100:].sum() < 0.1 * vertical.sum()
    assert slash[:100].sum() < 0.1 * slash.sum()
    assert (columns[:30] | tiles[-1, 0]).all()
    # distances 0 to 99 go through a row's own tile and the two before it
    near = np.arange(16)[:, None] - np.arange(16)
    assert tiles[(near >= 0) & (near <= 2)].all()


def test_a_planted_column_and_a_planted_diagonal_are_found():
    q, k, _ = qkv(LENGTH, heads=1, kv_heads=1, dim=32, seed=2)
    tiles, columns, vertical, _ = chosen(q, k.at[333].set(q[-64:, 0].sum(0) / 2))
    assert vertical.argmax() == 333
    assert columns[333] | tiles[-1, 333 // 64]
    # each query finds its own key 450 places back
    tiles, _, _, slash = chosen(q, k.at[:-450].set(3.0 * q[450:]))
    assert slash.argmax() == 450
    for row in range(8, 16):
        assert tiles[row, row - 7]
        assert tiles[row, row - 8]


def test_positions_batches_and_a_mask_are_honoured():
    """A longer cache, per sequence its own place in it and its own segments."""
    q, k, v = qkv(70, 180, batch=(2,), seed=3)
    first = on_device([40, 110])
    positions = first[:, None] + jnp.arange(70)
    ids = jnp.where(jnp.arange(180) < 60, 0, 1) * jnp.ones((2, 1), int)
    mask = js.masks.segments(jnp.take_along_axis(ids, positions, -1), ids)
    method = js.minference(patterns=MIXED, **SMALL)

    @jax.jit
    def run(q, k, v, positions):
        return method.attend((), q, k, v, positions=positions, mask=mask)

    out, info = run(q, k, v, positions)
    # the same with the cache cut off behind the last query
    end = 40 + 70
    alone = js.masks.segments(ids[0, positions[0]], ids[0, :end])
    cut = q[0], k[0, :end], v[0, :end]
    expected, info_alone = jax.jit(lambda q, k, v: method.attend((), q, k, v, mask=alone))(*cut)
    np.testing.assert_allclose(info.slash[0, :, :end], info_alone.slash, atol=1e-5)
    np.testing.assert_allclose(out[0], expected, atol=2e-5)
    changed, _ = run(q, k.at[0, end:].add(3.0), v.at[0, end:].add(3.0), positions)
    np.testing.assert_array_equal(changed, out)
    # the first 20 queries of the first sequence are of the segment that ends at key 60
    changed, _ = run(q, k, v.at[0, :60].add(3.0), positions)
    np.testing.assert_array_equal(changed[0, 20:], out[0, 20:])
    assert (changed[0, :20] != out[0, :20]).all()


def test_nothing_as_large_as_the_attention_map_is_made():
    length, last_q = 4096, 64
    q, k, _ = qkv(length, heads=1, kv_heads=1, dim=4)
    method = js.minference(patterns=VerticalSlash(100, 200))
    jaxpr = jax.make_jaxpr(lambda q, k: method.plan((), q, k, mask=CAUSAL)[0])(q, k)
    assert largest(jaxpr.jaxpr) <= 2 * last_q * length


def largest(jaxpr):
    """The size of the largest array of a program, its loops included."""
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    inner = [sub for e in jaxpr.eqns for sub in _compat.inner_jaxprs(e.params)]
    return max([*sizes, *map(largest, inner)], default=0)


def test_ratio_scales_both_sizes_down_to_the_least():
    pattern = [VerticalSlash(200, 240)]
    for ratio, sizes in ((1.0, (200, 240)), (0.25, (50, 60)), (0.01, (30, 50)), (9.0, (400, 400))):
        budget = Budget.of(pattern, ratio, 400)
        assert (budget.columns, budget.distances) == ((sizes[0],), (sizes[1],))


def test_patterns_of_the_same_numbers_are_not_the_same():
    """A compiled program is found again by its patterns."""
    q, k, _ = qkv(300)
    shape, lines = AShape(30, 50), VerticalSlash(30, 50)
    assert shape != lines
    plans = [js.minference(patterns=p).plan((), q, k, mask=CAUSAL)[0] for p in (shape, lines)]
    assert [len(parts_of(plan)) for plan in plans] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patterns": (30, 50)}, "must be one of AShape"),
        ({"patterns": ()}, "must be one of AShape"),
        ({"patterns": AShape(-1, 5)}, "n_init=-1"),
        ({"patterns": AShape(1, 0)}, "n_local=0"),
        ({"patterns": VerticalSlash(0, 5)}, "vertical_size=0"),
        ({"patterns": [VerticalSlash(5, 0)]}, "slash_size=0"),
        ({"patterns": BlockSparse(0)}, "top_k=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"last_q": 0}, "last_q=0"),
        ({"forced_slash": -1}, "forced_slash=-1"),
        ({"minference_ratio": 0.0}, "minference_ratio=0.0 must be above 0"),
    ],
)
def test_bad_input_is_named(arguments, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        js.minference(**arguments)


def test_patterns_must_be_as_many_as_heads():
    q, k, v = qkv(20)
    with pytest.raises(ValueError, match="patterns has 3 entries; expected one per query head, 4"):
        js.sparse_attention(q, k, v, js.minference(patterns=MIXED[:3]))
