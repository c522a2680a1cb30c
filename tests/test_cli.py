"""The command line: what it prints, and one line and exit code 2 for a wrong call."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import examples.compare
import jsparse as js
from jsparse.cli import main
from jsparse.evaluation import Captured, Profiled, save_captured
from jsparse.planning import (
    SEARCHES,
    Choice,
    Provenance,
    Table,
    load_table,
    near_outputs,
    thresholds,
)
from jsparse.registry import METHODS
from tests.inputs import leveled, qkv


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "captured.safetensors"
    save_captured([Captured(*qkv(300, seed=seed)) for seed in (0, 1)], path)
    return path


def fails(capsys, *arguments):
    """Runs a wrong call and gives its one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jsparse: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_methods_lists_the_registry(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["methods"])
    out = capsys.readouterr().out
    for row in METHODS:
        (line,) = [x for x in out.splitlines() if f" {row.name} " in x]
        assert row.paper in line
        assert row.summary in line


def test_methods_cuts_no_cell_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["methods"])
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(row.name in out and row.paper in out for row in METHODS)


@pytest.mark.newest
def test_compare_prints_a_table_and_writes_a_report(capsys, file, tmp_path):
    output = tmp_path / "new" / "report.html"
    arguments = ["--methods", "mean_pooled", "--output", output, "--repeats", 1, "--block", 64]
    main(["compare", *map(str, [file, *arguments])])
    out = capsys.readouterr().out
    assert "mean_pooled 0.1" in out
    assert "streaming" not in out
    assert f"report: {output}" in out
    assert "2 layers, 300 tokens, 4 query heads over 2 kv heads of 16" in output.read_text()
    assert [p.name for p in output.parent.iterdir()] == ["report.html"]


def test_the_block_asked_for_is_the_one_compared(capsys, file):
    line = fails(capsys, "compare", file, "--methods", "mean_pooled", "--block", 400)
    assert "300 tokens, a tile 400" in line


def test_a_wrong_method_is_named_with_the_right_ones(capsys, file):
    line = fails(capsys, "compare", file, "--methods", "xattention", "nosuch")
    assert "'nosuch'" in line
    assert all(row.name in line for row in METHODS)


