"""Which pattern suits which head: MInference's offline search within a budget of operations.

Jiang et al. 2024, arXiv:2407.02490, section 3.2, algorithm 1.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.core.tiling import block_mask
from jsparse.estimators.minference import AShape, BlockSparse, Pattern, VerticalSlash, minference
from jsparse.evaluation.capture import Captured
from jsparse.evaluation.cost import attend_cost
from jsparse.evaluation.metrics import recalled_mass
from jsparse.evaluation.store import Store, fingerprint
from jsparse.masks import causal
from jsparse.planning.table import Choice, Provenance, Table
from jsparse.types import BlockMask, parts_of

# those of the authors' searches, made for texts of about 30,000 tokens
CANDIDATES: tuple[Pattern, ...] = (
    AShape(100, 800),
    VerticalSlash(30, 800),
    VerticalSlash(100, 750),
    VerticalSlash(100, 800),
    VerticalSlash(500, 700),
    VerticalSlash(1000, 4096),
    VerticalSlash(3500, 100),
    BlockSparse(100),
)
_FACTORS = (1.0, 0.5, 0.25, 0.125)
_NEAR = 5e-3


class Attended(NamedTuple):
    """What attention gave."""

    out: Float[Array, "q_len heads v_dim"]
    lse: Float[Array, "heads q_len"]


Score = Callable[[Attended, Attended, int], Float[Array, " heads"]]


def kept_mass(sparse: Attended, dense: Attended, start: int) -> Float[Array, " heads"]:
    """The share of dense attention's mass that is computed, over queries from `start` on."""
    return recalled_mass(sparse.lse[:, start:], dense.lse[:, start:])


def near_outputs(sparse: Attended, dense: Attended, start: int) -> Float[Array, " heads"]:
    """The share of output numbers within 0.005 of dense attention's, from query `start` on."""
    gap = sparse.out[start:].astype(jnp.float32) - dense.out[start:].astype(jnp.float32)
    return (jnp.abs(gap) <= _NEAR).mean((0, 2))


def scaled(
    candidates: Sequence[Pattern], factors: Sequence[float] = _FACTORS
) -> tuple[Pattern, ...]:
    """The candidates with their sizes times each factor, at least 1; each pattern once.

    Of an A-shape the window is scaled, its few first keys stay.
    """

    def times(pattern: Pattern, factor: float) -> Pattern:
        sizes = dataclasses.asdict(pattern)
        sizes = {
            name: size if name == "n_init" else max(1, int(size * factor))
            for name, size in sizes.items()
        }
        return type(pattern)(**sizes)

    return tuple(dict.fromkeys(times(p, factor) for factor in factors for p in candidates))


