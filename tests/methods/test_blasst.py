"""BLASST against its oracle, and the checks of its specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.estimators.blasst import Calibration
from tests.inputs import leveled, on_device, qkv
from tests.oracles import blasst as oracle

CAUSAL = js.masks.causal()
BLOCKS = {"block_q": 16, "block_kv": 16}
LOGITS = on_device([0, 1, 4, 2, -3, -2, 3, 0], jnp.float32)


@functools.cache
def attending(name="threshold", **arguments):
    """The method's output, log-sum-exp and info, compiled for any value of the argument."""

    def run(value, q, k, v, scale):
        method = js.blasst(**{name: value}, **BLOCKS, **arguments)
        options = {"mask": CAUSAL, "scale": scale, "return_lse": True}
        (out, lse), info = method.attend((), q, k, v, **options)
        return out, lse, info

    return jax.jit(run)


@pytest.mark.parametrize(
    ("order", "threshold", "out", "skipped"),
    [
        ([0, 1, 2, 3], 0.0, 3.017733, []),
        ([0, 1, 2, 3], 1e-3, 3.017733, []),
        ([0, 1, 2, 3], 0.01, 3.014079, [2]),
        ([0, 1, 2, 3], 0.5, 2.040648, [2, 3]),
        ([0, 1, 2, 3], 1.0, 2.040648, [2, 3]),
        ([3, 2, 1, 0], 0.01, 3.014079, [1]),
    ],
)
def test_worked_example(order, threshold, out, skipped):
    """One query, tiles of two keys, in either order: a step of decoding."""
    order = np.arange(8).reshape(4, 2)[order].ravel()
    k, v = LOGITS[order][:, None, None], jnp.arange(8.0)[order][:, None, None]
    q = jnp.ones((1, 1, 1))
    method = js.blasst(decode_threshold=threshold, threshold=0.3, block_kv=2)
    options = {"mask": CAUSAL, "scale": 1.0, "return_lse": True}
    (found, lse), info = method.attend((), q, k, v, **options)
    np.testing.assert_allclose(found, out, atol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(~info.kept.to_dense()), skipped)
    if not skipped:
        np.testing.assert_allclose(lse, 4.465634, atol=1e-6)
    expected = oracle.attend(q, k, v, threshold, block_q=1, block_kv=2, scale=1.0)
    np.testing.assert_allclose(found, expected[0], atol=1e-6)
    np.testing.assert_array_equal(info.kept.to_dense(), expected[2])


def test_it_equals_the_oracle_and_its_plan_is_what_it_keeps():
    q, k, v = leveled(90)
    thresholds = on_device([1e-3, 0.02, 0.3, 1.0])
    out, lse, info = attending()(thresholds, q, k, v, 0.25)
    expected = oracle.attend(q, k, v, thresholds, **BLOCKS)
    np.testing.assert_allclose(out, expected[0], atol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5)
    np.testing.assert_array_equal(info.kept.to_dense(), expected[2])
    np.testing.assert_allclose(
        info.sparsity, oracle.sparsity(q, k, thresholds, **BLOCKS), atol=1e-6
    )
    plan, planned = js.blasst(threshold=thresholds, **BLOCKS).plan((), q, k, mask=CAUSAL)
    np.testing.assert_array_equal(plan.to_dense(), expected[2])
    np.testing.assert_array_equal(planned.sparsity, info.sparsity)
    np.testing.assert_allclose(js.attend(q, k, v, plan, mask=CAUSAL), out, atol=4e-6)


def test_zero_is_dense_and_larger_thresholds_skip_more():
    q, k, v = leveled(96)
    run = attending()
    found = [run(on_device(t), q, k, v, 0.25) for t in (0.0, 1e-4, 1e-2, 0.1, 1.0)]
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    np.testing.assert_allclose(found[0][0], dense, atol=4e-6)
    assert not found[0][2].sparsity.any()
    tiles = [np.asarray(info.kept.to_dense()) for _, _, info in found]
    for more, fewer in zip(tiles, tiles[1:], strict=False):
        assert not (fewer & ~more).any()
    assert tiles[-1].sum() < tiles[2].sum() < tiles[0].sum()


def test_at_one_a_tile_stays_if_some_row_reaches_its_largest_logit_there():
    q, k, v = leveled(80)
    logits = np.einsum("qhd,khd->hqk", q, np.repeat(k, 2, axis=1)) / 4
    logits = np.where(np.tril(np.ones((80, 80), bool)), logits, -np.inf)
    peaks = logits.reshape(4, 80, 5, 16).max(-1)
    reached = peaks >= np.maximum.accumulate(peaks, axis=-1)
    reached &= np.isfinite(peaks)
    info = attending()(on_device(1.0), q, k, v, 0.25)[2]
    np.testing.assert_array_equal(info.kept.to_dense(), reached.reshape(4, 5, 16, 5).any(2))


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.4])
def test_what_is_dropped_is_bounded(threshold):
    """Of a row at most the threshold for each skipped key, over what its kept ones sum up to."""
    q, k, v = leveled(96)
    _, lse, info = attending()(on_device(threshold), q, k, v, 0.25)
    _, dense_lse = js.attend(q, k, v, mask=CAUSAL, return_lse=True)
    kept = np.repeat(np.repeat(info.kept.to_dense(), 16, -1), 16, -2)
    seen = np.tril(np.ones((96, 96), bool))
    logits = np.einsum("qhd,khd->hqk", q, np.repeat(k, 2, axis=1)) / 4
    peak = np.where(seen & kept, logits, -np.inf).max(-1)
    skipped = (seen & ~kept).sum(-1)
    assert skipped.max() >= 16
    dropped = 1 - np.exp(np.asarray(lse - dense_lse, np.float64))
    bound = threshold * skipped / np.exp(lse - peak)
    assert (dropped <= bound + 1e-5).all()
    assert dropped.max() > 10 * 1e-5


