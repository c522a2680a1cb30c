"""GNA against its oracle, and the figures of its specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.token_tiles import TokenTiles
from jsparse.masks.gna import simulate
from jsparse.masks.neighborhood import Axis, Neighborhood, axes_of
from jsparse.masks.neighborhood_attention import axis_tiles, fully_block_sparse
from jsparse.types import Frame, TileGrid
from tests.inputs import on_device, qkv
from tests.oracles import gna as oracle

RNG = np.random.default_rng(0)
# every pair by itself, where what is asked is not how tiles are computed
PLAIN = {"implementation": "reference"}
VIDEO, VIDEO_WINDOW, VIDEO_TILE = (30, 48, 80), (18, 24, 24), (2, 8, 8)
# grids with every number different from axis to axis, and tiles that do not divide them
CASES = {
    "one axis": ((61,), {"window": 6, "stride": 4}, (8,), (16,)),
    "dilated": ((61,), {"window": 7, "stride": 3, "dilation": 4}, (4,), (8,)),
    "plane": ((10, 13), {"window": (5, 4), "stride": (2, 3)}, (2, 4), (4, 2)),
    "causal rows": (
        (10, 13),
        {"window": (4, 3), "stride": (3, 1), "dilation": (1, 3), "is_causal": (True, False)},
        (2, 4),
        (4, 2),
    ),
    "volume": (
        (4, 6, 7),
        {"window": (4, 3, 2), "stride": (1, 3, 2), "dilation": (1, 2, 3)},
        (2, 1, 2),
        (1, 2, 2),
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def line(length):
    """The specification's data: q = 1, k = ln(j + 1), v = j."""
    j = np.arange(length)
    columns = np.ones(length), np.log(j + 1), j
    return [on_device(x, jnp.float32)[:, None, None] for x in columns]


def run(method, q, k, v, **options):
    """Attention as one program: many small ones take longer to compile than to run."""
    return jax.jit(lambda *x: js.sparse_attention(*x, method, **options))(q, k, v)


def dense(q, k, v, seen):
    """The oracle's outputs over pairs of tokens."""
    return oracle.attention(*map(np.asarray, (q, k, v)), seen, q.shape[-1] ** -0.5)


def starts(length, **settings):
    first, _ = Axis(length, **settings).window_of(np.arange(length), length)
    return first.tolist()


def outputs(length, **settings):
    out, lse = run(js.gna(**settings), *line(length), scale=1.0, return_lse=True, **PLAIN)
    return np.asarray(out)[:, 0, 0], np.asarray(lse)[0]


def pairs_of(mask, q_len, kv_len):
    frame = Frame(q_len, kv_len)
    visible = jax.jit(lambda i, j: mask.visible(i, j, frame))
    return np.asarray(visible(jnp.arange(q_len)[:, None], jnp.arange(kv_len)))


def layout(case):
    grid, settings, q_tile, kv_tile = case
    axes = axes_of(grid, **settings)
    dilation = tuple(axis.dilation for axis in axes)
    return axes, TokenTiles(grid, q_tile, dilation), TokenTiles(grid, kv_tile, dilation)


@pytest.mark.parametrize(
    ("stride", "expected", "out"),
    [
        (2, [0, 0, 1, 1, 3, 3, 4, 4], [2, 2, 2.8571, 2.8571, 4.7273, 4.7273, 5.6923, 5.6923]),
        (3, [0, 0, 0, 2, 2, 2, 4, 4], None),
        (4, [0] * 4 + [4] * 4, None),
    ],
)
def test_windows_and_outputs_of_the_specification(stride, expected, out):
    assert starts(8, window=4, stride=stride) == expected
    for i in range(8):
        assert oracle.span(i, length=8, window=4, stride=stride)[0] == expected[i]
    if out is not None:
        np.testing.assert_allclose(outputs(8, window=4, stride=stride)[0], out, atol=6e-5)


