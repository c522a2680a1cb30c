"""Training in phases of growing context, resumed where it was stopped: what the trainers share."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jsparse as js
import jsparse.nn
from examples.language_model import data
from examples.language_model.model import LanguageModel, bits_per_byte

# below this length a dense product of everything is the faster way to train on a CPU
REFERENCE_BELOW = 1024
# `loss(model, batch) -> (what is minimised, bits per byte)`
Loss = Callable[[LanguageModel, Any], tuple[jax.Array, jax.Array]]


class Phase(NamedTuple):
    """Steps at one context length, and their share of all."""

    context: int
    batch: int
    share: float


class Course(NamedTuple):
    """How long a model is trained, on what lengths and how fast.

    Attributes:
      phases: Long contexts last: what they teach, heads that look far back, needs words and syntax
        first.
      steps: Updates of all phases together.
      rate: The peak of the learning rate.
      save_every: Steps between saved states.
    """

    phases: tuple[Phase, ...]
    steps: int
    rate: float = 2e-3
    save_every: int = 50

    def phase_at(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        end = 0.0
        for phase in self.phases:
            end += phase.share * self.steps
            if step < end:
                return phase
        return self.phases[-1]

    @property
    def first_long(self) -> int:
        """The step at which the second phase begins."""
        return math.ceil(self.phases[0].share * self.steps)

    def rates(self) -> optax.Schedule:
        """Cosine over the short contexts; the last gets a quarter of the peak, falling to zero.

        Positions that the model meets for the first time in the last phase need more than the tail
        of a cosine to be learnt.
        """
        steps, rate = self.steps, self.rate
        last = round(steps * (1.0 - self.phases[-1].share))
        warmup = min(100, steps // 10 + 1)
        short = optax.warmup_cosine_decay_schedule(
            0.0, rate, warmup, max(last, warmup + 1), end_value=rate / 20
        )
        long = optax.linear_schedule(rate / 4, 0.0, steps - last)
        return optax.join_schedules([short, long], [last])


def plain_loss(model: LanguageModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bits per byte and nothing besides."""
    bits = bits_per_byte(model, tokens)
    return bits, bits


def windows_of(stream: np.ndarray) -> Callable[[int, Phase], jax.Array]:
    """Random windows of a text for each step, the same in every run."""

    def batches(step: int, phase: Phase) -> jax.Array:
        rows = data.windows(stream, phase.context, phase.batch, seed=10_000 + step)
        return jnp.asarray(rows, jnp.int32)

    return batches


evaluate = nnx.jit(bits_per_byte)


def held_out_bits(model: LanguageModel, stream: np.ndarray, context: int, tokens: int) -> float:
    """Bits per byte over fixed windows of the held-out text."""
    rows = data.windows(stream, context, max(1, tokens // context), seed=1)
    costs = [float(evaluate(model, jnp.asarray(row[None], jnp.int32))) for row in rows]
    return float(np.mean(costs))


class Training:
    """A model in training, and its state on disk.

    Attributes:
      model: The model, trained in place.
      done: Steps made so far, those of earlier runs included.
    """

    def __init__(
        self,
        model: LanguageModel,
        course: Course,
        *,
        states: Path,
        fresh: bool = False,
        loss: Loss = plain_loss,
        trained: Any = nnx.Param,
    ):
        """Makes the optimizer, and goes back to the last state that was saved.

        Args:
          model: As it is before the first step.
          course: What it is trained on.
          states: The folder of saved states.
          fresh: Whether to forget those.
          loss: What is minimised.
          trained: The parameters that learn, a filter of Flax; default all.
        """
        self.model, self.course = model, course
        transformation = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                course.rates(),
                b2=0.98,
                weight_decay=0.05,
                mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
            ),
        )
        self._optimizer = nnx.Optimizer(model, transformation, wrt=trained)

        @functools.partial(nnx.jit, donate_argnums=(0, 1))
        def step(model, optimizer, batch):
            differentiate = nnx.value_and_grad(
                loss, argnums=nnx.DiffState(0, trained), has_aux=True
            )
            (_, bits), gradients = differentiate(model, batch)
            optimizer.update(model, gradients)
            return bits

        self._step = step
        self._states = ocp.CheckpointManager(
            states.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )
        if fresh:
            for saved in self._states.all_steps():
                self._states.delete(saved)
        self.done = self._states.latest_step() or 0
        if self.done:
            whole = model, self._optimizer
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(whole))
            restored = self._states.restore(self.done, args=ocp.args.StandardRestore(target))
            nnx.update(whole, restored)

    def branch(self, trunk: "Training") -> None:
        """Goes on from where another run is, with all that both have: what both would have learnt.

        That is parameters and what the optimizer remembers of them; others stay as they are.
        """
        found = dict(nnx.to_flat_state(nnx.state((trunk.model, trunk._optimizer))))
        whole = self.model, self._optimizer
        own = nnx.to_flat_state(nnx.state(whole))
        # copies, since a step takes the memory of what it is given
        taken = [(path, jax.tree.map(jnp.copy, found.get(path, x))) for path, x in own]
        nnx.update(whole, nnx.from_flat_state(taken))
        self.done = trunk.done

    def run(
        self,
        batches: Callable[[int, Phase], Any],
        keep: Callable[[Phase, float], None],
        until: int | None = None,
    ) -> None:
        """Makes the steps that are left, under a bar; the model's statistics move meanwhile.

        Args:
          batches: `batches(step, phase)` is what the loss is taken of.
          keep: `keep(phase, bits)` is called before each save with the bits per byte of the steps
            since the last one; what it writes of steps after `done` is to be dropped on going on.
          until: The step to stop at; default the course's last.
        """
        course, recent = self.course, []
        end = course.steps if until is None else until
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            bar = progress.add_task("training", total=end, completed=self.done)
            for step in range(self.done, end):
                phase = course.phase_at(step)
                self._implement(phase.context)
                self.model.train()
                bits = self._step(self.model, self._optimizer, batches(step, phase))
                recent.append(float(bits))
                progress.update(bar, advance=1, description=f"{recent[-1]:.3f} bits/byte")
                if (step + 1) % course.save_every == 0 or step + 1 == end:
                    self.done = step + 1
                    self._implement(None)
                    self.model.eval()
                    keep(phase, float(np.mean(recent)))
                    recent.clear()
                    self._save()
        self._implement(None)

    def _implement(self, context: int | None) -> None:
        """Takes all pairs for short contexts, whatever is fastest for others."""
        short = context is not None and context < REFERENCE_BELOW
        for layer in js.nn.attention_layers(self.model):
            layer.implementation = "reference" if short else None

    def _save(self) -> None:
        state = nnx.state((self.model, self._optimizer))
        self._states.save(self.done, args=ocp.args.StandardSave(state))
        self._states.wait_until_finished()
