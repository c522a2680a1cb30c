"""Every rule of selection against a loop that says what it means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.core import selection
from tests.inputs import on_device

RNG = np.random.default_rng(0)
RULES = {
    "top_k": (selection.top_k, 3),
    "top_p": (selection.top_p, 0.6),
    "above": (selection.above, 0.6),
}


def ranked(scores, visible, forced):
    """Visible blocks: forced ones first, each kind by falling score, ties to the lower index."""
    blocks = [j for j in range(len(scores)) if visible[j]]
    return sorted(blocks, key=lambda j: (not forced[j], -scores[j], j))


def chosen_by_loop(rule, scores, value, visible, forced):
    order = ranked(scores, visible, forced)
    if rule == "top_k":
        return set(order[: max(value, 1)])
    if rule == "above":
        best = {order[0]} if order else set()
        return best | {j for j in order if forced[j] or scores[j] >= value}
    kept, mass, total = set(), 0.0, sum(scores[j] for j in order)
    for place, j in enumerate(order):
        if forced[j] or place == 0 or mass < value * total or value >= 1:
            kept.add(j)
        mass += scores[j]
    return kept


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0, 1, 2, 5, 20])
def test_rules_equal_loops(rule, value):
    value = value if rule == "top_k" else value / 20
    # multiples of 1/64: sums are exact, and there are ties
    scores = RNG.integers(0, 16, (40, 9)).astype(np.float32) / 64
    visible, forced = RNG.random((40, 9)) < 0.7, RNG.random((40, 9)) < 0.15
    visible[0] = False
    got = jax.jit(RULES[rule][0])(
        on_device(scores), value, visible=on_device(visible), forced=on_device(forced)
    )
    for row in range(40):
        expected = chosen_by_loop(rule, scores[row], value, visible[row], forced[row])
        assert set(np.flatnonzero(got[row])) == expected, row


def test_forced_blocks_count_inside_k():
    scores = on_device([0.1, 0.9, 0.8, 0.2])
    forced = on_device([True, False, False, True])
    assert selection.top_k(scores, 3, forced=forced).tolist() == [True, True, False, True]


def test_more_than_is_visible_takes_what_is_visible():
    visible = on_device([True, False, True, False])
    assert selection.top_k(jnp.ones(4), 9, visible=visible).tolist() == visible.tolist()


def test_a_share_of_one_takes_all_whatever_the_sum_says():
    # in f32 the mass before the last blocks already equals the total
    scores = on_device([1e8, 1.0, 1.0, 1e-3], jnp.float32)
    assert selection.top_p(scores, 1.0).all()
    assert selection.top_p(scores, 0.9).tolist() == [True, False, False, False]


def test_k_and_p_may_differ_from_row_to_row_and_be_traced():
    scores = on_device(RNG.random((3, 6)), jnp.float32)
    counts = jax.jit(selection.top_k)(scores, on_device([[1], [3], [6]])).sum(-1)
    assert counts.tolist() == [1, 3, 6]
    shares = on_device([[1e-6], [0.5], [1.0]])
    kept = jax.jit(selection.top_p)(scores, shares)
    for row in range(3):
        alone = selection.top_p(scores[row], float(shares[row, 0]))
        np.testing.assert_array_equal(kept[row], alone)


@pytest.mark.parametrize("rule", RULES)
def test_a_nan_is_chosen_and_keeps_to_its_row(rule):
    function, value = RULES[rule]
    scores = on_device(RNG.random((2, 6)), jnp.float32)
    broken = function(scores.at[0, 4].set(jnp.nan), value)
    assert broken[0, 4]
    assert broken[0].sum() >= 1
    np.testing.assert_array_equal(broken[1], function(scores, value)[1])


@pytest.mark.parametrize("rule", RULES)
def test_nothing_visible_chooses_nothing(rule):
    function, value = RULES[rule]
    assert not function(jnp.ones((2, 5)), value, visible=jnp.zeros(5, bool)).any()


def test_forced_mass_counts_towards_p():
    scores, forced = on_device([4.0, 2.0, 1.0, 1.0]), on_device([0, 0, 1, 1], bool)
    np.testing.assert_array_equal(selection.top_p(scores, 0.25, forced=forced), [0, 0, 1, 1])
    np.testing.assert_array_equal(selection.top_p(scores, 0.5, forced=forced), [1, 0, 1, 1])
    # forced blocks stay, even when fewer would do
    np.testing.assert_array_equal(selection.top_p(scores, 0.1, forced=forced), [0, 0, 1, 1])


def test_what_is_not_visible_does_not_enter_the_total():
    scores, visible = on_device([100.0, 3.0, 2.0, 1.0]), on_device([0, 1, 1, 1], bool)
    np.testing.assert_array_equal(selection.top_p(scores, 0.5, visible=visible), [0, 1, 0, 0])
    # nor does its order: infinite or broken, it stays out
    for hidden in (jnp.inf, jnp.nan):
        broken = scores.at[0].set(hidden)
        np.testing.assert_array_equal(selection.top_p(broken, 0.9, visible=visible), [0, 1, 1, 1])
        np.testing.assert_array_equal(selection.top_k(broken, 1, visible=visible), [0, 1, 0, 0])
        np.testing.assert_array_equal(selection.above(broken, 2.5, visible=visible), [0, 1, 0, 0])