def test_causal_windows_and_outputs_of_the_specification():
    first, last = Axis(8, 4, 2, is_causal=True).window_of(np.arange(8), 8)
    assert first.tolist() == [0, 0, 0, 0, 2, 2, 4, 4]
    assert (last + 1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    out, lse = outputs(8, window=4, stride=2, is_causal=True)
    expected = [0, 0.6667, 1.3333, 2, 3.1667, 3.7778, 5.1111, 5.6923]
    np.testing.assert_allclose(out, expected, atol=6e-5)
    assert lse[7] == pytest.approx(3.2581, abs=5e-5)


def test_a_stride_of_the_window_is_attention_inside_blocks():
    q, k, v = qkv(96)
    out = run(js.gna(window=24, stride=24), q, k, v, **PLAIN)
    block = np.arange(96) // 24
    np.testing.assert_allclose(out, dense(q, k, v, block[:, None] == block)[0], atol=2e-6)
    assert starts(14, window=4, stride=4)[-2:] == [10, 10]


@pytest.mark.parametrize(("window", "stride"), [(6, 2), (7, 3), (8, 8), (9, 1)])
def test_inner_windows_are_the_group_and_as_much_on_either_side(window, stride):
    length, halo = 48, (window - stride) // 2
    first, last = Axis(length, window, stride).window_of(np.arange(length), length)
    inner = slice(8, 40)
    group = np.arange(length)[inner] // stride * stride
    np.testing.assert_array_equal(first[inner], group - halo)
    np.testing.assert_array_equal(last[inner], group + stride - 1 + halo)


@by_case
def test_pairs_are_those_of_the_oracle_in_any_order(case):
    grid, settings, _, _ = case
    axes, *orders = layout(case)
    tokens = int(np.prod(grid))
    expected = oracle.pairs(grid, **settings)
    mask = js.masks.neighborhood(grid, **settings).flatten_batch(())
    np.testing.assert_array_equal(pairs_of(mask, tokens, tokens), expected)

    places = [oracle.order(grid, order.tile, order.dilation) for order in orders]
    expected = oracle.ordered_pairs(expected, *places)
    mask = Neighborhood.of(axes, *orders).flatten_batch(())
    found = pairs_of(mask, *(order.length for order in orders))
    there = places[0] >= 0
    np.testing.assert_array_equal(found[there], expected[there])


def test_axes_that_do_not_fit_one_word_are_compared_in_several():
    grid = (8,) * 6
    mask = js.masks.neighborhood(grid, window=2, dilation=2).flatten_batch(())
    assert len(mask.guards) == 2
    by_axis = oracle.axis_pairs(8, window=2, dilation=2)
    i = RNG.integers(0, 8, (2000, 6))
    # mostly neighbors, or hardly any would be seen along all axes
    j = np.clip(i + RNG.choice([-2, 0, 2, 1], (2000, 6), p=[0.3, 0.35, 0.3, 0.05]), 0, 7)
    expected = by_axis[i, j].all(-1)
    index = [on_device(np.ravel_multi_index(x.T, grid)) for x in (i, j)]
    np.testing.assert_array_equal(mask.visible(*index, Frame(8**6, 8**6)), expected)
    assert 20 < expected.sum() < 1000


@by_case
def test_tiles_of_any_size_cover_what_is_visible_and_know_when_all_is(case):
    """Tokens row-major and tile by tile, in blocks that are tiles and in blocks that are not."""
    grid, _, q_tile, kv_tile = case
    axes, *orders = layout(case)
    row_major = [TokenTiles.row_major(grid)] * 2
    tiles = int(np.prod(q_tile)), int(np.prod(kv_tile))
    for used, blocks in ((orders, tiles), (orders, (6, 5)), (row_major, (6, 5))):
        mask = Neighborhood.of(axes, *used).flatten_batch(())
        plane = TileGrid(*(order.length for order in used), *blocks)

        def both(mask=mask, plane=plane):
            frame = Frame(*plane[:2])
            q_block, kv_block = jnp.arange(plane.q_blocks)[:, None], jnp.arange(plane.kv_blocks)
            pairs = mask.visible(jnp.arange(plane.q_len)[:, None], jnp.arange(plane.kv_len), frame)
            return pairs, mask.classifier(plane)(q_block, kv_block, frame)

        seen, (some, every) = jax.tree.map(np.asarray, jax.jit(both)())
        sums, sizes = oracle.tile_sums(seen, *blocks)
        assert (some | (sums == 0)).all()
        assert (~every | (sums == sizes)).all()
        if blocks == tiles:
            np.testing.assert_array_equal(some, sums > 0)
            np.testing.assert_array_equal(every, sums == sizes)


@by_case
def test_the_plan_lists_the_tiles_with_something_to_see(case):
    grid, settings, q_tile, kv_tile = case
    q, k, _ = qkv(int(np.prod(grid)), heads=2, kv_heads=1, dim=2)
    method = js.gna(grid=grid, q_tile=q_tile, kv_tile=kv_tile, **settings)
    plan, info = jax.jit(lambda q, k: method.plan((), q, k))(q, k)
    _, *orders = layout(case)
    if info.q_order is None:
        orders = [TokenTiles.row_major(grid)] * 2
    places = [oracle.order(grid, order.tile, order.dilation) for order in orders]
    for order, place in zip(info, places, strict=True):
        if order is not None:
            np.testing.assert_array_equal(np.asarray(order)[0][place >= 0], place[place >= 0])
    seen = oracle.ordered_pairs(oracle.pairs(grid, **settings), *places)
    sums, _ = oracle.tile_sums(seen, plan.block_q, plan.block_kv)
    np.testing.assert_array_equal(plan.to_dense()[0], sums > 0)
    entries = np.asarray(plan.entries())[0]
    assert (np.diff(np.asarray(plan.kv_indices)[0], axis=-1) > 0)[entries[:, 1:]].all()


def test_a_mask_of_ones_own_drops_tiles():
    grid, settings, q_tile, kv_tile = CASES["causal rows"]
    q, k, _ = qkv(130, heads=2, kv_heads=1, dim=2)
    method = js.gna(grid=grid, q_tile=q_tile, kv_tile=kv_tile, **settings)
    given = js.masks.lengths(None, 20)
    plan, _ = method.plan((), q, k)
    within, _ = method.plan((), q, k, mask=given)
    seen = oracle.pairs(grid, **settings)
    seen[:, 20:] = False
    _, *orders = layout(CASES["causal rows"])
    places = [oracle.order(grid, order.tile, order.dilation) for order in orders]
    sums, _ = oracle.tile_sums(oracle.ordered_pairs(seen, *places), plan.block_q, plan.block_kv)
    listed = np.asarray(within.to_dense())[0]
    assert (listed | (sums == 0)).all()
    # bounds of a tile of scattered tokens are their first and last
    assert (sums > 0).sum() <= listed.sum() < plan.kv_num_blocks.sum() / 2


@by_case
def test_output_and_lse_are_those_of_the_oracle(case):
    grid, settings, q_tile, kv_tile = case
    q, k, v = qkv(int(np.prod(grid)), heads=4, kv_heads=2, dim=8, v_dim=6)
    method = js.gna(grid=grid, q_tile=q_tile, kv_tile=kv_tile, **settings)
    out, lse = run(method, q, k, v, return_lse=True)
    expected = dense(q, k, v, oracle.pairs(grid, **settings))
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=2e-6)


