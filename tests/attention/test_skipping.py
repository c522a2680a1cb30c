"""The in-loop skip of the executors: its rule, its gradient, and what it leaves unread."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.testing import CASES, AttentionSuite
from tests.inputs import leveled, on_device, qkv
from tests.oracles import blasst as oracle

CAUSAL = js.masks.causal()
SIZES = {"block_q": 16, "block_kv": 16}
implementations = pytest.mark.parametrize("implementation", ["reference", "xla"])


def attend_as_dense(q, k, v, plan=None, *, return_lse=False, **options):
    """Nothing is skipped at a threshold of 0, whatever changes the logits."""
    out, lse, _ = js.attend_skipping(q, k, v, plan, threshold=0.0, **options)
    return (out, lse) if return_lse else out


class TestSkippingNothing(AttentionSuite):
    attention = staticmethod(functools.partial(attend_as_dense, implementation="xla"))

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            quick = "everything", "columns"
            marks = {name: [] for name in quick}
            metafunc.parametrize(
                "case",
                [
                    pytest.param(case, id=case.name, marks=marks.get(case.name, pytest.mark.slow))
                    for case in CASES
                ],
            )

    @pytest.mark.slow  # the same of the executor that this one is
    def test_dropping_a_feature_is_noticed(self):
        super().test_dropping_a_feature_is_noticed()


@functools.cache
def compiled(implementation, causal, block_q, block_kv):
    def run(threshold, q, k, v):
        mask = CAUSAL if causal else None
        sizes = {"block_q": block_q, "block_kv": block_kv}
        everything = js.masks.sliding_window(left=2**20, right=2**20) if mask is None else mask
        plan = js.block_mask(everything, q.shape[-3], k.shape[-3], **sizes)
        options = {"mask": mask, "implementation": implementation}
        return js.attend_skipping(q, k, v, plan, threshold=threshold, **options)

    return jax.jit(run)


# several tiles in each of several steps, all tiles in one step, one tile in each
@pytest.mark.numbers
@implementations
@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_q", "block_kv", "causal"),
    [(24, 460, 8, 50, True), (41, 75, 16, 8, True), (40, 600, 16, 128, False)],
)
def test_it_is_the_loop_of_the_paper(implementation, q_len, kv_len, block_q, block_kv, causal):
    # rows that go on and heads that decide alike come in groups of other sizes
    q, k, v = leveled(q_len, kv_len, block=block_kv, heads=6)
    # the level of the first tile is the largest for one of the kv heads, not for the other
    threshold = on_device([1e-3, 0.5, 0.1, 0.03, 1.0, 0.2])
    run = compiled(implementation, causal, block_q, block_kv)
    out, lse, kept = run(threshold, q, k, v)
    sizes = {"block_q": block_q, "block_kv": block_kv}
    expected = oracle.attend(q, k, v, threshold, **sizes, causal=causal)
    np.testing.assert_array_equal(kept.to_dense(), expected[2])
    assert expected[2][1].sum() < expected[2][0].sum()
    assert expected[2][4].sum() < expected[2][3].sum()
    np.testing.assert_allclose(out, expected[0], atol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5)


def test_another_threshold_is_no_other_program():
    q, k, v = leveled(64)
    traces = []

    @jax.jit
    def run(threshold, q, k, v):
        traces.append(threshold)
        return js.attend_skipping(q, k, v, threshold=threshold, mask=CAUSAL)[2].kv_num_blocks

    run(on_device(0.0), q, k, v), run(on_device(0.5), q, k, v)
    assert len(traces) == 1


@pytest.mark.newest
@implementations
def test_the_gradient_is_that_of_attention_over_the_tiles_kept(implementation):
    """By softmax with those tiles as a constant mask, the lse's share included."""
    q, k, v = leveled(70)
    bias = on_device(np.random.default_rng(3).normal(size=(4, 1, 70)), jnp.float32)
    kept = js.attend_skipping(q, k, v, js.block_mask(CAUSAL, 70, 70, **SIZES), threshold=0.02,
                              mask=CAUSAL, bias=bias)[2]  # fmt: skip
    assert 0 < int(kept.kv_num_blocks.sum()) < 4 * 15
    tiles = jnp.repeat(jnp.repeat(kept.to_dense(), 16, -1), 16, -2)[:, :70, :70]
    seen = tiles & jnp.tril(jnp.ones((70, 70), bool))

    def plain(q, k, v, bias):
        logits = jnp.einsum("qhd,khd->hqk", q, jnp.repeat(k, 2, 1)) / 4 + bias
        logits = jnp.where(seen, logits, -jnp.inf)
        out = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits), jnp.repeat(v, 2, 1))
        return jnp.sin(out).sum() + jnp.cos(jax.nn.logsumexp(logits, axis=-1)).sum()

    def skipping(q, k, v, bias):
        plan = js.block_mask(CAUSAL, 70, 70, **SIZES)
        options = {"mask": CAUSAL, "bias": bias, "implementation": implementation}
        out, lse, _ = js.attend_skipping(q, k, v, plan, threshold=0.02, **options)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    def slopes(loss):
        def both(*operands):
            first = jax.grad(loss, argnums=(0, 1, 2, 3))(*operands)
            return sum(jnp.sin(x).sum() for x in first), first

        (_, first), second = jax.jit(jax.value_and_grad(both, argnums=(0, 1), has_aux=True))(
            q, k, v, bias
        )
        return first, second

    for got, expected in zip(slopes(skipping), slopes(plain), strict=True):
        for mine, true in zip(got, expected, strict=True):
            size = float(jnp.abs(true).max())
            np.testing.assert_allclose(mine, true, atol=2e-5 * max(1.0, size))


