"""Scores a table of `jsparse plan` inside the language model, on text it was not trained on.

    python -m examples.language_model.score_table build/plan.json

Prints the bits per byte with dense attention, with each head's own setting and, for a table of
elastic rules, with one rule for all heads that keeps as many tokens.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jsparse as js
from examples.compare import CHECKPOINT
from examples.language_model import data
from examples.language_model.model import bits_per_byte, load
from jsparse import checks
from jsparse.cli import one_line_errors
from jsparse.masks.moa import span
from jsparse.planning import Table, load_table, methods_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="score_table", description=__doc__.split("\n")[0])
    parser.add_argument("table", type=Path, metavar="FILE", help="a table of jsparse plan")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="FILE")
    parser.add_argument(
        "--context", type=int, default=8192, metavar="BYTES", help="default: %(default)s"
    )
    parser.add_argument(
        "--texts", type=int, default=4, metavar="N", help="windows; default: %(default)s"
    )
    with one_line_errors("score_table"):
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    checks.positive(context=arguments.context, texts=arguments.texts)
    table, model = load_table(arguments.table), load(arguments.checkpoint)
    _, held_out = data.split()
    texts = data.windows(held_out, arguments.context, arguments.texts, seed=1)
    models = {
        "dense": model,
        f"{table.method}, a setting for each head": js.nn.with_methods(model, methods_of(table)),
    }
    if isinstance(table.layers[0][0].value, js.ElasticRule):
        share = kept_share(table, arguments.context)
        method = js.moa(rules=share, **table.arguments)
        alike = js.nn.with_methods(model, [method] * len(table.layers))
        models[f"{table.method}, {share:.3f} of the length for all"] = alike
    score = nnx.jit(bits_per_byte)
    print(f"bits per byte, {arguments.texts} x {arguments.context} bytes of held-out text")
    for name, with_method in models.items():
        bits = [float(score(with_method, jnp.asarray(row[None], jnp.int32))) for row in texts]
        print(f"{np.mean(bits):8.4f}  {name}", flush=True)


def kept_share(table: Table, length: int) -> float:
    """Tokens that heads keep, over the length, mean over layers and heads."""
    spans = [sum(span(c.value, length, **table.arguments)) for layer in table.layers for c in layer]
    return float(np.mean(np.minimum(spans, length)) / length)


if __name__ == "__main__":
    main()
