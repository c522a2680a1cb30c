"""Choosing blocks from scores: one place for every rule, each by name.

All rules share the contract: what is not `visible` is never chosen; ties go to the lower index; a
row that sees anything gets at least one block; a score that is NaN ranks above every number, so
that a broken row computes more, not nothing, and stays broken in sight.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
    visible, forced = _full(scores, visible, True), _full(scores, forced, False)
    rank = _rank(scores, visible, forced)
    return visible & (rank < jnp.maximum(k, 1))


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
    order = _order(scores, visible, forced)
    ranked = jnp.take_along_axis(mass, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    need = jnp.asarray(p) * mass.sum(-1, keepdims=True)
    # `not >=` rather than `<`: a row with a NaN keeps everything
    wanted = ~(before >= need) | (jnp.asarray(p) >= 1.0)
    wanted = wanted.at[..., 0].set(True)
    rank = jnp.argsort(order, axis=-1)
    chosen = jnp.take_along_axis(wanted, rank, axis=-1)
    return visible & (chosen | forced)


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
    best = _rank(scores, visible, forced) == 0
    return visible & (~(scores < threshold) | forced | best)


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


def _rank(scores: Array, visible: Array, forced: Array) -> Int[Array, "*rows blocks"]:
    """Place of each block in `_order`."""
    return jnp.argsort(_order(scores, visible, forced), axis=-1)


def _order(scores: Array, visible: Array, forced: Array) -> Int[Array, "*rows blocks"]:
    """The blocks: forced ones, then the others, both by falling score; then what is not visible."""
    broken = jnp.isnan(scores)
    tier = jnp.where(visible, 2 * ~forced + ~broken, 4)
    value = jnp.where(broken, 0.0, -scores)
    return jnp.lexsort((value, tier), axis=-1)
