"""A ring of tiles in shared memory: one warpgroup fills it, others empty it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 64  # 16-bit elements that one swizzled row of shared memory holds


def tiles(dtype: Any, count: int, tokens: int, width: int) -> Any:
    """Shared memory for `count` tiles [tokens, width] in the layout that wgmma reads."""
    transforms = (plgpu.TilingTransform((8, LANES)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, tokens, width), dtype, transforms=transforms)


def fill(source: Any, ring: Any, full: Any, free: Any, step: jax.Array, stages: int) -> None:
    """Copies a tile into the ring's next slot, as soon as its last reader is done with that."""
    slot = lax.rem(step, jnp.int32(stages))

    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(free.at[slot])

    plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])


def drain(steps: jax.Array, stages: int, barriers: Sequence[Any]) -> None:
    """Waits for what is still being read, so that no program ends with unseen arrivals."""

    def wait(step, _):
        for free in barriers:
            plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)
