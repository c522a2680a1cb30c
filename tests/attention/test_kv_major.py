"""Tiles of keys with the queries that list them: equal to rows that walk their lists."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import attend as attending
from jsparse.attention import kv_major, triton, xla
from jsparse.attention.block_sparse import Lists, Sizes
from jsparse.testing import CASES, Problem
from tests.attention.test_query_major import close
from tests.inputs import on_device, qkv

CAUSAL = js.masks.causal()
EVERYTHING = next(case for case in CASES if case.name == "everything")


@pytest.fixture
def small_chunks(monkeypatch):
    """Several spans of queries, and several chunks for most tiles of keys."""
    monkeypatch.setattr(kv_major, "_ROWS", 8)
    monkeypatch.setattr(kv_major, "_CHUNKS", 1)
    monkeypatch.setitem(kv_major._LOGITS, "cpu", 8 * 16 * 3)
    # not from the cache: what was compiled for other chunks would be found there
    monkeypatch.setattr(attending, "_compiled", attending._executed)


def plan_of(tiles, kv_len, block_kv=16, block_q=1):
    q_len = tiles.shape[-2] * block_q
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}
    return js.BlockMask.from_dense(jnp.asarray(tiles), **sizes)


@pytest.mark.parametrize(
    "changes",
    [
        {"list_heads": 4, "bias": (2, 4, 41, 59)},
        # packed: a tile of keys has two rows per query
        {"list_heads": 2, "bias": (2, 1, 41, 59), "empty_rows": True, "density": 0.2},
        {"list_heads": 1, "heads": 4, "kv_heads": 4, "bias": (41, 1)},
        # one bias for all queries, of which several tiles stand below each other
        {"list_heads": 2, "bias": (4, 1, 59)},
    ],
    ids=str,
)
def test_every_option_against_float64(changes, small_chunks, monkeypatch):
    problem = Problem(dataclasses.replace(EVERYTHING, block_q=1, **changes))
    chosen = []
    monkeypatch.setattr(kv_major, "passes", lambda plan: chosen.append(plan) or KV_MAJOR)
    got = problem.value_and_gradients(js.attend)(problem.operands)
    close(got, problem.exact(), problem.tolerance())
    assert kv_major.pays(chosen[0])


KV_MAJOR = kv_major.PASSES


@pytest.mark.parametrize("share", [0.05, 0.7])
def test_lists_that_could_hold_every_block_go_by_what_they_hold(share, monkeypatch):
    """Their width says nothing; both ways give the gradient of integers that are captured, too."""
    q, k, v = qkv(96, heads=2, kv_heads=2, dim=8)
    tiles = np.random.default_rng(0).random((2, 96, 6)) < share
    shift = jnp.arange(96) % 5
    went = []

    def told(name, compute):
        def computed(*args):
            jax.debug.callback(lambda: went.append(name))
            return compute(*args)

        return computed

    either = kv_major._where_full(*(told(n, m.forward) for n, m in WAYS.items()))
    monkeypatch.setattr(
        kv_major, "_PASSES_OF_ANY", kv_major._PASSES_OF_ANY._replace(forward=either)
    )

    def attend(q, k, v, tiles, implementation):
        plan = plan_of(tiles, 96)
        assert kv_major.pays(plan)
        out = js.attend(
            q,
            k,
            v,
            plan,
            score_mod=lambda s, b, h, i, j: s - shift[i],
            implementation=implementation,
        )
        return jnp.sin(out).sum(), out

    def run(implementation):
        gradient = jax.value_and_grad(attend, (0, 1, 2), has_aux=True)
        return jax.jit(gradient, static_argnums=4)(q, k, v, on_device(tiles), implementation)

    close(jax.tree.leaves(run("xla")), jax.tree.leaves(run("reference")), 4e-6)
    jax.effects_barrier()
    assert went == ["tiles of keys" if share > 0.5 else "rows"]


WAYS = {"tiles of keys": kv_major, "rows": xla}


def test_the_choice_follows_from_sizes():
    def chosen(q_len, kv_len, width, block_q, block_kv):
        lists = jnp.zeros((1, -(-q_len // block_q), width), jnp.int32)
        counts, lost = jnp.zeros(lists.shape[:-1], jnp.int32), jnp.zeros(1, bool)
        plan = js.BlockMask(lists, counts, lost, q_len, kv_len, block_q, block_kv)
        return kv_major.passes(plan)

    for sizes in ((4096, 4096, 8, 1, 64), (4096, 4096, 8, 1, 16), (8192, 8192, 2, 4, 64)):
        assert chosen(*sizes) is kv_major.PASSES, sizes
    for sizes in (
        (4096, 4096, 64, 1, 8),  # tiles of few keys: reading them costs little
        (8192, 8192, 8, 16, 64),  # rows of their own fill a product
        (1, 65536, 64, 1, 64),  # decoding: nothing to gather
        (256, 65536, 2, 1, 64),  # a tile of keys is listed by hardly any query
    ):
        assert chosen(*sizes) is xla.PASSES, sizes


def test_spans_are_longer_where_lists_are_sparser():
    """At eight blocks of 128 keys; the logical tiles of the paper's kernel have 128 to 1024."""
    for length, density, logical in (
        (2048, 0.75, 128),
        (8192, 0.234375, 512),
        (65536, 0.031006, 1024),
    ):
        budget = 8 * 128
        share = (2 * budget * length - budget**2) / length**2
        assert share == pytest.approx(density, abs=1e-6)
        blocks = length // 128
        sizes = Sizes(1, 1, 1, 1, 128, length, blocks, ragged=False)
        lists = Lists(jnp.zeros((1, 1, length, 8), jnp.int32), jnp.zeros((1, 1, length)), None)
        cut = kv_major.Cut.of(lists, sizes)
        # two full products for each tile of keys, on average, whatever the density
        assert cut.chunk == 64
        assert cut.span * 8 == 2 * 64 * blocks
        assert cut.span >= 2 * logical


