"""`jsparse tune`: what it times, checks, keeps and says; the kernels run in the interpreter."""

import dataclasses
import json
import time

import jax.numpy as jnp
import pytest

from jsparse.attention import tuning
from jsparse.attention.mosaic import CHIPS
from jsparse.cli import main
from pallas_kernels import configurations
from pallas_kernels.block_sparse_attention import mosaic
from pallas_kernels.configurations import Key

KEY = Key("forward", False, "Some GPU", "bfloat16", 64, 64, 64, 64)
CONFIGS = tuple(mosaic.Config(stages) for stages in (1, 2, 3))
KERNELS = tuple(tuning._kernels(CHIPS["9"]))
QUICK = tuning.Effort(0.0, 1)


def job(calls=None, **outcomes):
    """A job whose configurations give a number, raise or sleep, by `stages`."""

    def run(config):
        outcome = outcomes.get(f"s{config.stages}", 1.0)

        def call():
            if calls is not None:
                calls.append(config.stages)
            if isinstance(outcome, Exception):
                raise outcome
            # the last is the fastest
            time.sleep(0.03 / config.stages)
            return jnp.full((4,), outcome)

        return call

    return tuning.Job(KEY, tuning.Sizes(), CONFIGS, lambda: run)


def test_the_fastest_that_is_right_is_kept(tmp_path):
    path = tmp_path / "tuned.json"
    timings = list(tuning.tune([job()], path, effort=QUICK))
    assert [t.config["stages"] for t in timings] == [1, 2, 3]
    assert not any(t.failed or t.kept for t in timings)
    assert configurations.read(path)[KEY].best()["config"] == dataclasses.asdict(CONFIGS[2])
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (1.1, "off by 1.0e-01"),
        (float("nan"), "off by nan"),
        (RuntimeError("no registers"), "RuntimeError: no registers"),
    ],
)
def test_one_that_fails_or_is_wrong_is_passed_over(tmp_path, outcome, says):
    path = tmp_path / "tuned.json"
    timings = list(tuning.tune([job(s3=outcome)], path, effort=QUICK))
    assert [t.failed is None for t in timings] == [True, True, False]
    assert says in timings[2].failed
    assert configurations.read(path)[KEY].best()["config"]["stages"] == 2


def test_without_a_default_to_check_against_nothing_is_taken(tmp_path):
    path = tmp_path / "tuned.json"
    timings = list(tuning.tune([job(s1=ValueError("broken"))], path, effort=QUICK))
    assert all("ValueError: broken" in t.failed for t in timings)
    assert configurations.read(path)[KEY].best() is None


def test_a_stopped_run_goes_on_and_keeps_other_entries(tmp_path):
    path, calls = tmp_path / "tuned.json", []
    other = configurations.Entry(KEY._replace(dim=128), "0.1", {})
    configurations.write(path, [other])
    running = tuning.tune([job(calls)], path, effort=QUICK)
    next(running), next(running)
    running.close()
    assert set(calls) == {1, 2}
    calls.clear()
    timings = list(tuning.tune([job(calls)], path, effort=QUICK))
    assert [t.kept for t in timings] == [True, True, False]
    # the default once more, for its result
    assert (calls.count(1), calls.count(2)) == (1, 0)
    assert set(configurations.read(path)) == {KEY, other.key}
    calls.clear()
    list(tuning.tune([job(calls)], path, effort=QUICK))
    assert calls == []
    list(tuning.tune([job(calls)], path, effort=QUICK, again=True))
    assert set(calls) == {1, 2, 3}


@pytest.mark.parametrize("change", ["jax", "problem", "default"])
def test_what_was_timed_otherwise_is_timed_anew(tmp_path, monkeypatch, change):
    path, calls = tmp_path / "tuned.json", []
    list(tuning.tune([job()], path, effort=QUICK))
    this = job(calls)
    if change == "jax":
        monkeypatch.setattr(tuning.jax, "__version__", "0.0.1")
    elif change == "problem":
        this = this._replace(sizes=tuning.Sizes(length=64))
    else:
        this = this._replace(candidates=CONFIGS[::-1])
    assert not any(t.kept for t in tuning.tune([this], path, effort=QUICK))
    assert set(calls) == {1, 2, 3}


