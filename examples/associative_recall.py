"""Trains small models to recall what stood far back, which a sparse method has to find first.

    python -m examples.associative_recall                      # dense, nsa and flashmoba
    python -m examples.associative_recall --methods flashmoba --seeds 0 1 2

Pairs of a key and a value are planted in the first part of a sequence, among other tokens; in the
second half keys are asked for, and the model is to say their values. No window and no block of a
query's own reaches back that far. Writes the curve of each method, the share of right answers, and
what is left of it in the end when queries choose no block besides their own. Goes on where it was
stopped.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jsparse as js
import jsparse.nn
from examples import curves
from examples.language_model.model import Config, LanguageModel
from examples.language_model.training import Course, Phase, Training
from jsparse import checks
from jsparse.cli import one_line_errors
from jsparse.evaluation import density_of_layers

FOLDER = curves.FOLDER / "recall"
LENGTH, PAIRS, ASKED = 512, 4, 8
# tokens: keys, then values, then those that mean nothing
KEYS, VALUES, OTHERS = 16, 16, 16
MODEL = Config(width=64, layers=2, heads=2, kv_heads=1, hidden=128, rope_base=10_000.0)
# what to do is learnt on short sequences, where all is chosen; how to choose on the others
COURSE = Course(
    (Phase(32, 64, 0.35), Phase(128, 16, 0.3), Phase(256, 16, 0.15), Phase(LENGTH, 8, 0.2)),
    steps=2400,
    rate=3e-3,
)
BLOCK = 16
# sequences that are asked about for each point of a curve, and how many times as many for its end
POINT, END = 64, 8


class Choice(NamedTuple):
    """A method and its training.

    Attributes:
      method: None attends to all.
      without: The same without a choice: a query's own block alone.
    """

    method: js.Method | None
    without: js.Method | None = None


def nsa(top_k: int) -> js.Method:
    # of windows half as long, models read what they are asked for, and choose nothing; perceptrons,
    # which begin at random, drown what the other branches find
    sizes = {"compression_size": BLOCK, "stride": BLOCK, "block_kv": BLOCK, "window": 2 * BLOCK}
    mean = js.windows.mean()
    return js.nsa(compression=mean, **sizes, top_k=top_k, num_init=0, num_local=1)


def flashmoba(top_k: int) -> js.Method:
    return js.flashmoba(block_kv=BLOCK, top_k=top_k)


METHODS = {
    "dense": Choice(None),
    "nsa": Choice(nsa(4), nsa(1)),
    "flashmoba": Choice(flashmoba(4), flashmoba(1)),
}


class Recall(NamedTuple):
    """Sequences and what is asked in them.

    Attributes:
      tokens: [batch, length].
      asked: Where a key is asked for, [batch, questions].
      answers: Its value.
      planted: Where the key stood first.
    """

    tokens: jax.Array
    asked: jax.Array
    answers: jax.Array
    planted: jax.Array


def sequences(count: int, length: int, seed: int) -> Recall:
    """Random sequences: pairs in the first three eighths, questions in the second half."""
    rng = np.random.default_rng(seed)
    tokens = KEYS + VALUES + rng.integers(0, OTHERS, (count, length))
    rows = np.arange(count)[:, None]

    def some(choices, taken):
        return rng.random((count, choices)).argsort(-1)[:, :taken]

    # a pair has both its tokens in one block
    planted = 2 * some(3 * length // 16, PAIRS)
    keys, values = some(KEYS, PAIRS), KEYS + rng.integers(0, VALUES, (count, PAIRS))
    tokens[rows, planted], tokens[rows, planted + 1] = keys, values
    asked = length // 2 + some(length // 2, ASKED)
    which = rng.integers(0, PAIRS, (count, ASKED))
    tokens[rows, asked] = keys[rows, which]
    found = tokens, asked, values[rows, which], planted[rows, which]
    return Recall(*(jnp.asarray(x, jnp.int32) for x in found))


def answers_of(model: LanguageModel, recall: Recall) -> jax.Array:
    """Logits at the questions, [batch, questions, vocabulary]."""
    return jnp.take_along_axis(model(recall.tokens), recall.asked[..., None], axis=-2)


def loss(model: LanguageModel, recall: Recall) -> tuple[jax.Array, jax.Array]:
    """Bits per answer."""
    logp = jax.nn.log_softmax(answers_of(model, recall).astype(jnp.float32))
    taken = jnp.take_along_axis(logp, recall.answers[..., None], axis=-1)
    bits = -taken.mean() / jnp.log(2.0)
    return bits, bits


@nnx.jit
def recalled(model: LanguageModel, recall: Recall) -> jax.Array:
    """The share of right answers."""
    return (answers_of(model, recall).argmax(-1) == recall.answers).mean()


def recalled_in_the_end(model: LanguageModel, length: int) -> float:
    """The same of so many sequences that chance moves it by a third of a percent."""
    shares = [recalled(model, sequences(POINT, length, seed=seed)) for seed in range(1, END + 1)]
    return round(float(jnp.stack(shares).mean()), 4)


def with_method(model: LanguageModel, method: js.Method | None) -> LanguageModel:
    """The same model, parameters shared, with a method that takes the same parameters."""
    copy = nnx.merge(*nnx.split(model))
    for layer in js.nn.attention_layers(copy):
        layer.method = method
    return copy


def train(
    name: str, *, course: Course = COURSE, seed: int = 0, folder: Path, states: Path, fresh: bool
) -> dict:
    """Trains with one of the methods; returns the record that it wrote."""
    method, without = METHODS[name]
    model = LanguageModel(MODEL, method=method, rngs=nnx.Rngs(seed))
    training = Training(model, course, states=states, fresh=fresh, loss=loss)
    length = course.phases[-1].context
    held_out = sequences(POINT, length, seed=1)
    record = {
        **{"method": name, "length": length, "pairs": PAIRS, "asked": ASKED, "seed": seed},
        "phases": [phase._asdict() for phase in course.phases],
        **{"steps": course.steps, "rate": course.rate, "jax": jax.__version__, "curve": []},
    }
    path = folder / f"{name}-{seed}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if training.done:
        record["curve"] = curves.earlier(path, record, training.done)
    before = record["curve"][-1]["seconds"] if record["curve"] else 0.0
    started = time.perf_counter()

    def keep(phase: Phase, bits: float) -> None:
        point = {
            **{"step": training.done, "context": phase.context},
            "bits_per_answer": round(bits, 4),
            "recall": round(float(recalled(model, held_out)), 4),
            "seconds": round(before + time.perf_counter() - started, 1),
        }
        record["curve"].append(point)
        curves.write(path, record)

    training.run(
        lambda step, phase: sequences(phase.batch, phase.context, seed=10_000 + step), keep
    )
    reports = nnx.jit(density_of_layers)(model, held_out.tokens[:4])
    for what in ("tiles", "pairs"):
        shares = jnp.stack([getattr(report, what) for report in reports])
        record.setdefault("density", {})[what] = round(float(shares.mean()), 4)
    record["questions"] = END * POINT * ASKED
    record["recall"] = recalled_in_the_end(model, length)
    if without is not None:
        blind = with_method(model, without)
        record["recall_without_choice"] = recalled_in_the_end(blind, length)
    curves.write(path, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="associative_recall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--steps", type=int, default=COURSE.steps, help="default: %(default)s")
    parser.add_argument(
        "--seeds",
        **{"type": int, "nargs": "+", "default": [0], "metavar": "SEED"},
        help="of a run each; default: 0",
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help="of curves")
    parser.add_argument("--fresh", action="store_true", help="forget any saved state")
    arguments = parser.parse_args()
    with one_line_errors("associative_recall"):
        checks.positive(steps=arguments.steps)
        for name, seed in itertools.product(arguments.methods, arguments.seeds):
            found = train(
                name,
                course=COURSE._replace(steps=arguments.steps),
                seed=seed,
                folder=arguments.output,
                states=Path("build") / "associative_recall" / f"{name}-{seed}",
                fresh=arguments.fresh,
            )
            said = {k: v for k, v in found.items() if k.startswith(("density", "recall"))}
            print(f"{name}, seed {seed}: {json.dumps(said)}")
        if arguments.output == FOLDER:
            curves.draw(curves.FOLDER)


if __name__ == "__main__":
    main()
