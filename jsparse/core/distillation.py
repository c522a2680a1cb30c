"""By what a gate learns the map of attention of a model that stays as it is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks


def shares_of_rows(x: Float[Array, "*rows columns"]) -> Float[Array, "*rows columns"]:
    """Divides each row by its sum; a row of zeros stays as it is."""
    total = x.sum(-1, keepdims=True)
    return x / jnp.where(total > 0, total, 1.0)


def gate_loss(
    gate_logits: Float[Array, "*batch heads rows kv_blocks"],
    targets: Float[Array, "*batch heads rows kv_blocks"],
    *,
    skipped: float = 0.25,
) -> Float[Array, ""]:
    """How far the gate's softmax is from its targets: a KL divergence, mean over rows.

    The authors average over all entries of the map instead, which gives this divided by the number
    of columns; their factor of 10 on it is then 10 / kv_blocks here. It is infinite where targets
    have something that the gate does not see: both are to be of the same mask.

    Args:
      gate_logits: As `info.gate_logits`, -inf where nothing is visible.
      targets: What the method's `gate_targets` makes of the attention that is learnt.
      skipped: The share of the rows, from the first, that do not count: they have few blocks. A
        quarter where rows are of blocks of queries, half where they are of single ones, in the
        authors' code.
    """
    checks.shares(skipped=skipped)
    targets = jax.lax.stop_gradient(targets)[..., int(skipped * targets.shape[-2]) :, :]
    gate_logits = gate_logits[..., int(skipped * gate_logits.shape[-2]) :, :]
    visible = ~jnp.isneginf(gate_logits)
    # a row that sees nothing has a softmax too; its targets are zero
    nothing = jnp.where(visible.any(-1, keepdims=True), -jnp.inf, 0.0)
    log_share = jax.nn.log_softmax(jnp.where(visible, gate_logits, nothing), axis=-1)
    log_share = jnp.where(visible, log_share, jnp.where(targets > 0, -jnp.inf, 0.0))
    log_target = jnp.log(jnp.where(targets > 0, targets, 1.0))
    return (targets * (log_target - log_share)).sum(-1).mean()
