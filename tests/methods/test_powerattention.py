"""PowerAttention against its oracle, and the figures of its specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.tiling import visible_tiles
from jsparse.masks.powerattention import powers_of_two
from jsparse.types import Frame, TileGrid
from tests.inputs import on_device, qkv
from tests.oracles import powerattention as oracle

BLOCK = 16


def plan_of_blocks(tiles):
    sizes = {"block_q": BLOCK, "block_kv": BLOCK}
    length = BLOCK * len(tiles)
    return js.BlockMask.from_dense(on_device(tiles)[None], q_len=length, kv_len=length, **sizes)


def tiles_of(count, **settings):
    """The block rows that the method's own mask gives at tiles of a block."""
    mask = powers_of_two(block_size=BLOCK, **{"window_size": 5, **settings})
    mask = mask & js.masks.causal()
    length = BLOCK * count
    plan = js.block_mask(mask, length, length, block_q=BLOCK, block_kv=BLOCK)
    return np.asarray(plan.to_dense())[0]


@pytest.mark.parametrize("settings", [{}, {"window_size": 1, "num_sink_blocks": 0}])
def test_tiles_are_those_of_the_oracle(settings):
    np.testing.assert_array_equal(tiles_of(40, **settings), oracle.blocks(40, **settings))


def test_rows_of_the_specification():
    tiles = tiles_of(16)
    rows = {15: "1000000100011111", 9: "1100011111000000"}
    for row, bits in rows.items():
        assert "".join(str(int(x)) for x in tiles[row]) == bits


def test_row_counts_of_the_specification():
    tiles = tiles_of(512)
    counts = [int(tiles[row].sum()) for row in (0, 3, 7, 8, 15, 31, 127, 511)]
    assert counts == [1, 4, 6, 6, 7, 8, 10, 12]
    assert tiles[:128, :128].sum() == 1141
    for blocks, density in ((128, 0.1382), (256, 0.0775), (512, 0.0428)):
        kept = tiles[:blocks, :blocks].sum()
        assert kept / (blocks * (blocks + 1) / 2) == pytest.approx(density, abs=5e-5)


def test_short_sequences_are_dense_and_the_seventh_block_drops_one_pair():
    assert (tiles_of(6) == np.tri(6, dtype=bool)).all()
    missing = np.argwhere(np.tri(7, dtype=bool) & ~tiles_of(7))
    assert missing.tolist() == [[6, 1]]


