"""Every mask against its definition, pair by pair, and its tiles against its pairs."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.masks.any_head import any_head
from jsparse.types import Frame, TileGrid
from tests.inputs import on_device

LENGTHS = [(40, 40), (23, 40), (40, 23), (1, 17)]


def sorted_ids(rng, length, groups=4):
    return np.sort(rng.integers(-1, groups, length)).astype(np.int32)


@functools.cache
def definitions(q_len, kv_len):
    """Masks with what they mean, in NumPy: i and j are index grids, p is i's key position."""
    rng = np.random.default_rng(0)
    q_ids, kv_ids = sorted_ids(rng, q_len), sorted_ids(rng, kv_len)
    shuffled = rng.permutation(kv_ids).astype(np.int32)
    pairs = rng.random((1, q_len, kv_len)) < 0.2
    pairs[:, :8, :16] = True
    bounds = np.sort(rng.integers(0, q_len + 2, (4, kv_len)), axis=0).astype(np.int32)
    lower = bounds[[2, 3, 0, 1]]
    four = on_device(lower.T[None])
    two = on_device(bounds[[2, 1]].T[None])
    table = on_device(rng.random(kv_len) < 0.5)
    m = js.masks
    # of tokens that make as many windows of six as there are keys
    tokens = sorted_ids(np.random.default_rng(1), 2 * kv_len + 4, groups=3)
    in_window = np.arange(6) + 2 * np.arange(kv_len)[:, None]
    windows = {"size": 6, "stride": 2, "kv_len": len(tokens)}
    return {
        "full": (m.full(), lambda i, j, p: True | (i == j)),
        "causal": (m.causal(), lambda i, j, p: j <= p),
        "causal_offset": (m.causal(offset=5), lambda i, j, p: j <= i + 5),
        "window": (m.sliding_window(left=7), lambda i, j, p: (p - j <= 7) & (j <= p)),
        "window_two_sided": (
            m.sliding_window(left=3, right=9),
            lambda i, j, p: (p - j <= 3) & (j - p <= 9),
        ),
        "window_left_only": (
            m.sliding_window(left=3, right=None),
            lambda i, j, p: p - j <= 3,
        ),
        "window_right_only": (
            m.sliding_window(left=None, right=2),
            lambda i, j, p: j - p <= 2,
        ),
        "head_windows": (
            m.head_windows(num_sink=[5], window=[12]),
            lambda i, j, p: (j < 5) | (p - j < 12),
        ),
        "head_windows_of_blocks": (
            m.head_windows(num_sink=[2], window=[10], block_size=4),
            lambda i, j, p: (j < 2) | (4 * (p // 4 - j // 4) < 10),
        ),
        "any_head": (
            any_head(m.causal() & m.head_windows(num_sink=[5, 2], window=[3, 9])),
            lambda i, j, p: (j <= p) & ((j < 5) | (p - j < 9)),
        ),
        "sinks": (m.sinks(5), lambda i, j, p: (j < 5) & (i >= 0)),
        "global": (m.global_tokens(3), lambda i, j, p: (j < 3) | (p < 3)),
        "dilated": (
            m.dilated(stride=3, window=4),
            lambda i, j, p: ((p - j) % 3 == 0) & (p - j >= 0) & (p - j <= 9),
        ),
        # wide enough that whole tiles lie within its reach: only the stride says what they hide
        "dilated_far": (
            m.dilated(stride=2, window=20),
            lambda i, j, p: ((p - j) % 2 == 0) & (p - j >= 0) & (p - j <= 38),
        ),
        "strided": (m.strided(stride=6, count=2), lambda i, j, p: (j % 6 >= 4) & (i >= 0)),
        "strided_sparse": (m.strided(stride=20), lambda i, j, p: (j % 20 == 19) & (i >= 0)),
        "prefix_lm": (m.prefix_lm(11), lambda i, j, p: (j <= p) | (j < 11)),
        "lengths": (m.lengths(9, 14), lambda i, j, p: (i < 9) & (j < 14)),
        "segments": (
            m.segments(on_device(q_ids), on_device(kv_ids)),
            lambda i, j, p: (q_ids[i] == kv_ids[j]) & (q_ids[i] >= 0),
        ),
        "segments_unsorted": (
            m.segments(on_device(q_ids), on_device(shuffled)),
            lambda i, j, p: (q_ids[i] == shuffled[j]) & (q_ids[i] >= 0),
        ),
        "dense": (m.dense(on_device(pairs)), lambda i, j, p: pairs[0][i, j]),
        "predicate": (
            m.predicate(lambda b, h, i, j: table[j] & (i % 2 == 0)),
            lambda i, j, p: np.asarray(table)[j] & (i % 2 == 0),
        ),
        "intervals_4": (
            m.intervals(four, causal=False, q_len=q_len),
            lambda i, j, p: (
                ~((i >= lower[0][j]) & (i < lower[1][j]))
                & ~((i >= lower[2][j]) & (i < lower[3][j]))
            ),
        ),
        "intervals_2": (
            m.intervals(two, causal=False, q_len=q_len),
            lambda i, j, p: ~(i >= bounds[2][j]) & ~(i < bounds[1][j]),
        ),
        "intervals_causal_1": (
            m.intervals(on_device(bounds[2:3].T[None]), causal=True, q_len=q_len),
            lambda i, j, p: (j <= p) & ~(i >= bounds[2][j]),
        ),
        "intervals_causal_2": (
            m.intervals(on_device(bounds[[1, 2]].T[None]), causal=True, q_len=q_len),
            lambda i, j, p: (j <= p) & ~((i >= bounds[1][j]) & (i < bounds[2][j])),
        ),
        "and": (
            m.causal() & m.sliding_window(left=6, right=None),
            lambda i, j, p: (j <= p) & (p - j <= 6),
        ),
        "or": (
            m.sliding_window(left=2, right=2) | m.sinks(3),
            lambda i, j, p: (abs(p - j) <= 2) | (j < 3),
        ),
        "whole_windows": (
            m.whole_windows(m.causal(offset=30), **windows),
            lambda i, j, p: 2 * j + 5 <= i + 30,
        ),
        "whole_windows_of_segments": (
            m.whole_windows(m.segments(on_device(q_ids), on_device(tokens)), **windows),
            lambda i, j, p: (tokens[in_window[j]] == q_ids[i][..., None]).all(-1) & (q_ids[i] >= 0),
        ),
        "not": (~m.causal(), lambda i, j, p: j > p),
        "not_of_both": (
            ~(m.causal() & m.segments(on_device(q_ids), on_device(kv_ids))),
            lambda i, j, p: ~((j <= p) & (q_ids[i] == kv_ids[j]) & (q_ids[i] >= 0)),
        ),
    }


NAMES = list(definitions(40, 40))
# another value of what a mask above it in the list is told: pairs and tiles differ, programs hardly
FURTHER_VALUES = {
    "causal_offset", "window_two_sided", "window_left_only", "window_right_only",
    "head_windows_of_blocks", "dilated_far", "strided_sparse", "segments_unsorted", "intervals_2",
    "intervals_causal_1", "intervals_causal_2", "whole_windows_of_segments", "not_of_both",
}  # fmt: skip
compiled = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in FURTHER_VALUES else n for n in NAMES]
)
# what a mask of one interval per dimension can say of a tile without looking inside
EXACT_EMPTY = {
    "full", "causal", "causal_offset", "window", "window_two_sided", "window_left_only",
    "window_right_only", "sinks", "global", "strided", "strided_sparse", "prefix_lm", "lengths",
    "dense", "not",
}  # fmt: skip


