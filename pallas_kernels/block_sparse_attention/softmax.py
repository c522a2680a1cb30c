"""The softmax of rows whose logits come piece by piece, in registers and in base 2."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.logits import LOG2_E

_LOWEST = float(jnp.finfo(jnp.float32).min)


class Softmax(NamedTuple):
    """What is known of rows so far.

    Attributes:
      peak: f32 [rows], the largest logit, in base 2, or one that is less by at most the slack;
        -inf where a row saw nothing.
      total: f32 [rows], the sum of `2 ** (logit - peak)`.
    """

    peak: jax.Array
    total: jax.Array

    def add(
        self,
        logits: jax.Array,
        to_base_2: float,
        slack: float = 0.0,
        largest: jax.Array | None = None,
    ) -> tuple["Softmax", jax.Array, jax.Array]:
        """Adds a piece.

        Args:
          logits: f32 [rows, columns].
          to_base_2: The positive factor from these to logits in base 2.
          slack: How much larger than the peak, in base 2, logits may become before the peak
            follows them and earlier numerators shrink. Numerators are then at most `2 ** slack`,
            which rounds them no worse than 1.
          largest: f32 [rows], the largest of the logits in base 2, where they are known.

        Returns:
          What is known then, the piece's numerators [rows, columns], and the factor [rows] by
          which numerators of earlier pieces shrink.
        """
        found = logits.max(axis=1) * to_base_2 if largest is None else largest
        if slack:
            peak = jnp.where(found > self.peak + slack, found, self.peak)
        else:
            peak = jnp.maximum(self.peak, found)
        shift = _finite(peak)
        probs = jnp.exp2(logits * to_base_2 - lax.broadcast_in_dim(shift, logits.shape, (0,)))
        decay = jnp.exp2(self.peak - shift)
        return Softmax(peak, self.total * decay + probs.sum(axis=1)), probs, decay

    def needs(self, largest: jax.Array, log2_threshold: jax.Array) -> jax.Array:
        """Whether rows need a piece; it may be left out where none of them does.

        Args:
          largest: f32 [rows], the largest of the piece's logits in base 2.
          log2_threshold: f32 [rows], not positive: rows need what is not further below the peak.
            +inf where a row has no say.

        Returns:
          bool [rows]: rows that see nothing of the piece do not need it, those with a nan do.
        """
        # finite: a row that sees nothing here is below it even where it saw nothing before
        least = jnp.maximum(self.peak + log2_threshold, _LOWEST)
        return ~(largest < least) & (log2_threshold < jnp.inf)

    def end(self) -> tuple[jax.Array, jax.Array]:
        """What numerators are to be multiplied by, and the log-sum-exp, natural log."""
        seen = self.total != 0.0
        safe = jnp.where(seen, self.total, 1.0)
        return 1.0 / safe, jnp.where(seen, self.peak / LOG2_E + jnp.log(safe), -math.inf)


def merge(parts: Sequence[Softmax]) -> tuple[Softmax, list[jax.Array]]:
    """The softmax over all keys from those over some each, and the factors of their numerators."""
    peak = functools.reduce(jnp.maximum, [part.peak for part in parts])
    shares = [jnp.exp2(part.peak - _finite(peak)) for part in parts]
    totals = [part.total * share for part, share in zip(parts, shares, strict=True)]
    return Softmax(peak, functools.reduce(jnp.add, totals)), shares


def _finite(peak: jax.Array) -> jax.Array:
    """The peak, or 0 where a row saw nothing: 2 ** (-inf - 0) is 0, 2 ** (-inf + inf) is nan."""
    return jnp.where(peak == -jnp.inf, 0.0, peak)
