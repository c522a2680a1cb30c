"""The Hopper kernels on few query rows and on short blocks of keys, in JAX's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import mosaic as adapter
from jsparse.attention.packing import Filling
from pallas_kernels.block_sparse_attention import mosaic, strips
from pallas_kernels.block_sparse_attention.walk import Lists, Side
from tests.inputs import on_device, qkv
from tests.kernels.test_mosaic_block_sparse import compare, compare_gradients, lists


@pytest.fixture(autouse=True)
def nothing_else_computes_gradients(monkeypatch):
    def otherwise(*_):
        raise AssertionError("the kernels were to compute these gradients")

    hopper = adapter.CHIPS["9"]._replace(otherwise=otherwise)
    monkeypatch.setitem(adapter.CHIPS, "9", hopper)


@pytest.mark.newest
def test_decoding_over_pages_of_sequences_of_their_own_lengths():
    # 4 rows per tile, filled up to 8; 5 pages of 16 keys in two tiles, of which one is not full
    q, k, v = qkv(2, 200, heads=4, kv_heads=1, dim=64, batch=(2,), dtype=jnp.bfloat16)
    pages = [[[[0, 3, 4, 7, 12], [1, 5, 6, 11, 0]]], [[[2, 0, 0, 0, 0], [0] * 5]]]
    counts = on_device([[[5, 4]], [[1, 0]]], jnp.int32)
    plan = js.BlockMask.from_lists(
        on_device(pages, jnp.int32), counts, q_len=2, kv_len=200, block_q=1, block_kv=16
    )
    # keys of no page that is listed, or past a sequence's length, are read by nobody
    poison = jnp.isin(jnp.arange(200) // 16, on_device([8, 9, 10]))[:, None, None]
    k, v = (jnp.where(poison, jnp.nan, x) for x in (k, v))
    length = on_device([195, 37])
    clean = (jnp.nan_to_num(x) for x in (k, v))
    compare(q, k, v, plan, mask=js.masks.lengths(None, length), exact=(q, *clean))


@pytest.mark.slow
def test_everything_that_changes_logits_on_strips_of_32_keys():
    # 16 rows per tile, of 4 queries each, the last tile of 3; v_dim below dim
    q, k, v = qkv(11, 150, heads=4, kv_heads=1, dim=128, v_dim=64, dtype=jnp.bfloat16)
    rng = np.random.default_rng(2)
    slopes, table = (on_device(rng.normal(size=n), jnp.float32) for n in (4, 150))
    ids = on_device(np.sort(rng.integers(0, 3, 150)), jnp.int32)
    compare(
        q,
        k,
        v,
        lists(11, 150, block_q=4, block_kv=32),
        mask=(js.masks.causal(offset=100) & js.masks.segments(ids[-11:], ids)) | js.masks.sinks(3),
        bias=on_device(rng.normal(size=(1, 1, 150)), jnp.bfloat16),
        score_mod=lambda s, b, h, i, j: s - slopes[h] * (i - j) * 0.02 + table[j] * table[i],
        softcap=20.0,
        scale=on_device(0.2),
    )


@pytest.mark.newest
def test_many_short_strips_through_a_ring_of_one_tile(monkeypatch):
    config = mosaic.Config(1, 64, mosaic.HALF_THE_REGISTERS, overlap=False)
    forward = mosaic.FORWARD._replace(default_config=lambda *_: config)
    monkeypatch.setitem(adapter.CHIPS, "9", adapter.CHIPS["9"]._replace(forward=forward))
    # 48 rows, filled up to 64; 13 blocks of 8 keys in two tiles, and a row of tiles that lists none
    q, k, v = qkv(96, 104, heads=1, kv_heads=1, dim=64, v_dim=128, dtype=jnp.float16)
    compare(q, k, v, lists(96, 104, block_q=48, block_kv=8, density=1.0))


@pytest.mark.newest
def test_gradients_of_everything_that_changes_logits():
    # own tiles of 12 rows filled up to 16, and of 16 keys; strips of as many
    # f16: sums over few pairs, of numbers that nearly cancel, feel the rounding of the output
    q, k, v = qkv(5, 30, heads=4, kv_heads=1, dim=64, dtype=jnp.float16)
    rng = np.random.default_rng(2)
    operands = {
        **{"q": q, "k": k, "v": v},
        "slopes": on_device(rng.normal(size=4), jnp.float32),
        "heat": on_device(rng.normal(size=5), jnp.float32),
        "table": on_device(rng.normal(size=30), jnp.float32),
    }
    ids = jnp.zeros(30, jnp.int32).at[28:].set(1)
    mask = js.masks.causal() & js.masks.segments(ids[-5:], ids) | js.masks.sinks(2)
    plan = js.BlockMask.from_lists(
        on_device([[[0, 1], [1, 0]]], jnp.int32),
        on_device([[2, 1]], jnp.int32),
        **{"q_len": 5, "kv_len": 30, "block_q": 3, "block_kv": 16},
    )

    def call(x, implementation):
        def score_mod(logit, batch, head, q_index, kv_index):
            far = (q_index - kv_index).astype(jnp.float32)
            warm = 1.0 + x["heat"][q_index] + x["table"][kv_index]
            return logit * warm + x["slopes"][head] * far * 0.05

        return js.attend(
            *(x["q"], x["k"], x["v"], plan),
            mask=mask,
            score_mod=score_mod,
            return_lse=True,
            implementation=implementation,
        )

    compare_gradients(operands, call)


@pytest.mark.slow
def test_gradients_where_no_mask_hides_what_fills_up_tiles():
    # one row per tile, filled up to 8, of which 8 make a tile; lists per head of a group
    q, k, v = qkv(9, 64, heads=2, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    plan = lists(9, 64, block_q=1, block_kv=32, heads=2, density=1.0)

    def call(x, implementation):
        return js.attend(
            x["q"], x["k"], x["v"], plan, return_lse=True, implementation=implementation
        )

    compare_gradients({"q": q, "k": k, "v": v}, call)


@pytest.mark.parametrize("with_whole", [False, True])
def test_parts_of_lists_begin_with_a_tile_and_are_filled_up_with_their_last_block(with_whole):
    rng = np.random.default_rng(0)
    counts = np.asarray([[[5, 0, 4, 1], [0, 3, 8, 0]]])
    last = counts.cumsum(-1) + np.arange(4)  # parts need not touch
    first = last - counts
    whole = first + rng.integers(0, counts + 1)
    ids = rng.integers(0, 9, (1, 2, 20))
    arrays = [on_device(x, jnp.int32) for x in (ids, first, last, whole)]
    met = Side((jnp.zeros((1, 144, 2, 64)),), 16)
    found = strips.strips(Lists(*arrays[: 3 + with_whole]), met)
    got = jax.tree.map(np.asarray, found)
    positions, values = (
        np.asarray(found.positions(144)),
        rng.normal(size=(3, 4, 144)).astype(np.float32),
    )
    along = np.asarray(found.along(on_device(values), 4, otherwise=-1.0))
    assert along.shape == (3, 4, positions.shape[2])
    for head, block in np.ndindex(2, 4):
        begin, end, split = (x[0, head, block] for x in got.lists[1:])
        listed = ids[0, head, first[0, head, block] : last[0, head, block]]
        assert end - begin == -(-len(listed) // 4)
        entirely = (whole if with_whole else last)[0, head, block] - first[0, head, block]
        assert split - begin == entirely // 4
        filled = np.concatenate([listed, np.repeat(listed[-1:], -len(listed) % 4)])
        np.testing.assert_array_equal(got.lists.ids[0, head, 4 * begin : 4 * end], filled)
        tokens = (filled[:, None] * 16 + np.arange(16)).ravel()
        counted = np.arange(len(tokens)) < 16 * len(listed)
        here = slice(64 * begin, 64 * end)
        np.testing.assert_array_equal(positions[0, head, here], np.where(counted, tokens, 144))
        for batch, q_head in np.ndindex(3, 2):
            want = np.where(counted, values[batch, 2 * head + q_head, tokens], -1.0)
            np.testing.assert_array_equal(along[batch, 2 * head + q_head, here], want)


def test_appended_rows_stand_for_the_last_of_their_tile():
    filling = Filling(3, 8)
    x = jnp.arange(2 * 9.0).reshape(2, 9) + 1
    filled = np.asarray(filling.fill(x, value=0.0))
    assert filled.shape == (2, filling.length(9)) == (2, filling.length(7))
    row = np.asarray(filling.row(jnp.arange(24)))
    true = np.arange(24) % 8 < 3
    np.testing.assert_array_equal(filled, np.where(true, np.asarray(x)[:, row], 0.0))
    assert row.reshape(3, 8).tolist() == [[3 * n, 3 * n + 1] + [3 * n + 2] * 6 for n in range(3)]
    np.testing.assert_array_equal(filling.cut(on_device(filled)), x)


@pytest.mark.parametrize(
    ("rows", "height"), [(1, 8), (4, 8), (16, 16), (17, 32), (48, 64), (65, 128), (130, 130)]
)
def test_short_tiles_are_filled_up_to_the_next_that_kernels_take(rows, height):
    assert adapter.CHIPS["9"].forward.height(rows) == height
    # where no tile is short, less than half of one may be filling
    wanted = height if height > 32 else rows
    assert adapter.CHIPS["8"].forward.height(rows) == wanted