def test_what_is_skipped_is_not_read():
    """No weight of zero meets a value of a skipped tile, whatever other rows do."""
    q, k, v = leveled(96)
    run = compiled("xla", True, 16, 16)
    out, lse, kept = run(on_device(0.05), q, k, v)
    tiles = np.asarray(kept.to_dense())
    for block in range(1, 6):
        spoilt = v.at[16 * block : 16 * block + 16].set(jnp.nan)
        found, _, _ = run(on_device(0.05), q, k, spoilt)
        rows = np.isfinite(found).all(-1).T.reshape(4, 6, 16)
        # masked pairs of a kept tile have a weight of zero too
        assert (rows.all(-1) == ~tiles[:, :, block]).all()


@pytest.mark.numbers
@implementations
def test_who_has_a_say(implementation):
    """Rows that see nothing of a tile and rows past the end have none; each other row has."""
    level = on_device([9.0, 0.0, 0.0])
    k = jnp.repeat(level, 16)[:, None, None] * jnp.ones((48, 1, 1))
    v = jnp.arange(48.0)[:, None, None]
    q = jnp.ones((20, 1, 1))

    def kept(q, mask=None, threshold=0.5):
        plan = js.block_mask(js.masks.causal(offset=48), len(q), 48, **SIZES)
        options = {"scale": 1.0, "implementation": implementation, "mask": mask}
        found = js.attend_skipping(q, k, v, plan, threshold=threshold, **options)[2]
        return found.to_dense().tolist()

    first = [True, False, False]
    # rows past the end of q are zeros, whose logits are all alike
    assert kept(q) == [[first, first]]
    # one row of the second tile of queries finds its largest logit in the last tile of keys
    last_row = q.at[17].set(-1.0)
    assert kept(last_row) == [[first, [True, True, True]]]
    # but not if it may not look there; a row that has seen nothing has nothing to compare with
    blind = js.masks.predicate(lambda b, h, q, kv: (q != 17) | (kv < 16))
    assert kept(last_row, blind) == [[first, first]]
    late = js.masks.predicate(lambda b, h, q, kv: (q != 3) | (kv >= 32))
    assert kept(q, late) == [[[True, False, True], first]]
    nan = q.at[3].set(jnp.nan)
    assert kept(nan) == [[[True, True, True], first]]
    # but lists are over where they are over
    indices, counts = on_device([[[1, 0], [0, 2]]]), on_device([[1, 2]])
    lists = js.BlockMask.from_lists(indices, counts, q_len=20, kv_len=48, **SIZES)
    found = js.attend_skipping(nan, k, v, lists, threshold=0.0, implementation=implementation)[2]
    assert found.to_dense().tolist() == [[[False, True, False], [True, False, True]]]
    # what nobody sees is skipped whatever the threshold
    hidden = js.masks.predicate(lambda b, h, q, kv: (kv < 16) | (kv >= 32))
    assert kept(q, hidden, threshold=0.0) == [[[True, False, True]] * 2]


@pytest.mark.numbers
@implementations
def test_the_order_of_the_keys_decides(implementation):
    """Logits that rise along the keys skip nothing, those that fall skip all but the first tile."""
    falling = jnp.repeat(on_device([9.0, 6.0, 3.0, 0.0]), 16)[:, None, None]
    q, v = jnp.ones((16, 1, 1)), jnp.ones((64, 1, 1))
    plan = js.block_mask(js.masks.causal(offset=64), 16, 64, **SIZES)

    def count(k, threshold=0.1, plan=plan):
        options = {"scale": 1.0, "implementation": implementation}
        kept = js.attend_skipping(q, k, v, plan, threshold=threshold, **options)[2]
        return jax.tree.map(lambda x: int(x.kv_num_blocks.sum()), kept, is_leaf=is_plan)

    def is_plan(x):
        return isinstance(x, js.BlockMask)

    assert count(falling) == 1
    assert count(falling[::-1]) == 4
    # at 1, what reaches the largest before is kept and what is below it is not
    assert count(jnp.repeat(on_device([1.0, 1.0, 0.999, 1.001]), 16)[:, None, None], 1.0) == 3
    # the parts of a tuple have each their own largest logit
    halves = [jnp.arange(4) < 2, jnp.arange(4) >= 2]
    parts = tuple(js.BlockMask.from_dense(h[None, None], **plan.grid._asdict()) for h in halves)
    assert count(falling, plan=parts) == (1, 1)


