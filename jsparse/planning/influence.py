"""How much a loss depends on each block of the attention map. Fu et al. 2024, arXiv:2406.14909."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsparse.attention.attend import attend
from jsparse.evaluation.capture import Profiled
from jsparse.masks import causal
from jsparse.types.mask import pad_to_blocks

# pairs worked on at once: a product large enough for all cores, little memory at any length
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 256, 512
# above the rounding of a probability near 1 in float32
_LEAST = 1e-6


def influence(probs: Any, gradient: Any, mean_gradient: Any, *, least: float = _LEAST) -> Any:
    """How a loss changes, to first order, when a key leaves a row that is normalised anew.

    `-A (G - sum_n A_n G_n) / (1 - A)`, which is exact where the loss is linear in the output.

    Args:
      probs: Probabilities `A` of a row's keys.
      gradient: The loss' gradient `G` by each of them.
      mean_gradient: The row's `sum_n A_n G_n`.
      least: Added to the mass of the keys that stay.
    """
    return -probs * (gradient - mean_gradient) / (1 - probs + least)


@functools.partial(jax.jit, static_argnames="block_size")
def influence_of_blocks(
    layer: Profiled, *, block_size: int = 64
) -> Float[Array, "heads blocks blocks"]:
    """Sums the size of every pair's influence on the loss by blocks, under a causal mask.

    No more than a few tiles of the attention map are there at a time: probabilities follow from the
    log-sum-exp of each row, their gradients from `d_out v^T`.

    Args:
      layer: q, k, v and the gradient by the output, of as many queries as keys, whose attention is
        a plain causal softmax.
      block_size: Tokens per block.
    """
    q, k, v, d_out = (x.astype(jnp.float32) for x in layer)
    (length, heads, dim), kv_heads = q.shape, k.shape[1]
    out, lse = attend(q, k, v, mask=causal(), return_lse=True)
    # of a row the sum of probabilities times their gradients
    mean_gradient = (out * d_out).sum(-1)
    rows_of = -(-_ROWS_AT_ONCE // block_size) * block_size
    columns_of = -(-_COLUMNS_AT_ONCE // block_size) * block_size
    blocks = -(-length // block_size)

    def padded(x: Array, size: int) -> Array:
        """Tokens second to last, whole tiles of them."""
        x = jnp.moveaxis(x, 0, -1)
        return jnp.swapaxes(pad_to_blocks(x, size, 0.0), -1, -2)

    queries, d_outs = padded(q * dim**-0.5, rows_of), padded(d_out, rows_of)
    keys, values = padded(k, columns_of), padded(v, columns_of)
    means, lse = (pad_to_blocks(x, rows_of, 0.0) for x in (mean_gradient.T, lse))
    tiles = queries.shape[1] // rows_of
    steps = keys.shape[1] // columns_of

    def one_tile(number):
        head, tile = jnp.divmod(number, tiles)
        kv_head = head // (heads // kv_heads)
        row = tile * rows_of + jnp.arange(rows_of)

        def part(x, start, size):
            return jax.lax.dynamic_slice_in_dim(x, start, size)

        here = (x[head] for x in (queries, d_outs, means, lse))
        query, d_of, mean, total = (part(x, tile * rows_of, rows_of) for x in here)

        def step(number, sums):
            start = number * columns_of
            key, value = (part(x[kv_head], start, columns_of) for x in (keys, values))
            column = start + jnp.arange(columns_of)
            # on some devices the log-sum-exp is of logits that were rounded in another way
            probs = jnp.minimum(jnp.exp(query @ key.T - total[:, None]), 1.0)
            effect = influence(probs, d_of @ value.T, mean[:, None])
            # the only key of the first row leaves nothing behind
            effect = jnp.where(row[:, None] == 0, -probs * mean[:, None], effect)
            seen = (column <= row[:, None]) & (row < length)[:, None]
            effect = jnp.abs(jnp.where(seen, effect, 0.0))
            effect = effect.reshape(rows_of // block_size, block_size, -1, block_size).sum((1, 3))
            at = (0, start // block_size)
            return jax.lax.dynamic_update_slice(sums, effect, at)

        sums = jnp.zeros((rows_of // block_size, steps * columns_of // block_size))
        reached = ((tile + 1) * rows_of - 1) // columns_of + 1
        return jax.lax.fori_loop(0, jnp.minimum(reached, steps), step, sums)

    sums = jax.lax.map(one_tile, jnp.arange(heads * tiles))
    return sums.reshape(heads, -1, sums.shape[-1])[:, :blocks, :blocks]


def influence_by_distance(
    of_blocks: Float[np.ndarray, "heads blocks blocks"], *, sink_blocks: int
) -> Float[np.ndarray, "heads blocks"]:
    """Sums the influence of blocks by how many blocks the query's lies behind the keys'.

    Without the first blocks of keys, which are never dropped; a window drops the others from some
    distance on.
    """
    distances = range(of_blocks.shape[-1])
    sums = [of_blocks.diagonal(-d, axis1=1, axis2=2)[:, sink_blocks:].sum(-1) for d in distances]
    return np.stack(sums, axis=-1)


class Influence(NamedTuple):
    """What a loss depends on, behind the first block of keys and in all.

    Attributes:
      by_distance: See `influence_by_distance`.
      total: Of all pairs.
    """

    by_distance: Float[np.ndarray, "layers heads blocks"]
    total: Float[np.ndarray, "layers heads"]

    @classmethod
    def of(cls, layers: Sequence[Sequence[Any]]) -> "Influence":
        """From the `figures` of each layer."""
        by_distance, total = zip(*layers, strict=True)
        return cls(np.array(by_distance), np.array(total))

    def dropped(
        self, window: Int[np.ndarray, " windows"]
    ) -> Float[np.ndarray, "layers heads windows"]:
        """Of the pairs that each of some windows, in blocks with the query's own, leaves out."""
        every = self._from_distance()
        return every[..., np.minimum(window, every.shape[-1] - 1)]

    def kept(self, window: Int[np.ndarray, "layers heads"]) -> Float[np.ndarray, "layers heads"]:
        """The share of all influence that a window of each head and the first block keep."""
        every = self._from_distance()
        window = np.minimum(window, every.shape[-1] - 1)[..., None]
        lost = np.take_along_axis(every, window, -1)[..., 0]
        return 1.0 - lost / np.where(self.total > 0, self.total, 1.0)

    def _from_distance(self) -> Float[np.ndarray, "layers heads distances"]:
        sums = np.cumsum(self.by_distance[..., ::-1], -1)[..., ::-1]
        return np.pad(sums, ((0, 0), (0, 0), (0, 1)))


def figures(layer: Profiled, block_size: int) -> list[Any]:
    """A layer's part of `Influence` as plain lists, the first block of keys being the sink."""
    of_blocks = np.asarray(influence_of_blocks(layer, block_size=block_size), np.float64)
    by_distance = influence_by_distance(of_blocks, sink_blocks=1)
    return [by_distance.tolist(), of_blocks.sum((1, 2)).tolist()]


def mean(found: Sequence[Influence]) -> Influence:
    """Over texts of one length."""
    return Influence(*(np.mean(parts, axis=0) for parts in zip(*found, strict=True)))
