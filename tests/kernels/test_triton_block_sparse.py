"""The Triton kernels, computed by XLA program by program; compilers see them in benchmarks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention.planned import masked
from jsparse.testing import CASES, AttentionSuite, Problem
from jsparse.types import block_mask
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import triton
from tests.inputs import leveled, on_device, qkv

# the others differ from these in what no line of the kernels is for
QUICK = (
    "one_kv_head v_dim fewer_queries rectangular_tiles columns lists_per_kv_head causal_ragged "
    "segments bias_full bias_queries score_mod scale_array two_batch_axes empty_rows hidden_rows"
).split()
attend = functools.partial(js.attend, implementation="triton")
interpreted = pytest.mark.usefixtures("interpreter")


@pytest.fixture
def interpreter():
    # around the whole test: gradients are traced after the call that they belong to
    with _compat.triton_interpreter():
        yield


@pytest.mark.newest
@interpreted
class TestTriton(AttentionSuite):
    attention = staticmethod(attend)

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            slow = [pytest.mark.slow]
            cases = [
                pytest.param(case, id=case.name, marks=[] if case.name in QUICK else slow)
                for case in CASES
            ]
            metafunc.parametrize("case", cases)


def close(got, expected, tolerance):
    """Every array within `tolerance` of the largest entry of the expected one."""
    for mine, true in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        mine, true = np.asarray(mine, np.float64), np.asarray(true, np.float64)
        finite = np.isfinite(true)
        np.testing.assert_array_equal(np.isfinite(mine), finite)
        size = max(1.0, np.abs(true[finite]).max(initial=0.0))
        np.testing.assert_allclose(mine[finite], true[finite], rtol=0, atol=tolerance * size)


def value_and_gradients(loss, implementation, *operands):
    """Of `loss(implementation, *operands)`, by every operand."""
    numbers = tuple(range(len(operands)))
    run = jax.value_and_grad(functools.partial(loss, implementation), argnums=numbers)
    return jax.jit(run)(*operands)


@interpreted
@pytest.mark.parametrize(
    "pieces",
    [None, *(pytest.param(p, marks=pytest.mark.slow) for p in ((16, 16), (32, 16))), (16, 32)],
)
def test_everything_at_once_in_pieces_of_tiles(pieces, monkeypatch):
    """Programs compute a part of a tile, and read tiles part by part."""
    if pieces:
        config = triton.Config(*pieces)
        monkeypatch.setattr(triton, "default_config", lambda *sizes, **which: config)
    case = next(case for case in CASES if case.name == "everything")
    sizes = {"block_q": 32, "block_kv": 64, "q_len": 80, "kv_len": 150, "bias": (2, 1, 1, 150)}
    problem = Problem(dataclasses.replace(case, **sizes))
    if pieces:
        got = problem.value_and_gradients(attend)(problem.operands)
        close(got, problem.exact(), problem.tolerance())
    else:
        got = jax.jit(lambda o: problem.run(attend, o))(problem.operands)
        close(got, problem.exact()[:2], problem.tolerance())


@interpreted
@pytest.mark.parametrize(
    "changes",
    [
        # two rows to a query make 20, and the last tile is not full
        {"block_q": 10, "list_heads": 2, "bias": (2, 4, 41, 59)},
        {"block_q": 24, "block_kv": 3, "bias": (2, 4, 41, 1)},
    ],
    ids=["packed", "columns"],
)
def test_tiles_of_any_rows_are_filled_up(changes):
    case = next(case for case in CASES if case.name == "everything")
    problem = Problem(dataclasses.replace(case, **changes))
    got = problem.value_and_gradients(attend)(problem.operands)
    close(got, problem.exact(), problem.tolerance())


@interpreted
def test_rows_that_fill_up_a_tile_give_nothing_however_large_their_logits():
    q, k, v = qkv(20, 16, heads=1, kv_heads=1)
    plan = js.block_mask(js.masks.causal(), 20, 16, block_q=20, block_kv=16)

    def loss(implementation, q, k, v):
        options = {"score_mod": lambda s, *_: s + 200.0, "implementation": implementation}
        return jnp.sin(js.attend(q, k, v, plan, **options)).sum()

    got = value_and_gradients(loss, "triton", q, k, v)
    # logits around 200 have an error of half a unit of theirs
    close(got, value_and_gradients(loss, "reference", q, k, v), 200 * 2.0**-23)


@interpreted
def test_a_large_group_is_packed_in_parts():
    q, k, v = qkv(16, 32, heads=48, kv_heads=1)
    plan = js.block_mask(js.masks.causal(), 16, 32, block_q=8, block_kv=16)
    assert js.explain(q, k, v, plan).implementation == "triton"
    out = jax.jit(lambda *x: attend(*x, plan, mask=js.masks.causal()))(q, k, v)
    close(out, js.attend(q, k, v, plan, mask=js.masks.causal(), implementation="reference"), 2e-5)


@pytest.mark.newest
@interpreted
def test_what_is_said_pair_by_pair():
    """Tiles of a dense mask, of a bias and of an array that a score_mod looks into."""
    q, k, v = qkv(48, 70, heads=2, kv_heads=1, batch=(2,))
    rng = np.random.default_rng(0)
    mask = js.masks.causal() & js.masks.dense(on_device(rng.random((2, 1, 48, 70)) < 0.7))
    pairs = on_device(rng.normal(size=(48, 70)), jnp.float32)
    bias = on_device(rng.normal(size=(2, 48, 70)), jnp.bfloat16)
    slopes = on_device(rng.normal(size=2), jnp.float32)
    weights = on_device(rng.normal(size=q.shape), jnp.float32)
    tiles = on_device(rng.random((2, 2, 3, 3)) < 0.8)
    plan = js.BlockMask.from_dense(tiles, q_len=48, kv_len=70, block_q=16, block_kv=32)

    def loss(implementation, q, k, v, pairs, bias, slopes):
        def score_mod(logit, batch, head, q_index, kv_index):
            return logit * (1 + pairs[q_index, kv_index]) + slopes[head] * kv_index

        options = {"mask": mask, "bias": bias, "score_mod": score_mod}
        out = js.attend(q, k, v, plan, **options, implementation=implementation)
        return (out * weights).sum()

    operands = q, k, v, pairs, bias, slopes
    got = value_and_gradients(loss, "triton", *operands)
    expected = value_and_gradients(loss, "reference", *operands)
    assert [x.dtype for x in got[1]] == [x.dtype for x in operands]
    # sums of some hundred roundings; the bias's gradient is rounded to its 8 bits once more
    close(got[0], expected[0], 2e-5)
    for n, (mine, true) in enumerate(zip(got[1], expected[1], strict=True)):
        close(mine, true, 2**-8 if n == 4 else 2e-5)


@interpreted
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_16_bits(dtype):
    """Their error is that of the inputs' rounding; nothing of what is not listed is read."""
    q, k, v = qkv(64, 128, heads=2, kv_heads=1, dim=24, v_dim=40, dtype=dtype)
    tiles = on_device([[[True, False], [True, False]], [[True, False], [False, False]]])
    plan = js.BlockMask.from_dense(tiles, q_len=64, kv_len=128, block_q=32, block_kv=64)
    weights = on_device(np.random.default_rng(0).normal(size=(64, 2, 40)), jnp.float32)

    def loss(implementation, q, k, v):
        out, lse = js.attend(q, k, v, plan, return_lse=True, implementation=implementation)
        seen = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return (out.astype(jnp.float32) * weights).sum() + (seen * weights[:, :, 0].T).sum()

    unread = k.at[64:].set(jnp.nan), v.at[64:].set(jnp.nan)
    _, got = value_and_gradients(loss, "triton", q, *unread)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    _, want = value_and_gradients(loss, "reference", *exact)
    for mine, true in zip(got, want, strict=True):
        assert mine.dtype == dtype
        error = jnp.linalg.norm((mine.astype(jnp.float32) - true).ravel())
        # operands of the products are rounded once, at random, and so is the result
        assert error <= 2 * jnp.finfo(dtype).eps * jnp.linalg.norm(true.ravel())


