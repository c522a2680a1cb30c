"""Tiles on their way into shared memory, copied by the warpgroup that multiplies them: cp.async.

A GPU before Hopper has no copy engine that a barrier could wait for: each thread starts copies, and
waits until at most so many of the latest ones still go on.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat

Ref = Any


class Copies:
    """Copies that the threads of a warpgroup start and wait for together, by cp.async."""

    def start(self, source: Ref, target: Ref) -> None:
        """Starts to copy a tile, all of it inside its array, from device to shared memory."""
        _compat.start_copy(source, target)

    def wait(self, running: int) -> None:
        """Waits for all but the last `running` copies that were started, and for all threads."""
        _compat.wait_copies(running)


class InterpretedCopies:
    """The same for JAX's interpreter, which knows no cp.async: each copy arrives at a barrier.

    Which ones are waited for follows, as on the chip, from how many were started.
    """

    def __init__(self, arrived: Ref, counts: Ref):
        self._arrived, self._counts = arrived, counts
        counts[...] = jnp.zeros(2, jnp.int32)  # of copies that were started, and waited for

    def _barrier(self, copy: jax.Array) -> Ref:
        return self._arrived.at[lax.rem(copy, jnp.int32(self._arrived.shape[0]))]

    def start(self, source: Ref, target: Ref) -> None:
        """Starts to copy a tile, all of it inside its array, from device to shared memory."""
        started = self._counts[0]
        # these write as the copy engine does, and want a fence after ordinary reads
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(source, target, self._barrier(started))
        self._counts[0] = started + 1

    def wait(self, running: int) -> None:
        """Waits for all but the last `running` copies that were started, and for all threads."""
        first, last = self._counts[1], self._counts[0] - running
        lax.fori_loop(first, last, lambda n, _: plgpu.barrier_wait(self._barrier(n)), None)
        self._counts[1] = jnp.maximum(first, last)


def scratch(most: int) -> tuple[Any, ...]:
    """What copies need beside their targets, if at most so many go on at a time."""
    if not _compat.interpreting():
        return ()
    return plgpu.Barrier(num_barriers=most), plgpu.SMEM((2,), jnp.int32)


def copies(scratch: Sequence[Ref]) -> Copies | InterpretedCopies:
    """Copies in a kernel that is traced now, given references to what `scratch` asked for."""
    return InterpretedCopies(*scratch) if _compat.interpreting() else Copies()


class Stream(NamedTuple):
    """Tiles of several arrays in turn, each array's in a ring of its own.

    Tile number `step` of an array is in slot step % stages. A tile may be read from `wait` for it
    until `wait` for the next one in the stream, whatever array that is of, or, where the tiles of a
    step stay together, until the first `wait` of the next step.

    Attributes:
      copies: What copies them.
      source: `source(array, step)` is a reference to a tile in device memory.
      slots: Shared memory of each array, made by `ring.tiles`.
      steps: How many tiles there are of each array.
      together: Whether the tiles of a step stay together; there are 2 slots or more then.
    """

    copies: Copies | InterpretedCopies
    source: Callable[[int, jax.Array], Ref]
    slots: Sequence[Ref]
    steps: jax.Array
    together: bool = False

    @property
    def stages(self) -> int:
        """How many tiles of an array there are slots for."""
        return self.slots[0].shape[0]

    @property
    def ahead(self) -> int:
        """How many tiles are on their way before the first is waited for."""
        arrays = len(self.slots)
        return arrays * self.stages - (arrays if self.together else 1)

    def begin(self, own: Sequence[tuple[Ref, Ref]]) -> None:
        """Copies tiles that stay, and starts to copy the first of the others.

        Args:
          own: Where those tiles are in device memory, and in shared memory.
        """
        for source, target in own:
            self.copies.start(source, target)
        for number in range(self.ahead):
            step, array = divmod(number, len(self.slots))
            self._start(array, jnp.int32(step))
        if own:
            self._wait(jnp.minimum(len(self.slots) * self.steps, self.ahead), self.ahead)

    def wait(self, array: int, step: jax.Array) -> Ref:
        """Waits for a tile, and starts to copy others to where those before it were."""
        arrays = len(self.slots)
        later = arrays * (self.steps - step) - array - 1
        most = self.ahead - 1
        if self.together and array > 0:
            # those of the next step were started at the first wait
            most += arrays - array
        self._wait(jnp.minimum(later, most), most)
        # all threads have come here: none reads what came before any more
        if not self.together:
            self._start((array or arrays) - 1, step + self.stages - (array == 0))
        elif array == 0:
            for each in range(arrays):
                self._start(each, step + self.stages - 1)
        return self._slot(array, step)

    def _wait(self, running: jax.Array, most: int) -> None:
        """Waits for all copies but the last `running`, a number up to `most`."""
        waits = [partial(self.copies.wait, n) for n in range(most + 1)]
        lax.switch(running, waits) if most else waits[0]()

    def _slot(self, array: int, step: jax.Array) -> Ref:
        return self.slots[array].at[lax.rem(step, jnp.int32(self.slots[array].shape[0]))]

    def _start(self, array: int, step: jax.Array) -> None:
        """Starts to copy a tile, if there is one of that number."""

        @pl.when(step < self.steps)
        def _():
            self.copies.start(self.source(array, step), self._slot(array, step))
