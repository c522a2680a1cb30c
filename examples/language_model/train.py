"""Trains the language model on the standard library's source, in phases of growing context.

    python -m examples.language_model.train --output examples/language_model/checkpoint

Takes the better part of an hour on two cores. It saves its state as it goes; the same command goes
on where it was stopped.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jsparse as js
from examples.language_model import data
from examples.language_model.model import LanguageModel, bits_per_byte, save

# below this length a dense product of everything is the faster way to train on a CPU
DENSE_BELOW = 1024


class Phase(NamedTuple):
    """Steps at one context length."""

    context: int
    batch: int
    share: float


# long contexts last: what they teach, heads that look far back, needs words and syntax first
PHASES = (Phase(256, 16, 0.62), Phase(1024, 4, 0.31), Phase(8192, 1, 0.07))


def phase_at(step: int, steps: int) -> Phase:
    """The phase that a step belongs to."""
    end = 0.0
    for phase in PHASES:
        end += phase.share * steps
        if step < end:
            return phase
    return PHASES[-1]


def learning_rate(peak: float, steps: int) -> optax.Schedule:
    """Cosine over the short contexts; the long one gets a quarter of the peak, falling to zero.

    Positions that the model meets for the first time in the last phase need more than the tail of
    a cosine to be learnt.
    """
    last = round(steps * (1.0 - PHASES[-1].share))
    short = optax.warmup_cosine_decay_schedule(
        0.0, peak, min(100, steps // 10 + 1), last, end_value=peak / 20
    )
    return optax.join_schedules([short, optax.linear_schedule(peak / 4, 0.0, steps - last)], [last])


def attention_for(context: int):
    """Exact causal attention: all pairs for short contexts, listed tiles for long ones."""
    implementation = "reference" if context < DENSE_BELOW else "xla"

    def attention(q, k, v, *, mask, x, positions):
        return js.attend(q, k, v, mask=mask, implementation=implementation)

    return attention


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model: LanguageModel, optimizer: nnx.Optimizer, tokens):
    """One update; returns bits per byte before it."""
    loss, gradients = nnx.value_and_grad(bits_per_byte)(model, tokens)
    optimizer.update(model, gradients)
    return loss


evaluate = nnx.jit(bits_per_byte)


def held_out_bits(model: LanguageModel, stream: np.ndarray, context: int, tokens: int) -> float:
    """Bits per byte over fixed windows of the held-out text."""
    rows = data.windows(stream, context, max(1, tokens // context), seed=1)
    costs = [float(evaluate(model, jnp.asarray(row[None], jnp.int32))) for row in rows]
    return float(np.mean(costs))


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

    train, held_out = data.split()
    model = LanguageModel(rngs=nnx.Rngs(arguments.seed))
    schedule = learning_rate(arguments.rate, arguments.steps)
    transformation = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=0.05,
            mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        ),
    )
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    states = ocp.CheckpointManager(
        (Path("build/language_model_state") / str(arguments.seed)).absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
    )
    if arguments.fresh:
        for step in states.all_steps():
            states.delete(step)
    done = states.latest_step() or 0
    if done:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state((model, optimizer)))
        restored = states.restore(done, args=ocp.args.StandardRestore(target))
        nnx.update((model, optimizer), restored)
    log = arguments.output / "log.jsonl"
    if not done:
        log.write_text("")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    recent: list[float] = []
    started = time.perf_counter()
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=arguments.steps, completed=done)
        for step in range(done, arguments.steps):
            phase = phase_at(step, arguments.steps)
            for block in model.blocks:
                block.attention.attention = _attention(phase.context)
            tokens = data.windows(train, phase.context, phase.batch, seed=10_000 + step)
            recent.append(float(train_step(model, optimizer, jnp.asarray(tokens, jnp.int32))))
            progress.update(bar, advance=1, description=f"{recent[-1]:.3f} bits/byte")
            if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
                row = {
                    "step": step + 1,
                    "context": phase.context,
                    "train_bits_per_byte": round(float(np.mean(recent)), 4),
                    "held_out_bits_per_byte": round(
                        held_out_bits(model, held_out, phase.context, 32_768), 4
                    ),
                    "seconds": round(time.perf_counter() - started, 1),
                }
                recent.clear()
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                states.save(step + 1, args=ocp.args.StandardSave(nnx.state((model, optimizer))))
                states.wait_until_finished()
                save(model, arguments.output / "model.safetensors")

    for block in model.blocks:
        block.attention.attention = _attention(8192)
    final = {
        f"held_out_bits_per_byte_at_{context}": round(
            held_out_bits(model, held_out, context, 262_144), 4
        )
        for context in (512, 2048, 8192)
    }
    with log.open("a") as file:
        file.write(json.dumps({"step": arguments.steps, **final}) + "\n")
    print(json.dumps(final))


# one function object per context, or every step would compile anew
_attention = functools.lru_cache(attention_for)


if __name__ == "__main__":
    main()
