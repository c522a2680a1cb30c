"""Attention to tiles and to what stands for the rest, by lists of tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import pyramid
from jsparse.testing import CASES, FEATURES, AttentionSuite
from pallas_kernels import _compat
from tests.attention import exact
from tests.inputs import on_device, qkv

BATCH, Q_LEN, KV_LEN, HEADS, KV_HEADS, DIM, V_DIM = 2, 45, 70, 4, 2, 8, 12
BLOCK_Q, BLOCK_KV, Q_BLOCKS, KV_BLOCKS = 16, 8, 3, 9
SCALE, SOFTCAP = 0.4, 3.0
# a few hundred roundings of f32
TOLERANCE = 2e-5
MASKS = {
    "all": None,
    "causal": js.masks.causal(),
    # the bounds of neither side tell that a block is seen, a part of it by each
    "dense": js.masks.dense(
        on_device(np.random.default_rng(5).random((BATCH, HEADS, Q_LEN, KV_LEN)) < 0.95)
    ),
}


def visible(name):
    if name == "dense":
        return np.random.default_rng(5).random((BATCH, HEADS, Q_LEN, KV_LEN)) < 0.95
    pairs = np.ones((BATCH, HEADS, Q_LEN, KV_LEN), bool)
    return np.tril(pairs, KV_LEN - Q_LEN) if name == "causal" else pairs


def random_tiles(list_heads, batch=(BATCH,), density=0.4):
    tiles = np.random.default_rng(0).random((*batch, list_heads, Q_BLOCKS, KV_BLOCKS)) < density
    tiles[..., 1, :] = False  # a row of tiles with nothing but summaries, or nothing at all
    return tiles


def lists_of(tiles):
    sizes = {"q_len": Q_LEN, "kv_len": KV_LEN, "block_q": BLOCK_Q, "block_kv": BLOCK_KV}
    return js.BlockMask.from_dense(on_device(tiles), **sizes)


def random_operands(**shapes):
    rng = np.random.default_rng(1)
    q, k, v = qkv(
        Q_LEN, KV_LEN, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, v_dim=V_DIM, batch=(BATCH,)
    )
    shapes = {"sinks": HEADS, **shapes}
    others = {name: on_device(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    return {"q": q, "k": k, "v": v, "scale": jnp.float32(SCALE), **others}


def attend(operands, plan, mask, implementation):
    return js.attend(
        *(operands[name] for name in "qkv"),
        plan,
        mask=MASKS[mask],
        sinks=operands["sinks"],
        scale=operands["scale"],
        softcap=SOFTCAP,
        return_lse=True,
        implementation=implementation,
    )


def value_and_gradients(run, operands, *rest):
    def loss(operands, *rest):
        out, lse = run(operands, *rest)
        return jnp.sin(out).sum() + jnp.cos(lse).sum(), (out, lse)

    (_, value), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(operands, *rest)
    return value, gradients


def check(run, operands, rest, columns):
    """Against float64 over columns laid out by hand; gradients against the reference."""
    value, gradients = value_and_gradients(functools.partial(run, "xla"), operands, *rest)
    k, v, shown, added = columns
    expected = exact.attention(
        operands["q"],
        k,
        v,
        shown,
        scale=SCALE,
        softcap=SOFTCAP,
        added=added,
        sinks=operands["sinks"],
    )
    exact.close(value, expected, TOLERANCE)
    _, expected = value_and_gradients(functools.partial(run, "reference"), operands, *rest)
    exact.close(*map(jax.tree.leaves, (gradients, expected)), TOLERANCE)


def per_head(x):
    return np.repeat(np.asarray(x, np.float64), HEADS // KV_HEADS, 2)


def listed_rows(tiles):
    """What is said per tile, per query [batch, heads, q_len, kv_blocks]."""
    rows = np.repeat(np.repeat(tiles, HEADS // tiles.shape[1], 1), BLOCK_Q, 2)[:, :, :Q_LEN]
    return np.broadcast_to(rows, (BATCH, *rows.shape[1:]))


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("list_heads", "mask"), [(1, "all"), (KV_HEADS, "causal"), (HEADS, "dense")]
)
def test_pooled_columns(list_heads, mask):
    """With gradients by what stands for the blocks too."""
    pooled = BATCH, KV_BLOCKS, KV_HEADS
    operands = random_operands(pooled_k=(*pooled, DIM), pooled_v=(*pooled, V_DIM), log_count=pooled)
    batch = (1,) if mask == "all" else (BATCH,)
    tiles = random_tiles(list_heads, batch)

    def run(implementation, operands, lists):
        names = "pooled_k", "pooled_v", "log_count"
        plan = js.BlockPyramid.from_pooled(lists, *(operands[name] for name in names))
        return attend(operands, plan, mask, implementation)

    seen, listed = visible(mask), listed_rows(tiles)
    shown = np.zeros((BATCH, HEADS, Q_LEN, KV_LEN + KV_BLOCKS), bool)
    for block in range(KV_BLOCKS):
        keys = slice(block * BLOCK_KV, (block + 1) * BLOCK_KV)
        own = listed[..., block]
        shown[..., keys.start : min(keys.stop, KV_LEN)] = own[..., None] & seen[..., keys]
        shown[..., KV_LEN + block] = ~own & seen[..., keys].all(-1)
    assert shown[..., KV_LEN:].any()
    added = np.zeros(shown.shape)
    added[..., KV_LEN:] = np.swapaxes(per_head(operands["log_count"][..., None]), 1, 2)[..., 0][
        :, :, None
    ]
    both = (
        np.concatenate([per_head(operands[x]), per_head(operands[f"pooled_{x}"])], 1) for x in "kv"
    )
    check(run, operands, (lists_of(tiles),), (*both, shown, added))


@pytest.mark.numbers
def test_pooled_columns_under_a_mask_that_counts_sequences():
    """A predicate says of each sequence what its columns stand for, whoever shares the list."""
    pooled = BATCH, KV_BLOCKS, KV_HEADS
    operands = random_operands(pooled_k=(*pooled, DIM), pooled_v=(*pooled, V_DIM), log_count=pooled)
    names = "pooled_k", "pooled_v", "log_count"
    lists = lists_of(random_tiles(1, (1,)))
    plan = js.BlockPyramid.from_pooled(lists, *(operands[name] for name in names))
    mask = js.masks.predicate(lambda b, h, i, j: j < BLOCK_KV * (1 + 2 * b))
    q, k, v = (operands[name] for name in "qkv")
    found, expected = (
        js.attend(q, k, v, plan, mask=mask, return_lse=True, implementation=name)
        for name in ("xla", "reference")
    )
    exact.close(found, expected, TOLERANCE)


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("list_heads", "mask"), [(1, "all"), (KV_HEADS, "dense"), (HEADS, "causal")]
)
def test_levels(list_heads, mask):
    operands = random_operands()
    tiles = random_tiles(list_heads, density=0.7)
    lists = lists_of(tiles)
    level_of = np.random.default_rng(2).integers(0, 4, (*tiles.shape,))
    level_of[..., -1] = 3  # the last block has but 6 keys
    levels = np.take_along_axis(level_of, np.asarray(lists.kv_indices), -1)

    def run(implementation, operands, lists, levels):
        plan = js.BlockPyramid.from_levels(lists, levels, top_level=3)
        return attend(operands, plan, mask, implementation)

    seen, listed = visible(mask), listed_rows(tiles)
    level_of = np.where(listed, listed_rows(level_of), -1)
    keys, values, shown, added = [], [], [], []
    k, v = per_head(operands["k"]), per_head(operands["v"])
    for level in range(4):
        for first in range(0, KV_LEN, 2**level):
            run_of = slice(first, min(first + 2**level, KV_LEN))
            keys.append(k[:, run_of].mean(1))
            values.append(v[:, run_of].mean(1))
            shown.append((level_of[..., first // BLOCK_KV] == level) & seen[..., run_of].all(-1))
            added.append(np.log(run_of.stop - run_of.start))
    columns = np.stack(keys, 1), np.stack(values, 1), np.stack(shown, -1), np.asarray(added)
    check(run, operands, (lists, on_device(levels)), columns)


def test_worked_numbers_of_levels():
    """PSA's example: a block of two and the mean of two, the query orthogonal to what is lost."""
    q = on_device([[[1.0, 0.0]]])
    k = on_device([[1, 0], [1, 0], [0, 1], [0, 3]], jnp.float32)[:, None]
    v = on_device([[1, 0], [3, 0], [0, 1], [0, 5]], jnp.float32)[:, None]
    lists = js.BlockMask.from_dense(
        jnp.ones((1, 1, 2), bool), q_len=1, kv_len=4, block_q=1, block_kv=2
    )
    plan = js.BlockPyramid.from_levels(lists, on_device([[[0, 1]]]))
    assert plan.top_level == 1
    for implementation in ("xla", "reference"):
        out = js.attend(q, k, v, plan, scale=1.0, implementation=implementation)
        np.testing.assert_allclose(out[0, 0], [1.462117, 0.806824], atol=1e-6)


