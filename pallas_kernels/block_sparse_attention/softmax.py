"""The softmax of rows whose logits come piece by piece, in registers and in base 2."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.logits import LOG2_E


class Softmax(NamedTuple):
    """What is known of rows so far.

    Attributes:
      peak: f32 [rows], the largest logit, in base 2; -inf where a row saw nothing.
      total: f32 [rows], the sum of `2 ** (logit - peak)`.
    """

    peak: jax.Array
    total: jax.Array

    def add(self, logits: jax.Array, to_base_2: float) -> tuple["Softmax", jax.Array, jax.Array]:
        """Adds a piece.

        Args:
          logits: f32 [rows, columns].
          to_base_2: The positive factor from these to logits in base 2.

        Returns:
          What is known then, the piece's numerators [rows, columns], and the factor [rows] by
          which numerators of earlier pieces shrink.
        """
        peak = jnp.maximum(self.peak, logits.max(axis=1) * to_base_2)
        # a row that saw nothing yet: 2 ** (-inf - 0) is 0, 2 ** (-inf + inf) would be nan
        shift = jnp.where(peak == -jnp.inf, 0.0, peak)
        probs = jnp.exp2(logits * to_base_2 - lax.broadcast_in_dim(shift, logits.shape, (0,)))
        decay = jnp.exp2(self.peak - shift)
        return Softmax(peak, self.total * decay + probs.sum(axis=1)), probs, decay

    def end(self) -> tuple[jax.Array, jax.Array]:
        """What numerators are to be multiplied by, and the log-sum-exp, natural log."""
        seen = self.total != 0.0
        safe = jnp.where(seen, self.total, 1.0)
        return 1.0 / safe, jnp.where(seen, self.peak / LOG2_E + jnp.log(safe), -math.inf)
