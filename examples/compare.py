"""The main job: every causal training-free method inside a trained language model.

    python -m examples.compare

Loads the shipped byte-level model, feeds it a file of Python's standard library that it was not
trained on, captures q, k, v of every layer, and compares dense attention with each method. Prints a
table and writes build/compare.html.
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from examples.language_model import data
from examples.language_model.model import bits_per_byte_with, load
from jsparse import checks
from jsparse.cli import compare_with_progress
from jsparse.evaluation import capture, save_captured
from jsparse.evaluation.compare import BLOCK, settings
from jsparse.evaluation.report import block_mask_figure, print_table, write_report

CHECKPOINT = Path(__file__).parent / "language_model" / "checkpoint" / "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--text", type=Path, help="a file to read; default: a held-out one")
    parser.add_argument("--context", type=int, default=8192, help="bytes of it to use")
    parser.add_argument("--output", type=Path, default=Path("build/compare.html"))
    parser.add_argument("--keep", type=Path, help="also write the captured tensors here")
    parser.add_argument("--picture", type=Path, help="also write the picture of tiles here")
    parser.add_argument(
        "--fresh", action="store_true", help="forget the figures of a run that was stopped"
    )
    arguments = parser.parse_args()
    try:
        run(arguments)
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        sys.exit(2)


def run(arguments: argparse.Namespace) -> None:
    checks.positive(context=arguments.context)
    model = load(arguments.checkpoint)
    text = arguments.text or data.held_out_file(arguments.context)
    content = np.frombuffer(text.read_bytes(), np.uint8)[: arguments.context]
    checks.longer_than_a_tile(len(content), BLOCK)
    tokens = jnp.asarray(content, jnp.int32)[None]

    print(f"{len(content)} bytes of {text.name}, capturing q, k, v of every layer")
    layers = capture(model, tokens)
    if arguments.keep:
        save_captured(layers, arguments.keep)
    partial = arguments.output.with_suffix(".partial.json")
    if arguments.fresh:
        partial.unlink(missing_ok=True)

    def score(attention) -> float:
        return bits_per_byte_with(model, tokens, attention)

    comparison = compare_with_progress(layers, settings(), score=score, partial=partial)
    print_table(comparison, "bits/byte")
    q_len, heads, dim = layers[0].q.shape
    write_report(
        comparison,
        arguments.output,
        title="Sparse attention methods inside a language model",
        source=(
            f"A byte-level model of {len(layers)} layers, {heads} heads of {dim}, reading {q_len} "
            f"bytes of {text.name}, a file of Python's standard library that it was not trained "
            f"on. Dense attention costs {comparison.dense_score:.4f} bits per byte."
        ),
        score_name="bits/byte",
    )
    if arguments.picture:
        block_mask_figure(comparison, layers=1).savefig(arguments.picture, dpi=110)
    print(f"report: {arguments.output}")


if __name__ == "__main__":
    main()