def with_levels(q, k, v, plan, **options):
    """Any list as a pyramid of exact tiles."""
    if isinstance(plan, js.BlockMask):
        plan = js.BlockPyramid.from_levels(plan, jnp.zeros_like(plan.kv_indices), top_level=0)
    return js.attend(q, k, v, plan, implementation="xla", **options)


def with_columns(q, k, v, plan, **options):
    """Any list as a pyramid whose columns weigh nothing."""
    if isinstance(plan, js.BlockMask):
        shape = *k.shape[:-3], plan.grid.kv_blocks, k.shape[-2]
        nothing = jnp.full(shape, -jnp.inf)
        zeros = (jnp.zeros((*shape, x.shape[-1]), x.dtype) for x in (k, v))
        plan = js.BlockPyramid.from_pooled(plan, *zeros, nothing)
    return js.attend(q, k, v, plan, implementation="xla", **options)


class _Pyramid(AttentionSuite):
    # bias and score_mod act on pairs
    supports = FEATURES - {"bias", "score_mod"}

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            names = "one_kv_head causal_ragged bias_keys two_batch_axes hidden_rows".split()
            cases = [case for case in CASES if case.name in names]
            metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.mark.slow
class TestLevels(_Pyramid):
    attention = staticmethod(with_levels)


@pytest.mark.slow
class TestColumns(_Pyramid):
    attention = staticmethod(with_columns)