@pytest.fixture(params=LENGTHS, ids=lambda lengths: f"{lengths[0]}x{lengths[1]}")
def lengths(request):
    return request.param


def expected_pairs(definition, q_len, kv_len):
    i, j = np.arange(q_len)[:, None], np.arange(kv_len)
    i, j = np.broadcast_arrays(i, j)
    return np.broadcast_to(definition(i, j, i + kv_len - q_len), (q_len, kv_len))


def mask_pairs(mask, q_len, kv_len):
    flat = mask.flatten_batch(mask.batch_shape)
    q_index, kv_index = jnp.arange(q_len)[:, None], jnp.arange(kv_len)
    return np.asarray(flat.visible(q_index, kv_index, Frame(q_len, kv_len)))


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_as_defined(name, lengths):
    mask, definition = definitions(*lengths)[name]
    mask.check_lengths(*lengths)
    np.testing.assert_array_equal(mask_pairs(mask, *lengths), expected_pairs(definition, *lengths))


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_keys_are_seen_where_each_key_is(name):
    mask, definition = definitions(23, 40)[name]
    pairs, flat = expected_pairs(definition, 23, 40), mask.flatten_batch(mask.batch_shape)
    rows = jnp.arange(23)[:, None]
    for count in (1, 4):
        first = np.arange(40 - count + 1)
        seen = flat.visible_run(rows, jnp.asarray(first), count, Frame(23, 40))
        each = pairs[:, first[:, None] + np.arange(count)].all(-1)
        np.testing.assert_array_equal(np.broadcast_to(seen, each.shape), each)


