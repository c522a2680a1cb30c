"""`explain`: what a call of `attend` would do, and what it would cost, without doing it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse import _compat, checks
from jsparse.attention.attend import choose, prepare, with_plan
from jsparse.attention.problem import Plan, Problem
from jsparse.types import BlockMask, Frame, Mask, entry
from jsparse.types.pytree import flatten_batch


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `attend` would do.

    Attributes:
      implementation: The one that would run, None if none can.
      refused: Why each other one before it would not.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      tiles: Tiles of the attention map, all heads and sequences.
      computed: Tiles that are computed.
      full: Computed tiles in which the mask hides nothing for certain.
      summaries: Tiles of pooled columns that are computed besides, of as many queries each.
      overflowed: Whether some list was too narrow for what it should hold.
      flops: Floating-point operations forward.
      backward_flops: Floating-point operations of the gradient.
      bytes: Bytes read and written forward, at least.
    """

    implementation: str | None
    refused: dict[str, str]
    block_q: int
    block_kv: int
    tiles: int
    computed: int
    full: int
    summaries: int
    overflowed: bool
    flops: float
    backward_flops: float
    bytes: float

    @property
    def density(self) -> float:
        """The share of all tiles that is computed."""
        return self.computed / self.tiles

    def __str__(self) -> str:
        lines = [
            f"implementation  {self.implementation}",
            *(f"  not {name}: {reason}" for name, reason in self.refused.items()),
            f"tiles           {self.computed} of {self.tiles} ({100 * self.density:.1f} %) of "
            f"{self.block_q} x {self.block_kv}",
            f"                {self.full} full, {self.computed - self.full} partly masked",
            *([f"summaries       {self.summaries} tiles of columns"] if self.summaries else []),
            f"forward         {self.flops / 1e9:.2f} GFLOP, {self.bytes / 1e6:.1f} MB at least",
            f"backward        {self.backward_flops / 1e9:.2f} GFLOP",
        ]
        if self.overflowed:
            lines.append("overflowed      a list was too narrow: tiles are missing, widen it")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanations:
    """What `attend` would do with a tuple of plans: one part after the other, then merged."""

    parts: tuple[Explanation, ...]

    @property
    def density(self) -> float:
        """The share of all pairs that lie in computed tiles."""
        return sum(part.density for part in self.parts)

    @property
    def overflowed(self) -> bool:
        """Whether some list of some part was too narrow."""
        return any(part.overflowed for part in self.parts)

    @property
    def flops(self) -> float:
        """Floating-point operations forward."""
        return sum(part.flops for part in self.parts)

    @property
    def backward_flops(self) -> float:
        """Floating-point operations of the gradient."""
        return sum(part.backward_flops for part in self.parts)

    @property
    def bytes(self) -> float:
        """Bytes read and written forward, at least."""
        return sum(part.bytes for part in self.parts)

    def __str__(self) -> str:
        lines = [f"part {n + 1} of {len(self.parts)}\n{p}" for n, p in enumerate(self.parts)]
        together = (
            f"together        {100 * self.density:.1f} % of the pairs, {self.flops / 1e9:.2f} "
            f"GFLOP forward, {self.backward_flops / 1e9:.2f} GFLOP backward"
        )
        return "\n\n".join([*lines, together])


def explain(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    plan: Plan | Sequence[Plan] | None = None,
    *,
    mask: Mask | None = None,
    **options: Any,
) -> Explanation | Explanations:
    """Says which implementation `js.attend` would choose for these arguments, why, and the cost.

    Tiles are those that are laid out: of a group's tokens next to each other for `TokenGroups`, of
    exact and pooled keys for a `BlockPyramid` of levels.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      plan: As for `js.attend`; concrete, since its tiles are counted. Inside of `jit` a `BlockMask`
        or None.
      mask: As for `js.attend`; concrete as well.
      **options: `bias`, `score_mod`, `softcap`, `scale` of `js.attend`.

    Returns:
      An `Explanation`, or for a tuple of plans `Explanations`, which has one for each part.

    Raises:
      ValueError: if arguments do not fit each other, as `js.attend` would, or tiles are traced.
      NotImplementedError: if no implementation can do this job here.
    """
    if isinstance(plan, Sequence):
        checks.some_plans(plan)
        return Explanations(tuple(_explain(q, k, v, part, mask, options) for part in plan))
    return _explain(q, k, v, plan, mask, options)