@pytest.mark.parametrize(
    ("q_len", "kv_len"), [pytest.param(100, 100, marks=pytest.mark.slow), (37, 100)]
)
@pytest.mark.parametrize("given", [None, js.masks.causal(), js.masks.sliding_window(left=40)])
def test_output_is_attention_to_the_pairs_of_the_oracle(q_len, kv_len, given):
    q, k, v = qkv(q_len, kv_len)
    method = js.powerattention(block_size=8, window_size=2)
    out = js.sparse_attention(q, k, v, method, mask=given)
    pairs = oracle.pairs(q_len, kv_len, block_size=8, window_size=2)
    dense = js.masks.dense(on_device(pairs)[None])
    mask = dense if given is None else dense & given
    expected = js.attend(q, k, v, mask=mask, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_a_decode_step_is_the_row_of_the_prefill():
    q, k, v = qkv(300)
    method = js.powerattention(block_size=16, window_size=2)
    whole = js.sparse_attention(q, k, v, method, mask=js.masks.causal())

    @jax.jit
    def step(t):
        mask = js.masks.causal(offset=t)
        return method.attend((), q[t][None], k, v, positions=t[None], mask=mask)[0][0]

    for t in (0, 150, 299):
        np.testing.assert_allclose(step(jnp.int32(t)), whole[t], atol=2e-6)


@pytest.mark.parametrize(("block_q", "block_kv"), [(64, 64), (16, 48), (100, 7)])
def test_tiles_of_any_size_cover_what_is_visible_and_know_when_all_is(block_q, block_kv):
    grid = TileGrid(300, 420, block_q, block_kv)
    mask = powers_of_two(block_size=32, window_size=2, num_sink_blocks=2)
    frame = Frame(300, 420)
    seen = np.asarray(mask.visible(jnp.arange(300)[:, None], jnp.arange(420)[None], frame))
    bounds = mask.classifier(grid)(
        jnp.arange(grid.q_blocks)[:, None], jnp.arange(grid.kv_blocks)[None], frame
    )
    some, every = map(np.asarray, bounds)
    for i in range(grid.q_blocks):
        for j in range(grid.kv_blocks):
            tile = seen[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
            assert some[i, j] == tile.any()
            # it may know less than all, but says nothing wrong
            assert tile.all() or not every[i, j]
    assert int(every.sum()) > 0
    assert int(visible_tiles(mask, grid).sum(-1).max()) <= mask.max_tiles(grid)


def coverage(tiles, hops):
    field = js.receptive_field([plan_of_blocks(tiles)] * hops)
    return int(np.asarray(field)[-1].sum())


@pytest.mark.parametrize(
    ("tiles", "counts"),
    [
        (oracle.blocks(128, window_size=1, num_sink_blocks=0), [8, 29, 64, 99, 120, 127, 128]),
        (oracle.blocks(128), [10, 35, 75, 110, 126, 128]),
        (oracle.window_and_sink(128, window=9), [10, 18, 26]),
        (oracle.stride_slash(128, window=6, stride=32), [10, 30, 50, 70, 90, 110, 126, 128]),
        (oracle.longnet(128), [8, 20, 41, 58, 75, 80, 80, 80]),
    ],
)
def test_coverage_over_layers_is_that_of_the_specification(tiles, counts):
    for hops, count in enumerate(counts, 1):
        assert coverage(tiles, hops) == count == len(oracle.reached(tiles, hops))


def test_a_window_takes_sixteen_hops_and_dilation_never_sees_all():
    window = oracle.window_and_sink(128, window=9)
    assert [coverage(window, hops) for hops in (15, 16)] == [122, 128]
    assert coverage(oracle.dilated(128, window=20, dilation=2), 64) == 64


def test_distances_with_few_ones_in_binary_are_reached():
    tiles = tiles_of(64, window_size=1, num_sink_blocks=0)
    for hops in (1, 2, 3):
        field = np.asarray(js.receptive_field([plan_of_blocks(tiles)] * hops))
        for i in range(64):
            for j in range(i + 1):
                assert field[i, j] == (bin(i - j).count("1") <= hops)


def test_layers_pass_on_what_the_receptive_field_says():
    """A block of the input changes a block of the output only where it is reached."""
    method = js.powerattention(block_size=8, window_size=1, num_sink_blocks=0)
    q, k, v = qkv(8 * 12, heads=1, kv_heads=1, dim=4)
    layers = 2

    def stack(x):
        for _ in range(layers):
            x = js.sparse_attention(q, k, x, method, mask=js.masks.causal())
        return x[:, 0].sum(-1).reshape(12, 8).sum(-1)

    gradient = jax.jacrev(stack)(v)[..., 0, :].reshape(12, 12, -1)
    reached = np.zeros((12, 12), bool)
    for i in range(12):
        for j in range(i + 1):
            reached[i, j] = bin(i - j).count("1") <= layers
    np.testing.assert_array_equal(np.abs(np.asarray(gradient)).max(-1) > 0, reached)


def test_a_projection_lets_one_head_pass_on_what_another_has_read():
    """Two layers of two heads, at distances 0 and 1, and 0 and 4: distance 5 is reached."""
    blocks, heads, dim = 12, 2, 4
    i, j = np.indices((blocks, blocks))
    tiles = np.stack([np.isin(i - j, (0, near)) for near in (1, 4)])
    sizes = {"q_len": blocks, "kv_len": blocks, "block_q": 1, "block_kv": 1}
    plan = js.BlockMask.from_dense(on_device(tiles), **sizes)
    q, k, x = qkv(blocks, heads=heads, kv_heads=heads, dim=dim)
    weights = jax.random.normal(jax.random.key(3), (heads * dim, heads * dim))

    def stack(x):
        for _ in range(2):
            out = js.attend(q, k, x, plan, implementation="reference")
            x = (out.reshape(blocks, -1) @ weights).reshape(out.shape)
        return x.reshape(blocks, -1).sum(-1)

    gradient = np.asarray(jax.jit(jax.jacrev(stack))(x)).reshape(blocks, blocks, -1)
    field = np.asarray(js.receptive_field([plan, plan]))
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, field)
    assert field[7, 2]
    # at distances 0, 1, 2, 4 and 5
    assert field[7].sum() == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"window_size": 0}, "window_size=0"), ({"block_size": 0}, "block_size=0")]
    + [({"num_sink_blocks": -1}, "num_sink_blocks=-1")],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.powerattention(**arguments)


def test_the_receptive_field_wants_square_plans():
    plan = js.block_mask(js.masks.causal(), 32, 64, block_q=16, block_kv=16)
    with pytest.raises(ValueError, match=r"\(32, 16\) for queries"):
        js.receptive_field([plan])
    with pytest.raises(ValueError, match="empty tuple"):
        js.receptive_field([])
