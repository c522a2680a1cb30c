"""How the programs of the Triton kernels are laid out."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result up to rounding.

    Attributes:
      own: Tokens that a program computes, at most a tile's.
      other: Tokens it reads per step of its loop, at most a tile's where tiles have 16 or more.
      num_warps: Of 32 threads each.
      num_stages: Depth of the pipeline. A step's tokens are read one step ahead with 2; with 3
        its place in the list two steps ahead, or, where a rule wants that place too, the tokens.
    """

    own: int
    other: int
    num_warps: int = 4
    num_stages: int = 3


def default_config(
    own: int, other: int, width: int, dtype: Any, *, rule: bool, backward: bool
) -> Config:
    """A configuration that fits every chip: no register spilled, at most 99 KiB of shared memory.

    That is what GPUs for desktops have. Chosen by what compilers say of it, not measured.

    Args:
      own: Tokens of a tile on the side that a program computes.
      other: Tokens of a tile on the side that it reads.
      width: The larger of dim and v_dim; up to 256 for a backward kernel.
      dtype: Of q, k and v.
      rule: Whether a rule changes logits.
      backward: Whether for one of the backward kernels.
    """
    sizes = (_BACKWARD if backward else _FORWARD)[jnp.dtype(dtype).itemsize]
    most = next(config for limit, config in sizes.items() if width <= limit)
    own, other = min(own, most.own), min(other, most.other)
    # a third stage spills on Blackwell where little is kept, and is too much where rows are wide
    two = rule or (backward and width <= 64) or width > 256
    # few numbers to keep are few threads' work
    num_warps = 4 if own * width <= 2048 else most.num_warps
    return Config(own, other, num_warps, num_stages=2 if two else 3)


# by bytes of a number and by width: the largest pieces of tiles
_FORWARD = {
    2: {128: Config(128, 64, 8), 256: Config(64, 32, 8), 576: Config(16, 32, 8)},
    4: {
        64: Config(128, 32, 8),
        128: Config(64, 32, 8),
        256: Config(32, 16, 8),
    },
}
_BACKWARD = {
    2: {64: Config(64, 32, 4), 128: Config(64, 64, 8), 256: Config(32, 32, 8)},
    4: {64: Config(32, 32, 4), 128: Config(32, 32, 8), 256: Config(32, 16, 8)},
}
