"""The notebooks run, in time, and are what their scripts say."""

import os
import resource
import signal
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

from examples import notebook

EXAMPLES = Path(__file__).parents[1] / "examples"


class Expected(NamedTuple):
    """A notebook's script, how many pictures it draws, and how long it may take.

    Attributes:
      seconds: Of two cores, however many others use them.
      extras: What it installs in Colab.
      fewer: Takes the place of the cell that says how many steps there are.
    """

    script: Path
    pictures: int
    seconds: int
    extras: str
    fewer: str = ""


# as many as it takes to save, to go on with longer sequences and to draw a curve
FEWER = "STEPS = ((32, 64, 20), (CONTEXT, 16, 20))\nSAVE_EVERY = 10"
NOTEBOOKS = [
    Expected(EXAMPLES / "choose_what_to_compute.py", 6, seconds=120, extras="report"),
    Expected(
        EXAMPLES / "train_with_native_sparse_attention.py",
        **{"pictures": 5, "seconds": 90, "extras": "report,train", "fewer": FEWER},
    ),
]
each = pytest.mark.parametrize("expected", NOTEBOOKS, ids=lambda x: x.script.stem)


def cells(of: nbformat.NotebookNode) -> list[tuple[str, str, str]]:
    return [(cell.id, cell.cell_type, cell.source) for cell in of.cells]


def kept(expected: Expected) -> nbformat.NotebookNode:
    return nbformat.read(expected.script.with_suffix(".ipynb"), as_version=4)


@each
def test_the_notebook_agrees_with_its_script(expected):
    nbformat.validate(kept(expected))
    assert cells(kept(expected)) == cells(notebook.read(expected.script)), "run `make notebook`"


@each
def test_the_notebook_was_run_in_order_and_is_small(expected):
    code = [cell for cell in kept(expected).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == expected.pictures
    # neither errors nor warnings
    assert {output.get("name", "picture") for output in outputs} == {"stdout", "picture"}
    assert expected.script.with_suffix(".ipynb").stat().st_size < 400 * 1024


@pytest.mark.newest
@each
def test_the_notebook_runs_in_time(expected):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = notebook.read(expected.script)
    if expected.fewer:
        (steps,) = (cell for cell in found.cells if cell.source.startswith("STEPS = "))
        steps.source = expected.fewer
    notebook.execute(found, expected.script.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # no less than importing JAX takes: the kernel has been counted
    assert 1 < spent < 2 * expected.seconds


def set_up(expected):
    """Runs the first cell, and returns where it says that the clone is."""
    cells = notebook.read(expected.script).cells
    names = {}
    exec(next(cell.source for cell in cells if cell.cell_type == "code"), names)
    return names["clone"]


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """What is run from a folder with nothing in it, in place of running it."""
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", lambda *given, **more: commands.append((*given, more)))
    return commands


@each
def test_in_colab_a_clone_is_uploaded_and_installed(expected, installed, monkeypatch, tmp_path):
    uploads = []

    def upload():
        uploads.append("jsparse.zip")
        with zipfile.ZipFile("jsparse.zip", "w") as file:
            file.writestr("jsparse/examples/language_model/model.py", "")

    files = types.SimpleNamespace(upload=upload)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    for _ in range(2):
        assert set_up(expected) == tmp_path / "jsparse"
        assert sys.path[0] == str(tmp_path / "jsparse")
    # it is there when the cell is run again
    assert uploads == ["jsparse.zip"]
    target = f"{tmp_path / 'jsparse'}[{expected.extras}]"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--editable", target]
    assert installed == [(pip, {"check": True})] * 2
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    assert set(expected.extras.split(",")) <= set(project["optional-dependencies"])


@each
def test_elsewhere_the_clone_is_found_and_nothing_is_installed(expected, installed, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    assert set_up(expected) == EXAMPLES.parent
    assert sys.path[0] == str(EXAMPLES.parent)
    assert not installed


@pytest.mark.slow
def test_a_kernel_that_dies_loses_no_more_than_an_interval():
    states = EXAMPLES.parent / "build" / "recall_states"
    assert not states.exists(), "another one trains, or died; remove it"
    script = EXAMPLES / "train_with_native_sparse_attention.py"

    def run(until):
        """What it says of its training, up to a line at which it is killed."""
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=EXAMPLES.parent,
            env={**os.environ, "MPLBACKEND": "agg"},
            stdout=subprocess.PIPE,
            text=True,
        )
        said = []
        for line in process.stdout:
            if line.startswith(("step ", "recall ")) or "of 880 steps" in line:
                said.append(line.rsplit(",", 1)[0])
            if until is not None and line.startswith(until):
                process.kill()
        assert process.wait() == (0 if until is None else -signal.SIGKILL)
        return said

    whole = run(None)
    first, second = run("step 240,"), run(None)
    # which of two states was complete is the disk's to say
    lost = second.pop(0)
    assert lost in ("160 of 880 steps were done before\n", "240 of 880 steps were done before\n")
    assert not states.exists()
    assert first == whole[:3]
    assert second == whole[-len(second) :]
    assert len(second) == (880 - int(lost.split()[0])) / 80 + 1
