"""Attention over a paged cache is attention over each sequence's own tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import paged
from jsparse.types import Frame
from pallas_kernels import _compat
from tests.attention.exact import close
from tests.inputs import on_device
from tests.oracles import paged as oracle

BATCH, Q_LEN, HEADS, KV_HEADS, DIM, V_DIM = 5, 2, 4, 2, 16, 12
PAGE, WIDTH, PAGES = 8, 5, 24
# in the middle of a page, shorter than q_len, empty, a whole table, up to the end of a page
LENGTHS = np.array([33, 1, 0, 40, 16])
SIZES = {"q_len": Q_LEN, "kv_len": WIDTH * PAGE, "block_kv": PAGE}
# rounding of sums of some dozens of f32 products
TOLERANCE = 32 * 2.0**-23
PLAIN = {"score_mod": None, "softcap": None, "scale": None, "mask": None}


def made(dtype=jnp.float32, heads=HEADS, kv_heads=KV_HEADS, page=PAGE):
    """Pages anywhere, the first of sequence 3 being that of sequence 0; entries that are none."""
    rng = np.random.default_rng(0)
    sizes = (BATCH, Q_LEN, heads, DIM), (PAGES, page, kv_heads, DIM), (PAGES, page, kv_heads, V_DIM)
    q, k, v = (on_device(rng.normal(size=size), dtype) for size in sizes)
    table = np.append(rng.permutation(PAGES)[: BATCH * WIDTH - 2], [-7, PAGES + 3])
    table = table.reshape(BATCH, WIDTH)
    # -1 would be the pool's last page, were it not none
    table[table == PAGES - 1] = table[4, 0]
    table[4, 0] = PAGES - 1
    table[3, 0] = table[0, 0]
    # past the length, where it counts for nothing, a page of another at another place
    table[1, 1:] = table[3, 1]
    lengths = LENGTHS * page // PAGE
    return q, js.PagedKV.from_table(k, v, on_device(table), on_device(lengths))


def with_holes(cache):
    """Pages that are gone in the middle of a table."""
    table = cache.page_table.at[0, 1].set(-1).at[3, 2].set(PAGES)
    return dataclasses.replace(cache, page_table=table)


Q, CACHE = made()


def exact(selected=None, q=Q, cache=CACHE, **options):
    if selected is None:
        selected = np.ones((BATCH, 1, Q_LEN, WIDTH), bool)
    table, lengths = np.asarray(cache.page_table), np.asarray(cache.lengths)
    options = {"scale": DIM**-0.5, **options}
    return oracle.attention(q, cache.k, cache.v, table, lengths, selected, **options)


def drawn(list_heads, rows=1, seed=1):
    """A plan of pages at random, none for one list, and the same for the oracle."""
    tiles = np.random.default_rng(seed).random((BATCH, list_heads, rows, WIDTH)) < 0.6
    tiles[3, 0] = False
    plan = js.BlockMask.from_dense(on_device(tiles), **SIZES, block_q=Q_LEN // rows, width=WIDTH)
    return plan, np.repeat(tiles, Q_LEN // rows, axis=2)


WINDOW = js.masks.sliding_window(left=9) | js.masks.sinks(3)


def in_window(b, h, i, j):
    return LENGTHS[b] - Q_LEN + i - j <= 9 or j < 3


RNG = np.random.default_rng(2)
BIASES = on_device(RNG.normal(size=(BATCH, WIDTH * PAGE)), jnp.float32)
SLOPES, SINKS = (on_device(RNG.normal(size=HEADS), jnp.float32) for _ in range(2))
RICH = {"softcap": 4.0, "sinks": SINKS, "scale": 0.3}


def score_mod(logit, batch, head, i, j):
    return logit + BIASES[batch, j] + SLOPES[head] * i


def added(b, h, i, j):
    return float(BIASES[b, j]) + float(SLOPES[h]) * i


@pytest.mark.parametrize(
    ("list_heads", "rows", "implementation"),
    [(1, 1, "xla"), (2, 1, "xla"), (4, 1, "xla"), (2, Q_LEN, "xla"), (2, Q_LEN, "reference")],
)
def test_every_option_over_lists_that_depend_on_data(list_heads, rows, implementation):
    options = {**RICH, "mask": WINDOW, "score_mod": score_mod, "return_lse": True}

    @jax.jit
    def run(q, cache, plan):
        return js.attend_paged(q, cache, plan, **options, implementation=implementation)

    cache = with_holes(CACHE)
    for seed in (1, 2):
        plan, selected = drawn(list_heads, rows, seed)
        want = exact(selected, cache=cache, **RICH, visible=in_window, added=added)
        close(run(Q, cache, plan), want, TOLERANCE)


@pytest.mark.numbers
def test_without_a_plan_every_page_is_read_in_which_there_is_something_to_see():
    run = jax.jit(lambda q, cache: js.attend_paged(q, cache, return_lse=True))
    out, lse = run(Q, CACHE)
    close((out, lse), exact(), TOLERANCE)
    # an empty sequence, and a query from before the first token
    for sequence, query in ((2, 0), (2, 1), (1, 0)):
        assert not out[sequence, query].any()
        assert jnp.isneginf(lse[sequence, :, query]).all()
    # what no list names may hold anything
    named = np.asarray(CACHE.page_table)[np.asarray(CACHE.listed())]
    unread = on_device(~np.isin(np.arange(PAGES), named))[:, None, None, None]
    k, v = (jnp.where(unread, jnp.nan, x) for x in (CACHE.k, CACHE.v))
    np.testing.assert_array_equal(run(Q, dataclasses.replace(CACHE, k=k, v=v))[0], out)

    plan = paged._pages_in_sight(CACHE, WINDOW, Q_LEN, KV_HEADS)
    found = np.asarray(plan.to_dense())[:, 0, 0]
    # the window of the two queries begins 10 tokens before the last; the sinks are in page 0
    first = (LENGTHS - Q_LEN - 9) // PAGE
    for row, begin, pages in zip(found, first, -(-LENGTHS // PAGE), strict=True):
        places = np.arange(pages)
        np.testing.assert_array_equal(row[:pages], (places == 0) | (places >= begin))
    run = jax.jit(lambda q, cache: js.attend_paged(q, cache, mask=WINDOW, return_lse=True))
    close(run(Q, CACHE), exact(visible=in_window), TOLERANCE)


def test_masks_per_head_and_per_sequence():
    ids = on_device(np.random.default_rng(5).integers(0, 2, (BATCH, WIDTH * PAGE)))
    window = [4, None, 10, 10]
    per_head = js.masks.head_windows(num_sink=[0] * HEADS, window=window)
    mask = per_head & js.masks.segments(jnp.zeros((BATCH, Q_LEN), int), ids)

    def visible(b, h, i, j):
        return LENGTHS[b] - Q_LEN + i - j < (window[h] or 99) and ids[b, j] == 0

    run = jax.jit(lambda q, cache: js.attend_paged(q, cache, mask=mask, return_lse=True))
    close(run(Q, CACHE), exact(visible=visible), TOLERANCE)


@pytest.mark.parametrize("mask", [None, WINDOW], ids=["causal", "window"])
def test_what_is_said_of_whole_tiles_is_so_of_each_pair(mask):
    splits, block_q = 2, 1
    plan, _ = drawn(1, Q_LEN)
    lists, places = paged._physical(CACHE, plan, splits)
    sizes = {"kv_len": CACHE.kv_len, "page_size": PAGE, "q_len": Q_LEN, "splits": splits}
    inside = paged.InPages(mask, CACHE.lengths, places, **sizes)
    grid, frame = lists.grid, Frame(lists.q_len, lists.kv_len)
    assert (grid.block_q, grid.q_blocks) == (block_q, BATCH * splits * Q_LEN)
    rows, pages = jnp.arange(grid.q_blocks)[:, None], jnp.arange(grid.kv_blocks)
    some, every = inside.classifier(grid)(rows, pages, frame)
    pairs = inside.visible(rows[..., None], pages[:, None] * PAGE + jnp.arange(PAGE), frame)
    assert not (pairs.any(-1) & ~some).any()
    assert not (~pairs.all(-1) & every).any()
    assert every.any()
    assert (~some).any()
    if mask is None:
        np.testing.assert_array_equal(some, pairs.any(-1))
        np.testing.assert_array_equal(every, pairs.all(-1))


@pytest.mark.numbers
@pytest.mark.parametrize(("implementation", "splits"), [("xla", 1), ("xla", 3), ("reference", 40)])
def test_any_number_of_parts_gives_the_same(implementation, splits, monkeypatch):
    # parts of a page each, as far as there are
    monkeypatch.setattr(paged, "_LEAST_KEYS", PAGE)
    options = {**PLAIN, "implementation": implementation, "splits": splits}
    run = jax.jit(lambda q, cache, plan: paged._attend(q, cache, plan, **options))
    cache = with_holes(CACHE)
    # a list for each query, so that a part of it is not all that a sequence has
    plan, selected = drawn(2, Q_LEN)
    close(run(Q, cache, plan), exact(selected, cache=cache), TOLERANCE)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "width", "page", "parts"),
    [(8, 4, 1024, 16, 4), (1, 1, 64, 64, 32), (64, 8, 64, 64, 1), (1, 1, 4, 16, 1)],
)
def test_the_number_of_parts_fills_the_machine_and_none_is_short(
    batch, kv_heads, width, page, parts
):
    plan = js.BlockMask.from_dense(
        jnp.ones((1, 1, width), bool), q_len=1, kv_len=width * page, block_q=1, block_kv=page
    )
    assert paged._default_splits(plan, batch * kv_heads) == parts


def contiguous(q, cache):
    """The same by `js.attend` on keys brought together."""
    own = jnp.arange(cache.kv_len) < cache.lengths[:, None]
    k, v = (
        x[cache.page_table].reshape(BATCH, cache.kv_len, *x.shape[2:]) for x in (cache.k, cache.v)
    )
    k, v = (jnp.where(own[..., None, None], x, 0) for x in (k, v))
    mask = js.masks.causal(offset=cache.lengths - Q_LEN)
    return js.attend(q, k, v, mask=mask, return_lse=True, implementation="reference")


def test_gradients_reach_queries_and_the_pool_where_a_page_is_shared(monkeypatch):
    monkeypatch.setattr(paged, "_LEAST_KEYS", PAGE)

    def loss(attention, q, k, v):
        out, lse = attention(q, dataclasses.replace(CACHE, k=k, v=v))
        return jnp.sin(out).sum() + jnp.where(jnp.isneginf(lse), 0.0, jnp.cos(lse)).sum()

    def ours(q, cache):
        out, lse = paged._attend(q, cache, None, **PLAIN, implementation="xla", splits=2)
        return out, lse

    def gradients(attention):
        return jax.jit(jax.grad(lambda *x: loss(attention, *x), argnums=(0, 1, 2)))

    operands = Q, CACHE.k, CACHE.v
    close(gradients(ours)(*operands), gradients(contiguous)(*operands), TOLERANCE)


def test_bfloat16_is_rounded_once():
    q, cache = made(jnp.bfloat16)
    for implementation in ("xla", "reference"):
        options = {**PLAIN, "implementation": implementation, "splits": 1}
        part = jax.eval_shape(lambda options=options: paged._attend(q, cache, None, **options))
        assert part[0].dtype == jnp.float32
    run = jax.jit(lambda q, cache: js.attend_paged(q, cache, return_lse=True))
    out, lse = run(q, cache)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    want, want_lse = exact(q=q, cache=cache)
    # probabilities and the output, each rounded to 8 bits
    np.testing.assert_allclose(
        np.asarray(out, np.float64), want, atol=2 * 2.0**-8 * float(jnp.abs(cache.v).max())
    )
    close([lse], [want_lse], TOLERANCE)


def test_a_mapped_call_is_one_call_after_the_other():
    both = jnp.stack([Q, -Q])
    run = jax.vmap(lambda q: js.attend_paged(q, CACHE, implementation="xla"))
    for got, q in zip(run(both), both, strict=True):
        close([got], [exact(q=q)[0]], TOLERANCE)


def test_a_group_of_heads_fills_the_tiles_of_a_kernel():
    q, cache = made(heads=16, kv_heads=1, page=16)
    plan, selected = drawn(1)
    plan = dataclasses.replace(plan, kv_len=cache.kv_len, block_kv=16)
    lengths = np.asarray(cache.lengths)

    def visible(b, h, i, j):
        return lengths[b] - Q_LEN + i - j <= 9 or j < 3

    with _compat.triton_interpreter():
        run = jax.jit(
            lambda q, cache, plan: js.attend_paged(
                q, cache, plan, mask=WINDOW, return_lse=True, implementation="triton"
            )
        )
        got = jax.block_until_ready(run(q, cache, plan))
    close(got, exact(selected, q, cache, visible=visible), 2 * TOLERANCE)


def test_memory_is_that_of_what_is_selected():
    batch, heads, kv_heads, dim, page = 8, 16, 4, 64, 16

    def one(q, cache, plan):
        out = js.attend_paged(q.reshape(batch, 1, heads, dim), cache, plan, implementation="xla")
        return out.reshape(q.shape)

    def temporary(max_len, selected, calls=1):
        sizes = {"page_size": page, "max_len": max_len, "kv_heads": kv_heads, "dim": dim}
        cache = jax.eval_shape(
            lambda: js.cache.paged.empty(batch, pages=batch * max_len // page, **sizes)
        )
        lists = jnp.zeros((batch, kv_heads, 1, selected), jnp.int32)
        counts, lost = lists[..., 0], lists[..., 0, 0] > 0
        plan = js.BlockMask(lists, counts, lost, 1, max_len, 1, page)
        q = jax.ShapeDtypeStruct((calls, batch, 1, heads, dim), jnp.float32)
        run = jax.jit(jax.vmap(one, in_axes=(0, None, None)) if calls > 1 else one)
        return run.lower(q, cache, plan).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2**13, 32), temporary(2**16, 32)
    # a step's keys and values, twice; a number for each head and token of a pool would be 32 MiB
    assert short < 2**23
    # the place of each page
    assert long < short + 2 * 4 * batch * 2**16 // page
    # calls that share a pool have no copy of it each
    assert temporary(2**13, 32, calls=3) < 2 * short


def call(q=Q, cache=CACHE, plan=None, **options):
    return lambda: js.attend_paged(q, cache, plan, **options)


PLAN = drawn(1)[0]
SENTENCES = {
    "sequences": (call(q=Q[:3]), r"q has shape \(3, 2, 4, 16\); a cache of 5 sequences needs \[5,"),
    "cache": (call(cache=CACHE.k), "cache is .*; it must be a PagedKV"),
    "heads": (call(q=Q[:, :, :3]), "heads=3 must be a multiple of 2"),
    "dtype": (call(q=Q.astype(jnp.bfloat16)), "cast them to one dtype"),
    "plan": (call(plan=CACHE), "plan is PagedKV; pages are selected by a BlockMask"),
    "pages of a plan": (
        call(plan=dataclasses.replace(PLAN, block_kv=4)),
        "block_kv=4; for this q and cache it needs q_len=2, kv_len=40, block_kv=8",
    ),
    "queries of a plan": (
        call(q=Q[:, :1], plan=PLAN),
        "The plan has q_len=2, .* needs q_len=1, kv_len=40",
    ),
    "lists": (
        call(plan=jax.tree.map(lambda x: jnp.repeat(x, 3, axis=1), PLAN)),
        "3 lists per sequence",
    ),
    "mask length": (
        call(mask=js.masks.segments(jnp.zeros(Q_LEN, int), jnp.zeros(39, int))),
        "covers 39 tokens; the input has 40",
    ),
    "mask batch": (
        call(mask=js.masks.causal(offset=jnp.zeros(3, int))),
        "mask has batch axes",
    ),
    "sinks": (call(sinks=jnp.zeros(3)), "one logit per query head"),
    "pool": (
        lambda: js.PagedKV.from_table(CACHE.k[0], CACHE.v, CACHE.page_table, CACHE.lengths),
        r"k has shape \(8, 2, 16\); expected \[pages",
    ),
    "pools": (
        lambda: js.PagedKV.from_table(CACHE.k[:3], CACHE.v, CACHE.page_table, CACHE.lengths),
        "must agree in",
    ),
    "table": (
        lambda: js.PagedKV.from_table(CACHE.k, CACHE.v, CACHE.page_table * 1.0, CACHE.lengths),
        "page_table holds float32",
    ),
    "lengths": (
        lambda: js.PagedKV.from_table(CACHE.k, CACHE.v, CACHE.page_table, CACHE.lengths[:2]),
        r"lengths has shape \(2,\); a page_table of \(5, 5\) needs \(5,\)",
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_sentence(name, without_shape_checks):
    wrong, message = SENTENCES[name]
    with pytest.raises(ValueError, match=message):
        wrong()


def changed(row, place, page):
    return dataclasses.replace(CACHE, page_table=CACHE.page_table.at[row, place].set(page))


def test_integers_that_int32_lacks_are_no_page(without_shape_checks):
    """A cast would make page 0 of it, which is somebody's."""
    table, lengths = np.int64(CACHE.page_table), np.int64(CACHE.lengths)
    table[0, 1], table[3, 2] = 2**32, -(2**32)
    wide = js.PagedKV.from_table(CACHE.k, CACHE.v, table, lengths)
    np.testing.assert_array_equal(wide.listed(), with_holes(CACHE).listed())
    lengths[2] = 2**32
    longer = js.PagedKV.from_table(CACHE.k, CACHE.v, table, lengths)
    with js.debug_checks(), pytest.raises(ValueError, match=r"lengths\[2\]=\d+ must be .* 40"):
        js.attend_paged(Q, longer)


