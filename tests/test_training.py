"""The training of examples: it goes on where it was stopped, and the right parameters learn."""

import dataclasses
import json
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import jsparse as js
import jsparse.nn
from examples import associative_recall as recall
from examples import curves, train_sparse, what_clusters_miss
from examples.language_model.model import Config, LanguageModel, load, save
from examples.language_model.training import Course, Phase, Training, plain_loss
from jsparse.core import clustering
from jsparse.evaluation import capture
from tests.inputs import on_device

SMALL = Config(width=16, layers=2, heads=2, kv_heads=1, hidden=16)
COURSE = Course((Phase(16, 2, 0.5), Phase(32, 1, 0.5)), steps=6, save_every=2)
INDEXER = {"index_heads": 2, "index_dim": 8, "rotary_dim": 4}
TEXT = np.random.default_rng(0).integers(0, 256, (2, 32))


def model_with(method=None, **changes):
    sizes = dataclasses.replace(SMALL, **changes)
    return LanguageModel(sizes, method=method, rngs=nnx.Rngs(0))


def parameters(model):
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    }


def batches(step, phase):
    rng = np.random.default_rng(step)
    return on_device(rng.integers(0, 256, (phase.batch, phase.context)), jnp.int32)


def test_a_run_that_is_stopped_goes_on_to_the_same_end(tmp_path):
    whole = Training(model_with(layers=1), COURSE, states=tmp_path / "whole")
    kept = []
    whole.run(batches, lambda phase, bits: kept.append((whole.done, phase.context, bits)))
    assert [row[:2] for row in kept] == [(2, 16), (4, 32), (6, 32)]

    def stopped(step, phase):
        if step == 5:
            raise KeyboardInterrupt
        return batches(step, phase)

    first = Training(model_with(layers=1), COURSE, states=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        first.run(stopped, lambda *_: None)
    second = Training(model_with(layers=1), COURSE, states=tmp_path / "parts")
    # the fifth step is lost, and no other
    assert second.done == 4
    seen = []
    second.run(lambda *given: seen.append(given[0]) or batches(*given), lambda *_: None)
    assert seen == [4, 5]
    expected, got = parameters(whole.model), parameters(second.model)
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    assert Training(model_with(layers=1), COURSE, states=tmp_path / "parts", fresh=True).done == 0


@pytest.mark.newest
def test_a_branch_goes_on_as_the_trunk_would_have(tmp_path):
    assert COURSE.first_long == 3
    assert [COURSE.phase_at(step).context for step in (2, 3)] == [16, 32]
    whole = Training(model_with(layers=1), COURSE, states=tmp_path / "whole")
    whole.run(batches, lambda *_: None)
    trunk = Training(model_with(layers=1), COURSE, states=tmp_path / "trunk")
    kept = []
    trunk.run(batches, lambda *_: kept.append(trunk.done), until=COURSE.first_long)
    assert kept == [2, 3]
    branch = Training(model_with(layers=1), COURSE, states=tmp_path / "branch")
    branch.branch(Training(model_with(layers=1), COURSE, states=tmp_path / "trunk"))
    assert branch.done == 3
    branch.run(batches, lambda *_: None)
    got = parameters(branch.model)
    for name, x in parameters(whole.model).items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    # what a method adds stays as it was made, and the trunk is left alone
    method = js.from_length(js.flashmoba(block_kv=8, top_k=2, taps=3), min_length=32)
    other = Training(model_with(method, layers=1), COURSE, states=tmp_path / "other")
    before = parameters(other.model)
    other.branch(trunk)
    common, got = parameters(trunk.model), parameters(other.model)
    assert got.keys() - common.keys()
    for name, x in got.items():
        np.testing.assert_array_equal(x, common.get(name, before[name]), err_msg=name)
    other.run(batches, lambda *_: None)
    for name, x in parameters(trunk.model).items():
        np.testing.assert_array_equal(x, common[name], err_msg=name)


def test_the_last_phase_starts_anew_at_a_quarter_of_the_peak():
    rates = COURSE._replace(steps=100, rate=1.0).rates()
    assert [COURSE.phase_at(step).context for step in range(6)] == [16, 16, 16, 32, 32, 32]
    found = [float(rates(step)) for step in (0, 11, 49, 50, 75, 100)]
    np.testing.assert_allclose(found, [0, 1, 0.0516, 0.25, 0.125, 0], atol=2e-3)


def test_what_a_kill_left_behind_is_dropped_and_other_settings_are_refused(tmp_path):
    path = tmp_path / "nsa.json"
    record = {"method": "nsa", "steps": 6, "curve": [{"step": 2}, {"step": 4}]}
    curves.write(path, record)
    assert curves.earlier(path, {**record, "curve": []}, 2) == [{"step": 2}]
    with pytest.raises(ValueError, match="2 steps .*none.json is gone.*--fresh"):
        curves.earlier(tmp_path / "none.json", record, 2)
    with pytest.raises(ValueError, match="steps=6, not 8.*--fresh"):
        curves.earlier(path, {**record, "steps": 8}, 2)


def gradients(loss, model):
    tokens = on_device(TEXT, jnp.int32)

    @nnx.jit
    def run(model):
        return nnx.grad(lambda model: loss(model, tokens)[0])(model)

    found = jax.tree_util.tree_leaves_with_path(run(model))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in found}