def _explain(
    q: Array, k: Array, v: Array, plan: Any, mask: Mask | None, options: Any
) -> Explanation:
    problem = prepare(q, k, v, plan, mask=mask, **options)
    if not _compat.is_traced((plan, mask)):
        # inside of `jit` what is known would be traced where its axes are flattened
        shape = problem.batch_shape
        with _compat.at_once():
            problem = problem._replace(
                plan=None if plan is None else flatten_batch(plan, shape),
                mask=None if mask is None else flatten_batch(mask, shape),
            )
    chosen, lowered, refused = choose(problem)
    if lowered is None:
        raise NotImplementedError(" ".join(refused.values()))
    for part in lowered.parts:
        checks.countable(_compat.is_traced((part.plan, part.mask)))
    with _compat.at_once():
        exact, *besides = (_counted(part, chosen, refused) for part in lowered.parts)
    return dataclasses.replace(
        exact,
        summaries=sum(part.computed for part in besides),
        flops=sum((part.flops for part in besides), exact.flops),
        backward_flops=sum((part.backward_flops for part in besides), exact.backward_flops),
        bytes=sum((part.bytes for part in besides), exact.bytes),
    )


def _counted(part: Problem, chosen: str | None, refused: dict[str, str]) -> Explanation:
    """What computing one list of tiles takes."""
    q, v, tiles = part.operands.q, part.operands.v, with_plan(part)
    grid, (batches, _, heads, dim) = tiles.grid, q.shape
    # lists are counted as they are, so that a million tokens can be explained as well
    repeats = (batches // len(tiles.kv_indices)) * (heads // tiles.list_heads)
    computed = full = repeats * int(np.asarray(tiles.kv_num_blocks).sum(dtype=np.int64))
    if part.mask is not None:
        full = _full_tiles(tiles, part.mask, batches, heads)
    pair_flops = 2.0 * grid.block_q * grid.block_kv
    dims = dim + v.shape[-1]
    itemsize = jnp.dtype(q.dtype).itemsize
    rows = batches * grid.q_len * heads * dims
    return Explanation(
        implementation=chosen,
        refused=refused,
        block_q=grid.block_q,
        block_kv=grid.block_kv,
        tiles=batches * heads * grid.q_blocks * grid.kv_blocks,
        computed=computed,
        full=full,
        summaries=0,
        overflowed=bool(jax.device_get(tiles.overflowed).any()),
        flops=computed * pair_flops * dims,
        # products with q, k once more for the logits and for dq and dk; with v for dp and dv
        backward_flops=computed * pair_flops * (3 * dim + 2 * v.shape[-1]),
        bytes=float(itemsize * (rows + computed * grid.block_kv * dims)),
    )


def _full_tiles(tiles: BlockMask, mask: Mask, batches: int, heads: int) -> int:
    """How many listed tiles the mask leaves whole for certain, over all sequences and heads."""
    grid, classify = tiles.grid, mask.classifier(tiles.grid)
    rows = jnp.arange(grid.q_blocks)[:, None]
    found = 0
    for batch, head in np.ndindex(batches, heads):
        at = entry(len(tiles.kv_indices), batch), head // (heads // tiles.list_heads)
        frame = Frame(grid.q_len, grid.kv_len, batch, head)
        every = classify(rows, tiles.kv_indices[at], frame).every
        found += int((every & tiles.entries()[at]).sum())
    return found