def test_everything_that_attend_takes_follows_the_tokens():
    """Gradients, a caller's mask, bias, score_mod, sinks and extra tokens, all in one program."""
    grid, settings, q_tile, kv_tile = CASES["causal rows"]
    tokens = 130
    q, k, v = qkv(tokens, heads=4, kv_heads=2, dim=8, v_dim=6, batch=(2,))
    _, extra_k, extra_v = qkv(tokens, 9, heads=4, kv_heads=2, dim=8, v_dim=6, batch=(2,), seed=1)
    bias = on_device(RNG.normal(size=(4, tokens, tokens)), jnp.float32)
    sinks, slope = jnp.linspace(-1.0, 1.0, 4), jnp.float32(0.1)
    given = js.masks.segments(on_device(RNG.integers(0, 2, tokens)))
    method = js.gna(grid=grid, q_tile=q_tile, kv_tile=kv_tile, **settings)
    operands = q, k, v, extra_k, extra_v, bias, sinks, slope

    def ours(q, k, v, extra_k, extra_v, bias, sinks, slope):
        def score_mod(logit, batch, head, i, j):
            return logit - slope * (i - j)

        more = {"extra_k": extra_k, "extra_v": extra_v}
        changes = {"bias": bias, "sinks": sinks, "score_mod": score_mod, "softcap": 5.0}
        options = {"scale": 0.5, "return_lse": True, **PLAIN}
        return js.sparse_attention(q, k, v, method, mask=given, **more, **changes, **options)

    def plain(q, k, v, extra_k, extra_v, bias, sinks, slope):
        k, v = (jnp.concatenate(x, 1) for x in ((k, extra_k), (v, extra_v)))
        i, j = jnp.arange(tokens)[:, None], jnp.arange(tokens)
        own = given.flatten_batch(()).visible(i, j, Frame(tokens, tokens))
        own &= oracle.pairs(grid, **settings)
        seen = jnp.concatenate([own, jnp.ones((tokens, 9), bool)], 1)
        bias = jnp.pad(bias - slope * (i - j), [(0, 0), (0, 0), (0, 9)])
        return js.attend(
            q,
            k,
            v,
            mask=js.masks.dense(seen[None]),
            bias=bias,
            sinks=sinks,
            softcap=5.0,
            scale=0.5,
            return_lse=True,
            **PLAIN,
        )

    def value_and_gradient(run):
        def loss(operands):
            out, lse = run(*operands)
            return jnp.sin(out).sum() + jnp.cos(lse).sum(), (out, lse)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(operands)

    ((_, results), gradients), ((_, expected), exact) = map(value_and_gradient, (ours, plain))
    for got, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=4e-6)
    for got, want in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5, rtol=3e-5)


