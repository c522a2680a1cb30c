"""Block-sparse attention, forward, for GPUs of compute capability 8: Ampere and Ada.

A program is one warpgroup. It owns a tile of queries or half of one, keeps their softmax in
registers, and copies the pieces of keys and values that its list names while it multiplies those
before (see `stream`).
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, configurations, mma, ring, stream
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.softmax import Softmax
from pallas_kernels.block_sparse_attention.walk import Lists, Side, Sides, divmod_i32
from pallas_kernels.mma import HEIGHT
from pallas_kernels.ring import LANES
from pallas_kernels.warpgroup import warpgroup

SHARED_MEMORY = 101_376  # bytes a program may have on the chip with the least, 8.6 or 8.9
PAIRED = SHARED_MEMORY // 2  # what leaves room for a second program on a multiprocessor
RESERVED = 2048  # of which the compiler's scratch for reductions takes a part


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result up to rounding.

    Attributes:
      rows: Queries of a program, 64 or 128, at most a tile's.
      columns: Keys multiplied at once, a power of 2 from 16 to 128, at most a tile's.
      stages: Pieces of keys, and of values, that there is room for, at least 1.
      hold_queries: Whether queries stay in registers, or are read again for each piece of keys.
    """

    rows: int = 64
    columns: int = 64
    stages: int = 1
    hold_queries: bool = True


def shared_memory(dim: int, v_dim: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for."""
    return 2 * (config.rows * dim + config.stages * config.columns * (dim + v_dim))


def default_config(
    block_q: int, block_kv: int, dim: int, v_dim: int, *, rule: bool = False
) -> Config | None:
    """The deepest ring with which two programs share a multiprocessor, or one that fits.

    Args:
      block_q: Queries per tile.
      block_kv: Keys per tile.
      dim: Width of q and k.
      v_dim: Width of v.
      rule: Whether more than a mask changes logits.

    Returns:
      The configuration, or None if none fits.
    """
    wide = max(dim, v_dim) > 128
    base = Config(
        # what is read of keys and values serves twice the rows, if registers suffice for them
        rows=128 if block_q == 128 and max(dim, v_dim) <= 64 and not rule else 64,
        columns=min(block_kv, 32 if dim + v_dim > 320 else 64),
    )
    base = dataclasses.replace(base, hold_queries=base.rows == 64 and not wide)
    for most in (PAIRED, SHARED_MEMORY):
        for stages in (2, 1):
            config = dataclasses.replace(base, stages=stages)
            if shared_memory(dim, v_dim, config) <= most - RESERVED:
                return config
    return None