@pytest.mark.newest
@interpreted
def test_second_derivatives():
    q, k, v = qkv(32, heads=2, kv_heads=1)

    def slope(implementation, q, k, v):
        def loss(*operands):
            out = js.attend(*operands, mask=js.masks.causal(), implementation=implementation)
            return jnp.sin(out).sum()

        return sum(jnp.sin(x).sum() for x in jax.grad(loss, argnums=(0, 1, 2))(q, k, v))

    got = value_and_gradients(slope, "triton", q, k, v)
    close(got, value_and_gradients(slope, "reference", q, k, v), 2e-4)


@pytest.mark.newest
@interpreted
def test_gradients_of_static_masks_turn_no_lists_round(monkeypatch):
    """Columns come from the mask: of each sequence, mapped, and with groups packed into rows."""
    sizes = {"block_q": 8, "block_kv": 16}
    method = masked(
        lambda queries: js.masks.sinks(5) | js.masks.sliding_window(left=20, offset=queries.offset),
        **sizes,
    )
    q, k, v = qkv(40, 60, heads=4, kv_heads=2, batch=(3, 1))
    positions = on_device([[3], [20], [9]])[..., None] + jnp.arange(40)

    def loss(implementation, q, k, v):
        def alone(q, k, v, positions):
            options = {"positions": positions, "implementation": implementation}
            return js.sparse_attention(q, k, v, method, **options)

        # and of a mask without a method
        short = [x[0, 0, 24:] for x in (q, k, v)]
        more = js.attend(*short, mask=js.masks.causal(), implementation=implementation)
        return jnp.sin(jax.vmap(alone)(q, k, v, positions)).sum() + jnp.sin(more).sum()

    expected = value_and_gradients(loss, "reference", q, k, v)
    counted = []
    monkeypatch.setattr(block_mask, "invert", lambda *lists: counted.append(lists))
    close(value_and_gradients(loss, "triton", q, k, v), expected, 2e-5)
    assert not counted


