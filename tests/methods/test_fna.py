"""FNA against its oracle, and the figures of its specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.masks.fna import relative_bias
from jsparse.masks.neighborhood import Axis
from jsparse.types import Frame
from tests.inputs import on_device, qkv
from tests.oracles import fna as oracle

# every pair by itself, where what is asked is not how tiles are computed
PLAIN = {"implementation": "reference"}


def run(method, q, k, v, **options):
    """Attention as one program: many small ones take longer to compile than to run."""
    return jax.jit(lambda *x: js.sparse_attention(*x, method, **options))(q, k, v)


def line(length):
    """The specification's data: q = 1, k = ln(j + 1), v = j."""
    j = np.arange(length)
    columns = np.ones(length), np.log(j + 1), j
    return [on_device(x, jnp.float32)[:, None, None] for x in columns]


def dense(q, k, v, grid, *, window, dilation=1, is_causal=False):
    """What the oracle says of settings that are one number for all axes or one for each."""
    per_axis = [
        x if isinstance(x, tuple) else (x,) * len(grid) for x in (window, dilation, is_causal)
    ]
    return oracle.attention(*map(np.asarray, (q, k, v)), grid, *per_axis, q.shape[-1] ** -0.5)


def windows(length, **settings):
    first, last = Axis(length, **settings).window_of(np.arange(length), length)
    return first, last + 1


def pairs(grid, **settings):
    """bool [tokens, tokens] by the mask."""
    tokens = int(np.prod(grid))
    mask = js.masks.neighborhood(grid, **settings).flatten_batch(())
    index, frame = jnp.arange(tokens), Frame(tokens, tokens)
    return np.asarray(jax.jit(lambda i, j: mask.visible(i, j, frame))(index[:, None], index))


def test_windows_and_outputs_of_the_specification():
    starts, ends = windows(8, window=4)
    assert starts.tolist() == [0, 0, 0, 1, 2, 3, 4, 4]
    assert [oracle.neighbors(i, length=8, window=4)[0] for i in range(8)] == starts.tolist()
    assert (ends - starts == 4).all()
    out, lse = run(js.fna(window=4), *line(8), scale=1.0, return_lse=True, **PLAIN)
    expected = [2, 2, 2, 2.8571, 3.7778, 4.7273, 5.6923, 5.6923]
    np.testing.assert_allclose(out[:, 0, 0], expected, atol=6e-5)
    expected = [2.3026, 2.3026, 2.3026, 2.6391, 2.8904, 3.091, 3.2581, 3.2581]
    np.testing.assert_allclose(lse[0], expected, atol=6e-5)


def test_dilated_neighbors_and_outputs_of_the_specification():
    found = [set(oracle.neighbors(i, length=7, window=3, dilation=2)) for i in range(7)]
    odd = {1, 3, 5}
    assert found == [{0, 2, 4}, odd, {0, 2, 4}, odd, {2, 4, 6}, odd, {2, 4, 6}]
    seen = pairs((7,), window=3, dilation=2)
    assert [set(np.flatnonzero(row).tolist()) for row in seen] == found
    out = run(js.fna(window=3, dilation=2), *line(7), scale=1.0, **PLAIN)[:, 0, 0]
    expected = [2.8889, 3.6667, 2.8889, 3.6667, 4.5333, 3.6667, 4.5333]
    np.testing.assert_allclose(out, expected, atol=6e-5)


@pytest.mark.parametrize(
    ("grid", "settings", "tiles"),
    [
        ((50,), {"window": 5}, {}),
        ((26,), {"window": 4, "dilation": 4}, {"q_tile": (4,), "kv_tile": (2,)}),
        (
            (7, 9),
            {"window": (3, 4), "dilation": (2, 1), "is_causal": (False, True)},
            {"q_tile": (2, 2), "kv_tile": (1, 4)},
        ),
        # as in a video: causal in time, all of a picture
        ((4, 3, 5), {"window": (2, 3, 5), "is_causal": (True, False, False)}, {}),
    ],
    ids=str,
)
def test_output_and_lse_are_those_of_the_oracle(grid, settings, tiles):
    q, k, v = qkv(int(np.prod(grid)), heads=4, kv_heads=2, dim=8, v_dim=6)
    out, lse = run(js.fna(grid=grid, **settings, **tiles), q, k, v, return_lse=True)
    expected = dense(q, k, v, grid, **settings)
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=2e-6)


def test_it_is_gna_with_groups_of_one():
    grid, settings = (7, 9), {"window": (3, 4), "q_tile": (2, 2), "kv_tile": (1, 4)}
    q, k, v = qkv(63)
    methods = js.fna(grid=grid, **settings), js.gna(grid=grid, stride=1, **settings)
    mine, other = (run(method, q, k, v, **PLAIN) for method in methods)
    np.testing.assert_array_equal(mine, other)
    plan, _ = js.fna(grid=(16, 16), window=4).plan((), *qkv(256)[:2])
    assert (plan.block_q, plan.block_kv) == (64, 64)


@pytest.mark.parametrize("is_causal", [False, True])
def test_windows_of_whole_axes_are_plain_attention(is_causal):
    q, k, v = qkv(50)
    out = run(js.fna(window=50, is_causal=is_causal), q, k, v, **PLAIN)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    if not is_causal:
        whole = run(js.fna(grid=(5, 10), window=(5, 10)), q, k, v, **PLAIN)
        np.testing.assert_allclose(whole, out, atol=2e-6)