BAD = {
    r"page_table\[3, 2\]=24 names no page: there are 24": changed(3, 2, PAGES),
    r"page_table\[0, 4\]=-1 names no page": changed(0, 4, -1),
    r"page_table\[3, 3\]=\d+ stands at place 1 of a table too": changed(
        3, 3, int(CACHE.page_table[4, 1])
    ),
    r"lengths\[1\]=41 must be between 0 and 40": dataclasses.replace(
        CACHE, lengths=CACHE.lengths.at[1].set(41)
    ),
}


def test_debug_checks_name_the_first_bad_entry():
    def attend(cache, tiles):
        plan = js.BlockMask.from_dense(tiles, **SIZES, block_q=Q_LEN, width=WIDTH)
        return js.attend_paged(Q, cache, plan, implementation="reference")

    run, every = jax.jit(attend), jnp.ones((1, 1, WIDTH), bool)
    with js.debug_checks():
        jax.block_until_ready(run(CACHE, every))
        for message, cache in BAD.items():
            with pytest.raises(ValueError, match=message):
                attend(cache, every)
            with pytest.raises(jax.errors.JaxRuntimeError, match=message):
                jax.block_until_ready(run(cache, every))
        # entries that no plan selects are nobody's business
        jax.block_until_ready(run(changed(3, 2, PAGES), every.at[..., 2:].set(False)))