def test_gradients_are_those_of_the_dense_masked_reference():
    grid, settings, q_tile, kv_tile = CASES["volume"]
    q, k, v = qkv(168, heads=2, kv_heads=1, dim=8)
    method = js.gna(grid=grid, q_tile=q_tile, kv_tile=kv_tile, **settings)
    mask = js.masks.dense(on_device(oracle.pairs(grid, **settings))[None])
    runs = (
        lambda *x: js.sparse_attention(*x, method),
        lambda *x: js.attend(*x, mask=mask, **PLAIN),
    )
    ours, dense = (
        jax.jit(jax.grad(lambda *x, run=run: jnp.sin(run(*x)).sum(), argnums=(0, 1, 2)))(q, k, v)
        for run in runs
    )
    for got, want in zip(ours, dense, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_dilation_is_each_residue_by_itself():
    length, dilation, settings = 61, 3, {"window": 7, "stride": 3}
    whole = oracle.axis_pairs(length, dilation=dilation, **settings)
    q, k, v = qkv(length)
    method = js.gna(dilation=dilation, q_tile=(4,), kv_tile=(4,), **settings)
    out = run(method, q, k, v, **PLAIN)
    for residue in range(dilation):
        own = slice(residue, None, dilation)
        alone = oracle.axis_pairs(len(range(length)[own]), **settings)
        np.testing.assert_array_equal(whole[own, own], alone)
        np.testing.assert_allclose(out[own], dense(q[own], k[own], v[own], alone)[0], atol=2e-6)


def test_odd_windows_of_one_query_are_symmetric_and_even_ones_are_not():
    q, k, v = (x.reshape(9, 8, 4, 16) for x in qkv(72, heads=4, kv_heads=4))

    def out(window, flipped):
        flat = ((jnp.flip(x, 0) if flipped else x).reshape(72, 4, 16) for x in (q, k, v))
        method = js.gna(grid=(9, 8), window=window, q_tile=(2, 4))
        out = run(method, *flat, **PLAIN).reshape(9, 8, 4, 16)
        return np.asarray(jnp.flip(out, 0) if flipped else out)

    np.testing.assert_allclose(out((5, 4), True), out((5, 4), False), atol=2e-6)
    assert np.abs(out((4, 4), True) - out((4, 4), False)).max() > 1e-2


@by_case
def test_restoring_undoes_permuting(case):
    grid = case[0]
    x = RNG.normal(size=(2, int(np.prod(grid)), 3, 2)).astype(np.float32)
    for order in layout(case)[1:]:
        moved, back = jax.jit(lambda x, o=order: (o.permute(x), o.restore(o.permute(x))))(x)
        place = oracle.order(grid, order.tile, order.dilation)
        moved = np.asarray(moved)
        assert moved.shape[1] == order.length == len(place)
        np.testing.assert_array_equal(moved[:, place >= 0], x[:, place[place >= 0]])
        assert not moved[:, place < 0].any()
        np.testing.assert_array_equal(back, x)


def test_the_tile_order_of_the_specification():
    order = TokenTiles((4, 6), (2, 3), (1, 1)).order()[0]
    assert order[:12].tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]