@pytest.mark.newest
def test_second_derivatives():
    """By what stands for the blocks as well."""
    q, k, v = qkv(24, 32, heads=2, kv_heads=1, dim=8)
    tiles = on_device(np.random.default_rng(0).random((1, 3, 4)) < 0.4)
    lists = js.BlockMask.from_dense(tiles, q_len=24, kv_len=32, block_q=8, block_kv=8)
    pooled = qkv(4, heads=1, kv_heads=1, dim=8, seed=1)[1:]
    operands = q, k, v, *pooled, jnp.linspace(-1, 1, 4)[:, None]
    numbers = tuple(range(len(operands)))

    def curvature(implementation):
        def total(q, k, v, *pooled):
            plan = js.BlockPyramid.from_pooled(lists, *pooled)
            return jnp.sin(js.attend(q, k, v, plan, implementation=implementation)).sum()

        def slope(*operands):
            return sum(jnp.sin(x).sum() for x in jax.grad(total, numbers)(*operands))

        return jax.jit(jax.grad(slope, numbers))(*operands)

    exact.close(curvature("xla"), curvature("reference"), 2e-4)


@pytest.mark.numbers
@pytest.mark.parametrize("form", ["columns", "levels"])
def test_16_bits_lose_what_16_bits_lose(form):
    """Output and lse of rounded inputs, within the rounding of outputs and probabilities."""
    lists = lists_of(random_tiles(HEADS))
    levels = on_device(np.random.default_rng(2).integers(0, 4, lists.kv_indices.shape))
    q, k, v = (random_operands()[name].astype(jnp.bfloat16) for name in "qkv")
    plan = js.BlockPyramid.from_levels(lists, levels, top_level=3)
    if form == "columns":
        pooled = BATCH, KV_BLOCKS, KV_HEADS
        arrays = random_operands(pooled_k=(*pooled, DIM), pooled_v=(*pooled, V_DIM), n=pooled)
        plan = js.BlockPyramid.from_pooled(
            lists, *(arrays[x] for x in ("pooled_k", "pooled_v", "n"))
        )
    got = js.attend(q, k, v, plan, return_lse=True, implementation="xla")
    whole = (x.astype(jnp.float32) for x in (q, k, v))
    expected = js.attend(*whole, plan, return_lse=True, implementation="reference")
    assert got[0].dtype == jnp.bfloat16
    # of probabilities, pooled keys and values, parts and their sum: half a unit of 8 bits each
    exact.close(got, expected, 4 * 2.0**-9)


