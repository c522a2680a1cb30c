"""Training scripts that are killed, as by a machine that is gone, come to the same end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERY = 2  # steps between saved states
# what each is started with besides, and what it leaves
SCRIPTS = {
    "examples.language_model.train": ([], ("log.jsonl", "model.safetensors")),
    "examples.train_sparse": (["--method", "nsa"], ("nsa.json",)),
}


def start(name, folder, at):
    """Runs a script in its folder up to where it is killed; returns how it ended, and its steps."""
    folder.mkdir(exist_ok=True)
    steps = folder / "steps.txt"
    steps.write_text("")
    further = [*SCRIPTS[name][0], "--steps", "6", "--save-every", str(EVERY), "--output", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", name, at, *further],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if at == "never" else -signal.SIGKILL), done.stderr
    return [int(step) for step in steps.read_text().split()]


def without_seconds(found):
    if isinstance(found, list):
        return [without_seconds(x) for x in found]
    if isinstance(found, dict):
        return {name: without_seconds(x) for name, x in found.items() if name != "seconds"}
    return found


def left(name, folder):
    """What a script wrote, without what the clock said."""
    for file in SCRIPTS[name][1]:
        content = (folder / "out" / file).read_bytes()
        if file.endswith(".json"):
            content = without_seconds(json.loads(content))
        elif file.endswith(".jsonl"):
            content = [without_seconds(json.loads(line)) for line in content.splitlines()]
        yield content


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_that_is_killed_loses_no_more_than_an_interval(name, tmp_path):
    assert start(name, tmp_path / "whole", "never") == [0, 1, 2, 3, 4, 5]
    made = 0
    # before anything is saved; between two saves, where train_sparse has just left the trunk that
    # all runs begin with; when the curve is written and the state is not, which is the run's first
    # in train_sparse, and once more
    for at in ("step:1", "step:3", "save:4", "save:6", "never"):
        steps = start(name, tmp_path / "parts", at)
        assert made - EVERY <= steps[0] <= made
        made = steps[-1] + 1
    assert made == 6
    for got, expected in zip(*(left(name, tmp_path / x) for x in ("parts", "whole")), strict=True):
        assert got == expected