def test_thresholds_follow_lengths_and_phases():
    q, k, v = leveled(64)
    run = attending("scale_factor")
    for factor in (0.64, 6.4):
        same = attending()(on_device(factor / 64), q, k, v, 0.25)[2].kept.to_dense()
        found = run(on_device(factor), q, k, v, 0.25)[2].kept.to_dense()
        np.testing.assert_array_equal(found, same)
    # inputs shorter than the factor have a threshold of 1, which is not exceeded
    high = run(on_device(1e5), q, k, v, 0.25)[2].kept.to_dense()
    one = attending()(on_device(1.0), q, k, v, 0.25)[2].kept.to_dense()
    np.testing.assert_array_equal(high, one)

    def decoded(k=k, positions=None, mask=CAUSAL, **arguments):
        run = jax.jit(js.blasst(**arguments, block_kv=16).attend)
        return run((), q[-1:], k, v, mask=mask, positions=positions)[1].kept.to_dense()

    expected = decoded(decode_threshold=0.1)
    assert not expected.all()
    np.testing.assert_array_equal(decoded(threshold=1.0, decode_scale_factor=6.4), expected)
    assert decoded(decode_threshold=0.0, threshold=1.0).all()
    # of a cache with room, the keys that are there count: 32 of 64
    half = {"positions": on_device([31]), "mask": js.masks.causal(offset=31)}
    there = decoded(decode_scale_factor=3.2, **half)
    np.testing.assert_array_equal(there[..., :2], expected[..., :2])
    curves = [Calibration(0.1, 4.0, 0.5, 3.0), Calibration(0.5, 4.0, 0.1, 2.0)] * 2
    for curve_of, q_len, name in (
        ("a", 64, "scale_factor"),
        ("decode_a", 1, "decode_scale_factor"),
    ):
        slope = {"a": "b", "decode_a": "decode_b"}[curve_of]
        factors = [getattr(c, curve_of) * np.exp(0.3 * getattr(c, slope)) for c in curves]
        found, want = (
            jax.jit(js.blasst(**arguments, **BLOCKS).attend)((), q[-q_len:], k, v, mask=CAUSAL)[1]
            for arguments in (
                {"calibration": curves, "target_sparsity": 0.3},
                {name: on_device(factors, jnp.float32)},
            )
        )
        np.testing.assert_array_equal(found.kept.to_dense(), want.kept.to_dense())


def test_the_last_queries_alone_skip_what_they_skip_among_others():
    """Fewer queries in a last tile: rows that are only padding have no say."""
    q, k, v = leveled(80)
    whole = attending()(on_device(0.1), q, k, v, 0.25)[2].kept.to_dense()
    q = q.at[64:70].set(0.0)
    method = js.blasst(threshold=0.1, **BLOCKS)
    part = jax.jit(method.attend)((), q[64 + 6 :], k, v, mask=CAUSAL)[1].kept.to_dense()
    expected = oracle.attend(q[70:], k, v, 0.1, **BLOCKS)[2]
    np.testing.assert_array_equal(part, expected)
    assert part.sum() <= whole[:, -1:].sum()


def test_reports_count_what_is_skipped():
    q, k, v = leveled(96)
    method = js.blasst(threshold=0.05, **BLOCKS)
    report = jax.jit(lambda *x: js.density_report(method, *x, mask=CAUSAL))(q, k, v)
    _, _, kept = oracle.attend(q, k, v, 0.05, **BLOCKS)
    np.testing.assert_allclose(report.tiles, kept.sum((1, 2)) / 21, atol=1e-6)
    pairs = np.repeat(np.repeat(kept, 16, -1), 16, -2) & np.tril(np.ones((96, 96), bool))
    np.testing.assert_allclose(report.pairs, pairs.sum((1, 2)) / (96 * 97 / 2), rtol=1e-5)
    assert float(report.tiles.mean()) < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, r"threshold=1.5 must lie in \[0, 1\]"),
        ({"decode_threshold": -0.1}, r"decode_threshold=-0.1 must lie in \[0, 1\]"),
        ({"scale_factor": 0.0}, "scale_factor=0.0 must be finite and above 0"),
        ({"decode_scale_factor": on_device([1.0, -2.0])}, "decode_scale_factor="),
        ({"target_sparsity": 0.0}, r"target_sparsity=0.0 must lie in \(0, 1\]"),
        ({"block_kv": 0}, "block_kv=0"),
        (
            {"scale_factor": 5.0, "calibration": [Calibration(1.0, 1.0, 1.0, 1.0)]},
            "pass one of them",
        ),
        ({"calibration": [Calibration(-1.0, 1.0, 1.0, 1.0)]}, "a=-1.0"),
        ({"calibration": [Calibration(1.0, 21.0, 1.0, 1.0)]}, "b=21.0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.blasst(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": on_device([0.1, 0.2])}, r"threshold has shape \(2,\)"),
        ({"scale_factor": on_device([1.0, 2.0])}, r"scale_factor has shape \(2,\)"),
        ({"calibration": [Calibration(1.0, 1.0, 1.0, 1.0)]}, "calibration has 1 entries"),
    ],
)
def test_one_number_per_head(arguments, message):
    q, k, v = qkv(32)
    with pytest.raises(ValueError, match=message):
        js.sparse_attention(q, k, v, js.blasst(**arguments), mask=CAUSAL)
