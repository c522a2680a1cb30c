"""Elastic rules: influences by hand, programs against enumeration, searches on planted heads."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.evaluation import Profiled
from jsparse.planning import (
    Lengths,
    Program,
    elastic_rules,
    influence_of_blocks,
    load_table,
    methods_of,
    pareto_front,
    save_table,
    search_rules,
)
from jsparse.planning.influence import Influence, influence, influence_by_distance
from jsparse.planning.pareto import grid_of, programs_to_solve, solve, undominated
from jsparse.planning.rules import Spans
from tests.inputs import on_device, qkv
from tests.oracles import moa as oracle

BLOCK = 8
# lengths of the paper, and small ones of the same kind
PAPER = Lengths((2048, 4096, 8192), (2048, 4096, 8192, 16384), 12288)
SIZES = {"block_size": BLOCK, "interval": 16}


def test_worked_influences():
    probs, gradient = np.array([0.5, 0.3, 0.2]), np.array([1.0, -1.0, 2.0])
    found = influence(probs, gradient, probs @ gradient, least=0.0)
    np.testing.assert_allclose(found, [-0.4, 0.6857142857142857, -0.35], rtol=1e-15)


def test_an_influence_is_the_change_of_a_loss_that_is_linear_in_the_output():
    rng = np.random.default_rng(0)
    probs, gradient = oracle.softmax(rng.normal(size=9)), rng.normal(size=9)
    found = influence(probs, gradient, probs @ gradient, least=0.0)
    np.testing.assert_allclose(found, oracle.influence(probs, gradient), rtol=1e-13)
    for j in range(9):
        change = oracle.without(probs, j) @ gradient - probs @ gradient
        assert found[j] == pytest.approx(change, rel=1e-13, abs=1e-15)


def profiled(length, *, heads=4, kv_heads=2, seed=0):
    q, k, v = qkv(length, heads=heads, kv_heads=kv_heads, seed=seed)
    return Profiled(q, k, v, qkv(length, heads=heads, seed=seed + 100)[0])


def test_influences_of_blocks_are_those_of_the_oracle():
    # more than a tile of either side, and the last of each ragged
    layer = profiled(603)
    found = influence_of_blocks(layer, block_size=BLOCK)
    expected = oracle.block_influence(*layer, block=BLOCK)
    # G - sum A G loses digits where one key has nearly all the mass
    np.testing.assert_allclose(found, expected, rtol=3e-5, atol=1e-6)


def test_what_a_rule_drops_is_what_lies_outside_its_blocks():
    sums = np.abs(np.random.default_rng(0).normal(size=(2, 9, 9))) * np.tri(9)
    by_distance = influence_by_distance(sums, sink_blocks=1)
    found = Influence.of([[by_distance.tolist(), sums.sum((1, 2)).tolist()]])
    kept = np.arange(2, 12)
    for head in range(2):
        expected = [oracle.dropped(sums[head], n) for n in kept]
        np.testing.assert_allclose(found.dropped(kept - 1)[0, head], expected, atol=1e-12)
        assert expected[-3:] == [0.0] * 3
        assert (np.diff(expected) <= 0).all()
    shares = found.kept(np.array([[2, 4]]))[0]
    for head, blocks in enumerate((3, 5)):
        lost = oracle.dropped(sums[head], blocks)
        assert shares[head] == pytest.approx(1 - lost / sums[head].sum())


def test_the_grid_of_the_paper_has_48_rules():
    rules = elastic_rules(PAPER)
    assert len(rules) == 48
    assert [(r.alpha, r.beta) for r in rules] == oracle.rules(8192, 2048, 16384)


def test_rules_that_no_length_tells_apart_are_tried_once():
    lengths = Lengths((32,), (32, 64), 48)
    rules = elastic_rules(lengths, interval=4)
    spans = Spans.of(rules, lengths, BLOCK)
    kept = [
        tuple(-(-max(min(int(r.alpha + r.beta * n), n), 16) // 8) * 8 for n in lengths.every)
        for r in rules
    ]
    assert 1 < len(spans.rules) == len({*kept}) < len(rules)
    assert spans.rules == tuple(rules[kept.index(x)] for x in dict.fromkeys(kept))


def test_the_program_of_the_specification_has_one_best_plan():
    loss = np.array([[[[4, 2, 0], [1, 0.5, 0]]], [[[6, 1, 0], [2, 1.5, 0]]]])
    program = Program(loss, np.array([[1.0, 2, 4], [1, 3, 6]]), np.array([4.0, 6]), 0.0, 3)
    (plan,) = pareto_front(program)
    assert plan.tolist() == [[1, 1]]
    assert program.losses(plan).tolist() == [2.5, 2.5]
    every = oracle.plans(loss, program.cost, program.budget)
    assert [p[0].tolist() for p, _ in every] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def random_program(seed, *, objectives=2, layers=2, heads=2, rules=3, most_rules=2):
    rng = np.random.default_rng(seed)
    # wider rules lose less and cost more, as elastic ones do
    loss = np.sort(rng.random((objectives, layers, heads, rules)), -1)[..., ::-1].copy()
    cost = np.sort(rng.integers(1, 9, (2, rules)), -1).astype(float)
    budget = cost.mean(-1) * layers * heads
    return Program(loss, cost, budget, 0.7, most_rules)


@pytest.mark.parametrize("most_rules", [1, 2, 3])
def test_one_objective_is_as_small_as_enumeration_finds(most_rules):
    for seed in range(8):
        program = random_program(seed, most_rules=most_rules)
        every = oracle.plans(
            program.loss, program.cost, program.budget, least=0.7, most_rules=most_rules
        )
        for objective in range(2):
            found = solve(program, objective, {})
            if not every:
                assert found is None
                continue
            least = min(z[objective] for _, z in every)
            assert program.losses(found)[objective] == pytest.approx(least, rel=1e-6)
            assert any((found == plan).all() for plan, _ in every)
            # the other objective above its middle
            other = 1 - objective
            values = sorted(z[other] for _, z in every)
            inside = (values[len(values) // 2], values[-1])
            found = solve(program, objective, {other: inside})
            least = min(z[objective] for _, z in every if z[other] >= inside[0])
            assert program.losses(found)[objective] == pytest.approx(least, rel=1e-6)


def test_the_front_is_part_of_the_true_one_and_holds_its_ends():
    wide = 0
    for seed in range(6):
        program = random_program(seed, heads=3)
        every = oracle.plans(program.loss, program.cost, program.budget, least=0.7, most_rules=2)
        if not every:
            continue
        true = [z for _, z in oracle.front(every)]
        found = [program.losses(plan).tolist() for plan in pareto_front(program)]
        wide += len(found) > 2
        for losses in found:
            assert any(losses == pytest.approx(z, rel=1e-6) for z in true)
        for objective in range(2):
            assert min(z[objective] for z in found) == pytest.approx(
                min(z[objective] for z in true)
            )
    assert wide >= 2


def test_more_ranges_find_more_of_the_front():
    program = random_program(3, layers=1, heads=6, rules=4, most_rules=4)
    every = oracle.plans(program.loss, program.cost, program.budget, least=0.7)
    true = len(oracle.front(every))
    found = [len(pareto_front(program, ranges=ranges)) for ranges in (1, 4, 16)]
    assert found[0] < found[1] < found[2] <= true


def test_ranges_are_those_between_the_ends():
    ends = np.array([[0.0, 8.0, 5.0], [4.0, 0.0, 5.0], [2.0, 2.0, 5.0]])
    steps = grid_of(ends, 2)
    assert len(steps) == 3 * 4 == programs_to_solve(3, 2) - 3
    assert steps[0] == (0, {1: (0.0, 4.0), 2: (5.0, 5.0)})
    assert steps[-1] == (2, {0: (2.0, 4.0), 1: (4.0, 8.0)})
    assert programs_to_solve(1, 4) == 1


def test_of_equal_plans_the_first_is_not_beaten():
    losses = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [2.0, 2.0], [0.5, 9.0]])
    assert undominated(losses).tolist() == [True, True, False, False, True]


def planted(length, *, seed=0):
    """Two layers of four heads: those that look far back by a share of the length, and near ones.

    Logits fall linearly with the distance, over a share of the length that is the head's; what the
    loss makes of the output is random.
    """
    rng = np.random.default_rng(seed)
    layers = []
    for reach in ((0.02, 0.5, 0.02, 0.5), (0.02, 0.02, 0.02, 0.9)):
        fall = np.arange(length)[:, None] / (np.array(reach) * length)
        ones = np.ones_like(fall)
        # logits fall linearly: q = (1, 0), k = (position, 1)
        q = np.stack([ones, 0 * ones], -1)
        k = np.stack([6 * fall, ones], -1)
        v, d_out = rng.normal(size=(2, length, 4, 4))
        layers.append(Profiled(*(on_device(x, jnp.float32) for x in (q, k, v, d_out))))
    return layers


TEXTS = [planted(64), planted(64, seed=5), planted(128)]
HELD_OUT = [planted(160, seed=7)]


class Stopped(Exception):
    """What interrupts a search in these tests."""


@pytest.fixture(scope="module")
def table():
    return search_rules(TEXTS, held_out=HELD_OUT, density=0.5, source="planted", **SIZES)


def test_the_search_gives_far_heads_more_and_keeps_to_the_bounds(table):
    assert (table.method, table.provenance.source) == ("moa", "planted")
    spans = {
        n: np.array(
            [
                [min(n, sum(js.masks.moa.span(c.value, n, **table.arguments))) for c in layer]
                for layer in table.layers
            ]
        )
        for n in (64, 128, 256)
    }
    for length, of_heads in spans.items():
        assert 0.45 * length <= of_heads.mean() <= 0.5 * length
    far = np.array([[0, 1, 0, 1], [0, 0, 0, 1]], bool)
    assert spans[128][far].min() > spans[128][~far].max()
    assert all(len({c.value for c in layer}) <= 2 for layer in table.layers)


def test_figures_of_the_choice_are_those_of_the_unseen_length(table):
    q, k, _ = qkv(160, heads=4, kv_heads=4)
    for layer, held_out, method in zip(table.layers, HELD_OUT[0], methods_of(table), strict=True):
        sums = oracle.block_influence(*held_out, block=BLOCK)
        tiles = np.asarray(method.plan((), q, k)[0].to_dense())
        tiles = np.broadcast_to(tiles, (4, *tiles.shape[1:]))
        for head, choice in enumerate(layer):
            kept = (sums[head] * tiles[head]).sum() / sums[head].sum()
            assert choice.score == pytest.approx(kept, abs=1e-4)
            assert choice.cost == pytest.approx(tiles[head].sum() / np.tri(20).sum())
    front = table.provenance.search["front"]
    lost = sum(
        (oracle.block_influence(*x, block=BLOCK).sum((1, 2)) * [1 - c.score for c in layer]).sum()
        for x, layer in zip(HELD_OUT[0], table.layers, strict=True)
    )
    assert min(x["unseen"] for x in front) == pytest.approx(lost, rel=1e-2)


def test_losses_are_means_over_texts_and_below_those_of_heads_alike(table):
    front = table.provenance.search["front"]
    best = min(front, key=lambda plan: plan["unseen"])
    for number, (length, texts) in enumerate(((64, TEXTS[:2]), (128, TEXTS[2:]))):
        alike, chosen = [], []
        for text in texts:
            sums = [oracle.block_influence(*layer, block=BLOCK) for layer in text]
            alike.append(sum(oracle.dropped(x, length // 16) for of in sums for x in of))
            spans = [
                [sum(js.masks.moa.span(c.value, length, **table.arguments)) for c in layer]
                for layer in table.layers
            ]
            chosen.append(
                sum(
                    oracle.dropped(x, tokens // BLOCK)
                    for of, tokens_of in zip(sums, spans, strict=True)
                    for x, tokens in zip(of, tokens_of, strict=True)
                )
            )
        assert best["losses"][number] == pytest.approx(np.mean(chosen), rel=1e-4)
        # one rule for all heads, half of the length, is a plan within the bounds too
        assert all(plan["losses"][number] < np.mean(alike) for plan in front)


def test_the_bound_holds_at_a_length_that_nothing_was_profiled_at():
    # offsets and whole lengths alone: what they keep of 64 tokens says nothing of 1024
    sizes = {**SIZES, "num_betas": 2}
    table = search_rules(TEXTS[:1], held_out=HELD_OUT, extended=1024, **sizes)
    rules = [choice.value for layer in table.layers for choice in layer]
    for length in (64, 1024):
        kept = [sum(js.masks.moa.span(rule, length, **table.arguments)) for rule in rules]
        assert 0.45 * length <= np.mean(np.minimum(kept, length)) <= 0.5 * length


def test_a_saved_table_is_the_same_and_a_broken_one_says_why(table, tmp_path, without_shape_checks):
    path = tmp_path / "plan.json"
    save_table(table, path)
    assert load_table(path) == table
    content = json.loads(path.read_text())
    assert content["per_head"] == "rules"
    value = content["layers"][1][2]["value"]
    for broken, message in (
        ({**value, "kind": "AShape"}, "its kind must be one of ElasticRule"),
        ({"kind": "ElasticRule", "alpha": 0}, "ElasticRule takes alpha, beta"),
        ({**value, "alpha": "x"}, "layer 1: alpha='x' must be a number"),
    ):
        content["layers"][1][2]["value"] = broken
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_table(path)


def test_a_stopped_search_goes_on_and_gives_the_same_table(table, tmp_path):
    partial = tmp_path / "plan.partial.json"
    labels = []

    def stop_at(step):
        def progress(label, steps):
            assert steps == 4 * 2 + programs_to_solve(2, 4)
            labels.append(label)
            if len(labels) == step:
                raise Stopped

        return progress

    def run(step):
        labels.clear()
        return search_rules(
            TEXTS,
            held_out=HELD_OUT,
            source="planted",
            partial=partial,
            progress=stop_at(step),
            **SIZES,
        )

    for step in (6, 12):
        with pytest.raises(Stopped):
            run(step)
        assert len(json.loads(partial.read_text())["figures"]) == step - 1
    assert run(None) == table
    assert len(labels) == 8 + programs_to_solve(2, 4)
    assert not partial.exists()


def weighted(length, of_heads, *, seed):
    """A text whose loss depends on some heads more than on others."""
    layer = profiled(length, seed=seed)
    return [layer._replace(d_out=layer.d_out * on_device(of_heads)[:, None])]


def test_heads_that_share_a_kv_head_share_a_rule():
    texts = [weighted(n, (0.0, 9.0, 2.0, 1.0), seed=n) for n in (64, 96, 128)]
    table = search_rules(texts[:2], held_out=texts[2:], share_in_group=True, **SIZES)
    spans = [sum(js.masks.moa.span(c.value, 96, **table.arguments)) for c in table.layers[0]]
    # the losses of a group add up: those of the first heads alone would say the other
    assert spans[0] == spans[1] > spans[2] == spans[3]
    assert 0.45 * 96 <= np.mean(spans) <= 0.5 * 96


def test_the_model_itself_may_decide_at_the_unseen_length():
    asked = []

    def loss(methods):
        asked.append(methods)
        return -float(len(asked))

    # what matters at one length does not at the other
    texts = [weighted(64, (9.0, 9.0, 1.0, 1.0), seed=0), weighted(96, (1.0, 1.0, 9.0, 9.0), seed=1)]
    held_out = [weighted(128, (1.0, 1.0, 1.0, 1.0), seed=2)]
    found = search_rules(texts, held_out=held_out, loss=loss, most_rules=4, **SIZES)
    front = found.provenance.search["front"]
    assert len(front) == len(asked) > 1
    assert [x["unseen"] for x in front] == [-1.0 - n for n in range(len(front))]
    q, k, _ = qkv(128)
    first, last = (np.asarray(asked[n][0].plan((), q, k)[0].to_dense()) for n in (0, -1))
    chosen = np.asarray(methods_of(found)[0].plan((), q, k)[0].to_dense())
    np.testing.assert_array_equal(chosen, last)
    assert first.shape != last.shape or (first != last).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "texts is empty"),
        ({"held_out": [[]]}, "held_out is empty or has a text without layers"),
        ({"held_out": [planted(64)]}, "one length that the others do not have"),
        ({"held_out": [planted(80), planted(88)]}, "held_out has texts of 80, 88 tokens"),
        ({"texts": [planted(64)[:1]]}, "held_out.0. has .layers, q, k. .2,"),
        ({"density": 0.0}, "density=0.0"),
        ({"least_spent": 1.5}, "least_spent=1.5"),
        ({"ranges": 0}, "ranges=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"interval": 0}, "interval=0"),
        ({"time_limit": 0.0}, "time_limit=0.0"),
        ({"density": 0.01}, "No plan keeps to costs of"),
        ({"interval": 4096, "num_betas": 1}, "No elastic rule of the grid fits"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        search_rules(**{"texts": TEXTS[:1], "held_out": HELD_OUT, **SIZES, **arguments})


def test_a_text_of_other_shapes_or_broken_numbers_is_named():
    good = profiled(64)
    broken = good._replace(d_out=good.d_out.at[3].set(jnp.nan))
    for layer, message in (
        (broken, "texts.0.: Layer 0 has d_out with numbers that are not finite"),
        (good._replace(q=good.q[:32], d_out=good.d_out[:32]), "32 queries and 64 keys"),
        (good._replace(d_out=good.d_out[:, :2]), "d_out of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            search_rules([[layer]], held_out=[[profiled(96)]], **SIZES)
