"""Which threshold skips how much, fitted head by head over lengths: BLASST's calibration.

2025, arXiv:2512.12087; the fit is that of the authors' code.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import optimize

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.core.heads import expand_kv_heads
from jsparse.core.tiling import block_mask
from jsparse.estimators.blasst import Calibration, blasst
from jsparse.evaluation.capture import Captured
from jsparse.evaluation.cost import attend_cost
from jsparse.evaluation.metrics import recalled_mass
from jsparse.evaluation.store import Store, fingerprint
from jsparse.masks import causal
from jsparse.planning.table import Choice, Provenance, Table
from jsparse.types import BlockMask

# twenty from 1e-6 to 0.99
THRESHOLDS = (
    *(1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.02),
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
)
# where they take the curve to be one
_FITTED = 0.1, 0.9
_STEEPEST = 20.0


def fit(
    sparsity: Float[np.ndarray, "*points"], factors: Float[np.ndarray, "*points"]
) -> tuple[float, float] | None:
    """Fits `factor = a * exp(b * sparsity)` by least squares, `a >= 0`, `0 <= b <= 20`.

    Args:
      sparsity: Shares of tiles that were skipped; those from 0.1 to 0.9 count.
      factors: The scale factors that skipped them.

    Returns:
      `(a, b)`; None where fewer than two different sparsities count.
    """
    counted = (sparsity >= _FITTED[0]) & (sparsity <= _FITTED[1])
    sparsity, factors = sparsity[counted], factors[counted]
    if len(np.unique(sparsity)) < 2:
        return None

    def squares(b: float) -> tuple[float, float]:
        # the best factor in front follows from the slope, and is not below 0
        curve = np.exp(b * (sparsity - 1))
        a = float(factors @ curve / (curve @ curve))
        return float(((factors - a * curve) ** 2).sum()), a

    # one number is left to be found; from the best of a grid, since there may be several valleys
    grid = np.linspace(0.0, _STEEPEST, 81)
    best = grid[int(np.argmin([squares(b)[0] for b in grid]))]
    around = max(0.0, best - 0.25), min(_STEEPEST, best + 0.25)
    found: Any = optimize.minimize_scalar(
        lambda b: squares(b)[0], bounds=around, method="bounded", options={"xatol": 1e-10}
    )
    b = min((best, float(found.x)), key=lambda b: squares(b)[0])
    return squares(b)[1] * math.exp(-b), b


def search_scale_factors(
    layers: list[Captured],
    *,
    target_sparsity: float = 0.5,
    lengths: Sequence[int] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    block_size: int = 128,
    source: str = "",
    progress: Callable[[str, int], None] = lambda label, steps: None,
    partial: str | Path | None = None,
) -> Table:
    """Fits, per head, how much `js.blasst` skips to the threshold times the number of keys.

    Of each length the beginning of the captured text is taken. A point is a threshold and the share
    of causal tiles that it skips, while decoding those of single queries, the last tile's of the
    length. A head without two points between 0.1 and 0.9 gets the fit of the points of all heads.
    Scores and costs of the choices are those at the whole length and the target.

    Args:
      layers: Captured tensors, of the same shapes, queries and keys of the same tokens.
      target_sparsity: The share of tiles to skip, in (0, 1]; in the table it can be changed without
        another search.
      lengths: Tokens, rounded down to whole tiles; default an eighth, a quarter, half and all.
      thresholds: In (0, 1].
      block_size: Tokens per tile, on both sides.
      source: The name of the model or file, for the table.
      progress: Called with a label and the number of steps before each step.
      partial: A JSON file that keeps figures as they come, so that a search that was stopped goes
        on where it was; removed at the end.

    Differs from the paper:
      A fit per head, where the authors fit one for the model. Any captured text serves, where they
      take 24 prompts of several lengths up to 32,768; decoding is read off the last tile's queries
      of the same text, where they decode.

    Raises:
      ValueError: if there is no layer, layers differ in shape or lack queries, a length is below a
        tile or above what was captured, a number is out of range, or no threshold skips between a
        tenth and nine tenths of the tiles of any head.
    """
    checks.same_layers(layers)
    checks.finite_layers(layers)
    checks.fractions(target_sparsity=target_sparsity, thresholds=np.asarray(thresholds))
    checks.positive(block_size=block_size)
    length, heads, _ = layers[0].q.shape
    checks.all_queries(length, layers[0].k.shape[0])
    if lengths is None:
        lengths = [length >> n for n in (3, 2, 1, 0) if length >> n >= block_size]
    checks.lengths_to_fit(lengths, block_size, length)
    lengths = [n // block_size * block_size for n in lengths]
    arguments = {
        "target_sparsity": target_sparsity,
        "block_q": block_size,
        "block_kv": block_size,
    }
    told = [*lengths], [*thresholds], sorted(arguments.items())
    store = Store(partial, fingerprint((x for layer in layers for x in layer), "factors", *told))
    log_thresholds = jnp.log(jnp.asarray(thresholds, jnp.float32))

    found = []
    for number, layer in enumerate(layers):
        label = f"layer {number} thresholds"
        progress(label, 2 * len(layers))

        def figure(layer=layer):
            counts = skipped_tiles(layer.q, layer.k, log_thresholds, block_size=block_size)
            prefill, decode = (np.asarray(x, np.float64) for x in counts)
            return [_shares(prefill, decode, n // block_size, block_size) for n in lengths]

        found.append(store.get(label, figure))
    # [layers, lengths, phases, heads, thresholds]
    shares = np.asarray(found, np.float64)
    factors = np.outer(lengths, thresholds)
    every = np.broadcast_to(factors[:, None], (len(layers), len(lengths), heads, len(thresholds)))
    prefill, decode = (fit(shares[:, :, phase], every) for phase in (0, 1))
    checks.something_to_fit(prefill)
    # where single queries skip nothing that can be fitted, they shall skip nothing
    pooled = prefill or (0.0, 0.0), decode or (0.0, 0.0)

    chosen = []
    for number, (layer, of_layer) in enumerate(zip(layers, shares, strict=True)):
        calibration = [
            Calibration(*(x for n in (0, 1) for x in fit(of_layer[:, n, h], factors) or pooled[n]))
            for h in range(heads)
        ]
        label = f"layer {number} at the target"
        progress(label, 2 * len(layers))

        def outcome(layer=layer, calibration=calibration):
            return [
                np.asarray(x, np.float64).tolist()
                for x in _at_target(layer, calibration, arguments)
            ]

        scores, costs = store.get(label, outcome)
        chosen.append(tuple(map(Choice, calibration, scores, costs)))
    store.discard()
    search = {"target_sparsity": target_sparsity, "lengths": lengths, "thresholds": [*thresholds]}
    provenance = Provenance(source, length, length, "kept_mass", search)
    return Table("blasst", arguments, tuple(chosen), provenance)


@functools.partial(jax.jit, static_argnames="block_size")
def skipped_tiles(
    q: Float[Array, "length heads dim"],
    k: Float[Array, "length kv_heads dim"],
    log_thresholds: Float[Array, " thresholds"],
    *,
    block_size: int,
) -> tuple[
    Float[Array, "heads blocks thresholds"],
    Float[Array, "heads blocks thresholds"],
]:
    """Counts the causal tiles that thresholds skip in each whole row of tiles, and query by query.

    A skipped tile holds no row's largest logit so far, so the largest logits of all tiles up to one
    are those of the tiles kept, whatever the threshold: one walk serves all of them.
    """
    length, heads, dim = q.shape
    blocks, rows = length // block_size, jnp.arange(block_size)
    k = jnp.moveaxis(expand_kv_heads(k, heads), 1, 0)
    missing = -length % block_size
    k = jnp.pad(k, ((0, 0), (0, missing), (0, 0)))
    q = jnp.moveaxis(q, 1, 0)[:, : blocks * block_size].reshape(heads, blocks, block_size, dim)

    def counts(index):
        head, block = jnp.divmod(index, blocks)
        logits = jnp.dot(q[head, block], k[head].T, preferred_element_type=jnp.float32)
        seen = jnp.arange(k.shape[1]) <= (block * block_size + rows)[:, None]
        logits = jnp.where(seen, logits * dim**-0.5, -jnp.inf)
        peaks = logits.reshape(block_size, -1, block_size).max(-1)
        gaps = peaks - jax.lax.cummax(peaks, axis=1)
        visible = jnp.arange(gaps.shape[1]) <= block

        def below(gaps):
            return ((gaps[..., None] < log_thresholds) & visible[:, None]).sum(-2)

        return below(gaps.max(0)), below(gaps).sum(0)

    prefill, decode = jax.lax.map(counts, jnp.arange(heads * blocks))
    shape = heads, blocks, len(log_thresholds)
    return prefill.reshape(shape).astype(jnp.float32), decode.reshape(shape).astype(jnp.float32)


def _shares(prefill: np.ndarray, decode: np.ndarray, blocks: int, block_size: int) -> Any:
    """Of a length: skipped over causal tiles, per head and threshold, of prefill and decoding."""
    tiles = blocks * (blocks + 1) / 2
    whole = prefill[:, :blocks].sum(1) / tiles
    return [whole.tolist(), (decode[:, blocks - 1] / (blocks * block_size)).tolist()]


def _at_target(
    layer: Captured, calibration: Sequence[Calibration], arguments: dict[str, Any]
) -> tuple[Array, list[float]]:
    """Per head the share of dense attention's mass that is kept, and the operations it costs."""
    method = blasst(calibration=calibration, **arguments)
    (_, lse), info = method.attend((), *layer, mask=causal(), return_lse=True)
    _, dense_lse = attend(*layer, mask=causal(), return_lse=True)
    scored, kept = info.scored, info.kept
    sizes: dict[str, Any] = {
        "heads": 1,
        "kv_heads": 1,
        "dim": layer.q.shape[-1],
        "v_dim": layer.v.shape[-1],
    }
    dense = attend_cost(block_mask(causal(), **scored.grid._asdict()), **sizes).flops

    def of_head(head: int) -> BlockMask:
        at = slice(head, head + 1)
        arrays = kept.kv_indices[at], kept.kv_num_blocks[at], kept.overflowed[at]
        return BlockMask(*arrays, **kept.grid._asdict())

    costs = [
        attend_cost(of_head(head), **sizes, scored=scored).flops / dense
        for head in range(len(calibration))
    ]
    return recalled_mass(lse, dense_lse), costs