def test_a_tile_that_all_list_and_tiles_that_none_does(small_chunks):
    q, k, v = qkv(70, 128)
    rng = np.random.default_rng(0)
    tiles = rng.random((4, 70, 8)) < 0.2
    tiles[..., 0], tiles[..., [3, 7]] = True, False
    tiles[:, 33] = False
    plan = plan_of(tiles, 128)
    assert kv_major.pays(plan)

    def run(implementation):
        def loss(q, k, v):
            out, lse = js.attend(q, k, v, plan, return_lse=True, implementation=implementation)
            return jnp.sin(out).sum() + jnp.where(jnp.isneginf(lse), 0.0, lse).sum(), (out, lse)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    # keys and values that no list names may hold anything
    broken = [x.at[50].set(jnp.nan) for x in (k, v)]
    got, expected = run("xla")(q, *broken), run("reference")(q, k, v)
    close(got, expected, 200 * 2.0**-23)
    assert not got[1][0][33].any()
    jax.tree.map(np.testing.assert_array_equal, got, run("xla")(q, *broken))


def test_broken_numbers_reach_only_who_lists_them(small_chunks):
    q, k, v = qkv(70, 128)
    tiles = np.random.default_rng(0).random((4, 70, 8)) < 0.4
    tiles[:, 0] = np.arange(8) == 1
    plan = plan_of(tiles, 128)

    @jax.jit
    def run(q, k, v):
        def total(q, k, v):
            out, lse = js.attend(q, k, v, plan, return_lse=True, implementation="xla")
            # the gradient of a row goes into the row alone
            return jnp.where(jnp.isfinite(out), out, 0.0).sum(), (out, lse)

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (gradient, *_), (clean, _) = run(q, k, v)
    for x, y in ((k.at[20].set(jnp.nan), v), (k, v.at[20].set(jnp.inf))):
        (d_q, *_), (out, _) = run(q, x, y)
        hit = tiles[..., 1].T
        np.testing.assert_array_equal(~np.isfinite(out).all(-1), hit)
        np.testing.assert_array_equal(np.asarray(out)[~hit], np.asarray(clean)[~hit])
        np.testing.assert_array_equal(np.asarray(d_q)[~hit], np.asarray(gradient)[~hit])
    _, (out, lse) = run(q.at[9].set(jnp.nan), k, v)
    some = tiles[:, 9].any(-1)
    np.testing.assert_array_equal(np.isnan(lse[:, 9]), some)
    others = np.arange(70) != 9
    np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(clean)[others])
    # the first row lists one tile alone; chunks that are not full have nothing of it
    (_, *d_keys), _ = run(q.at[0].set(jnp.nan), k, v)
    for gradient in d_keys:
        np.testing.assert_array_equal(np.isfinite(gradient).all((1, 2)), np.arange(128) // 16 != 1)


@pytest.mark.newest
def test_mapped_equals_batch_and_second_derivatives(small_chunks):
    q, k, v = qkv(40, 64, batch=(2,), dim=8)
    tiles = np.random.default_rng(0).random((2, 4, 40, 4)) < 0.6
    plan = plan_of(tiles, 64)
    assert kv_major.pays(plan)

    def run(q, plan, k, v, implementation="xla"):
        return js.attend(q, k, v, plan, mask=CAUSAL, implementation=implementation)

    mapped = jax.jit(jax.vmap(run))(q, plan, k, v)
    np.testing.assert_allclose(mapped, jax.jit(run)(q, plan, k, v), atol=2e-6)

    def curvature(implementation):
        def slope(q):
            total = jax.grad(lambda q: jnp.sin(run(q, plan, k, v, implementation)).sum())
            return jnp.sin(total(q)).sum()

        return jax.jit(jax.grad(slope))(q)

    np.testing.assert_allclose(curvature("xla"), curvature("reference"), atol=2e-5)


def test_bfloat16_is_as_good_as_that_of_rows(small_chunks, monkeypatch):
    q, k, v = qkv(70, 128, dtype=jnp.bfloat16)
    plan = plan_of(np.random.default_rng(0).random((4, 70, 8)) < 0.5, 128)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]

    def run(operands, implementation="xla"):
        def loss(q, k, v):
            out = js.attend(q, k, v, plan, implementation=implementation)
            return jnp.sin(out.astype(jnp.float32)).sum(), out

        got = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*operands)
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(got)]

    true = run(exact, "reference")
    monkeypatch.setattr(kv_major, "passes", lambda plan: kv_major.PASSES)
    mine = run((q, k, v))
    monkeypatch.setattr(kv_major, "passes", lambda plan: xla.PASSES)
    by_rows = run((q, k, v))
    for a, b, c in zip(mine, by_rows, true, strict=True):
        # the same roundings, of sums in another order
        assert np.linalg.norm(a - c) <= 1.5 * np.linalg.norm(b - c)


