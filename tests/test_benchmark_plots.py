"""The charts of what the benchmarks wrote."""

import copy
import json
import sys
from xml.etree import ElementTree

import pytest

from benchmarks import attention, plots


def gpu_record():
    def timing(length, density, **more):
        times = {
            "jsparse": {"ms": 1.0, "tflops": 100.0 * density},
            "torch flex": {"error": "not there"},
            "jsparse, forward and gradients": {"ms": 3.0},
        }
        sizes = {"length": length, "density": density, "dim": 128, "heads": 16, "kv_heads": 4}
        backward = {"ms": 2.0, "tflops": 50.0}
        return {**sizes, "causal": False, "times": times, "backward": backward, **more}

    return {
        "machine": {"device": "Made-up GPU", "jax": "1", "torch": "2", "date": "2026-01-01T00"},
        "timings": [
            *(timing(length, density) for length in (8192, 32768) for density in (1.0, 0.1)),
            timing(8192, 1.0, causal=True),
            {"length": 8192, "error": "out of memory"},
        ],
    }


def test_gpu_charts_are_over_density_and_over_length():
    found = {chart.title: chart for chart in plots.charts(gpu_record())}
    shape = "dim 128, 16 heads over 4"
    assert set(found) == {
        *(f"{length} tokens, {shape}" for length in (8192, 32768)),
        *(f"density {density}, {shape}" for density in ("1", "0.1")),
    }
    over_density = found[f"8192 tokens, {shape}"]
    assert over_density.lines == {
        "jsparse": [(0.1, 10.0), (1.0, 100.0)],
        "jsparse, gradients": [(0.1, 50.0), (1.0, 50.0)],
    }
    assert found[f"density 1, {shape}"].lines["jsparse"] == [(8192, 100.0), (32768, 100.0)]


def test_cpu_charts_have_one_of_each_dtype():
    record = json.loads(attention.RESULTS.read_text())
    record["against_torch"] = [
        {**row, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
        for row in record["against_torch"]
    ]
    titles = [chart.title for chart in plots.charts(record)]
    assert sum("float32" in title for title in titles) == 1
    assert sum("bfloat16" in title for title in titles) == 1
    # as written before there was more than one
    old = copy.deepcopy(record)
    old["case"]["dtype"] = "float32"
    old["against_torch"] = [
        {k: v for k, v in row.items() if k != "dtype"} for row in record["against_torch"][:3]
    ]
    assert [c.title for c in plots.charts(old)] == [t for t in titles if "bfloat16" not in t]


def test_a_picture_says_what_was_measured_where(tmp_path):
    path = tmp_path / "x.svg"
    plots.draw(gpu_record(), path)
    text = path.read_text()
    ElementTree.fromstring(text)
    for said in ("Made-up GPU, jax 1, torch 2, 2026-01-01", "TFLOP/s on computed tiles", "jsparse"):
        assert said in text
    assert "torch flex" not in text


@pytest.mark.parametrize("name", ["attention_cpu", "attention_cpu_newest"])
def test_the_kept_picture_is_of_the_kept_figures(name, tmp_path):
    path, kept = tmp_path / "x.svg", plots.RESULTS / name
    record = json.loads(kept.with_suffix(".json").read_text())
    plots.draw(record, path)

    def words(text):
        found = [x.text for x in ElementTree.fromstring(text).iter() if x.tag.endswith("text")]
        return sorted(filter(None, found))

    text = kept.with_suffix(".svg").read_text()
    assert words(text) == words(path.read_text()), "run python -m benchmarks.plots"


def test_of_all_results_that_are_kept_those_with_charts_are_drawn(monkeypatch, tmp_path):
    for path in plots.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots"])
    assert plots.main() == 0
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert drawn == {"attention_cpu", "attention_cpu_newest"}


@pytest.mark.parametrize("text", ["{}", "no json"])
def test_a_file_without_figures_is_named(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["plots", str(path)])
    with pytest.raises(SystemExit) as stop:
        plots.main()
    assert stop.value.code == 2
    assert str(path) in capsys.readouterr().err
