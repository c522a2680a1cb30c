"""The main job: every causal method that has nothing to learn inside a trained language model.

    python -m examples.compare

Loads the shipped byte-level model, feeds it a file of Python's standard library that it was not
trained on, captures q, k, v of every layer, and compares dense attention with each method. Prints a
table and writes build/compare.html.
"""

import argparse
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.language_model import data
from examples.language_model.model import bits_per_byte_with, load
from jsparse import checks
from jsparse.cli import compare_with_progress, one_line_errors
from jsparse.evaluation import capture, save_captured
from jsparse.evaluation.compare import BLOCK, settings
from jsparse.evaluation.report import make_room, write_report, write_tiles
from jsparse.evaluation.table import print_table

CHECKPOINT = Path(__file__).parent / "language_model" / "checkpoint" / "model.safetensors"
OPENING = 1200


def main() -> None:
    parser = argparse.ArgumentParser(prog="compare", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="FILE")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: a held-out file")
    parser.add_argument(
        "--context", type=int, default=8192, metavar="BYTES", help="of it; default: %(default)s"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/compare.html"),
        metavar="PAGE",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="also write q, k, v of all layers"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also write tiles as an SVG")
    parser.add_argument(
        "--fresh", action="store_true", help="forget the figures of a run that was stopped"
    )
    arguments = parser.parse_args()
    with one_line_errors("compare"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    checks.positive(context=arguments.context)
    checks.drawing_library()
    for path in (arguments.output, arguments.keep, arguments.picture):
        if path:
            make_room(path)
    model = load(arguments.checkpoint)
    text = arguments.text or data.held_out_file(arguments.context)
    try:
        content = text.read_bytes()[: arguments.context]
    except OSError as error:
        checks.readable_text(text, error)
    checks.longer_than_a_tile(len(content), BLOCK)
    tokens = jnp.asarray(np.frombuffer(content, np.uint8), jnp.int32)
    name = arguments.text or (
        f"{data.name_of(text)}, a file of the standard library of Python "
        f"{platform.python_version()} that was kept from its training"
    )

    print(f"reading {len(content)} bytes of {name}")
    layers = capture(model, tokens[None])
    if arguments.keep:
        save_captured(layers, arguments.keep)
    partial = arguments.output.with_suffix(".partial.json")
    if arguments.fresh:
        partial.unlink(missing_ok=True)

    def score(attention) -> float:
        return bits_per_byte_with(model, tokens, attention)

    comparison = compare_with_progress(layers, settings(), score=score, repeats=1, partial=partial)
    print_table(comparison, "bits/byte")
    (_, heads, dim), kv_heads = layers[0].q.shape, layers[0].k.shape[1]
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    write_report(
        comparison,
        arguments.output,
        title="Sparse attention methods inside a language model",
        source=(
            f"A byte-level language model of {size / 1e6:.1f} million parameters ({len(layers)} "
            f"layers, {heads} query heads over {kv_heads} kv heads of {dim}) reads {len(content)} "
            f"bytes of {name}. With dense attention it predicts them at "
            f"{comparison.dense_score:.4f} bits per byte; then each method takes its place, "
            "without any training."
        ),
        score_name="bits/byte",
        text=content[:OPENING].decode(errors="replace"),
    )
    if arguments.picture:
        write_tiles(comparison, arguments.picture)
    print(f"report: {arguments.output}")


if __name__ == "__main__":
    main()