def dry_run(capsys, monkeypatch, tmp_path, kernels):
    monkeypatch.setattr(tuning, "_kernels", lambda chip: kernels)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "tuned.json"
    main(["tune", "--dry-run", "--output", str(path)])
    out = capsys.readouterr().out
    entries = json.loads(path.read_text())["entries"]
    assert [entry["key"]["operation"] for entry in entries] == [k.operation for k in kernels]
    assert {entry["key"]["device"] for entry in entries} == {"interpreter"}
    for entry in entries:
        assert len(entry["timed"]) == 2
        assert all("ms" in candidate for candidate in entry["timed"]), entry["timed"]
        assert entry["config"] is not None
    assert "no measure of speed" in out
    assert f"export JSPARSE_TUNED={path}" in out
    return path


@pytest.mark.newest
def test_a_dry_run_goes_through_the_motions(capsys, monkeypatch, tmp_path):
    path = dry_run(capsys, monkeypatch, tmp_path, KERNELS[:1])
    before = path.read_text()
    main(["tune", "--dry-run", "--output", str(path)])
    assert "2 of 2 were timed before; --again times them anew" in capsys.readouterr().out
    assert path.read_text() == before


@pytest.mark.slow
def test_a_dry_run_of_every_kernel(capsys, monkeypatch, tmp_path):
    dry_run(capsys, monkeypatch, tmp_path, KERNELS)


def test_every_kernel_has_jobs_for_every_shape():
    shapes = [tuning.Shape(), tuning.Shape(dim=256, v_dim=256, block_kv=64)]
    found = tuning.jobs(shapes, tuning.Sizes(), tuning.DRY._replace(most=None))
    # backward kernels do not take the wide one
    assert [sum(j.key.dim == dim for j in found) for dim in (128, 256)] == [10, 4]
    assert all(len(j.candidates) > 2 for j in found if j.key.dim == 128)


@pytest.mark.parametrize(
    ("shape", "sizes", "error", "says"),
    [
        ({"dim": 80}, {}, ValueError, "dim=80 must be a multiple of 64"),
        ({"block_q": 24}, {}, NotImplementedError, "16, 32, 64 or 128 queries, not 24"),
        ({}, {"length": 100}, ValueError, "length=100 must be a multiple of 128"),
        ({}, {"kv_heads": 3}, ValueError, "heads=16 must be a multiple of 3"),
        ({}, {"density": 1.5}, ValueError, r"density=1.5 must lie in \(0, 1\]"),
    ],
)
def test_sizes_that_cannot_be_timed_are_named(shape, sizes, error, says):
    with pytest.raises(error, match=says):
        tuning.jobs([tuning.Shape(**shape)], tuning.Sizes(**sizes), tuning.DRY)


def wrong(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_without_a_gpu_it_is_one_sentence(capsys):
    line = wrong(capsys)
    reason = "it needs a Hopper or Blackwell GPU"
    assert line.startswith("jsparse: This machine cannot be tuned: " + reason)
    assert line.count("\n") == 1


def test_a_wrong_size_a_foreign_file_and_no_place_are_named(capsys, tmp_path, monkeypatch):
    assert "'12y' is no size" in wrong(capsys, "--tiles", "12y")
    path = tmp_path / "notes.json"
    path.write_text("{}")
    line = wrong(capsys, "--dry-run", "--output", str(path))
    assert "holds no tuned configurations" in line
    assert path.read_text() == "{}"
    monkeypatch.setattr(tuning, "device_check", lambda: None)
    assert "JSPARSE_TUNED is empty" in wrong(capsys)