@pytest.mark.numbers
def test_bits_of_many_blocks():
    """Many blocks: what stands in for whom is looked up, and in every tile of columns."""
    length = 8 * pyramid._BITS * (pyramid._COMPARED + 1)
    q, k, v = qkv(16, length, heads=2, kv_heads=1, dim=8)
    blocks = length // 8
    tiles = on_device(np.random.default_rng(0).random((2, 2, blocks)) < 0.02)
    lists = js.BlockMask.from_dense(tiles, q_len=16, kv_len=length, block_q=8, block_kv=8)
    means = (x.reshape(blocks, 8, 1, 8).mean(1) for x in (k, v))
    plan = js.BlockPyramid.from_pooled(lists, *means, jnp.full((blocks, 1), np.log(8)))
    got, expected = (js.attend(q, k, v, plan, implementation=x) for x in ("xla", "reference"))
    exact.close((got,), (expected,), TOLERANCE)


@pytest.mark.numbers
def test_columns_that_nobody_needs_are_no_tiles():
    """Under a causal mask the first rows of tiles have no column to see."""
    rows = np.tril(np.ones((64, 64), bool)) & ~np.tril(np.ones((64, 64), bool), -2)
    lists = js.BlockMask.from_dense(
        on_device(rows)[None], q_len=1024, kv_len=1024, block_q=16, block_kv=16
    )
    q, k, v = qkv(1024, heads=2, kv_heads=1, dim=8)
    zeros = jnp.zeros((64, 1, 8))
    plan = js.BlockPyramid.from_pooled(lists, zeros, zeros, jnp.zeros((64, 1)))
    masked = js.explain(q, k, v, plan, mask=js.masks.causal())
    alone = js.explain(q, k, v, lists, mask=js.masks.causal())
    assert masked.summaries == 2 * 62
    assert (masked.computed, masked.full) == (alone.computed, alone.full) == (2 * 127, 2 * 63)
    assert masked.flops == alone.flops + 2 * 62 * 2 * 16 * 64 * 16
    assert js.explain(q, k, v, plan).summaries == 2 * 64
    assert "124 tiles of columns" in str(masked)


def test_explain_counts_levels_by_their_keys():
    """A level halves what a tile takes: density is the mean of 1 / 2**level."""
    q, k, v = qkv(Q_LEN, KV_LEN)
    lists = lists_of(np.ones((1, Q_BLOCKS, KV_BLOCKS), bool))
    levels = jnp.broadcast_to(on_device([0, 1, 1, 2, 3, 3, 3, 3, 3]), (1, Q_BLOCKS, KV_BLOCKS))
    found = js.explain(q, k, v, js.BlockPyramid.from_levels(lists, levels))
    keys = 8 + 2 * 4 + 2 + 5
    assert (found.block_q, found.block_kv) == (16, 1)
    assert (found.computed, found.summaries) == (4 * Q_BLOCKS * keys, 0)
    assert found.flops == 4 * Q_BLOCKS * keys * 16 * 2 * 32


@pytest.mark.parametrize("form", ["columns", "levels"])
def test_no_array_of_all_pairs(form):
    """Temporary memory of output and gradients is a few arrays of the size of q."""
    length, heads, dim, width = 2**15, 2, 64, 4
    blocks = length // 128
    tokens = jax.ShapeDtypeStruct((length, heads, dim), jnp.float32)
    entries = jax.ShapeDtypeStruct((1, blocks, width), jnp.int32)

    def loss(q, k, v, kv_indices, levels):
        sizes = {"q_len": length, "kv_len": length, "block_q": 128, "block_kv": 128}
        counts = jnp.full(kv_indices.shape[:-1], width)
        lists = js.BlockMask.from_lists(kv_indices, counts, **sizes)
        plan = js.BlockPyramid.from_levels(lists, levels, top_level=3)
        if form == "columns":
            means = (x.reshape(blocks, 128, heads, dim).mean(1) for x in (k, v))
            plan = js.BlockPyramid.from_pooled(lists, *means, jnp.zeros((blocks, heads)))
        return js.attend(q, k, v, plan, mask=js.masks.causal(), implementation="xla").sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    memory = run.lower(tokens, tokens, tokens, entries, entries).compile().memory_analysis()
    # one bool per pair would be 64 such arrays
    assert memory.temp_size_in_bytes < 24 * length * heads * dim * 4


