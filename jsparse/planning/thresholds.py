"""The threshold that suits each head, found offline. Xu et al. 2025, arXiv:2503.16428."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jsparse import checks
from jsparse.attention.map_scores import map_sums
from jsparse.core import blocks, selection
from jsparse.estimators.xattention import antidiagonal_scores, xattention
from jsparse.evaluation.capture import Captured
from jsparse.evaluation.store import Store, fingerprint
from jsparse.masks import causal
from jsparse.planning.table import Choice, Provenance, Table
from jsparse.types import TileGrid


def needed_thresholds(
    mass: Float[Array, "heads q_blocks kv_blocks"],
    estimate: Float[Array, "heads q_blocks kv_blocks"],
    visible: Bool[Array, "heads q_blocks kv_blocks"],
    coverage: float,
) -> Float[Array, " heads"]:
    """The share of estimated mass that has to be kept for the blocks that matter to be in it.

    Of each row of tiles those that matter are the fewest that hold `coverage` of the true mass. The
    threshold is the estimated mass of all blocks that rank no lower than the lowest of these, over
    the estimated mass of all, both summed over rows.
    """
    matter = selection.top_p(mass, coverage, visible=visible)
    least = jnp.where(matter, estimate, jnp.inf).min(-1, keepdims=True)
    kept = jnp.where(visible & (estimate >= least), estimate, 0.0).sum((-1, -2))
    total = jnp.where(visible, estimate, 0.0).sum((-1, -2))
    return jnp.minimum(kept / total, 1.0)


def search_thresholds(
    layers: list[Captured],
    *,
    coverage: float = 0.9,
    stride: int = 16,
    block_size: int = 128,
    source: str = "",
    progress: Callable[[str, int], None] = lambda label, steps: None,
    partial: str | Path | None = None,
) -> Table:
    """Finds each head the threshold at which XAttention takes the blocks that matter to it.

    The true mass of a block is the sum of dense attention's probabilities in it. A head's score is
    the share of that mass in the blocks that are taken.

    Args:
      layers: Captured tensors, of the same shapes.
      coverage: Share of the true mass that the blocks to be found hold, in (0, 1]; 0.9 in the
        authors' code.
      stride: Of `js.xattention`; thresholds hold for this stride.
      block_size: Of `js.xattention`.
      source: The name of the model or file, for the table.
      progress: Called with a label and the number of steps before each step.
      partial: A JSON file that keeps figures as they come, so that a search that was stopped goes
        on where it was; removed at the end.

    Differs from the paper:
      This is the authors' code. The paper describes a dynamic program that lowers one head's
      threshold at a time by a tenth and runs the model after each.

    Raises:
      ValueError: if there is no layer, layers differ in shape, or a number is out of range.
    """
    checks.same_layers(layers)
    checks.finite_layers(layers)
    checks.fractions(coverage=coverage)
    arguments = {"stride": stride, "block_size": block_size}
    xattention(**arguments)  # says what is wrong before the first layer
    q_len, kv_len = layers[0].q.shape[0], layers[0].k.shape[0]
    tensors = (x for layer in layers for x in layer)
    store = Store(partial, fingerprint(tensors, "thresholds", coverage, sorted(arguments.items())))
    figures = functools.partial(_figures, coverage=coverage, **arguments)
    chosen = []
    for number, layer in enumerate(layers):
        label = f"layer {number}"
        progress(label, len(layers))

        def figure(layer=layer):
            return [np.asarray(x, np.float64).tolist() for x in figures(layer.q, layer.k)]

        found = store.get(label, figure)
        chosen.append(tuple(Choice(*of_head) for of_head in zip(*found, strict=True)))
    store.discard()
    provenance = Provenance(source, q_len, kv_len, "kept_mass", {"coverage": coverage})
    return Table("xattention", arguments, tuple(chosen), provenance)


@functools.partial(jax.jit, static_argnames=("coverage", "stride", "block_size"))
def _figures(q: Array, k: Array, *, coverage: float, stride: int, block_size: int) -> Any:
    """Per head the threshold, the true mass that it keeps and the tiles that it costs."""
    mask = causal()
    grid = TileGrid(q.shape[0], k.shape[0], block_size, block_size)
    mass = map_sums(q, k, block_q=block_size, block_kv=block_size, mask=mask)
    estimate = antidiagonal_scores(q, k, stride=stride, block_size=block_size, mask=mask)
    visible, forced = blocks.candidates(mask, grid, (), q.shape[1])
    thresholds = needed_thresholds(mass, estimate, visible, coverage)
    keep = selection.top_p(estimate, thresholds[:, None, None], visible=visible, forced=forced)
    kept = jnp.where(keep, mass, 0.0).sum((-1, -2)) / mass.sum((-1, -2))
    return thresholds, kept, keep.sum((-1, -2)) / visible.sum((-1, -2))
