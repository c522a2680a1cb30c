"""Searches find what was planted, keep to the budget, and go on where they were stopped."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.blocks import candidates as visible_blocks
from jsparse.evaluation import Captured, attend_cost
from jsparse.planning import (
    load_table,
    near_outputs,
    patterns,
    save_table,
    search_patterns,
    search_thresholds,
)
from jsparse.planning.patterns import CANDIDATES, _choose, scaled
from jsparse.planning.thresholds import needed_thresholds
from jsparse.types import TileGrid
from tests.inputs import on_device

LENGTH, BLOCK = 768, 16
CAUSAL = js.masks.causal()
WINDOW, STRIPES, BOXES = js.AShape(4, 100), js.VerticalSlash(40, 50), js.BlockSparse(5)
PATTERNS = WINDOW, STRIPES, BOXES
ARGUMENTS = {"block_size": BLOCK, "forced_slash": 1, "forced_vertical": 1}


def planted():
    """Heads that look at the last 90 tokens, at ten keys far back, and at the topic's blocks."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, LENGTH, 3, 48))
    position = np.arange(LENGTH)
    # a window: neighbours in time look alike, on circles of several speeds
    angles = position[:, None] / np.array([40.0, 80.0, 200.0, 900.0])
    circles = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    q[:, 0, :8], k[:, 0, :8] = 7 * circles, 2 * circles
    # columns: all queries look at the same few keys
    q[:, 1, 0], k[:, 1, 0] = 6.0, 0.0
    k[rng.choice(np.arange(50, LENGTH - 200), 10, replace=False), 1, 0] = 12.0
    # topics: blocks of tokens in an order of their own look at their like
    topics = rng.permutation(LENGTH // BLOCK) % 12
    of_token = np.eye(12)[np.repeat(topics, BLOCK)]
    q[:, 2, :12], k[:, 2, :12] = 12 * of_token, 6 * of_token
    return Captured(*(on_device(x, jnp.float32) for x in (q, k, v)))


@pytest.fixture(scope="module")
def layer():
    return planted()


def test_the_search_finds_the_pattern_of_each_head(layer):
    table = search_patterns(
        [layer], candidates=PATTERNS, budget=0.6, start=300, source="planted", **ARGUMENTS
    )
    assert [choice.value for choice in table.layers[0]] == list(PATTERNS)
    for head, choice in enumerate(table.layers[0]):
        assert choice.score > 0.8
        # the accountant's count of this head's tiles and columns
        method = js.minference(patterns=choice.value, **ARGUMENTS)
        plan, _ = method.plan((), layer.q[:, [head]], layer.k[:, [head]], mask=CAUSAL)
        sizes = {"heads": 1, "kv_heads": 1, "dim": 48, "v_dim": 48}
        dense = js.block_mask(CAUSAL, LENGTH, LENGTH, block_q=BLOCK, block_kv=BLOCK)
        share = attend_cost(plan, **sizes).flops / attend_cost(dense, **sizes).flops
        assert choice.cost == pytest.approx(share)
        assert choice.cost <= 0.6
    assert table.provenance.search["candidates"][0] == "AShape(4, 100)"
    assert (table.provenance.source, table.provenance.q_len) == ("planted", LENGTH)


class Stopped(Exception):
    """What interrupts a search in these tests."""


def test_a_stopped_search_goes_on_and_gives_the_same_file(layer, tmp_path, monkeypatch):
    layers = [layer, layer._replace(v=-layer.v)]
    partial = tmp_path / "plan.partial.json"
    few = WINDOW, js.AShape(0, 200)

    def run(name, stop_at=None):
        labels = []

        def progress(label, steps):
            assert steps == 4
            labels.append(label)
            if len(labels) == stop_at:
                raise Stopped

        table = search_patterns(
            layers, candidates=few, budget=0.5, start=0, score=near_outputs, progress=progress,
            partial=partial, **ARGUMENTS,
        )  # fmt: skip
        save_table(table, tmp_path / name)

    run("whole.json")
    with pytest.raises(Stopped):
        run("never.json", stop_at=4)
    kept = json.loads(partial.read_text())["figures"]
    assert len(kept) == 3
    planned = []
    shares = patterns._shares
    monkeypatch.setattr(patterns, "_shares", lambda *a: planned.append(1) or shares(*a))
    run("resumed.json")
    assert len(planned) == 1
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not partial.exists()
    # other values have the same tiles, and other outputs
    first, second = load_table(tmp_path / "whole.json").layers
    assert [c.cost for c in first] == [c.cost for c in second]


def test_the_best_within_the_budget_or_else_the_cheapest():
    figures = [
        {"cost": [0.4, 0.1, 0.9, 0.3], "score": [0.5, 0.5, 0.9, None]},
        {"cost": [0.2, 0.2, 0.6, 0.4], "score": [0.5, 0.7, 0.8, 0.1]},
        {"cost": [0.6, 0.6, 0.7, 0.1], "score": [0.9, 0.9, 0.9, None]},
    ]
    chosen = _choose(PATTERNS, figures, budget=0.5)
    assert [c.value for c in chosen] == [STRIPES, STRIPES, STRIPES, STRIPES]
    assert [c.cost for c in chosen] == [0.2, 0.2, 0.6, 0.4]


def test_candidates_are_those_of_the_authors_and_smaller_ones():
    assert js.AShape(100, 800) in CANDIDATES
    assert js.VerticalSlash(3500, 100) in CANDIDATES
    small = scaled([js.AShape(100, 800), js.VerticalSlash(30, 3), js.BlockSparse(1)], [1.0, 0.25])
    assert small == (
        js.AShape(100, 800),
        js.VerticalSlash(30, 3),
        js.BlockSparse(1),
        js.AShape(100, 200),
        js.VerticalSlash(7, 1),
    )


def test_worked_thresholds():
    """Blocks 2 and 0 hold nine tenths of the true mass; the estimate ranks 0 third, after 1."""
    mass = on_device([[[2.0, 0.5, 7.0, 0.5]]])
    estimate = on_device([[[2.0, 3.0, 4.0, 1.0]]])
    visible = jnp.ones((1, 1, 4), bool)
    np.testing.assert_allclose(needed_thresholds(mass, estimate, visible, 0.9), [0.9])
    np.testing.assert_allclose(needed_thresholds(mass, estimate, visible, 0.6), [0.4])
    # a row that sees two blocks adds its mass, what it does not see adds none
    mass = jnp.concatenate([mass, mass], 1)
    estimate = jnp.concatenate([estimate, on_device([[[1.0, 9.0, 50.0, 50.0]]])], 1)
    visible = on_device([[[True] * 4, [True, True, False, False]]])
    np.testing.assert_allclose(needed_thresholds(mass, estimate, visible, 0.8), [19 / 20])


def test_thresholds_take_what_matters_and_resume(layer, tmp_path):
    sizes = {"stride": 4, "block_size": BLOCK}
    partial = tmp_path / "plan.partial.json"
    seen = []

    def stop(label, steps):
        seen.append(steps)
        if len(seen) == 2:
            raise Stopped

    layers = [layer, layer._replace(q=0.5 * layer.q)]
    with pytest.raises(Stopped):
        search_thresholds(layers, progress=stop, partial=partial, **sizes)
    assert list(json.loads(partial.read_text())["figures"]) == ["layer 0"]
    table = search_thresholds(layers, partial=partial, **sizes)
    assert table == search_thresholds(layers, **sizes)
    assert not partial.exists()
    method = js.xattention(threshold=on_device([c.value for c in table.layers[0]]), **sizes)
    tiles = method.plan((), layer.q, layer.k, mask=CAUSAL)[0].to_dense()
    visible, _ = visible_blocks(CAUSAL, TileGrid(LENGTH, LENGTH, BLOCK, BLOCK), (), 3)
    logits = np.einsum("qhd,khd->hqk", layer.q, layer.k) / np.sqrt(48)
    logits = np.where(np.tri(LENGTH, dtype=bool), logits, -np.inf)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    mass = probs.reshape(3, LENGTH // BLOCK, BLOCK, LENGTH // BLOCK, BLOCK).sum((2, 4))
    for head, choice in enumerate(table.layers[0]):
        kept = mass[head][np.asarray(tiles[head])].sum() / LENGTH
        assert choice.score == pytest.approx(kept, rel=1e-4)
        assert choice.cost == pytest.approx(float(tiles[head].sum() / visible[head].sum()))
        assert kept > 0.85


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": LENGTH}, "start=768 leaves none of 768 queries"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"candidates": ()}, "candidates=0"),
        ({"candidates": [js.BlockSparse(0)]}, "top_k=0"),
        ({"block_size": 0}, "block_size=0"),
    ],
)
def test_bad_input_is_named(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        search_patterns([layer], **{"start": 0} | arguments)


def test_thresholds_refuse_what_the_method_refuses(layer):
    with pytest.raises(ValueError, match="coverage=2.0"):
        search_thresholds([layer], coverage=2.0)
    with pytest.raises(ValueError, match="block_size=100 must be a multiple of 16"):
        search_thresholds([layer], block_size=100)


def test_broken_numbers_are_named_before_the_search(layer):
    broken = layer._replace(k=layer.k.at[3].set(jnp.nan))
    for search in (search_patterns, search_thresholds):
        with pytest.raises(ValueError, match="Layer 1 has k with numbers that are not finite"):
            search([layer, broken])
