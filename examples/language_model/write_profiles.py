"""Profiles the language model for `jsparse plan --method moa`: what its loss depends on.

    python -m examples.language_model.write_profiles --output build/profile

Reads windows of the text it was trained on, of several lengths, and writes of each a file of q, k,
v and the gradient of the bits per byte by each layer's attention. Goes on where it was stopped.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp

from examples.compare import CHECKPOINT
from examples.language_model import data
from examples.language_model.model import bits_per_byte, load
from jsparse import checks
from jsparse.cli import one_line_errors
from jsparse.evaluation import profile, save_captured


def main() -> None:
    parser = argparse.ArgumentParser(prog="write_profiles", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("build/profile"), metavar="FOLDER")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096],
        metavar="BYTES",
        help="of the texts to plan for; default: 1024 2048 4096",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=6144,
        metavar="BYTES",
        help="of the texts that decide among plans; default: %(default)s",
    )
    parser.add_argument(
        "--texts", type=int, default=4, metavar="N", help="of each length; default: %(default)s"
    )
    with one_line_errors("write_profiles"):
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    checks.positive(texts=arguments.texts, held_out=arguments.held_out)
    model = load(arguments.checkpoint)
    train, _ = data.split()
    written = {}
    for length in (*arguments.lengths, arguments.held_out):
        checks.positive(length=length)
        written[length] = []
        for number, row in enumerate(data.windows(train, length, arguments.texts, seed=length)):
            path = arguments.output / f"{length}-{number}.safetensors"
            written[length].append(path)
            if path.exists():
                continue
            aside = path.with_suffix(".partial")
            save_captured(profile(model, bits_per_byte, jnp.asarray(row[None], jnp.int32)), aside)
            aside.rename(path)
            print(path, flush=True)
    *files, held_out = (" ".join(map(str, paths)) for paths in written.values())
    print(f"\njsparse plan --method moa {' '.join(files)} --held-out {held_out}")


if __name__ == "__main__":
    main()
