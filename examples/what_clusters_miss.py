"""Why the routing transformer stays behind dense attention: what its clusters hold of that.

    python -m examples.train_sparse --method dense
    python -m examples.train_sparse --method routing-transformer
    python -m examples.what_clusters_miss

Takes both runs where they were left, and one held-out text of 4096 bytes. Of the dense run's
attention it measures which share lies on the keys that the method would compute, by the centroids
of the other run: inside clusters for the heads that it routes, in blocks of neighbours for those
that it leaves local; and which share lies on the nearest bytes. Writes a JSON file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jsparse as js
import jsparse.nn
from examples import curves
from examples.language_model import data
from examples.language_model.model import LanguageModel
from examples.language_model.training import Training
from examples.train_sparse import CONTEXT, SETTINGS, STATES
from jsparse import checks
from jsparse.cli import one_line_errors
from jsparse.evaluation import capture

METHOD = "routing-transformer"
OUTPUT = curves.FOLDER / "measured" / "clusters.json"
CAUSAL = js.masks.causal()


def left(name: str, seed: int, states: Path) -> LanguageModel:
    """The model of a run as it was left.

    Raises:
      ValueError: if nothing of the run is saved, or it is not over.
    """
    setting, place = SETTINGS[name], states / f"{name}-{seed}"
    model = LanguageModel(method=setting.method(), rngs=nnx.Rngs(seed))
    if place.exists():
        done = Training(model, setting.course, states=place, loss=setting.loss()).done
        if done == setting.course.steps:
            return model
    raise ValueError(
        f"{place} has no run that is over; make it by python -m examples.train_sparse --method "
        f"{name} --seed {seed}."
    )


def shares_held(
    dense: LanguageModel, routed: LanguageModel, method: js.Method, tokens: Any, *, window: int
) -> dict[str, list[list[float]]]:
    """The shares of dense attention that the method's keys hold, and the nearest.

    By layer and head, means over queries. A query is in one cluster: of several, keys would count
    twice.

    Args:
      dense: Whose attention it is.
      routed: Whose centroids cut it.
      method: What `routed` has in its layers.
      tokens: A text, [1, length].
      window: How many keys are the nearest, a query's own included.
    """
    nearest = CAUSAL & js.masks.sliding_window(left=window - 1)

    @jax.jit
    def of_layer(q, k, v, params):
        _, whole = js.attend(q, k, v, mask=CAUSAL, return_lse=True)
        (_, held), _ = method.attend(params, q, k, v, mask=CAUSAL, return_lse=True)
        _, near = js.attend(q, k, v, mask=nearest, return_lse=True)
        return [jnp.exp(lse - whole).mean(-1) for lse in (held, near)]

    layers = js.nn.attention_layers(routed)
    found = [
        of_layer(seen.q, seen.k, seen.v, layer.params())
        for seen, layer in zip(capture(dense, tokens), layers, strict=True)
    ]
    held, near = (
        [[round(float(x), 4) for x in heads] for heads in each] for each in zip(*found, strict=True)
    )
    return {"held": held, "nearest": near}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="what_clusters_miss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--states", type=Path, default=STATES, metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of both runs; default: %(default)s")
    parser.add_argument(
        "--window", type=int, default=64, help="the nearest bytes; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    with one_line_errors("what_clusters_miss"):
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    checks.positive(window=arguments.window)
    setting = SETTINGS[METHOD]
    assert setting.factory is not None
    dense, routed = (left(name, arguments.seed, arguments.states) for name in ("dense", METHOD))
    _, held_out = data.split()
    tokens = jnp.asarray(data.windows(held_out, CONTEXT, 1, seed=2), jnp.int32)
    method = setting.factory(**setting.arguments)
    shares = shares_held(dense, routed, method, tokens, window=arguments.window)
    means = {
        name: [round(sum(heads) / len(heads), 4) for heads in zip(*by_layer, strict=True)]
        for name, by_layer in shares.items()
    }
    record = {
        **{"method": METHOD, "arguments": setting.arguments, "steps": setting.course.steps},
        **{"seed": arguments.seed, "context": CONTEXT, "window": arguments.window},
        # of its query heads the first ones are local
        "local_heads": setting.arguments["num_local_heads"]
        * dense.config.heads
        // dense.config.kv_heads,
        "mean_over_layers": means,
        "by_layer": shares,
        "jax": jax.__version__,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    curves.write(arguments.output, record)
    print(f"{arguments.output}: {json.dumps(means)}")


if __name__ == "__main__":
    main()
