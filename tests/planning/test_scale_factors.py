"""BLASST's calibration: the fit of the specification, on what the oracle counts."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.estimators.blasst import Calibration, blasst
from jsparse.evaluation import Captured
from jsparse.masks import causal
from jsparse.planning import load_table, methods_of, save_table, search_scale_factors
from jsparse.planning.scale_factors import fit, skipped_tiles
from tests.inputs import leveled, on_device, qkv
from tests.oracles import blasst as oracle

BLOCK = 8
BLOCKS = {"block_q": BLOCK, "block_kv": BLOCK}
THRESHOLDS = 0.003, 0.03, 0.1, 0.3, 0.7


@pytest.fixture(scope="module")
def layers():
    first = leveled(64, block=BLOCK, heads=2, kv_heads=1, spread=3.0)
    return [Captured(*first), Captured(first[0][::-1], first[1][::-1], first[2])]


def test_the_fit_finds_the_curve_that_made_the_points():
    sparsity = np.asarray([0.2, 0.5, 0.8])
    factors = np.asarray([8.300292, 50.213842, 303.776044])
    a, b = fit(sparsity, factors) or (0.0, 0.0)
    np.testing.assert_allclose([np.log(a), b], [0.916291, 6.0], atol=1e-5)
    # nearly none and nearly all do not count
    more = np.append(sparsity, [0.05, 0.95, 0.0, 1.0]), np.append(factors, [900.0, 1.0, 3.0, 5.0])
    np.testing.assert_allclose(fit(*more) or (), (a, b), rtol=1e-6)
    assert fit(sparsity[:1].repeat(3), factors) is None
    assert fit(sparsity + 0.9, factors) is None


def test_the_fit_keeps_to_its_bounds_and_leaves_the_least_squares():
    sparsity = np.linspace(0.1, 0.9, 9)
    assert fit(sparsity, np.exp(30 * sparsity))[1] == pytest.approx(20.0)
    assert fit(sparsity, np.exp(-3 * sparsity))[1] == 0.0
    noisy = 4 * np.exp(5 * sparsity) * np.random.default_rng(0).uniform(0.7, 1.4, 9)
    a, b = fit(sparsity, noisy)

    def squares(a, b):
        return ((noisy - a * np.exp(b * sparsity)) ** 2).sum()

    for other in (a * 1.01, b), (a * 0.99, b), (a, b + 0.01), (a, b - 0.01):
        assert squares(a, b) < squares(*other)


def test_one_walk_counts_for_all_thresholds(layers):
    q, k, v = layers[0]
    logs = jnp.log(on_device(THRESHOLDS))
    prefill, decode = skipped_tiles(q, k, logs, block_size=BLOCK)
    visible = np.tri(8, dtype=bool)
    for n, threshold in enumerate(THRESHOLDS):
        kept = oracle.attend(q, k, v, threshold, **BLOCKS)[2]
        np.testing.assert_array_equal(prefill[..., n], (visible & ~kept).sum(-1))
        single = oracle.attend(q, k, v, threshold, block_q=1, block_kv=BLOCK)[2]
        skipped = np.repeat(visible, BLOCK, 0) & ~single
        np.testing.assert_array_equal(decode[..., n], skipped.sum(-1).reshape(2, 8, BLOCK).sum(-1))


class Stopped(Exception):
    """What interrupts the search."""


def test_each_head_is_fitted_over_lengths_and_a_stopped_search_goes_on(layers, tmp_path):
    options = {"thresholds": THRESHOLDS, "block_size": BLOCK, "lengths": [24, 37, 64]}
    partial = tmp_path / "plan.partial.json"
    seen = []

    def stop(label, steps):
        seen.append((label, steps))
        if len(seen) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        search_scale_factors(layers, progress=stop, partial=partial, **options)
    assert seen[-1] == ("layer 1 at the target", 4)
    assert len(json.loads(partial.read_text())["figures"]) == 3
    table = search_scale_factors(layers, partial=partial, **options)
    assert not partial.exists()
    save_table(table, tmp_path / "plan.json")
    assert load_table(tmp_path / "plan.json") == table
    assert table.provenance.search["lengths"] == [24, 32, 64]

    def found(layer, of, block_q, rows=slice(None)):
        """Per head the sparsity of causal tiles of the first tokens, and the factors."""
        shares, factors = [], []
        for length in (24, 32, 64):
            visible = np.tri(length // BLOCK, dtype=bool).repeat(BLOCK // block_q, 0)[rows]
            for threshold in THRESHOLDS:
                q, k, v = (x[:length] for x in layer)
                kept = oracle.attend(q, k, v, threshold, block_q=block_q, block_kv=BLOCK)[2]
                shares.append((visible & ~kept[:, rows]).sum((1, 2)) / visible.sum())
                factors.append(threshold * length)
        return np.asarray(shares)[:, of], np.asarray(factors)

    for layer, choices in zip(layers, table.layers, strict=True):
        for head, choice in enumerate(choices):
            prefill = fit(*found(layer, head, BLOCK))
            decode = fit(*found(layer, head, 1, slice(-BLOCK, None)))
            expected = Calibration(*(prefill or ()), *(decode or ()))
            for name in ("a", "b", "decode_a", "decode_b"):
                got, want = getattr(choice.value, name), getattr(expected, name)
                assert got == pytest.approx(want, rel=1e-4), name

    # the score is the mass that is kept, the cost the products of logits and of what is kept
    q, k, v = layers[0]
    method = methods_of(table)[0]
    (_, lse), info = method.attend((), q, k, v, mask=causal(), return_lse=True)
    factors = [choice.value.scale_factor(0.5, decode=False) for choice in table.layers[0]]
    limits = np.minimum(np.asarray(factors) / 64, 1.0)
    np.testing.assert_array_equal(info.kept.to_dense(), oracle.attend(q, k, v, limits, **BLOCKS)[2])
    dense = oracle.attend(q, k, v, 0.0, **BLOCKS)[1]
    for head, choice in enumerate(table.layers[0]):
        assert choice.score == pytest.approx(np.exp(lse[head] - dense[head]).mean(), rel=1e-4)
        assert choice.cost == pytest.approx(1 - float(info.sparsity[head]) / 2)
    assert 0.1 < float(info.sparsity.mean()) < 0.9


def test_a_head_that_skips_nothing_gets_the_curve_of_all(layers):
    first = layers[0]
    # without levels every tile of eight rows has a largest logit that counts
    flat = Captured(*qkv(64, heads=2, kv_heads=1, dim=16))
    options = {"thresholds": THRESHOLDS[:3], "block_size": BLOCK, "lengths": [64]}
    both = search_scale_factors([first, flat], **options)
    curves = [choice.value for choice in both.layers[1]]
    assert (curves[0].a, curves[0].b) == (curves[1].a, curves[1].b)
    assert curves[0].a > 0
    with pytest.raises(ValueError, match=r"No two thresholds .* pass a smaller block_size"):
        search_scale_factors([flat], **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_sparsity": 1.5}, "target_sparsity=1.5"),
        ({"thresholds": [0.1, 2.0]}, "thresholds="),
        ({"block_size": 0}, "block_size=0"),
        ({"lengths": [4]}, r"lengths=\[4\] must lie between a tile of 8 and the 64 tokens"),
        ({"lengths": [65]}, r"lengths=\[65\]"),
        ({"block_size": 65}, "lengths=0"),
    ],
)
def test_bad_input_is_named(layers, arguments, message):
    with pytest.raises(ValueError, match=message):
        search_scale_factors(layers, **{"block_size": BLOCK, **arguments})
    with pytest.raises(ValueError, match="60 queries of 64 keys"):
        search_scale_factors([layers[0]._replace(q=layers[0].q[4:])])


def test_a_method_of_a_table_has_its_target(layers):
    curve = Calibration(0.5, 3.0, 1.0, 2.0)
    assert curve.scale_factor(0.5, decode=False) == pytest.approx(0.5 * np.exp(1.5))
    assert curve.scale_factor(0.5, decode=True) == pytest.approx(np.exp(1.0))
    q, k, _ = layers[0]
    low, high = (
        blasst(calibration=[curve] * 2, target_sparsity=target, **BLOCKS).plan((), q, k)[1].sparsity
        for target in (0.1, 0.9)
    )
    assert (low < high).all()