def test_bounds_of_the_specification():
    tiles = {"q_tile": VIDEO_TILE, "kv_tile": VIDEO_TILE}
    sliding = simulate(VIDEO, window=VIDEO_WINDOW, **tiles)
    assert (sliding.total, sliding.visited.max()) == (900, 250)
    assert sliding.bound_max == pytest.approx(3.6)
    assert sliding.bound_mean == pytest.approx(5.44, abs=5e-3)
    assert not sliding.fully_block_sparse
    strided = simulate(VIDEO, window=VIDEO_WINDOW, stride=(16, 8, 8), **tiles)
    assert set(strided.visited) == {81}
    assert strided.bound_max == strided.bound_mean == pytest.approx(11.11, abs=2e-3)
    assert strided.fully_block_sparse
    assert strided.flop_bound == pytest.approx(30 * 48 * 80 / (18 * 24 * 24))

    for stride, most, whole in ((128, 17, False), (256, 16, True)):
        text = simulate((32768,), window=2048, stride=stride, q_tile=(128,), kv_tile=(128,))
        assert (text.visited.max(), text.fully_block_sparse) == (most, whole)

    for stride, most, mean in ((1, 9, 6.25), (2, 9, 6.25), (4, 4, 4)):
        small = simulate((8, 8), window=4, stride=stride, q_tile=(2, 2), kv_tile=(2, 2))
        assert (small.visited.max(), small.visited.mean(), small.total) == (most, mean, 16)


@by_case
def test_the_simulator_counts_what_the_plan_lists(case):
    grid, settings, q_tile, kv_tile = case
    q, k, _ = qkv(int(np.prod(grid)), heads=1, kv_heads=1, dim=2)
    method = js.gna(grid=grid, q_tile=q_tile, kv_tile=kv_tile, **settings)
    plan, _ = method.plan((), q, k)
    found = simulate(grid, q_tile=q_tile, kv_tile=kv_tile, **settings)
    counts = np.asarray(plan.kv_num_blocks)[0]
    assert sorted(found.visited) == sorted(counts[counts > 0])
    assert found.total == plan.grid.kv_blocks


def test_tiles_that_start_at_the_window_are_as_few_as_can_be():
    aligned = simulate((64,), window=8, q_tile=(8,), kv_tile=(8,))
    gathered = simulate((64,), window=8, q_tile=(8,), kv_tile=(8,), from_window_start=True)
    # 15 keys from a start that is no multiple of 8 but at the borders
    assert aligned.visited.tolist() == [2, 3, 3, 3, 3, 3, 3, 2]
    assert gathered.visited.tolist() == [2] * 8


