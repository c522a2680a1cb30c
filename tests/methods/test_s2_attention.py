"""S2-Attention against its oracle, and the figures of its specification."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.tiling import visible_tiles
from jsparse.masks.s2_attention import kv_efficient, sharded_blocks, two_sided_blocks
from jsparse.types import Frame, TileGrid
from tests.inputs import on_device, qkv
from tests.oracles import s2_attention as oracle

BLOCK = 8
SMALL = {"heads": 4, "kv_heads": 4, "local_blocks": 2, "vert_stride": 4}


def plan_of(count, **settings):
    length = BLOCK * count
    mask = sharded_blocks(block_size=BLOCK, **settings) & js.masks.causal()
    return js.block_mask(mask, length, length, block_q=BLOCK, block_kv=BLOCK)


def tiles_of(count, **settings):
    return np.asarray(plan_of(count, **settings).to_dense())


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        {**SMALL, "heads": 8, "head_sliding_offset": 1},
        {**SMALL, "kv_heads": 2, "num_dense_heads": 1},
        {**SMALL, "head_sliding_step": 3, "local_blocks": 1},
        {**SMALL, "homo_head": True, "head_sliding_offset": 2},
    ],
)
def test_tiles_are_those_of_the_oracle(settings):
    names = {"head_sliding_step": "step", "head_sliding_offset": "head_offset"}
    expected = oracle.blocks(12, **{names.get(name, name): x for name, x in settings.items()})
    found = tiles_of(12, **settings)
    assert found.shape[0] in (1, settings["heads"])
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


def test_tiles_per_head_and_last_rows_of_the_specification():
    tiles = tiles_of(8, **SMALL)
    assert tiles.sum((1, 2)).tolist() == [23, 18, 19, 21]
    rows = ["".join(str(int(x)) for x in tiles[head, 7]) for head in range(4)]
    assert rows == ["10001011", "00010011", "00100011", "01000111"]


def test_row_lengths_have_a_closed_form():
    tiles = tiles_of(20, **SMALL)
    for head in range(4):
        for i in range(20):
            expected = oracle.row_length(i, local_blocks=2, vert_stride=4, residue=head)
            assert tiles[head, i].sum() == expected


def test_phi_3_small_keeps_half_and_sees_all():
    phi = {"heads": 32, "kv_heads": 8, "local_blocks": 16, "vert_stride": 8}
    tiles = tiles_of(64, **phi)
    causal = np.tri(64, dtype=bool)
    assert tiles.sum() / (32 * causal.sum()) == pytest.approx(0.50529, abs=5e-6)
    np.testing.assert_array_equal(tiles.any(0), causal)


def test_too_few_shares_leave_holes_and_a_warning_says_so():
    few = {"heads": 32, "kv_heads": 8, "local_blocks": 1, "vert_stride": 16}
    assert tiles_of(64, **few).any(0).sum() == 976
    q, k, _ = qkv(64, heads=32, kv_heads=8, dim=2)
    method = js.s2_attention(block_size=8, local_blocks=1, vert_stride=16)
    with pytest.warns(UserWarning, match="8 of 16 shares"):
        method.plan((), q, k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        js.s2_attention(local_blocks=1, vert_stride=8).plan((), q, k)
        js.s2_attention(local_blocks=1, vert_stride=16, num_dense_heads=1).plan((), q, k)
        js.s2_attention(local_blocks=1, vert_stride=16, homo_head=True).plan((), q, k)


@pytest.mark.parametrize(
    ("q_len", "kv_len"), [pytest.param(100, 100, marks=pytest.mark.slow), (37, 100)]
)
@pytest.mark.parametrize("given", [None, js.masks.causal(), js.masks.sliding_window(left=40)])
def test_output_is_attention_to_the_pairs_of_the_oracle(q_len, kv_len, given):
    q, k, v = qkv(q_len, kv_len)
    method = js.s2_attention(block_size=8, local_blocks=2, vert_stride=2)
    out = js.sparse_attention(q, k, v, method, mask=given)
    sizes = {"heads": 4, "kv_heads": 2, "local_blocks": 2, "vert_stride": 2}
    pairs = js.masks.dense(on_device(oracle.pairs(q_len, kv_len, block_size=8, **sizes)))
    mask = pairs if given is None else pairs & given
    expected = js.attend(q, k, v, mask=mask, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("settings", [{"vert_stride": 1, "local_blocks": 1}, {"local_blocks": 13}])
def test_stride_one_or_a_long_window_is_dense(settings):
    q, k, v = qkv(100)
    out = js.sparse_attention(q, k, v, js.s2_attention(block_size=8, **settings))
    dense = js.attend(q, k, v, mask=js.masks.causal(), implementation="reference")
    np.testing.assert_allclose(out, dense, atol=2e-6)


@pytest.mark.parametrize(("block_q", "block_kv"), [(64, 64), (16, 48), (100, 7)])
@pytest.mark.parametrize("two_sided", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tiles_of_any_size_cover_what_is_visible_and_know_when_all_is(block_q, block_kv, two_sided):
    grid = TileGrid(300, 420, block_q, block_kv)
    if two_sided:
        mask = two_sided_blocks(block_size=32, local_blocks=(4, 2), vert_stride=3)
    else:
        mask = sharded_blocks(block_size=32, **SMALL)
    classify = mask.classifier(grid)
    whole = 0
    for head in range(mask.heads):
        frame = Frame(300, 420, 0, head)
        seen = np.asarray(mask.visible(jnp.arange(300)[:, None], jnp.arange(420)[None], frame))
        bounds = classify(
            jnp.arange(grid.q_blocks)[:, None], jnp.arange(grid.kv_blocks)[None], frame
        )
        some, every = map(np.asarray, bounds)
        for i in range(grid.q_blocks):
            for j in range(grid.kv_blocks):
                tile = seen[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
                assert some[i, j] == tile.any()
                assert tile.all() or not every[i, j]
        whole += int(every.sum())
    # none where a tile spans blocks of which only some are kept
    assert (whole > 0) == (two_sided or block_q < 64 or block_kv < 32)
    assert int(visible_tiles(mask, grid).sum(-1).max()) <= mask.max_tiles(grid)


def test_the_two_sided_pattern_is_that_of_the_oracle():
    mask = two_sided_blocks(block_size=BLOCK, local_blocks=(3, 2), vert_stride=4)
    plan = js.block_mask(mask, BLOCK * 16, BLOCK * 16, block_q=BLOCK, block_kv=BLOCK)
    expected = oracle.two_sided(16, left=3, right=2, vert_stride=4)
    np.testing.assert_array_equal(np.asarray(plan.to_dense())[0], expected)


def test_dropped_blocks_never_come_back():
    assert bool(kv_efficient(plan_of(16, **SMALL)).all())
    # at relative distances they do
    dense = oracle.two_sided(16, left=1, right=1, vert_stride=4) & np.tri(16, dtype=bool)
    length = BLOCK * 16
    relative = js.BlockMask.from_dense(
        on_device(dense)[None], q_len=length, kv_len=length, block_q=BLOCK, block_kv=BLOCK
    )
    assert not bool(kv_efficient(relative).any())


def test_outputs_do_not_notice_that_dropped_blocks_are_gone():
    """A block outside the window and of no share of a head may hold anything later on."""
    q, k, v = qkv(BLOCK * 12, heads=2, kv_heads=2)
    method = js.s2_attention(block_size=BLOCK, local_blocks=2, vert_stride=2)
    tiles = oracle.blocks(12, heads=2, kv_heads=2, local_blocks=2, vert_stride=2)
    now = 8
    gone = ~tiles[:, now:].any(1) & (np.arange(12) < now)
    assert gone.any()
    forget = on_device(np.repeat(gone, BLOCK, axis=1).T[..., None])
    out = js.sparse_attention(q, k, v, method)
    later = js.sparse_attention(q, jnp.where(forget, 9.0, k), jnp.where(forget, 9.0, v), method)
    np.testing.assert_allclose(later[now * BLOCK :], out[now * BLOCK :], atol=2e-6)


def test_chunks_of_keys_merge_with_their_gradients():
    q, k, v = qkv(BLOCK * 12)
    settings = {"heads": 4, "kv_heads": 2, "local_blocks": 2, "vert_stride": 2}
    plan, mask = plan_of(12, **settings), js.masks.causal()
    tiles = np.asarray(plan.to_dense())
    sizes = {"q_len": BLOCK * 12, "kv_len": BLOCK * 12, "block_q": BLOCK, "block_kv": BLOCK}
    early = np.arange(12) < 5
    chunks = [js.BlockMask.from_dense(on_device(tiles & x), **sizes) for x in (early, ~early)]

    def merged(q, k, v):
        parts = [js.attend(q, k, v, c, mask=mask, return_lse=True) for c in chunks]
        return js.merge(parts)[0]

    def whole(q, k, v):
        return js.attend(q, k, v, plan, mask=mask, implementation="reference")

    np.testing.assert_allclose(jax.jit(merged)(q, k, v), whole(q, k, v), atol=2e-6)
    ours, theirs = (
        jax.jit(jax.grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2)))(q, k, v)
        for f in (merged, whole)
    )
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_lists_and_their_inverse_have_as_many_entries():
    plan = plan_of(12, **SMALL)
    inverse = plan.inverse()
    assert int(inverse.offsets[..., -1].sum()) == int(plan.kv_num_blocks.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_blocks": 0}, "local_blocks=0"),
        ({"vert_stride": 0}, "vert_stride=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"num_dense_heads": -1}, "num_dense_heads=-1"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.s2_attention(**arguments)


def test_more_dense_heads_than_there_are_is_refused():
    q, k, _ = qkv(64)
    with pytest.raises(ValueError, match="num_dense_heads=3 must be at most 2"):
        js.s2_attention(num_dense_heads=3).plan((), q, k)
