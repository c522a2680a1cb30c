"""Runs a training script on a model of a few numbers, and kills it where it is told to.

    python -m tests.killed examples.train_sparse step:3 --method nsa --steps 6

Before the third step, or with `save:4` when the curve has its point of four steps and the state is
not saved yet; `never` lets it end. What it makes of each step is appended to steps.txt.
"""

import functools
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax

import jsparse as js
from examples import train_sparse
from examples.language_model.model import Config, LanguageModel
from examples.language_model.training import Course, Phase, Training, held_out_bits, windows_of

SMALL = Config(width=16, layers=1, heads=2, kv_heads=1, hidden=16)
PHASES = Phase(16, 2, 0.5), Phase(64, 1, 0.5)
NSA = {"compression_size": 8, "stride": 4, "block_kv": 8, "top_k": 3, "window": 8}
# what makes each script small
CHANGES: dict[str, dict[str, Any]] = {
    "examples.language_model.train": {"PHASES": PHASES},
    "examples.train_sparse": {
        "CONTEXT": 64,
        "Config": lambda: SMALL,
        "SETTINGS": {
            "nsa": train_sparse.Setting(js.nsa, NSA, sparse_from=32, course=Course(PHASES, 0))
        },
    },
}


def main() -> None:
    name, at, *arguments = sys.argv[1:]
    script = importlib.import_module(name)

    def reached(place):
        if at == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def logged(text):
        batches = windows_of(text)

        def of(step, phase):
            reached(f"step:{step}")
            with Path("steps.txt").open("a") as file:
                file.write(f"{step}\n")
            return batches(step, phase)

        return of

    save = Training._save

    def saved(training):
        reached(f"save:{training.done}")
        save(training)

    Training._save = saved
    vars(script).update(
        LanguageModel=functools.partial(LanguageModel, SMALL),
        held_out_bits=lambda model, text, context, tokens: held_out_bits(model, text, 64, 128),
        windows_of=logged,
        **CHANGES[name],
    )
    jax.config.update("jax_disable_most_optimizations", True)
    sys.argv = [name, *arguments]
    script.main()


if __name__ == "__main__":
    main()