@pytest.mark.parametrize("level", [7, -1])
def test_debug_checks_name_the_first_entry_without_a_level(level):
    q, k, v = qkv(8, 16, dim=8)
    tiles = on_device(np.ones((1, 2, 4), bool))
    lists = js.BlockMask.from_dense(tiles, q_len=8, kv_len=16, block_q=4, block_kv=4)
    good = js.BlockPyramid.from_levels(lists, lists.kv_indices * 0, top_level=1)
    bad = dataclasses.replace(good, levels=good.levels.at[0, 1, 2].set(level))
    run = jax.jit(lambda plan: js.attend(q, k, v, plan, implementation="reference"))
    message = rf"levels\[0, 1, 2\]={level} is no level: .* 0 to top_level=1"
    with js.debug_checks():
        with pytest.raises(ValueError, match=message):
            js.attend(q, k, v, bad)
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(run(bad))
        jax.block_until_ready(run(good))
        # of an entry that does not count, no level is read
        counts = lists.kv_num_blocks.at[0, 1].set(2)
        shorter = dataclasses.replace(bad.block_mask, kv_num_blocks=counts)
        jax.block_until_ready(run(dataclasses.replace(bad, block_mask=shorter)))


@pytest.mark.numbers
def test_traced_levels_out_of_range_are_padding():
    q, k, v = qkv(Q_LEN, KV_LEN)
    lists = lists_of(np.ones((1, Q_BLOCKS, KV_BLOCKS), bool))
    levels = jnp.broadcast_to(on_device([0, 1, 1, 7, -1, 3, 0, 3, 3]), (1, Q_BLOCKS, KV_BLOCKS))

    def run(implementation):
        def traced(levels):
            plan = js.BlockPyramid.from_levels(lists, levels, top_level=3)
            return js.attend(q, k, v, plan, implementation=implementation)

        return jax.jit(traced)(levels)

    tiles = np.ones((1, Q_BLOCKS, KV_BLOCKS), bool)
    tiles[..., 3:5] = False
    without = lists_of(tiles)
    plan = js.BlockPyramid.from_levels(without, jnp.delete(levels, on_device([3, 4]), axis=-1))
    expected = js.attend(q, k, v, plan, implementation="reference")
    exact.close((run("xla"), run("reference")), (expected, expected), TOLERANCE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lists: jax.jit(lambda x: js.BlockPyramid.from_levels(lists, x))(
                lists.kv_indices
            ),
            "levels is traced; say the highest",
        ),
        (
            lambda lists: js.BlockPyramid.from_levels(lists, lists.kv_indices * 0, top_level=4),
            "top_level=4 averages 16 tokens; block_kv=8",
        ),
        (
            lambda lists: js.BlockPyramid.from_levels(lists, lists.kv_indices * 0, top_level=-1),
            "top_level=-1",
        ),
        (
            lambda lists: js.BlockPyramid.from_levels(lists, lists.kv_indices * 0 + 2, top_level=1),
            "levels holds 2; they run from 0 to top_level=1",
        ),
        (
            lambda lists: js.attend(
                *qkv(Q_LEN, KV_LEN),
                js.BlockPyramid.from_pooled(
                    lists, *[jnp.zeros((KV_BLOCKS, 1, 16))] * 2, jnp.zeros((KV_BLOCKS, 1))
                ),
            ),
            "pooled_k has 1 heads of width 16; k and v ask for 2 of 16",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(lists_of(np.ones((1, Q_BLOCKS, KV_BLOCKS), bool)))


@pytest.mark.newest
@pytest.mark.parametrize(("implementation", "form"), [("mosaic", "columns"), ("triton", "levels")])
def test_kernels_compute_pyramids(implementation, form):
    """In the interpreter, under a mask; levels of tiles that the kernels take."""
    length, block = 384, 128
    q, k, v = qkv(256, length, heads=2, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    tiles = on_device([[[True, False, True], [False, True, True]]])
    lists = js.BlockMask.from_dense(tiles, q_len=256, kv_len=length, block_q=128, block_kv=block)

    leveled = js.BlockPyramid.from_levels(lists, on_device([[[1, 0], [1, 0]]]))

    def run(implementation):
        def loss(q, k, v):
            plan = leveled
            if form == "columns":
                means = (x.reshape(3, block, 1, 64).mean(1) for x in (k, v))
                counts = jnp.full((3, 1), np.log(block), jnp.float32)
                plan = js.BlockPyramid.from_pooled(lists, *means, counts)
            out = js.attend(q, k, v, plan, mask=js.masks.causal(), implementation=implementation)
            return (out.astype(jnp.float32) ** 2).sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    surrounding = _compat.triton_interpreter if implementation == "triton" else _compat.interpreter
    with surrounding():
        (_, got), gradients = jax.block_until_ready(run(implementation))
    (_, expected), exact_gradients = run("reference")
    # outputs and gradients are rounded to 8 bits, and so are probabilities on the way
    exact.close((got, *gradients), (expected, *exact_gradients), 2**-6)