def test_tiles_are_whole_where_the_test_says_so():
    """By brute force, and by the published closed form where it holds."""
    sizes = [(a, b) for a in (1, 2, 4, 6) for b in (1, 2, 3, 4)]
    said = by_closed_form = 0
    for length in range(2, 17):
        for window in range(2, length + 1):
            for stride in range(1, window + 1):
                axis, settings = Axis(length, window, stride), {"window": window, "stride": stride}
                seen = oracle.axis_pairs(length, **settings)
                for q_tile, kv_tile in sizes:
                    some, full = oracle.tile_sums(seen, q_tile, kv_tile)
                    whole = ((some == 0) | (some == full)).all()
                    found = fully_block_sparse(axis, q_tile, kv_tile)
                    assert found == whole, (axis, q_tile, kv_tile)
                    tiles = {"q_tile": q_tile, "kv_tile": kv_tile}
                    if q_tile % kv_tile == 0 and oracle.fully_block_sparse(
                        length, **settings, **tiles
                    ):
                        by_closed_form += 1
                        assert found, (axis, q_tile, kv_tile)
                    said += found
    assert said > by_closed_form > 1000
    assert not fully_block_sparse(Axis(16, 16, is_causal=True), 4, 4)
    # residues of different lengths
    assert fully_block_sparse(Axis(32, 8, 8, dilation=2), 4, 4)
    assert not fully_block_sparse(Axis(33, 8, 8, dilation=2), 4, 4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_queries_that_see_a_key_are_those_of_the_closed_form(is_causal):
    for length in range(2, 25):
        for window in range(2, length + 1):
            for stride in range(1, window + 1):
                axis = Axis(length, window, stride, is_causal=is_causal)
                first, last = axis.window_of(np.arange(length), length)
                index = np.arange(length)
                seen = (first[:, None] <= index) & (index <= last[:, None])
                for j in range(length):
                    start, end = oracle.queries_of_key(
                        j, length=length, window=window, stride=stride, is_causal=is_causal
                    )
                    assert np.flatnonzero(seen[:, j]).tolist() == list(range(start, end))


def test_a_video_is_planned_without_anything_quadratic():
    method = js.gna(grid=VIDEO, window=VIDEO_WINDOW, q_tile=VIDEO_TILE, kv_tile=VIDEO_TILE)
    tokens = int(np.prod(VIDEO))
    q = jax.ShapeDtypeStruct((tokens, 1, 2), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda q: method.plan((), q, q)[0])(q)
    # 900 tiles of queries and at most 250 of keys for each
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    assert max(sizes) <= 900 * 250
    plan, _ = jax.jit(lambda q: method.plan((), q, q))(jnp.zeros(q.shape))
    assert plan.kv_indices.shape == (1, 900, 250)
    assert int(plan.kv_num_blocks.sum()) == int(900 * 900 / 5.440038684719536 + 0.5)


def test_whole_tiles_are_attended_to_without_a_mask(monkeypatch):
    """With aligned strides nothing is hidden in any tile, and the mask is not even made."""
    monkeypatch.setattr(Neighborhood, "visible", None)
    settings = {"window": (4, 6), "stride": (4, 2)}
    method = js.gna(grid=(8, 12), q_tile=(4, 2), kv_tile=(4, 2), **settings)
    q, k, v = qkv(96)
    out = run(method, q, k, v, **PLAIN)
    expected = dense(q, k, v, oracle.pairs((8, 12), **settings))
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    # nor where every window is all there is, whatever the tiles
    everything = run(js.gna(grid=(8, 12), stride=(3, 1)), q, k, v, **PLAIN)
    np.testing.assert_allclose(everything, dense(q, k, v, np.ones((96, 96)))[0], atol=2e-6)


def test_whole_tiles_hide_places_that_no_key_fills():
    settings = {"window": (10, 6), "stride": (1, 2)}
    method = js.gna(grid=(10, 12), q_tile=(4, 2), kv_tile=(4, 2), **settings)
    q, k, v = qkv(120)
    assert simulate((10, 12), q_tile=(4, 2), kv_tile=(4, 2), **settings).fully_block_sparse
    out = run(method, q, k, v, **PLAIN)
    expected = dense(q, k, v, oracle.pairs((10, 12), **settings))
    np.testing.assert_allclose(out, expected[0], atol=2e-6)


def test_a_causal_window_of_all_tokens_is_causal_attention():
    q, k, v = qkv(100)
    out = run(js.gna(is_causal=True, stride=7), q, k, v, **PLAIN)
    np.testing.assert_allclose(out, dense(q, k, v, np.tri(100))[0], atol=2e-6)


def test_extra_tokens_are_part_of_one_softmax():
    q, k, v = qkv(60)
    _, extra_k, extra_v = qkv(60, 7, seed=1)
    more = {"extra_k": extra_k, "extra_v": extra_v}
    out, lse = run(js.gna(window=8), q, k, v, return_lse=True, **more, **PLAIN)
    seen = np.concatenate([oracle.axis_pairs(60, window=8), np.ones((60, 7), bool)], 1)
    together = [np.concatenate(x) for x in ((k, extra_k), (v, extra_v))]
    expected = dense(q, *together, seen)
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=2e-6)