def search_patterns(
    layers: list[Captured],
    *,
    candidates: Sequence[Pattern] | None = None,
    budget: float = 0.25,
    start: int = 2500,
    score: Score = kept_mass,
    source: str = "",
    progress: Callable[[str, int], None] = lambda label, steps: None,
    partial: str | Path | None = None,
    **arguments: Any,
) -> Table:
    """Finds each head the pattern with the best score among those that cost no more than a budget.

    What a candidate costs is what its kernel would compute: the products of all tiles and columns
    that its plan lists for that head, whole tiles, over those of dense causal attention. Where no
    candidate keeps to the budget, a head gets the cheapest. Memory is that of attention by tiles.

    Args:
      layers: Captured tensors, of the same shapes.
      candidates: What to try; default the authors' candidates and these at half, a quarter and an
        eighth of their sizes.
      budget: Most operations of a head, as a share of dense causal attention's, in (0, 1].
      start: The first query that counts for the score; 2500 in the authors' code.
      score: `kept_mass`, `near_outputs`, or another function of what sparse and dense attention
        gave and `start`, per head, higher is better.
      source: The name of the model or file, for the table.
      progress: Called with a label and the number of steps before each step.
      partial: A JSON file that keeps figures as they come, so that a search that was stopped goes
        on where it was; removed at the end.
      **arguments: Of `js.minference`, the same for all heads.

    Differs from the paper:
      Candidates of all costs below the budget compete, where the paper first brings each to the
      same cost; so the authors' candidates are tried at smaller sizes too. The score is that of
      what is computed, whole tiles, not of the pattern's own pairs. Near distances are forced as
      when it runs, 100 of them, where their search forces 30. What wins is what is saved: theirs
      saves a vertical-slash pattern in the place of either of the others.

    Raises:
      ValueError: if there is no layer, layers differ in shape, `start` leaves no query, or a number
        is out of range.
    """
    candidates = scaled(CANDIDATES) if candidates is None else tuple(candidates)
    checks.same_layers(layers)
    checks.finite_layers(layers)
    checks.positive(candidates=len(candidates))
    checks.fractions(budget=budget)
    checks.non_negative(start=start)
    q_len, kv_len = layers[0].q.shape[0], layers[0].k.shape[0]
    checks.rows_left(start, q_len)
    # factories check their arguments: better now than after the first candidates
    methods = [minference(patterns=pattern, **arguments) for pattern in candidates]
    tensors = (x for layer in layers for x in layer)
    name = getattr(score, "__name__", repr(score))
    told = candidates, budget, start, name, sorted(arguments.items())
    store = Store(partial, fingerprint(tensors, "patterns", *told))
    dense_attention = jax.jit(functools.partial(attend, mask=causal(), return_lse=True))
    runs = [_programs(method) for method in methods]
    chosen = []
    for number, layer in enumerate(layers):
        # only where some figure of the layer is not there yet
        dense = functools.cache(lambda layer=layer: Attended(*dense_attention(*layer)))
        figures = []
        for pattern, (plan_of, run) in zip(candidates, runs, strict=True):
            label = f"layer {number} {_name(pattern)}"
            progress(label, len(layers) * len(candidates))

            def figure(layer=layer, plan_of=plan_of, run=run, dense=dense):
                costs = _shares(plan_of(layer.q, layer.k), layer)
                if min(costs) > budget:
                    return {"cost": costs, "score": [None] * len(costs)}
                found = score(Attended(*run(*layer)), dense(), start)
                numbers = np.asarray(found, np.float64).tolist()
                finite = [x if math.isfinite(x) else None for x in numbers]
                return {"cost": costs, "score": finite}

            figures.append(store.get(label, figure))
        chosen.append(_choose(candidates, figures, budget))
    store.discard()
    search = {"budget": budget, "start": start, "candidates": [_name(p) for p in candidates]}
    provenance = Provenance(source, q_len, kv_len, name, search)
    return Table("minference", arguments, tuple(chosen), provenance)


def _name(pattern: Pattern) -> str:
    return f"{type(pattern).__name__}({', '.join(map(str, dataclasses.astuple(pattern)))})"


def _programs(method: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def plan_of(q, k):
        return method.plan((), q, k, mask=causal())[0]

    def run(q, k, v):
        return method.attend((), q, k, v, mask=causal(), return_lse=True)[0]

    return jax.jit(plan_of), jax.jit(run)


def _shares(plan: BlockMask | Sequence[BlockMask], layer: Captured) -> list[float]:
    """Each head's operations over those of dense causal attention in tiles of the same size."""
    heads = layer.q.shape[1]
    sizes: dict[str, Any] = {"dim": layer.q.shape[-1], "v_dim": layer.v.shape[-1]}
    first = parts_of(plan)[0]
    dense = attend_cost(block_mask(causal(), **first.grid._asdict()), heads=1, kv_heads=1, **sizes)

    def of_head(part: BlockMask, head: int) -> BlockMask:
        at = slice(head, head + 1)
        arrays = part.kv_indices[at], part.kv_num_blocks[at], part.overflowed[at]
        return BlockMask(*arrays, **part.grid._asdict())

    return [
        attend_cost([of_head(p, h) for p in parts_of(plan)], heads=1, kv_heads=1, **sizes).flops
        / dense.flops
        for h in range(heads)
    ]


def _choose(
    candidates: Sequence[Pattern], figures: Sequence[dict[str, list[Any]]], budget: float
) -> tuple[Choice, ...]:
    """Each head's best within the budget: by score, then by cost, then in the given order."""
    chosen = []
    for head in range(len(figures[0]["cost"])):
        costs, scores = ([found[name][head] for found in figures] for name in ("cost", "score"))
        ranked = [
            (-scores[n], cost, n)
            for n, cost in enumerate(costs)
            if cost <= budget and scores[n] is not None
        ]
        best = min(ranked)[-1] if ranked else costs.index(min(costs))
        chosen.append(Choice(candidates[best], scores[best], costs[best]))
    return tuple(chosen)
