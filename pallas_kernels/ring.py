"""A ring of tiles in shared memory: one warpgroup fills it, others empty it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 64  # 16-bit elements that one swizzled row of shared memory holds
# the layout of 16-bit tiles that products read
TRANSFORMS = (plgpu.TilingTransform((8, LANES)), plgpu.SwizzleTransform(128))


def tiles(dtype: Any, count: int, tokens: int, width: int) -> Any:
    """Shared memory for `count` tiles [tokens, width] in the layout that products read."""
    return plgpu.SMEM((count, tokens, width), dtype, transforms=TRANSFORMS)


def tile(dtype: Any, tokens: int, width: int) -> Any:
    """Shared memory for one such tile, without an axis for the count."""
    return plgpu.SMEM((tokens, width), dtype, transforms=TRANSFORMS)


def barriers(stages: int, readers: int, copies: int = 1) -> tuple[Any, Any]:
    """Barriers of a ring: a tile has come, in so many copies, and all readers are done with it."""
    full = plgpu.Barrier(num_barriers=stages, num_arrivals=copies)
    return full, plgpu.Barrier(num_barriers=stages, num_arrivals=readers)


def anew(index: jax.Array) -> jax.Array:
    """The same index; addresses derived from it are computed where they are used.

    Or the compiler would derive those of all products before a loop and keep them in registers, or
    have no room for them.
    """
    return lax.optimization_barrier(index)


class Ring(NamedTuple):
    """References to the slots and barriers of a ring; tile number `step` is in slot step % stages.

    Attributes:
      slots: Shared memory made by `tiles`.
      full: Barrier per slot: its copies have arrived.
      free: Barrier per slot: every reader has released the tile.
    """

    slots: Any
    full: Any
    free: Any

    def _slot(self, step: jax.Array) -> jax.Array:
        return anew(lax.rem(step, jnp.int32(self.slots.shape[0])))

    def fill(self, sources: Sequence[Any], step: jax.Array) -> None:
        """Copies the strips of a tile into its slot, once the last readers of that are done."""
        slot = self._slot(step)

        @pl.when(step >= self.slots.shape[0])
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        if len(sources) == 1:
            plgpu.copy_gmem_to_smem(sources[0], self.slots.at[slot], self.full.at[slot])
            return
        size = self.slots.shape[1] // len(sources)
        for n, source in enumerate(sources):
            target = self.slots.at[slot, pl.ds(n * size, size)]
            plgpu.copy_gmem_to_smem(source, target, self.full.at[slot])

    def drain(self, steps: jax.Array) -> None:
        """Waits for what is still being read, so that no program ends with unseen arrivals."""

        def wait(step, _):
            plgpu.barrier_wait(self.free.at[self._slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.slots.shape[0], 0), steps, wait, None)

    def wait(self, step: jax.Array) -> None:
        """Waits for a tile to come."""
        plgpu.barrier_wait(self.full.at[self._slot(step)])

    def piece(self, step: jax.Array, part: int | jax.Array, size: int) -> Any:
        """A reference to tokens [part * size, (part + 1) * size) of a tile."""
        return self.slots.at[self._slot(step), pl.ds(part * size, size)]

    def release(self, step: jax.Array) -> None:
        """Says that this reader is done with a tile."""
        plgpu.barrier_arrive(self.free.at[self._slot(step)])