def test_axis_tiles_of_ragged_residues_are_counted_to_their_own_end():
    # residues of 9, 9 and 8 tokens, in tiles of 4: the last has no third tile
    first, count = axis_tiles(Axis(26, 4, dilation=3), 4, 4)
    assert count.tolist() == [[2, 3, 2], [2, 3, 2], [2, 2, 0]]
    assert first[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window=0 must be a positive int"),
        ({"window": 1}, "window=1 on axis 0 must be at least 2"),
        ({"window": 4, "stride": 5}, "stride=5 must be at most 4"),
        ({"window": 4, "stride": 0}, "stride=0"),
        ({"window": 4, "dilation": 0}, "dilation=0"),
        ({"window": (4, 4)}, r"window=\(4, 4\) is for 2 axes; pass grid"),
        ({"grid": (8, 8), "window": (4, 9)}, "window=9 on axis 1 must be at most 8"),
        ({"grid": (8, 8), "window": 3, "dilation": 4}, "window=3 on axis 0 must be at most 2"),
        ({"grid": (8, 8), "window": (4,)}, r"grid=\(8, 8\), window=\(4,\): give one size per axis"),
        ({"grid": (8, 0), "window": 4}, "grid=0"),
        ({"grid": (8, 8), "q_tile": (4,)}, r"q_tile=\(4,\)"),
        ({"grid": (8, 8), "kv_tile": (4, 0)}, "kv_tile=0"),
        ({"grid": (2, 2, 2, 2)}, "q_tile=None: a grid of 4 axes has no default tile"),
        ({"grid": ()}, "a grid of 0 axes"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.gna(**arguments)


@pytest.mark.parametrize("method", [js.gna(window=4), js.fna(window=4)], ids=["gna", "fna"])
def test_known_positions_are_those_of_the_grid(method):
    """Others are not quietly taken for the grid's own."""
    q, k, v = qkv(64)
    with pytest.raises(ValueError, match=r"must be 0 to 63: .* Leave positions out"):
        js.sparse_attention(q, k, v, method, positions=on_device(np.arange(64) + 100, jnp.int32))
    with pytest.raises(ValueError, match="must be consecutive in each sequence"):
        method.plan((), q, k, positions=on_device(np.arange(64)[::-1], jnp.int32))
    with pytest.raises(ValueError, match=r"positions has shape \(60,\)"):
        method.plan((), q, k, positions=jnp.arange(60))
    plan, _ = method.plan((), q, k, positions=jnp.arange(64))
    np.testing.assert_array_equal(plan.to_dense(), method.plan((), q, k)[0].to_dense())


def test_tokens_that_are_not_the_grid_are_refused(without_shape_checks):
    q, k, v = qkv(64)
    method = js.gna(grid=(8, 8), window=4)
    with pytest.raises(ValueError, match="q has 60 tokens and k 64"):
        js.sparse_attention(q[:60], k, v, method)
    with pytest.raises(ValueError, match=r"grid=\(8, 8\) has 64 tokens; q and k have 60"):
        method.plan((), q[:60], k[:60])
    with pytest.raises(ValueError, match="window=80 on axis 0 must be at most 64"):
        js.sparse_attention(q, k, v, js.gna(window=80))
    with pytest.raises(ValueError, match="covers 64 tokens; the input has 60"):
        js.attend(q[:60], k, v, mask=js.masks.neighborhood((8, 8), window=4))
    with pytest.raises(ValueError, match="covers 60 tokens; the input has 64"):
        js.sparse_attention(q, k, v, method, mask=js.masks.segments(jnp.zeros(60, jnp.int32)))
    with pytest.raises(ValueError, match="extra_v=None: extra_k and extra_v go together"):
        js.sparse_attention(q, k, v, method, extra_k=k)
    with pytest.raises(ValueError, match="extra_k has 3 tokens and extra_v 2; they must agree"):
        js.sparse_attention(q, k, v, method, extra_k=k[:3], extra_v=v[:2])