@interpreted
@pytest.mark.parametrize(("of_q", "of_plan"), [(0, None), (None, 0), (0, 0)])
def test_a_plan_that_carries_its_inverse_may_be_mapped_or_not(of_q, of_plan, monkeypatch):
    """Each sequence of each call has lists of its own: none may be taken for another's."""
    q, k, v = qkv(64, heads=2, kv_heads=1, batch=(3, 2))
    k, v = k[0], v[0]
    tiles = np.random.default_rng(0).random((3, 2, 1, 4, 4)) < 0.5
    sizes = {"q_len": 64, "kv_len": 64, "block_q": 16, "block_kv": 16}
    plans = js.BlockMask.from_dense(on_device(tiles), **sizes).with_inverse()
    q = q if of_q == 0 else q[0]
    plans = plans if of_plan == 0 else jax.tree.map(lambda x: x[0], plans)

    def gradients(q, plan, implementation):
        def loss(q, k, v):
            return jnp.sin(js.attend(q, k, v, plan, implementation=implementation)).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    def of(x, axis, call):
        return x if axis is None else jax.tree.map(lambda leaf: leaf[call], x)

    one_by_one = [
        gradients(of(q, of_q, call), of(plans, of_plan, call), "reference") for call in range(3)
    ]
    monkeypatch.setattr(block_mask, "invert", None)
    mapped = jax.vmap(functools.partial(gradients, implementation="triton"), (of_q, of_plan))
    close(jax.jit(mapped)(q, plans), jax.tree.map(lambda *x: np.stack(x), *one_by_one), 2e-5)


@interpreted
def test_the_choice_falls_on_it_where_mosaic_cannot():
    q, k, v = qkv(64)
    found = js.explain(q, k, v)
    assert found.implementation == "triton"
    assert set(found.refused) == {"mosaic"}