@pytest.mark.parametrize(
    ("lengths", "blocks"), [((40, 40), (8, 4)), ((23, 40), (5, 7)), ((40, 23), (64, 1))], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_tiles_are_sound(name, lengths, blocks):
    mask, definition = definitions(*lengths)[name]
    pairs = expected_pairs(definition, *lengths)
    grid = TileGrid(*lengths, *blocks)
    classify = mask.flatten_batch(mask.batch_shape).classifier(grid)
    q_block, kv_block = jnp.arange(grid.q_blocks)[:, None], jnp.arange(grid.kv_blocks)
    bounds = classify(q_block, kv_block, Frame(*lengths, 0, 0))
    shape = (grid.q_blocks, grid.kv_blocks)
    some, every = (np.broadcast_to(np.asarray(x), shape) for x in bounds)
    for a in range(grid.q_blocks):
        for b in range(grid.kv_blocks):
            rows = slice(a * blocks[0], (a + 1) * blocks[0])
            tile = pairs[rows, b * blocks[1] : (b + 1) * blocks[1]]
            assert some[a, b] or not tile.any(), f"tile {a}, {b} is called empty and is not"
            assert not every[a, b] or tile.all(), f"tile {a}, {b} is called full and is not"
            if name in EXACT_EMPTY:
                assert some[a, b] == tile.any(), f"tile {a}, {b} is empty and is computed"


@compiled
def test_block_mask_lists_the_tiles_under_jit_too(name):
    mask, _ = definitions(40, 40)[name]
    grid = TileGrid(40, 40, 8, 4)

    def build(mask):
        return js.block_mask(mask, **grid._asdict())

    plan, traced = build(mask), jax.jit(build)(mask)
    q_block, kv_block = jnp.arange(grid.q_blocks)[:, None], jnp.arange(grid.kv_blocks)
    flat = mask.flatten_batch(())
    tiles = flat.classifier(grid)(q_block, kv_block, Frame(40, 40, 0, 0)).some
    tiles = np.broadcast_to(tiles, (grid.q_blocks, grid.kv_blocks))
    for made in (plan, traced):
        np.testing.assert_array_equal(made.to_dense()[0], tiles)
        assert not made.overflowed.any()
    # lists are as wide as they need to be; those of traced arrays as the static numbers say
    bound = flat.max_tiles(grid)
    assert plan.width == max(1, tiles.sum(-1).max()) <= bound
    assert traced.width == (bound if jax.tree.leaves(mask) else plan.width)


@compiled
def test_attend_sees_what_the_mask_shows(name):
    lengths = (23, 40)
    mask, definition = definitions(*lengths)[name]
    pairs = on_device(expected_pairs(definition, *lengths))[None]
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (2, lengths[0], 2, 8))
    k, v = (jax.random.normal(key, (2, lengths[1], 1, 8)) for key in keys[1:])
    expected = js.attend(q, k, v, mask=js.masks.dense(pairs), implementation="reference")

    @jax.jit
    def by_tiles(mask, q, k, v):
        plan = js.block_mask(mask, *lengths, block_q=16, block_kv=8)
        return js.attend(q, k, v, plan, mask=mask, implementation="xla")

    for out in (
        js.attend(q, k, v, mask=mask, implementation="reference"),
        by_tiles(mask, q, k, v),
    ):
        np.testing.assert_allclose(out, expected, atol=4e-6)


def test_batched_arrays_equal_one_by_one():
    rng = np.random.default_rng(0)
    ids = on_device(np.sort(rng.integers(0, 3, (2, 3, 24)), axis=-1))
    prefix = on_device(rng.integers(0, 9, (2, 3)))
    q, k, v = (on_device(rng.normal(size=(2, 3, 24, 2, 8)), jnp.float32) for _ in range(3))

    def attend(q, k, v, ids, prefix):
        mask = js.masks.segments(ids) & js.masks.prefix_lm(prefix)
        return js.attend(q, k, v, mask=mask, implementation="xla")

    together = jax.jit(attend)(q, k, v, ids, prefix)
    mapped = jax.jit(jax.vmap(jax.vmap(attend)))(q, k, v, ids, prefix)
    np.testing.assert_allclose(together, mapped, atol=1e-6)
    for a in np.ndindex(2, 3):
        single = js.masks.segments(ids[a]) & js.masks.prefix_lm(prefix[a])
        alone = js.attend(q[a], k[a], v[a], mask=single, implementation="reference")
        np.testing.assert_allclose(together[a], alone, atol=4e-6)


