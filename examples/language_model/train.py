"""Trains the language model on the standard library's source, in phases of growing context.

    python -m examples.language_model.train --output examples/language_model/checkpoint

Takes the better part of an hour on two cores. It saves its state as it goes; the same command goes
on where it was stopped.
"""

import argparse
import json
import time
from pathlib import Path

from flax import nnx

from examples.language_model import data
from examples.language_model.model import LanguageModel, save
from examples.language_model.training import Course, Phase, Training, held_out_bits, windows_of

PHASES = (Phase(256, 16, 0.62), Phase(1024, 4, 0.31), Phase(8192, 1, 0.07))


def main() -> None:
    """Parses arguments and trains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/language_model"))
    parser.add_argument("--steps", type=int, default=1500, help="updates of 4096 bytes or more")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50, help="steps between saved states")
    parser.add_argument("--fresh", action="store_true", help="forget any saved state")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    text, held_out = data.split()
    training = Training(
        LanguageModel(rngs=nnx.Rngs(arguments.seed)),
        Course(PHASES, arguments.steps, arguments.rate, arguments.save_every),
        states=Path("build/language_model_state") / str(arguments.seed),
        fresh=arguments.fresh,
    )
    model = training.model
    log = arguments.output / "log.jsonl"
    kept = log.read_text().splitlines() if training.done and log.exists() else []
    log.write_text("".join(f"{line}\n" for line in kept if is_done(line, training.done)))
    started = time.perf_counter()

    def keep(phase: Phase, bits: float) -> None:
        row = {
            "step": training.done,
            "context": phase.context,
            "train_bits_per_byte": round(bits, 4),
            "held_out_bits_per_byte": round(
                held_out_bits(model, held_out, phase.context, 32_768), 4
            ),
            "seconds": round(time.perf_counter() - started, 1),
        }
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        save(model, arguments.output / "model.safetensors")

    training.run(windows_of(text), keep)
    final = {
        f"held_out_bits_per_byte_at_{context}": round(
            held_out_bits(model, held_out, context, 262_144), 4
        )
        for context in (512, 2048, 8192)
    }
    with log.open("a") as file:
        file.write(json.dumps({"step": arguments.steps, **final}) + "\n")
    print(json.dumps(final))


def is_done(line: str, done: int) -> bool:
    """Whether a line of the log is of steps that need not be made again."""
    row = json.loads(line)
    return row["step"] <= done and "context" in row


if __name__ == "__main__":
    main()