@interpreted
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_q": 144}, "16, 32, 64 or 128 queries, or of fewer than 16, not 144"),
        ({"block_kv": 48}, "16, 32, 64 or 128 keys, or of fewer than 16, not 48"),
        ({"dim": 257}, "up to 256, not 320"),
        ({"score_mod": lambda s, b, h, i, j: s + jnp.arange(99.0)[i - j + 49]}, "all pairs"),
        ({"score_mod": lambda s, b, h, i, j: jax.lax.erf(s)}, "does 'erf'"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(change, reason):
    sizes = {"block_q": 16, "block_kv": 16, "dim": 16, **change}
    q, k, v = qkv(48, heads=1, kv_heads=1, dim=sizes["dim"])
    sides = {name: sizes[name] for name in ("block_q", "block_kv")}
    tiles = jnp.ones((1, -(-48 // sides["block_q"]), -(-48 // sides["block_kv"])), bool)
    plan = js.BlockMask.from_dense(tiles, q_len=48, kv_len=48, **sides)
    with pytest.raises(NotImplementedError, match=reason):
        attend(q, k, v, plan, score_mod=change.get("score_mod"))


def test_without_a_gpu_it_is_refused():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(NotImplementedError, match="compute capability 8.0 or newer"):
        attend(*qkv(16))


@pytest.mark.newest
@interpreted
def test_tiles_are_skipped_as_the_reference_skips_them():
    """By whole tiles, under a rule; values of a skipped tile are not read, its logits are."""
    q, k, v = leveled(90, batch=(2,), v_dim=24)
    mask = js.masks.causal() & js.masks.segments(jnp.where(jnp.arange(90) < 37, 0, 1))
    plan = js.block_mask(js.masks.causal(), 90, 90, block_q=32, block_kv=16)
    bias = on_device(np.random.default_rng(0).normal(size=(4, 90, 1)), jnp.float32)
    thresholds = on_device([[0.0, 1e-3, 0.1, 1.0], [1.0, 0.3, 0.01, 0.0]])

    def loss(implementation, q, k, v, bias):
        options = {"mask": mask, "bias": bias, "implementation": implementation}
        out, lse, kept = js.attend_skipping(q, k, v, plan, threshold=thresholds, **options)
        return jnp.sin(out).sum() + jnp.cos(lse).sum(), (out, lse, kept)

    def run(implementation, *operands):
        function = functools.partial(loss, implementation)
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3), has_aux=True))(*operands)

    (got, aux), gradients = run("triton", q, k, v, bias)
    (expected, true_aux), true_gradients = run("reference", q, k, v, bias)
    tiles = np.asarray(aux[2].to_dense())
    np.testing.assert_array_equal(tiles, true_aux[2].to_dense())
    counts = tiles.sum((-1, -2))
    assert counts[0, 0] > counts[0, 3]
    assert counts[1, 0] < counts[1, 3]
    close((got, aux[:2], gradients), (expected, true_aux[:2], true_gradients), 2e-5)
    spoilt = v.at[:, 32:48].set(jnp.nan)
    out = run("triton", q, k, spoilt, bias)[0][1][0]
    broken = np.isnan(out).any(-1)
    rows = np.repeat(tiles[..., 2], 32, -1)[..., :90]
    np.testing.assert_array_equal(np.swapaxes(broken, 1, 2), rows)


@pytest.mark.newest
@interpreted
def test_who_has_a_say_in_what_is_skipped():
    k = jnp.repeat(on_device([9.0, 0.0, 0.0]), 16)[:, None, None] * jnp.ones((48, 1, 1))
    q = jnp.ones((20, 1, 1))
    plan = js.block_mask(js.masks.causal(offset=48), 20, 48, block_q=16, block_kv=16)

    def kept(q, mask=None):
        options = {"scale": 1.0, "mask": mask, "implementation": "triton"}
        return js.attend_skipping(q, k, k, plan, threshold=0.5, **options)[2].to_dense().tolist()

    first, every = [True, False, False], [True, True, True]
    # rows past the end of q, whose logits are all alike, have none
    assert kept(q) == [[first, first]]
    assert kept(q.at[17].set(-1.0)) == [[first, every]]
    assert kept(q.at[3].set(jnp.nan)) == [[every, first]]
    blind = js.masks.predicate(lambda b, h, q, kv: (q != 17) | (kv < 16))
    assert kept(q.at[17].set(-1.0), blind) == [[first, first]]
    late = js.masks.predicate(lambda b, h, q, kv: (q != 3) | (kv >= 32))
    assert kept(q, late) == [[[True, False, True], first]]


@interpreted
def test_tiles_too_large_to_decide_over_are_refused():
    q, k, v = qkv(128, heads=1, kv_heads=1, dim=128)
    options = {"threshold": 0.1, "implementation": "triton"}
    with pytest.raises(NotImplementedError, match="at most 64 queries by 32 keys of 128 float32"):
        js.attend_skipping(q, k, v, **options)
    # its running maximum is taken before the scale
    q, k, v = qkv(32, dim=16)
    plan = js.block_mask(js.masks.causal(), 32, 32, block_q=16, block_kv=16)
    with pytest.raises(NotImplementedError, match="scales above 0, not -1.0"):
        js.attend_skipping(q, k, v, plan, scale=-1.0, **options)