def test_memory_is_that_of_arrays_like_q_whatever_the_width():
    heads, dim, block_kv = 2, 32, 32

    def of_gradient(length, width):
        tokens = jax.ShapeDtypeStruct((length, heads, dim), jnp.float32)
        lists = jnp.zeros((heads, length, width), jnp.int32)
        counts = jnp.zeros(lists.shape[:-1], jnp.int32)
        plan = js.BlockMask(lists, counts, jnp.zeros(heads, bool), length, length, 1, block_kv)
        assert kv_major.pays(plan)

        def loss(q, k, v, plan):
            return js.attend(q, k, v, plan, implementation="xla").sum()

        function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        compiled = function.lower(tokens, tokens, tokens, plan).compile()
        # what is kept, gathered and given back; lists are cut into spans, and once more where used
        allowed = 22 * length * heads * dim * 4 + 2 * lists.size * 4
        assert compiled.memory_analysis().temp_size_in_bytes < allowed

    # a part of the output for each entry of the lists would be 64 arrays of the size of q
    of_gradient(2**13, 64)
    of_gradient(2**14, 8)


@pytest.mark.numbers
@pytest.mark.parametrize("block_q", [1, 8])
def test_entries_that_name_no_block_are_padding(block_q):
    q, k, v = qkv(64)
    sizes = 64, 64, block_q, 16
    rows = 64 // block_q
    lists = jnp.broadcast_to(on_device([-5, 1, 2**31 - 1, 3, 4]), (4, rows, 5))
    raw = js.BlockMask(lists, jnp.full((4, rows), 5), jnp.zeros(4, bool), *sizes)
    clean = plan_of(np.isin(np.arange(4), [1, 3]) & np.ones((4, rows, 1), bool), 64, 16, block_q)
    assert kv_major.pays(raw) == (block_q == 1)

    @jax.jit
    def run(k, v, plan):
        def total(k):
            out = js.attend(q, k, v, plan, implementation="xla")
            return jnp.sin(out).sum(), out

        return jax.grad(total, has_aux=True)(k)

    # nor are the blocks read that a clipped or wrapped index would name
    hidden = np.isin(np.arange(64) // 16, [0, 2])
    broken = [jnp.where(hidden[:, None, None], jnp.nan, x) for x in (k, v)]
    got, expected = run(*broken, raw), run(*broken, clean)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, expected)
    np.testing.assert_array_equal(raw.to_dense(), clean.to_dense())
    np.testing.assert_array_equal(raw.inverse().q_num_blocks, clean.inverse().q_num_blocks)
    assert raw.inverse().q_num_blocks.sum() == 8 * rows


