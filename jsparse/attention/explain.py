"""`explain`: what a call of `attend` would do, and what it would cost, without doing it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse.attention.attend import prepare, refusals, with_plan
from jsparse.types import BlockMask, BlockPyramid, Frame, Mask, TokenGroups


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
            f"forward         {self.flops / 1e9:.2f} GFLOP, {self.bytes / 1e6:.1f} MB at least",
            f"backward        {self.backward_flops / 1e9:.2f} GFLOP",
        ]
        if self.overflowed:
            lines.append("overflowed      a list was too narrow: tiles are missing, widen it")
        return "\n".join(lines)


def explain(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    plan: BlockMask | TokenGroups | BlockPyramid | None = None,
    *,
    mask: Mask | None = None,
    **options: Any,
) -> Explanation:
    """Says which implementation `js.attend` would choose for these arguments, why, and the cost.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      plan: As for `js.attend`; concrete, since its tiles are counted.
      mask: As for `js.attend`.
      **options: `bias`, `score_mod`, `softcap`, `scale` of `js.attend`.

    Raises:
      ValueError: if arguments do not fit each other, as `js.attend` would.
      NotImplementedError: if the plan is not a list of tiles.
    """
    problem = prepare(q, k, v, plan, mask=mask, **options)
    chosen, refused = refusals(problem)
    tiles = with_plan(problem)
    grid, heads = tiles.grid, q.shape[-2]
    batches = problem.operands.q.shape[0]
    dense = np.asarray(tiles.to_dense())
    dense = np.broadcast_to(dense, (batches, *dense.shape[1:]))
    dense = np.repeat(dense, heads // dense.shape[1], axis=1)
    computed = int(dense.sum())
    if problem.mask is None:
        every = np.ones(dense.shape, bool)
    else:
        classify = problem.mask.classifier(grid)
        index = [
            jnp.arange(n).reshape([-1 if a == axis else 1 for a in range(4)])
            for axis, n in enumerate(dense.shape)
        ]
        frame = Frame(grid.q_len, grid.kv_len, index[0], index[1])
        every = np.broadcast_to(classify(index[2], index[3], frame).every, dense.shape)
    pair_flops = 2.0 * grid.block_q * grid.block_kv
    dims = q.shape[-1] + v.shape[-1]
    itemsize = jnp.dtype(q.dtype).itemsize
    rows = batches * grid.q_len * heads * dims
    return Explanation(
        implementation=chosen,
        refused=refused,
        block_q=grid.block_q,
        block_kv=grid.block_kv,
        tiles=dense.size,
        computed=computed,
        full=int((dense & every).sum()),
        overflowed=bool(jax.device_get(tiles.overflowed).any()),
        flops=computed * pair_flops * dims,
        # products with q, k once more for the logits and for dq and dk; with v for dp and dv
        backward_flops=computed * pair_flops * (3 * q.shape[-1] + 2 * v.shape[-1]),
        bytes=float(itemsize * (rows + computed * grid.block_kv * dims)),
    )
