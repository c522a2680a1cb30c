"""`attend_skipping`: attention that leaves out tiles while it goes along them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention.attend import add_sinks, prepare, run
from jsparse.attention.logits import ScoreMod
from jsparse.core.merging import merge
from jsparse.types import BlockMask, Mask


def attend_skipping(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    plan: BlockMask | Sequence[BlockMask] | None = None,
    *,
    threshold: float | Float[Array, "*thresholds"],
    mask: Mask | None = None,
    bias: Float[Array, "*bias"] | None = None,
    score_mod: ScoreMod | None = None,
    sinks: Float[Array, " heads"] | None = None,
    softcap: float | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array, Any]:
    """Attends as `js.attend` does, less tiles far below the largest logit that their rows have met.

    Each row of tiles goes along its list, keys from 0 upwards. A tile is skipped where for each of
    its queries `exp(largest logit in the tile - largest logit so far)` is below the threshold: its
    exponentials are not taken, its values not read, and softmax and log-sum-exp go on as if it had
    not been listed. So what is skipped depends on the order of the keys. Queries that see nothing
    of the tile, and rows past the last query, have no say. The first tile of which a query sees
    anything is never skipped.

    Logits are computed of every listed tile: at best, this saves what the tiles' second half costs.
    In `xla` rows of tiles go along together, one tile of each per step or several below 128 keys.
    The second half of a step is computed for those rows that skip less than all of it, a quarter of
    all at a time, so a step that all skip costs no more than its logits.

    The gradient is that of attention over the tiles that were kept, and visits these alone.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      plan: Which tiles there are to go along, as for `js.attend`. The parts of a tuple are executed
        one by one, each with largest logits of its own, and merged.
      threshold: In [0, 1], a number, or an array that broadcasts to [*batch, heads]; may be traced,
        so that another value needs no other program. With 0 no tile is skipped of which a query
        sees anything; a traced value above 1 counts as 1, one below 0 as 0.
      mask: As for `js.attend`, like all that follows.
      bias: Added to the logits.
      score_mod: Changes logits.
      sinks: A logit per head, which has no say in what is skipped.
      softcap: Caps logits.
      scale: Factor on the logits.
      implementation: "reference", "xla", "mosaic" or "triton"; default the fastest that can do it.

    Returns:
      `out` and `lse` of `js.attend`, and the plan of the tiles that were kept, with a list for each
      query head; for a tuple of plans a tuple of these.

    Raises:
      ValueError: if arguments do not fit each other, or a threshold lies outside [0, 1].
      NotImplementedError: if the plan is no list of tiles, or the named implementation cannot do
        this job here.
    """
    if isinstance(plan, Sequence):
        checks.some_plans(plan)
        parts = [
            attend_skipping(
                q,
                k,
                v,
                part,
                threshold=threshold,
                mask=mask,
                bias=bias,
                score_mod=score_mod,
                softcap=softcap,
                scale=scale,
                implementation=implementation,
            )
            for part in plan
        ]
        out, lse = merge([part[:2] for part in parts])
        kept = tuple(part[2] for part in parts)
    else:
        problem = prepare(
            q, k, v, plan, mask=mask, bias=bias, score_mod=score_mod, softcap=softcap, scale=scale
        )
        per_head = (*problem.batch_shape, q.shape[-2])
        limits = _log_thresholds(threshold, per_head)
        problem = problem._replace(log_threshold=limits.reshape(-1, q.shape[-2]))
        out, lse, kept = run(problem, implementation)
        out = out.reshape(*q.shape[:-1], v.shape[-1])
        lse = lse.reshape(*per_head, -1)
        kept = jax.tree.map(lambda x: x.reshape(*problem.batch_shape, *x.shape[1:]), kept)
    if sinks is not None:
        checks.sinks_shape(sinks, q.shape[-2])
        out, lse = add_sinks(out, lse, sinks)
    return out.astype(v.dtype), lse, kept


def _log_thresholds(threshold: Any, per_head: tuple[int, ...]) -> Float[Array, "*batch heads"]:
    """Logarithms of thresholds, for each sequence and head."""
    checks.skip_thresholds(threshold, per_head)
    found = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), per_head)
    # above 1 a tile could be skipped that holds the largest logit so far; a nan is not above 0
    return jnp.log(jnp.where(found > 0, jnp.minimum(found, 1.0), 0.0))
