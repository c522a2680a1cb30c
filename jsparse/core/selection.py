"""Choosing blocks from scores: one place for every rule, each by name.

All rules share the contract: what is not `visible` is never chosen; ties go to the lower index; a
row that sees anything gets at least one block; a score that is NaN ranks above every number, so
that a broken row computes more, not nothing, and stays broken in sight.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse.core.largest import largest, largest_with_mass
from pallas_kernels.sortable import NOTHING, sortable


@jax.jit
def top_k(
    scores: Float[Array, "*rows blocks"],
    k: Int[Array, "..."] | int,
    *,
    visible: Bool[Array, "..."] | None = None,
    forced: Bool[Array, "..."] | None = None,
) -> Bool[Array, "*rows blocks"]:
    """Chooses the `k` best blocks of each row; forced blocks come first and count inside `k`.

    Args:
      scores: Any ranking, higher is better.
      k: How many, at least 1; may differ from row to row and be traced.
      visible: Which blocks may be chosen. Default all.
      forced: Blocks that outrank all scores where they are visible.
    """
    visible, k = _full(scores, visible, True), jnp.maximum(jnp.asarray(k, jnp.int32), 1)
    if forced is None:
        return largest(_keys(scores, visible), k)
    forced = visible & forced
    room = k - forced.sum(-1, keepdims=True, dtype=jnp.int32)
    # all that are forced and some of the others, or some of those that are forced and no other
    others = room > 0
    rest = largest(_keys(scores, visible & (forced != others)), jnp.where(others, room, k))
    return rest | (forced & others)


@jax.jit
def top_p(
    scores: Float[Array, "*rows blocks"],
    p: Float[Array, "..."] | float,
    *,
    visible: Bool[Array, "..."] | None = None,
    forced: Bool[Array, "..."] | None = None,
) -> Bool[Array, "*rows blocks"]:
    """Chooses the fewest blocks that hold a share `p` of each row's mass, forced blocks included.

    Forced blocks are taken first and their mass counts; then the others by falling score while the
    mass taken *before* a block is less than `p` of the row's total. `p = 1` takes every visible
    block, whatever f32 makes of the sum.

    Args:
      scores: Non-negative mass per block.
      p: Share to hold, in (0, 1]; may differ from row to row and be traced.
      visible: Which blocks may be chosen; the total is over these. Default all.
      forced: Blocks that are taken first where they are visible.
    """
    visible, forced = _full(scores, visible, True), _full(scores, forced, False)
    mass = jnp.where(visible, scores, 0.0).astype(jnp.float32)
    free = visible & ~forced
    taken = jnp.where(forced, mass, 0.0).sum(-1, keepdims=True)
    need = jnp.asarray(p) * mass.sum(-1, keepdims=True) - taken
    chosen = largest_with_mass(_keys(scores, free), jnp.where(free, mass, 0.0), need)
    return _or_best(visible & (chosen | forced | (jnp.asarray(p) >= 1.0)), scores, visible)


@jax.jit
def above(
    scores: Float[Array, "*rows blocks"],
    threshold: Float[Array, "..."] | float,
    *,
    visible: Bool[Array, "..."] | None = None,
    forced: Bool[Array, "..."] | None = None,
) -> Bool[Array, "*rows blocks"]:
    """Chooses blocks whose score is at least `threshold`, forced ones, and the best of each row."""
    visible, forced = _full(scores, visible, True), _full(scores, forced, False)
    return _or_best(visible & (~(scores < threshold) | forced), scores, visible)


@jax.jit
def above_share(
    logits: Float[Array, "*rows blocks"],
    threshold: Float[Array, "..."] | float,
    *,
    visible: Bool[Array, "..."],
    forced: Bool[Array, "..."] | None = None,
) -> Bool[Array, "*rows blocks"]:
    """Chooses blocks by `above`, of their shares in a softmax over what is visible of each row."""
    # a row that sees nothing has no share to divide
    shown = jnp.where(visible, logits, jnp.finfo(logits.dtype).min)
    shares = jax.nn.softmax(shown, axis=-1)
    return above(shares, threshold, visible=visible, forced=forced)


def _full(scores: Array, given: Array | None, default: bool) -> Array:
    return jnp.broadcast_to(default if given is None else given, scores.shape)


def _keys(scores: Array, chosen: Array) -> Int[Array, "*rows blocks"]:
    """Integers in the order of the scores; of what is not to be chosen none."""
    return jnp.where(chosen, sortable(scores.astype(jnp.float32)), NOTHING)


def _or_best(chosen: Array, scores: Array, visible: Array) -> Bool[Array, "*rows blocks"]:
    """What was chosen, or the best block of rows in which that is none."""
    best = jnp.argmax(_keys(scores, visible), axis=-1, keepdims=True)
    others = chosen.any(-1, keepdims=True)
    return chosen | (visible & ~others & (jnp.arange(scores.shape[-1]) == best))