@pytest.mark.newest
def test_parts_merge_and_sinks_take_their_share():
    q, k, v = leveled(64)
    sinks = on_device([0.5, -1.0, 3.0, 0.0])
    plan = js.block_mask(CAUSAL, 64, 64, **SIZES)
    left = js.BlockMask.from_dense(jnp.arange(4)[None, None] < jnp.ones((1, 4, 1)) * 2,
                                   q_len=64, kv_len=64, **SIZES)  # fmt: skip
    parts = (plan & left, plan & js.BlockMask.from_dense(~left.to_dense(), **left.grid._asdict()))
    options = {"mask": CAUSAL, "threshold": 0.05}
    for of in (plan, parts):
        out, lse, kept = js.attend_skipping(q, k, v, of, sinks=sinks, **options)
        expected = js.attend(q, k, v, kept, mask=CAUSAL, sinks=sinks, return_lse=True)
        np.testing.assert_allclose(out, expected[0], atol=4e-6)
        np.testing.assert_allclose(lse, expected[1], atol=4e-6)
    _, _, without = js.attend_skipping(q, k, v, plan, **options)
    found = js.attend_skipping(q, k, v, plan, sinks=sinks, **options)[2]
    np.testing.assert_array_equal(found.to_dense(), without.to_dense())


@pytest.mark.numbers
def test_thresholds_of_sequences_and_heads():
    q, k, v = leveled(64, batch=(2,))
    threshold = on_device([[0.0, 0.01, 0.1, 1.0], [1.0, 0.1, 0.01, 0.0]])
    plan = js.block_mask(CAUSAL, 64, 64, **SIZES)

    def run(threshold, q, k, v):
        return js.attend_skipping(q, k, v, plan, threshold=threshold, mask=CAUSAL)

    out, lse, kept = jax.jit(run)(threshold, q, k, v)
    mapped = jax.jit(jax.vmap(run))(threshold, q, k, v)
    np.testing.assert_allclose(out, mapped[0], atol=2e-6)
    np.testing.assert_array_equal(kept.kv_num_blocks, mapped[2].kv_num_blocks)
    for n in range(2):
        sizes = {"block_q": 16, "block_kv": 16}
        expected = oracle.attend(q[n], k[n], v[n], threshold[n], **sizes)
        np.testing.assert_array_equal(kept.to_dense()[n], expected[2])
    # above 1 a traced threshold counts as 1
    high, one = (jax.jit(run)(jnp.full((2, 4), x), q, k, v) for x in (7.0, 1.0))
    np.testing.assert_array_equal(high[2].to_dense(), one[2].to_dense())
    # and what is not above 0 as 0
    nothing = on_device([[-1.0, jnp.nan, 0.0, -jnp.inf]] * 2)
    assert (jax.jit(run)(nothing, q, k, v)[2].kv_num_blocks == plan.kv_num_blocks).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, r"threshold=1.5 must lie in \[0, 1\]"),
        ({"threshold": on_device([0.1, -1, 0, 0])}, ValueError, "threshold="),
        ({"threshold": jnp.ones(3)}, ValueError, r"shape \(3,\), which does not broadcast to .*4,"),
        ({"plan": ()}, ValueError, "empty tuple"),
        ({"implementation": "mosaic"}, NotImplementedError, "'mosaic': .*default backend is cpu"),
    ],
)
def test_what_it_cannot_do_is_said(change, error, message):
    q, k, v = qkv(32)
    with pytest.raises(error, match=message):
        js.attend_skipping(q, k, v, **{"threshold": 0.1, **change})


def test_only_lists_of_tiles_can_be_gone_along(without_shape_checks):
    q, k, v = qkv(24, dim=8)
    ids = jnp.zeros((1, 24), jnp.int32)
    groups = js.TokenGroups.from_ids(ids, ids, groups=1)
    for implementation in (None, "reference", "xla"):
        with pytest.raises(NotImplementedError, match="along a list of them; TokenGroups is none"):
            js.attend_skipping(q, k, v, groups, threshold=0.1, implementation=implementation)