@pytest.mark.newest
@pytest.mark.parametrize(
    "sparse_from", [1, pytest.param(64, marks=pytest.mark.slow)], ids=["sparse", "dense"]
)
def test_the_indexer_learns_by_its_loss_and_all_else_by_the_models(sparse_from):
    method = js.hisa(top_k=4, block_kv=8, block_top_k=2, **INDEXER)
    model = model_with(js.from_length(method, min_length=sparse_from))
    plain = gradients(plain_loss, model)
    loss = train_sparse.loss_with(method, train_sparse.learn_tokens, sparse_from)
    learning = gradients(loss, model)
    of_indexer = {name for name in plain if "method_params" in name}
    assert of_indexer
    for name, gradient in learning.items():
        if name in of_indexer:
            assert not plain[name].any(), name
            assert gradient.any(), name
        else:
            np.testing.assert_allclose(gradient, plain[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_gates_learn_from_a_model_that_stays_as_it_is(tmp_path):
    method = js.seerattention(
        block_size=8, density=0.4, gate_dim=8, dense_rows=0, rope_base=SMALL.rope_base
    )
    model = model_with(method)
    before = parameters(model)
    loss = train_sparse.loss_with(method, train_sparse.learn_gates, 1)
    training = Training(model, COURSE, states=tmp_path, loss=loss, trained=train_sparse.OF_METHOD)
    training.run(batches, lambda *_: None)
    moved = {name for name, x in parameters(model).items() if (x != before[name]).any()}
    assert moved == {name for name in before if "method_params" in name}
    # a layer without the method has nothing to learn from
    run, tokens = nnx.jit(loss), on_device(TEXT, jnp.int32)
    for methods, learns in (([None, method], True), ([None, None], False)):
        model = js.nn.with_methods(model, methods)
        total, bits = run(model, tokens)
        assert (float(total) > float(bits)) == learns


@pytest.mark.newest
def test_clusters_begin_among_keys_and_move_while_training(tmp_path):
    setting = train_sparse.SETTINGS["routing-transformer"]._replace(
        arguments={"clusters": 2, "balanced": False}, sparse_from=32
    )
    model = model_with(setting.method())
    model.blocks[0].attention.method = None
    tokens = on_device(TEXT[:1], jnp.int32)
    setting.begin(model, tokens)
    layer = model.blocks[1].attention

    def centroids():
        return np.asarray(layer.method_params["centroids"].means[...])

    keys = clustering.layer_norm(capture(model, tokens)[1].k)
    before = centroids()
    # sums of keys, made as long as keys are
    closest = np.asarray(keys[:, 0] @ before[0].T).argmax(-1)
    sums = np.stack([keys[closest == n, 0].sum(0) for n in range(2)])
    np.testing.assert_allclose(clustering.layer_norm(sums), before[0], atol=1e-5)

    # attention to 16 bytes is dense, and has no clusters
    for length, distance in ((16, 0.0), (32, float(clustering.commitment(keys, before)))):
        total, bits = nnx.jit(setting.loss())(model, tokens[:, :length])
        np.testing.assert_allclose(float(total - bits), 1e-4 * distance, atol=1e-6)
    assert distance > 0.1
    training = Training(model, COURSE, states=tmp_path, loss=setting.loss())
    seen = []
    training.run(batches, lambda *_: seen.append((centroids() != before).any()))
    # three steps on 16 bytes, then three on 32; layers are left as they are for use
    assert seen == [False, True, True]
    assert layer.use_running_average
    assert layer.observe is None
    again = model_with(setting.method())
    again.blocks[0].attention.method = None
    Training(again, COURSE, states=tmp_path, loss=setting.loss())
    found = again.blocks[1].attention.method_params["centroids"].means[...]
    np.testing.assert_array_equal(found, centroids())


def test_a_saved_model_has_what_no_optimizer_moves(tmp_path):
    method = js.routing_transformer(clusters=2, num_local_heads=0)
    model = model_with(method)
    centroids = model.blocks[1].attention.method_params["centroids"]
    centroids.means[...] = jnp.full((1, 2, 8), 0.1)
    centroids.counts[...] = on_device([[70_000.0, 1.0]])
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", method=method)
    found = loaded.blocks[1].attention.method_params["centroids"]
    for name in ("means", "counts", "sums"):
        np.testing.assert_array_equal(getattr(found, name)[...], getattr(centroids, name)[...])


def test_a_method_joins_a_model_that_was_trained_without_it(tmp_path):
    method = js.seerattention(block_size=8, density=0.4, gate_dim=8, rope_base=SMALL.rope_base)
    trained = model_with()
    save(trained, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", method=method)
    common, got = parameters(trained), parameters(loaded)
    assert {name for name in got if name not in common} == {x for x in got if "method_params" in x}
    for name, x in common.items():
        np.testing.assert_array_equal(got[name], np.float32(np.float16(x)), err_msg=name)
    for layer in js.nn.attention_layers(loaded):
        assert all(x.any() for x in jax.tree.leaves(layer.params()))
    # whatever else is missing is an error
    wider = {"config": '{"width": 16, "layers": 3, "heads": 2, "kv_heads": 1, "hidden": 16}'}
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.numpy.save_file(tensors, tmp_path / "wider.safetensors", metadata=wider)
    with pytest.raises(ValueError, match=r"blocks\.2\..* has shape None"):
        load(tmp_path / "wider.safetensors", method=method)


def test_questions_have_their_answers_out_of_reach():
    for length in (32, recall.LENGTH):
        found = recall.sequences(8, length, seed=3)
        tokens, asked, answers, planted = (np.asarray(x) for x in found)
        rows = np.arange(8)[:, None]
        np.testing.assert_array_equal(tokens[rows, asked], tokens[rows, planted])
        np.testing.assert_array_equal(tokens[rows, planted + 1], answers)
        assert (tokens[rows, asked] < recall.KEYS).all()
        assert ((answers >= recall.KEYS) & (answers < recall.KEYS + recall.VALUES)).all()
        # a block of its own: neither token of a pair is in another
        assert (planted % 2 == 0).all()
        for row in tokens:
            assert len(set(row[row < recall.KEYS])) == recall.PAIRS
    # farther than the window, and than a block that the question is in
    assert (asked - planted).min() > 32 + recall.BLOCK


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nsa", "flashmoba"])
def test_what_is_far_back_is_found(name, tmp_path):
    phases = (Phase(32, 64, 0.5), Phase(128, 16, 0.5))
    record = recall.train(
        name,
        course=recall.COURSE._replace(phases=phases, steps=1400, save_every=100),
        folder=tmp_path,
        states=tmp_path / "states",
        fresh=True,
    )
    # a sixteenth by chance, a quarter for knowing the values that were planted
    assert record["recall"] > 0.9
    assert record["recall_without_choice"] < 0.5


@pytest.mark.newest
def test_two_stages_that_look_into_every_block_choose_as_one_does():
    sizes = {"top_k": 6, "block_kv": 8}
    model = LanguageModel(
        SMALL, method=js.hisa(**sizes, block_top_k=2, **INDEXER), rngs=nnx.Rngs(0)
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 48)), jnp.int32)
    some, every = (
        train_sparse.compare_selections(model, tokens, **sizes, block_top_k=blocks)
        for blocks in (2, 6)
    )
    assert every["overlap"] == [1.0] * SMALL.layers
    assert every["mass_two_stages"] == every["mass_one_stage"] == some["mass_one_stage"]
    for share, two, one in zip(*some.values(), strict=True):
        assert share < 1.0
        assert 0 < two < 1.0
        assert 0 < one < 1.0


@pytest.mark.slow
def test_what_clusters_hold_is_the_share_of_dense_attention_inside_them():
    method = js.routing_transformer(
        **{"clusters": 3, "balanced": False, "shared": False, "normalize_logits": False},
        **{"num_local_heads": 1, "local_block": 8},
    )
    dense = model_with(heads=4, kv_heads=2, layers=1)
    routed = LanguageModel(dense.config, method=method, rngs=nnx.Rngs(1))
    tokens = on_device(TEXT[:1], jnp.int32)
    found = what_clusters_miss.shares_held(dense, routed, method, tokens, window=5)
    seen = capture(dense, tokens)[0]
    q, k = np.float64(seen.q), np.repeat(np.float64(seen.k), 2, axis=1)
    place = np.arange(len(q))
    before = place[:, None] - place
    logits = np.where(before[:, None] >= 0, np.einsum("qhd,khd->qhk", q, k) / np.sqrt(4), -np.inf)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)

    def cluster(x):
        means = routed.blocks[0].attention.method_params["centroids"].means[0]
        return np.argmax(np.float64(clustering.layer_norm(on_device(x, jnp.float32))) @ means.T, -1)

    # of this block, or of the one on either side
    near_blocks = np.abs(place[:, None] // 8 - place // 8) <= 1
    inside = [cluster(q[:, h])[:, None] == cluster(k[:, h]) for h in (2, 3)]
    for name, pairs in (
        ("held", [near_blocks, near_blocks, *inside]),
        ("nearest", [before < 5] * 4),
    ):
        expected = [(probs[:, h] * pairs[h]).sum(-1).mean() for h in range(4)]
        np.testing.assert_allclose(found[name][0], expected, atol=6e-5)


def test_the_kept_runs_are_sparse_and_the_page_has_their_figures():
    found = curves.runs(curves.FOLDER)
    trained = {"nsa", "flashmoba", "hisa", "seerattention", "routing-transformer"}
    assert {"dense", "streaming", *trained} <= set(found)
    for name, record in found.items():
        assert record["curve"][-1]["step"] == record["steps"], name
        if name != "dense" and not record["dense_layers"]:
            assert record["density"]["pairs"] <= 0.25, name
        # a window's tiles are cut at its edges
        if name not in ("dense", "streaming") and not record["dense_layers"]:
            assert record["density"]["tiles"] <= 0.25, name
            # a fiftieth of what dense attention of equal steps comes to, or of what was distilled;
            # the page says why one is farther
            gap = 1.06 if name == "routing-transformer" else 1.02
            assert curves.last(record) <= gap * curves.dense_of(record, found), name
    recalled = curves.runs(recall.FOLDER)
    for name in ("nsa", "flashmoba"):
        runs = [record for record in recalled.values() if record["method"] == name]
        assert len({record["seed"] for record in runs}) == len(runs) >= 3
        for record in runs:
            assert record["recall"] >= 0.95
            assert record["recall_without_choice"] <= 0.1
            assert record["density"]["tiles"] <= 0.35
    page = (curves.FOLDER / "README.md").read_text()
    again = curves.runs(curves.FOLDER / "seed-1")
    for name in trained - {"routing-transformer"} | {"routing-transformer-last"}:
        for runs in (found, again):
            assert curves.last(runs[name]) <= 1.02 * curves.dense_of(runs[name], runs), name
            assert runs[name]["density"]["pairs"] <= 0.25, name
    missed = json.loads(what_clusters_miss.OUTPUT.read_text())
    shares, local = missed["mean_over_layers"], missed["local_heads"]
    by_kind = [
        " and ".join(f"{100 * x:.0f}" for x in heads)
        for heads in (shares["held"][local:], shares["held"][:local])
    ]
    for share in by_kind:
        assert f"hold {share} %" in " ".join(page.split())
    # the page says four fifths of the nearest
    assert [round(5 * x) for x in shares["nearest"][local:]] == [4, 4]
    assert missed["window"] == 64
    assert missed["arguments"] == found["routing-transformer"]["arguments"]
    remedy = "run `python -m examples.curves`"
    assert curves.between(page, curves.RUNS) == curves.section(found), remedy
    assert curves.between(page, curves.AGAIN) == curves.table(again), remedy
    assert curves.between(page, curves.STAGES) == curves.stages_table(found["hisa"]), remedy
    assert curves.between(page, curves.RECALL) == curves.recall_table(recalled), remedy


def test_the_kept_runs_are_what_the_scripts_do():
    for record in curves.runs(curves.FOLDER).values():
        setting = train_sparse.SETTINGS[record["method"]]
        said = train_sparse.said_of(setting.course, seed=0)
        said |= {"arguments": setting.arguments, "sparse_from": setting.sparse_from}
        assert record.get("below") == (setting.below and setting.below.said())
        # of whichever jax it was
        said["jax"] = record["jax"]
        assert record | json.loads(json.dumps(said)) == record, record["method"]
    for name, record in curves.runs(recall.FOLDER).items():
        assert name == f"{record['method']}-{record['seed']}"
        assert record["steps"] == recall.COURSE.steps
        assert record["phases"] == [phase._asdict() for phase in recall.COURSE.phases]


def test_the_kept_picture_is_of_the_kept_runs(tmp_path):
    def words(path):
        elements = ElementTree.fromstring(path.read_text()).iter()
        return sorted(filter(None, (x.text for x in elements if x.tag.endswith("text"))))

    if not curves.runs(curves.FOLDER):
        pytest.skip("no run is kept yet")
    for path in curves.FOLDER.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    curves.draw(tmp_path)
    assert words(tmp_path / "curves.svg") == words(curves.FOLDER / "curves.svg")


def test_a_gap_is_to_dense_attention_of_equal_steps():
    dense = {
        **{"method": "dense", "steps": 4, "phases": [], "rate": 1.0, "seed": 0},
        **{"distilled": False, "density": {"tiles": 1.0, "pairs": 1.0}},
        "held_out_bits_per_byte": {"512": 3.0, "4096": 2.0},
    }
    sparse = {**dense, "held_out_bits_per_byte": {"512": 9.0, "4096": 2.02}}
    gates = {**sparse, "distilled": True, "steps": 1, "held_out_bits_per_byte_dense": 1.01}
    longer = {**sparse, "steps": 8}
    found = {"dense": dense, "nsa": sparse, "seerattention": gates, "longer": longer}
    lines = curves.table(json.loads(json.dumps(found))).splitlines()[2:]
    assert [line.split(" | ")[-2:] for line in lines] == [
        ["2.000", "+0.0% |"],
        ["2.000", "+1.0% |"],
        ["1.010", "+100.0% |"],
        ["", " |"],
    ]
