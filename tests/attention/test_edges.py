"""Inputs at the edge: single tokens, huge and infinite logits, broken numbers, empty lists."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import on_device, qkv

CAUSAL = js.masks.causal()
SIZES = {"q_len": 40, "kv_len": 40, "block_q": 8, "block_kv": 8}
both = pytest.mark.parametrize("implementation", ["reference", "xla"])


@partial(jax.jit, static_argnames=("implementation", "softcap"))
def value_and_gradients(q, k, v, plan=None, *, softcap=None, implementation, **arrays):
    def loss(q, k, v):
        options = {"softcap": softcap, "implementation": implementation, **arrays}
        out, lse = js.attend(q, k, v, plan, return_lse=True, **options)
        seen = ~jnp.isneginf(lse)
        return jnp.sin(out).sum() + jnp.where(seen, lse, 0.0).sum(), (out, lse)

    gradients, outputs = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return *outputs, *gradients


@jax.jit
def curvature(q, k, v, plan):
    def slope(q):
        gradient = jax.grad(lambda q: js.attend(q, k, v, plan, implementation="xla").sum())
        return jnp.sin(gradient(q)).sum()

    return jax.grad(slope)(q)


def assert_equal_to_the_reference(q, k, v, plan=None, **options):
    got = value_and_gradients(q, k, v, plan, implementation="xla", **options)
    expected = value_and_gradients(q, k, v, plan, implementation="reference", **options)
    for mine, true in zip(got, expected, strict=True):
        finite = np.isfinite(true)
        np.testing.assert_array_equal(np.isfinite(mine), finite)
        size = max(1.0, np.abs(np.asarray(true)[finite]).max(initial=0.0))
        np.testing.assert_allclose(
            np.asarray(mine)[finite], np.asarray(true)[finite], rtol=0, atol=3e-5 * size
        )
    return got


# narrower ones go several at a time, and a list ends among them
@pytest.mark.parametrize("block", [8, 128])
def test_lists_end_one_after_the_other(block):
    """Rows go on side by side: what a list is over for has no say in its row any more."""
    length = 5 * block
    counts = jnp.array([[0, 3, 1, 5, 2], [4, 1, 5, 0, 1]])
    ids = on_device(np.argsort(np.random.default_rng(0).random((2, 5, 5))), jnp.int32)
    plan = js.BlockMask.from_lists(
        ids, counts, q_len=length, kv_len=length, block_q=block, block_kv=block
    )
    q, k, v = qkv(length, heads=2, dim=8)
    out, *_ = assert_equal_to_the_reference(q, k, v, plan)
    *skipped, kept = js.attend_skipping(q, k, v, plan, threshold=0.0, implementation="xla")
    np.testing.assert_allclose(skipped[0], out, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(kept.kv_num_blocks, plan.kv_num_blocks)
    weights = qkv(length, heads=2, dim=8, seed=1)[0]

    def slope(implementation, q, k, v):
        def loss(q):
            out = js.attend(q, k, v, plan, implementation=implementation)
            return (jnp.sin(out) * weights).sum()

        return (jax.grad(loss)(q) * weights).sum()

    second = [jax.jit(jax.grad(partial(slope, x)))(q, k, v) for x in ("xla", "reference")]
    np.testing.assert_allclose(*second, rtol=0, atol=3e-5)


@pytest.mark.newest
def test_second_derivatives_in_bfloat16():
    """Floats of 16 bits are read as bits, without a derivative; a second one must not notice."""
    q, k, v = qkv(40, dtype=jnp.bfloat16)

    def slope(implementation, q, k, v):
        def loss(q, k, v):
            out = js.attend(q, k, v, mask=CAUSAL, implementation=implementation)
            return (out.astype(jnp.float32) ** 2).sum()

        gradients = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
        return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in gradients)

    second = jax.jit(jax.grad(slope, argnums=(1, 2, 3)), static_argnums=0)
    exact = second("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    for mine, true in zip(second("xla", q, k, v), exact, strict=True):
        mine, true = np.asarray(mine, np.float32), np.asarray(true)
        # some roundings to bf16 on the way: of the output, and of both derivatives
        assert np.linalg.norm(mine - true) < 2.0**-6 * np.linalg.norm(true)


@pytest.mark.parametrize(
    "sizes",
    [
        {"q_len": 1},
        {"q_len": 1, "kv_len": 300},
        {"q_len": 300, "kv_len": 1},
        {"q_len": 5, "kv_len": 3, "dim": 1},
        {"q_len": 9, "heads": 1, "kv_heads": 1, "dim": 1, "v_dim": 3},
        {"q_len": 7, "heads": 6, "kv_heads": 3, "batch": (2, 3)},
    ],
    ids=str,
)
def test_small_sizes(sizes):
    assert_equal_to_the_reference(*qkv(**sizes), mask=CAUSAL)


def test_huge_logits_choose_the_largest():
    q, k, v = qkv(40)
    got = assert_equal_to_the_reference(1e6 * q, k, v, mask=CAUSAL)
    assert all(jnp.isfinite(x).all() for x in got)
    logits = np.einsum("qhd,khd->hqk", q, np.repeat(k, 2, axis=1))
    best = np.where(np.tril(np.ones((40, 40), bool)), logits, -np.inf).argmax(-1)
    for head in range(4):
        np.testing.assert_allclose(got[0][:, head], v[best[head], head // 2], atol=1e-6)


def test_products_past_the_range_of_float16_are_exact():
    q, k, v = qkv(40, dtype=jnp.float16)
    out, lse = js.attend(q * 500, k * 500, v, mask=CAUSAL, return_lse=True, implementation="xla")
    single = [x.astype(jnp.float32) for x in (q * 500, k * 500, v)]
    expected = js.attend(*single, mask=CAUSAL, return_lse=True, implementation="reference")
    assert float(lse.max()) > 65_504
    np.testing.assert_allclose(lse, expected[1], rtol=1e-6)
    np.testing.assert_allclose(out, expected[0], atol=2 * 2**-10 * float(jnp.abs(v).max()))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_bias_of_minus_infinity_hides(softcap):
    q, k, v = qkv(40)
    bias = jnp.zeros((40, 40)).at[3].set(-jnp.inf).at[:, 7].set(-jnp.inf)
    out, lse, *gradients = assert_equal_to_the_reference(q, k, v, bias=bias, softcap=softcap)
    assert not out[3].any()
    assert jnp.isneginf(lse[:, 3]).all()
    assert all(jnp.isfinite(x).all() for x in gradients)
    assert not gradients[1][7].any()
    assert not gradients[2][7].any()


@both
@pytest.mark.parametrize("sink", [0.0, -jnp.inf])
def test_sinks_beside_rows_without_keys(sink, implementation):
    q, k, v = qkv(40)
    ids = jnp.where(jnp.arange(40) < 5, -1, 0)
    sinks = on_device([sink, 1.0, sink, 0.5])
    options = {"mask": js.masks.segments(ids), "implementation": implementation}
    out, lse, *gradients = value_and_gradients(q, k, v, sinks=sinks, **options)
    assert not out[:5].any()
    np.testing.assert_array_equal(lse[:, :5], jnp.broadcast_to(sinks[:, None], (4, 5)))
    assert all(jnp.isfinite(x).all() for x in gradients)
    plain, plain_lse = js.attend(q, k, v, return_lse=True, **options)
    with_sink = jnp.logaddexp(plain_lse, sinks[:, None])
    share = jnp.exp(plain_lse - with_sink)[:, 5:].T[..., None]
    np.testing.assert_allclose(out[5:], plain[5:] * share, atol=2e-6)


@both
@pytest.mark.parametrize("broken", [jnp.nan, jnp.inf, -jnp.inf], ids=str)
def test_broken_keys_and_values_reach_only_the_rows_that_visit_them(broken, implementation):
    q, k, v = qkv(40)
    tiles = np.ones((1, 5, 5), bool)
    tiles[:, 1:, 2] = False  # the tile of token 18 is visited by the queries 0 to 7 alone
    plan = js.BlockMask.from_dense(on_device(tiles), **SIZES)

    @jax.jit
    def run(q, k, v):
        return js.attend(q, k, v, plan, implementation=implementation)

    broken_k, broken_v = k.at[18].set(broken), v.at[18].set(broken)
    out, clean = run(q, broken_k, broken_v), run(q, k, v)
    np.testing.assert_allclose(out[8:], clean[8:], atol=1e-6)
    assert not jnp.isfinite(out[:8]).all(-1).any()
    slope = jax.jit(jax.grad(lambda q, k, v: run(q, k, v)[8:].sum()))
    gradient, expected = slope(q, broken_k, broken_v), slope(q, k, v)
    np.testing.assert_allclose(gradient[8:], expected[8:], atol=4e-6)


def test_a_row_of_tiles_with_an_empty_list_is_empty():
    q, k, v = qkv(40)
    plan = js.BlockMask.from_lists(jnp.zeros((1, 5, 0), int), jnp.zeros((1, 5), int), **SIZES)
    out, lse, *gradients = assert_equal_to_the_reference(q, k, v, plan)
    assert not out.any()
    assert jnp.isneginf(lse).all()
    assert not any(x.any() for x in gradients)


# of any negative number, the least is the harder one
@pytest.mark.parametrize("padding", [pytest.param(-1, marks=pytest.mark.slow), 10**9, -(2**31)])
def test_what_stands_past_the_count_does_not_matter(padding):
    q, k, v = qkv(40)
    lists = on_device([[[4, 0, 4, padding]] * 5])  # and block 4 twice
    counts = jnp.full((1, 5), 3)
    plan = js.BlockMask.from_lists(lists, counts, **SIZES)
    tiles = np.zeros((1, 5, 5), bool)
    tiles[..., [0, 4]] = True

    def clean(width):
        return js.BlockMask.from_dense(on_device(tiles), **SIZES, width=width)

    # the constructor itself takes lists as they are: padding must not matter to executors either
    raw = js.BlockMask(
        on_device([[[0, 4, padding]] * 5]), jnp.full((1, 5), 2), jnp.zeros((1,), bool),
        *SIZES.values(),
    )  # fmt: skip
    for other in (plan, raw):
        got = value_and_gradients(q, k, v, other, implementation="xla")
        # the width says how many narrow tiles go together, and so in which order sums are taken
        same = clean(other.kv_indices.shape[-1])
        expected = value_and_gradients(q, k, v, same, implementation="xla")
        jax.tree.map(np.testing.assert_array_equal, got, expected)

    got, expected = (curvature(q, k, v, plan) for plan in (raw, clean(3)))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_pyramid_under_a_mask_shows_nothing_hidden():
    q, k, v = qkv(16, dim=8, batch=(2,))
    tiles = on_device(np.eye(4, dtype=bool))[None]
    lists = js.BlockMask.from_dense(tiles, q_len=16, kv_len=16, block_q=4, block_kv=4)

    def run(k, v, **options):
        means = (x.reshape(2, 4, 4, 2, 8).mean(2) for x in (k, v))
        counts = jnp.full((2, 4, 2), jnp.log(4.0))
        pyramid = js.BlockPyramid.from_pooled(lists, *means, counts)
        return js.attend(q, k, v, pyramid, implementation="reference", **options)

    out = run(k, v, mask=CAUSAL)
    later = run(k.at[:, 8:].add(3.0), v.at[:, 8:].add(3.0), mask=CAUSAL)
    np.testing.assert_array_equal(out[:, :8], later[:, :8])
    assert float(jnp.abs(out[:, 8:] - later[:, 8:]).max()) > 0.1
    earlier = run(k.at[:, :4].add(3.0), v.at[:, :4].add(3.0), mask=CAUSAL)
    assert float(jnp.abs(out[:, 8:] - earlier[:, 8:]).max()) > 1e-3
    assert float(jnp.abs(run(k, v, softcap=0.5) - run(k, v)).max()) > 1e-3
    with pytest.raises(NotImplementedError, match="pooled column"):
        run(k, v, bias=jnp.zeros((16, 16)))


@pytest.mark.newest
def test_sixty_four_bit_numbers_elsewhere_change_nothing():
    with jax.enable_x64(True):
        q, k, v = (x.astype(jnp.float32) for x in qkv(40, 56))

        def total(q, bias, implementation):
            return js.attend(
                q,
                k,
                v,
                mask=js.masks.causal(),
                bias=bias,
                score_mod=lambda s, b, h, i, j: s + 0.1 * h,
                implementation=implementation,
            ).sum()

        bias = jnp.ones((56,), jnp.float32)
        gradients = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)
        got, want = (gradients(q, bias, name) for name in ("xla", "reference"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)
        assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
        second = jax.jit(jax.grad(lambda q: (jax.grad(total)(q, bias, "xla") ** 2).sum()))(q)
        assert second.dtype == jnp.float32
        # a bias may be of them, and has its gradient in its own dtype
        wide = gradients(q, bias.astype(jnp.float64), "xla")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), wide, got)
        assert wide[1][1].dtype == jnp.float64