def test_the_inverse_of_many_rows():
    tiles = np.random.default_rng(0).random((2, 300, 40)) < 0.1
    tiles[0, :, 0] = True  # and one column that all rows name
    inverse = jax.jit(js.BlockMask.inverse)(plan_of(tiles, 640))
    for head in range(2):
        ids, offsets = np.asarray(inverse.q_indices[head]), np.asarray(inverse.offsets[head])
        for block in range(40):
            expected = np.flatnonzero(tiles[head, :, block])
            np.testing.assert_array_equal(ids[offsets[block] : offsets[block + 1]], expected)


def finished(function, *arguments):
    """Callbacks included."""
    jax.block_until_ready(function(*arguments))
    jax.effects_barrier()


BAD = {
    "outside": ([[0, 1], [2, 9]], [2, 2], r"kv_indices\[0, 1, 1\]=9 names no block: there are 4"),
    "negative": ([[0, -1], [2, 3]], [2, 2], r"kv_indices\[0, 0, 1\]=-1 names no block"),
    "twice": ([[0, 1], [2, 2]], [2, 2], r"kv_indices\[0, 1, 1\]=2 stands after 2"),
    "count": ([[0, 1], [2, 3]], [2, 3], r"kv_num_blocks\[0, 1\]=3 must be between 0 and .* 2\."),
}


@pytest.mark.parametrize("name", BAD)
def test_debug_checks_name_the_first_bad_entry(name):
    lists, counts, message = BAD[name]
    q, k, v = qkv(2, 16)
    sizes = jnp.zeros(1, bool), 2, 16, 1, 4

    def plan(lists, counts):
        return js.BlockMask(on_device([lists]), on_device([counts]), *sizes)

    run = jax.jit(lambda q, plan: js.attend(q, k, v, plan, implementation="reference"))
    bad, good = plan(lists, counts), plan([[0, 1], [2, 3]], [2, 2])
    # without the checks nothing is said, and what was compiled then is not used with them
    jax.block_until_ready(run(q, bad))
    with js.debug_checks():
        with pytest.raises(ValueError, match=message):
            js.attend(q, k, v, bad)
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            finished(run, q, bad)
        finished(run, q, good)
        with js.debug_checks(False):
            js.attend(q, k, v, bad)


def test_debug_checks_see_traced_lists_in_any_order():
    sizes = {"q_len": 2, "kv_len": 16, "block_q": 1, "block_kv": 4}
    build = jax.jit(lambda a, b: js.BlockMask.from_lists(a, b, **sizes).kv_num_blocks)
    lists, counts = on_device([[[3, 1], [-1, 7]]]), jnp.full((1, 2), 2)
    assert build(lists, counts).tolist() == [[2, 0]]
    with js.debug_checks(), pytest.raises(jax.errors.JaxRuntimeError, match=r"\[0, 1, 1\] holds"):
        finished(build, lists, counts)


def test_triton_leaves_lists_alone_whose_parts_would_outgrow_the_keys():
    def lists(q_len, kv_len, width, **tiles):
        sizes = {"q_len": q_len, "kv_len": kv_len, **tiles}
        indices = jnp.zeros((1, 1, q_len // tiles["block_q"], width), jnp.int32)
        return js.BlockMask.from_lists(indices, jnp.ones(indices.shape[:-1], jnp.int32), **sizes)

    # many queries list each tile of keys; a page is its own sequence's alone; rows fill a product
    assert triton.waste(lists(4096, 4096, 8, block_q=1, block_kv=64)) is None
    pages = {"block_kv": 48}
    assert "more memory than the keys" in triton.waste(lists(64, 2**15, 32, block_q=4, **pages))
    assert triton.waste(lists(64, 2**15, 32, block_q=16, **pages)) is None
    # read row by row nothing is kept
    assert triton.waste(lists(64, 2**15, 32, block_q=4, block_kv=16)) is None
