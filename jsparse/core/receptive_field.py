"""How far information travels through layers of block-sparse attention."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jsparse import checks
from jsparse.types import BlockMask


def receptive_field(plans: Sequence[BlockMask]) -> Bool[Array, "*batch blocks blocks"]:
    """Says which blocks reach which through layers stacked in the given order.

    `[..., i, j]` is True where a change in block `j` of the input can change block `i` after the
    last layer: some way of one listed tile per layer leads there, of whichever head, for a layer's
    output mixes its heads. Residual connections are not counted; where each row lists its own tile,
    as under nearly every causal mask, they add nothing.

    Args:
      plans: Of each layer, the first first; the same plan n times for n layers alike. Queries and
        keys are cut into the same blocks.

    Raises:
      ValueError: if there are no plans, or a plan's tiles do not cut queries and keys alike.
    """
    checks.square_plans(plans)
    first, *others = (plan.to_dense().any(-3) for plan in plans)
    reached = first
    for tiles in others:
        # how many ways there are, of which only matters whether there is one
        step = tiles.astype(jnp.float32)
        reached = jnp.einsum("...ij,...jk->...ik", step, reached.astype(jnp.float32)) > 0
    return reached