def test_a_dilation_is_the_same_on_every_so_manieth_token():
    """Also where it does not divide the length."""
    q, k, v = qkv(26)
    out = run(js.fna(window=3, dilation=4), q, k, v, **PLAIN)
    for residue in range(4):
        own = slice(residue, None, 4)
        length = len(range(26)[own])
        alone, *_ = dense(q[own], k[own], v[own], (length,), window=3)
        np.testing.assert_allclose(out[own], alone, atol=2e-6)


def test_axes_are_independent():
    settings = {"window": (3, 4), "dilation": (2, 1), "is_causal": (False, True)}

    rows, columns = (
        pairs((length,), **{name: values[axis] for name, values in settings.items()})
        for axis, length in enumerate((7, 9))
    )
    np.testing.assert_array_equal(pairs((7, 9), **settings), np.kron(rows, columns))
    assert (pairs((7, 9), window=(3, 4)).sum(1) == 12).all()

    # a window that is a whole axis: rows of tokens that see each other
    by_row = np.kron(pairs((7,), window=3), np.ones((9, 9), bool))
    np.testing.assert_array_equal(pairs((7, 9), window=(3, 9)), by_row)


@pytest.mark.parametrize("is_causal", [False, True])
def test_queries_that_see_a_key_are_those_of_the_closed_form(is_causal):
    for length in range(2, 33):
        for window in range(2, length + 1):
            first, end = windows(length, window=window, is_causal=is_causal)
            index = np.arange(length)
            seen = (first[:, None] <= index) & (index < end[:, None])
            for j in range(length):
                box = oracle.queries_of_key(j, length=length, window=window, is_causal=is_causal)
                assert np.flatnonzero(seen[:, j]).tolist() == list(range(*box))


def test_inner_outputs_move_with_the_tokens():
    q, k, v = qkv(80)
    method = js.fna(window=7)
    out = run(method, q, k, v, **PLAIN)
    moved = run(method, *(jnp.roll(x, 1, axis=0) for x in (q, k, v)), **PLAIN)
    # windows of 7 that touch neither border, before and after, nor what came round
    np.testing.assert_allclose(moved[5:76], out[4:75], atol=2e-6)


def test_gradients_of_values_are_column_sums_of_the_weights():
    grid, settings = (7, 9), {"window": (3, 4), "dilation": (1, 2)}
    q, k, v = qkv(63, heads=2, kv_heads=2, dim=8)
    method = js.fna(grid=grid, q_tile=(2, 2), kv_tile=(4, 1), **settings)
    gradient = jax.jit(jax.grad(lambda v: js.sparse_attention(q, k, v, method).sum()))(v)
    _, _, weights = dense(q, k, v, grid, **settings)
    expected = np.broadcast_to(weights.sum(1).T[..., None], gradient.shape)
    np.testing.assert_allclose(gradient, expected, atol=4e-6)
    np.testing.assert_allclose(gradient.sum(0), np.full((2, 8), 63.0), rtol=1e-5)


def test_a_table_of_relative_positions_is_a_change_of_the_logits():
    """Each entry counts for its head and its distance, near borders and dilated too."""
    grid, window, dilation = (7, 8), (3, 4), (2, 1)
    q, k, v = qkv(56, heads=4, kv_heads=2, dim=8)
    table = np.random.default_rng(0).normal(size=(4, 5, 7))
    axes = {"grid": grid, "dilation": dilation}
    method = js.fna(**axes, window=window, q_tile=(2, 4), kv_tile=(2, 4))

    @jax.jit
    def both(table):
        def attended(table):
            changed = relative_bias(table, **axes)
            out = js.sparse_attention(q, k, v, method, score_mod=changed, **PLAIN)
            return (out * jnp.cos(jnp.arange(8.0))).sum(), out

        return jax.value_and_grad(attended, has_aux=True)(table)

    (value, out), gradient = both(on_device(table, jnp.float32))
    tensors = [np.asarray(x, np.float64) for x in (q, k, v)]

    def expected(table):
        return oracle.attention(
            *tensors, grid, window, dilation, (False, False), 8**-0.5, table=table
        )[0]

    np.testing.assert_allclose(out, expected(table), atol=4e-6)
    # the change along one direction, by a difference in double precision
    step = 1e-6 * np.random.default_rng(1).normal(size=table.shape)
    after = (expected(table + step) * np.cos(np.arange(8))).sum()
    before = (expected(table - step) * np.cos(np.arange(8))).sum()
    np.testing.assert_allclose((gradient * step / 1e-6).sum(), (after - before) / 2e-6, atol=1e-4)


def test_a_table_of_other_offsets_is_refused():
    with pytest.raises(ValueError, match=r"table has shape \(4, 6\); of a grid of 1 axes"):
        relative_bias(jnp.zeros((4, 6)), grid=(8,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window=1 on axis 0 must be at least 2"),
        ({"grid": (8, 8), "window": 9}, "window=9 on axis 0 must be at most 8"),
        ({"grid": (8, 8), "window": 5, "dilation": 2}, "window=5 on axis 0 must be at most 4"),
        ({"grid": (8, 8), "dilation": (1, 2, 1)}, r"dilation=\(1, 2, 1\): give one size per axis"),
        ({"is_causal": (True, False)}, "is_causal=.* pass grid"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.fna(**arguments)


def test_queries_without_their_keys_are_refused():
    q, k, v = qkv(40, 64)
    with pytest.raises(ValueError, match="q has 40 tokens and k 64"):
        js.sparse_attention(q, k, v, js.fna(window=4))