def test_a_missing_or_truncated_file_is_named(capsys, file, tmp_path):
    assert "nothing.safetensors" in fails(capsys, "compare", tmp_path / "nothing.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert "not a readable safetensors file" in fails(capsys, "compare", file)


def test_missing_tensors_and_wrong_shapes_are_named(capsys, tmp_path):
    path = tmp_path / "x.safetensors"
    q, k, v = map(np.asarray, qkv(300))
    safetensors.numpy.save_file({"layers.0.q": q, "layers.0.v": v}, str(path))
    assert "layers.0.k" in fails(capsys, "compare", path)
    safetensors.numpy.save_file({"layers.0.q": q, "layers.0.k": k[1:], "layers.0.v": v}, str(path))
    assert "299 tokens" in fails(capsys, "compare", path)


def test_too_short_a_sequence_is_refused(capsys, tmp_path):
    path = tmp_path / "short.safetensors"
    save_captured([Captured(*qkv(128))], path)
    assert "Use a longer text" in fails(capsys, "compare", path, "--output", tmp_path / "r.html")


@pytest.mark.parametrize(("option", "value"), [("--repeats", 0), ("--block", -1)])
def test_numbers_out_of_range_are_refused(capsys, file, option, value):
    assert f"{option[2:]}={value}" in fails(capsys, "compare", file, option, value)


def test_a_place_that_cannot_be_written_is_refused(capsys, file):
    line = fails(capsys, "compare", file, "--methods", "flashmask", "--output", file / "r.html")
    assert "cannot be written" in line


def test_a_folder_as_output_is_refused_before_anything_runs(capsys, tmp_path):
    line = fails(capsys, "compare", tmp_path / "nothing.safetensors", "--output", tmp_path)
    assert "is a folder" in line


def test_a_missing_library_is_named_before_anything_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = fails(capsys, "compare", tmp_path / "nothing.safetensors")
    assert "pip install 'jsparse[report]'" in line
    monkeypatch.setattr(sys, "argv", ["compare", "--checkpoint", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit):
        examples.compare.main()
    assert "pip install 'jsparse[report]'" in capsys.readouterr().err


def test_what_draws_nothing_needs_no_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import jsparse.cli as c; c.main(['methods'])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "xattention" in done.stdout, done.stderr


def test_wrong_shapes_name_their_layer(capsys, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {f"layers.{n}.{x}": a for n in (0, 1) for x, a in zip("qkv", qkv(300), strict=True)}
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    tensors["layers.1.k"] = tensors["layers.1.k"][..., :8]
    safetensors.numpy.save_file(tensors, str(path))
    assert f"{path}: in layer 1, q has dim 16 and k 8" in fails(capsys, "compare", path)


def test_being_stopped_says_what_is_kept(capsys, file, tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("jsparse.cli.compare", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(file), "--output", str(tmp_path / "r.html")])
    assert stop.value.code == 130
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "the same command goes on" in line


def test_argparse_exits_with_2_and_help_shows_examples(capsys):
    for arguments in ([], ["nosuch"], ["compare"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    for arguments in (["--help"], ["compare", "--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "jsparse compare captured.safetensors" in capsys.readouterr().out


@pytest.mark.newest
def test_python_m_jsparse_is_the_same_command():
    command = [sys.executable, "-m", "jsparse", "compare", "nosuch.safetensors"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("jsparse: nosuch.safetensors")
    assert done.stderr.count("\n") == 1


def test_plan_prints_the_choices_and_writes_a_table(capsys, file, tmp_path):
    output = tmp_path / "new" / "plan.json"
    arguments = ["--method", "xattention", "--coverage", 0.8, "--block", 32, "--output", output]
    main(["plan", *map(str, [file, *arguments, "--source", "a model"])])
    out = capsys.readouterr().out
    assert f"plan: {output}" in out
    table = load_table(output)
    assert table.method == "xattention"
    assert table.arguments == {"stride": 16, "block_size": 32}
    assert table.provenance[:3] == ("a model", 300, 300)
    assert table.provenance.search == {"coverage": 0.8}
    assert f"{table.layers[1][3].value:.2f}" in out
    assert [p.name for p in output.parent.iterdir()] == ["plan.json"]


@pytest.fixture
def thresholds_of_four(tmp_path, monkeypatch):
    """A search in four steps: what is typed, and which layers were worked on, as they are."""
    file, output = tmp_path / "captured.safetensors", tmp_path / "plan.json"
    save_captured([Captured(*qkv(64, heads=2, seed=seed)) for seed in range(4)], file)
    options = ["--method", "xattention", "--stride", "4", "--block", "16"]
    compute, done = thresholds._figures, []

    def counted(*tensors, **given):
        done.append(tensors)
        return compute(*tensors, **given)

    monkeypatch.setattr(thresholds, "_figures", counted)
    return ["plan", str(file), *options, "--output", str(output)], done


def test_plan_goes_on_where_it_was_interrupted(capsys, tmp_path, thresholds_of_four, monkeypatch):
    """By Ctrl-C, after two of four layers; nothing is done twice, and the file is the same."""
    command, done = thresholds_of_four
    output = tmp_path / "plan.json"
    main(command)
    # of the bar
    assert "4/4" in capsys.readouterr().out
    whole = output.read_bytes()
    output.unlink()
    done.clear()
    counted = thresholds._figures

    def interrupted(*tensors, **given):
        if len(done) == 2:
            raise KeyboardInterrupt
        return counted(*tensors, **given)

    with monkeypatch.context() as patch:
        patch.setattr(thresholds, "_figures", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(command)
    assert stop.value.code == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert len(done) == 2
    assert not output.exists()
    main(command)
    assert len(done) == 4
    assert output.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captured.safetensors", "plan.json"]


# waits to be killed once two layers are done
KILLED = """
import sys, time
from jsparse import cli
from jsparse.planning import thresholds

compute, done = thresholds._figures, []

def figures(*tensors, **options):
    if len(done) == 2:
        print("killed here", flush=True)
        time.sleep(600)
    done.append(tensors)
    return compute(*tensors, **options)

thresholds._figures = figures
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_plan_goes_on_where_it_was_killed(tmp_path, thresholds_of_four):
    """The same by a signal that nothing can catch."""
    command, done = thresholds_of_four
    main(command)
    whole = load_table(tmp_path / "plan.json")
    (tmp_path / "plan.json").unlink()
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, *command],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert any("killed here" in line for line in child.stdout)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "plan.json").exists()
    done.clear()
    main(command)
    assert len(done) == 2
    found = load_table(tmp_path / "plan.json")
    assert found._replace(layers=()) == whole._replace(layers=())
    assert found.layers[2:] == whole.layers[2:]
    # a process of its own, whose programs are not compiled quickly, rounds otherwise
    np.testing.assert_allclose(found.layers[:2], whole.layers[:2], rtol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captured.safetensors", "plan.json"]


def test_plan_calibrates_blasst(capsys, tmp_path):
    layer = Captured(*leveled(96, heads=2, kv_heads=1))
    file, output = tmp_path / "captured.safetensors", tmp_path / "plan.json"
    save_captured([layer], file)
    options = ["--method", "blasst", "--target-sparsity", "0.3", "--block", "16"]
    main(["plan", str(file), *options, "--output", str(output)])
    table = load_table(output)
    assert table.arguments == {"target_sparsity": 0.3, "block_q": 16, "block_kv": 16}
    assert f"Calibration {table.layers[0][1].value.a:.3g} " in capsys.readouterr().out
    line = fails(capsys, "plan", file, "--target-sparsity", "0.3", "--output", output)
    assert "--target-sparsity is not for minference" in line


def test_plan_hands_its_options_to_the_search_and_says_what_is_too_dear(
    capsys, file, tmp_path, monkeypatch
):
    told = {}

    def search(layers, *, source, progress, partial, **given):
        told.update(given, source=source, partial=partial)
        progress("layer 0", 1)
        heads = tuple(Choice(js.AShape(4, 9), 0.5, cost) for cost in (0.1, 0.3))
        provenance = Provenance(source, 300, 300, "kept_mass", {"budget": given["budget"]})
        return Table("minference", {}, (heads,), provenance)

    monkeypatch.setitem(SEARCHES, "minference", search)
    options = ["--budget", "0.2", "--start", "7", "--score", "outputs", "--block", "32"]
    main(["plan", str(file), *options, "--output", str(tmp_path / "plan.json")])
    assert told == {
        "budget": 0.2,
        "start": 7,
        "score": near_outputs,
        "block_size": 32,
        "source": file.name,
        "partial": tmp_path / "plan.partial.json",
    }
    out = capsys.readouterr().out
    assert "AShape 4 9" in out
    assert "1 head above the budget 0.2" in out


def test_plan_takes_texts_of_several_lengths_and_keeps_some_for_the_choice(
    capsys, tmp_path, monkeypatch
):
    files = []
    for length in (64, 96, 128):
        q, k, v = qkv(length)
        files.append(str(tmp_path / f"{length}.safetensors"))
        save_captured([Profiled(q, k, v, q)] * 2, files[-1])
    told = {}

    def search(texts, *, held_out, source, progress, partial, **given):
        told.update(given, texts=texts, held_out=held_out, source=source)
        progress("text 0 layer 0", 1)
        heads = tuple(Choice(js.ElasticRule(*rule), 0.5, 0.1) for rule in ((64, 0.0), (-9, 0.5)))
        provenance = Provenance(source, 128, 128, "kept_influence", {})
        return Table("moa", {}, (heads,), provenance)

    monkeypatch.setitem(SEARCHES, "moa", search)
    output = ["--output", str(tmp_path / "plan.json")]
    options = ["--density", "0.3", "--extended", "512", "--interval", "16", "--share-in-group"]
    held_out = ["--held-out", files[2]]
    main(["plan", *files[:2], "--method", "moa", *held_out, *options, *output])
    assert [[len(layer.q) for layer in text] for text in told.pop("texts")] == [[64] * 2, [96] * 2]
    assert [len(text[0].d_out) for text in told.pop("held_out")] == [128]
    assert told == {
        "density": 0.3,
        "extended": 512,
        "interval": 16,
        "share_in_group": True,
        "source": "64.safetensors, 96.safetensors",
    }
    out = capsys.readouterr().out
    assert "ElasticRule 64 0, ElasticRule -9 0.5" in out
    line = fails(capsys, "plan", *files, "--method", "moa", *output)
    assert "--held-out is missing" in line
    line = fails(capsys, "plan", *files, *output)
    assert "3 files are given; the search for minference takes one" in line
    line = fails(capsys, "plan", files[0], "--method", "xattention", *held_out, *output)
    assert "--held-out is not for xattention" in line


def test_plan_refuses_in_one_line(capsys, file, tmp_path):
    output = ["--output", tmp_path / "plan.json"]
    line = fails(capsys, "plan", file, "--method", "xattention", "--budget", 0.2, *output)
    assert "--budget is not for xattention, whose search takes --block, --coverage" in line
    assert "start=2500 leaves none of 300 queries" in fails(capsys, "plan", file, *output)
    assert "budget=7.0" in fails(capsys, "plan", file, "--budget", 7.0, *output)
    assert "nothing.safetensors" in fails(capsys, "plan", tmp_path / "nothing.safetensors", *output)
    assert "is a folder" in fails(capsys, "plan", file, "--output", tmp_path)