def test_a_traced_offset_is_where_the_queries_sit():
    """A decode step: one program serves every position in the cache."""
    rng = np.random.default_rng(0)
    q, k, v = (on_device(rng.normal(size=(2, n, 1, 8)), jnp.float32) for n in (3, 32, 32))

    @jax.jit
    def step(start):
        mask = js.masks.causal(offset=start) & js.masks.sliding_window(left=4, offset=start)
        return js.attend(q, k, v, mask=mask, implementation="xla")

    for start in ([0, 5], [29, 11]):
        out = step(on_device(start))
        for sequence, first in enumerate(start):
            position, j = first + np.arange(3)[:, None], np.arange(32)
            pairs = on_device((j <= position) & (position - j <= 4))[None]
            alone = js.attend(
                q[sequence], k[sequence], v[sequence],
                mask=js.masks.dense(pairs), implementation="reference",
            )  # fmt: skip
            np.testing.assert_allclose(out[sequence], alone, atol=4e-6)


def test_arrays_that_all_sequences_share_are_not_copied():
    pairs = on_device(np.random.default_rng(0).random((1, 1, 16, 16)) < 0.5)
    flat = js.masks.dense(pairs).flatten_batch((64,))
    assert flat.pairs.shape == (1, 1, 16, 16)
    mask = js.masks.segments(jnp.zeros((3, 16), int)) & js.masks.dense(pairs)
    flat = mask.flatten_batch((2, 3))
    assert flat.left.q_ids.shape == (6, 16)
    assert flat.batch_shape == (6,)


@pytest.mark.parametrize("dropped", ["segments", "causal", "window"])
def test_dropping_a_part_changes_the_result(dropped):
    """If a composition lost one of its parts on the way, this is what would show it."""
    rng = np.random.default_rng(0)
    parts = {
        "segments": js.masks.segments(on_device(sorted_ids(rng, 32))),
        "causal": js.masks.causal(),
        "window": js.masks.sliding_window(left=6, right=6),
    }
    q, k, v = (on_device(rng.normal(size=(32, 1, 8)), jnp.float32) for _ in range(3))
    everything = parts["segments"] & parts["causal"] & parts["window"]
    rest = [mask for name, mask in parts.items() if name != dropped]
    out = js.attend(q, k, v, mask=everything, implementation="xla")
    without = js.attend(q, k, v, mask=rest[0] & rest[1], implementation="xla")
    assert float(jnp.abs(out - without).max()) > 1e-2


def test_a_million_tokens_become_tiles_in_seconds_and_megabytes():
    length = 2**20
    mask = js.masks.causal() & js.masks.sliding_window(left=1023)
    build = jax.jit(lambda: js.block_mask(mask, length, length))
    plan = build()
    assert plan.width == 9
    assert int(plan.kv_num_blocks.sum()) == 9 * 8192 - 36
    assert sum(x.nbytes for x in jax.tree.leaves(plan)) < 2**20
    memory = build.lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * 2**20


def test_a_million_tokens_in_a_process_of_their_own():
    """Seconds and megabytes as a user sees them: compiling included, peak of the whole process."""
    code = """
import resource, time
import jax, jsparse as js

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

mask = js.masks.causal() & js.masks.sliding_window(left=1023)
build = lambda length: jax.jit(lambda: js.block_mask(mask, length, length))()
jax.block_until_ready(build(4096))
memory, start = peak(), time.process_time()
plan = jax.block_until_ready(build(2**20))
assert plan.width == 9, plan.width
print(time.process_time() - start, peak() - memory)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 20  # of processor time; about 1 where this was written
    assert megabytes < 200  # about 60 there; one byte per pair of tokens would be a million


def test_masks_have_no_truth_value():
    with pytest.raises(TypeError, match="combine masks"):
        bool(js.masks.causal())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: js.masks.sliding_window(left=-1), "left=-1"),
        (lambda: js.masks.sinks(-2), "num_sink=-2"),
        (lambda: js.masks.dilated(stride=0, window=2), "stride=0"),
        (lambda: js.masks.strided(stride=4, count=5), "count=5 must be at most 4"),
        (lambda: js.masks.segments(jnp.zeros(4)), "q_ids holds float32"),
        (lambda: js.masks.dense(jnp.zeros((1, 4, 4))), "must hold bools"),
        (lambda: js.masks.predicate(lambda b, h, i, j: i + j), "must return one bool"),
        (
            lambda: js.masks.intervals(jnp.zeros((1, 8, 3), int), causal=True, q_len=8),
            "3 bounds per key",
        ),
        (lambda: js.block_mask(js.masks.causal(), 0, 8), "q_len=0"),
        (lambda: js.block_mask(js.masks.causal(), 8, 8, block_q=-4), "block_q=-4"),
    ],
)
def test_bad_input_is_named(call, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        call()
