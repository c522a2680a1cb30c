"""Every method against dense attention, on the same captured tensors, in the same run."""

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jsparse import _compat, checks
from jsparse.attention.attend import attend
from jsparse.core.blocks import candidates
from jsparse.core.reordering import Orders
from jsparse.core.tiling import block_mask
from jsparse.evaluation.capture import Captured
from jsparse.evaluation.cost import Cost, attend_backward_cost, attend_cost, plan_cost
from jsparse.evaluation.metrics import (
    Walked,
    in_place,
    output_error,
    pairs_planned,
    recalled_mass,
    tile_shares,
    visible_density,
    widest_part,
)
from jsparse.evaluation.store import Store, fingerprint
from jsparse.masks import causal
from jsparse.masks.reordered import follow
from jsparse.registry import METHODS, Row
from jsparse.types import BlockMask, Mask, Method, parts_of

BLOCK = 128


class Setting(NamedTuple):
    """One method at one value of what controls its density.

    Attributes:
      row: The method's row of the registry.
      value: Of the argument that the row names as its control; None where there is none.
      block: Tokens per block, for methods that have a `block_size`; None for their default.
    """

    row: Row
    value: float | None
    block: int | None = None

    @property
    def label(self) -> str:
        """The method, and its setting where it has one."""
        return self.row.name if self.value is None else f"{self.row.name} {self.value:g}"

    @property
    def operand(self) -> Array | None:
        """The value as an operand of compiled programs; None where it must be static."""
        return jnp.asarray(self.value, jnp.float32) if self.row.control_traced else None

    def method(self, operand: Array | None = None, *, kv_heads: int | None = None) -> Method:
        """The method at this setting.

        Args:
          operand: What replaces the setting's value.
          kv_heads: What an argument that asks for more of them is lowered to; None leaves it.
        """
        value = self.value if operand is None else operand
        defaults = inspect.signature(self.row.factory).parameters
        arguments: dict[str, Any] = {}
        shared = self.row.at_most_kv_heads
        if shared is not None and kv_heads is not None:
            arguments[shared] = min(defaults[shared].default, kv_heads)
        if self.row.control is not None and value is not None:
            arguments[self.row.control] = value
        if self.block and "block_size" in defaults:
            arguments["block_size"] = self.block
        return self.row.factory(**arguments)


class Result(NamedTuple):
    """Figures of one setting; lists are per layer and head, costs and times of all layers.

    Attributes:
      label: The setting's label.
      method: The method's name.
      density: Computed tiles over visible tiles.
      token_density: Attended pairs of tokens over visible pairs.
      recall: The share of dense attention's mass on attended pairs.
      error: Norm of the output's difference over the norm of the dense output.
      largest_error: The largest difference of a single number of the output.
      cosine: Of the angle between the output and the dense one.
      plan_seconds: Making the plans alone.
      seconds: Planning and attending.
      dense_seconds: Dense attention by the same executor in the same run.
      plan_flops: Of making the plans.
      flops: Of planning and attending.
      dense_flops: Of dense attention.
      backward_flops: Of the gradients of q, k and v through the plan.
      dense_backward_flops: Of those of dense attention.
      bytes: Read and written at least, planning and attending.
      dense_bytes: The same of dense attention.
      overflowed: Whether some list was too short for what the method chose.
      score: What the whole model costs with the method inside.
    """

    label: str
    method: str
    density: list[list[float]]
    token_density: list[list[float]]
    recall: list[list[float]]
    error: list[list[float]]
    largest_error: list[list[float]]
    cosine: list[list[float]]
    plan_seconds: float
    seconds: float
    dense_seconds: float
    plan_flops: float
    flops: float
    dense_flops: float
    backward_flops: float
    dense_backward_flops: float
    bytes: float
    dense_bytes: float
    overflowed: bool
    score: float | None


class _Planned(NamedTuple):
    """What a method says of a layer: `mask` is what it applies inside the tiles."""

    tiles: BlockMask | tuple[BlockMask, ...]
    orders: Orders
    walked: Walked | None
    mask: Mask


class _Programs(NamedTuple):
    """What is compiled for a method; the first operand is the setting's."""

    plan: Callable[..., "_Planned"]
    attend: Callable[..., Any]

    @classmethod
    def of(cls, setting: Setting, mask: Mask) -> "_Programs":
        """Programs of a setting, good for others of its method where the control is traced."""

        def plan(operand, q, k):
            method = setting.method(operand, kv_heads=k.shape[-2])
            tiles, info = method.plan((), q, k, mask=mask)
            own = getattr(info, "mask", mask)
            return _Planned(tiles, Orders.of(info), Walked.of(info), own)

        def attend(operand, mask, q, k, v):
            method = setting.method(operand, kv_heads=k.shape[-2])
            return method.attend((), q, k, v, mask=mask, return_lse=True)[0]

        return cls(jax.jit(plan), jax.jit(attend))


class Comparison(NamedTuple):
    """All results, and the pictures' raw material.

    That is per setting how much of each tile is computed, [layer][heads, q_blocks, kv_blocks].
    """

    results: list[Result]
    tiles: dict[str, list[np.ndarray]]
    dense_score: float | None
    q_len: int
    heads: int
    repeats: int


def settings(names: Iterable[str] | None = None, *, block: int | None = None) -> list[Setting]:
    """All causal methods of the registry that have nothing to learn, or those named.

    Each at all its settings; those that models are trained with, where they are not named, at the
    middle one: a model that was not tells little of them.

    Args:
      names: Names of methods.
      block: Tokens per block, for methods that have a `block_size`.

    Raises:
      ValueError: if a name is unknown, its method is not causal or has parameters, or a method
        refuses the block.
    """
    wanted = [row for row in METHODS if row.causal and not row.learns]

    def values(row: Row) -> Sequence[Any]:
        every = row.settings or (None,)
        return every if row.training_free or names is not None else every[len(every) // 2 :][:1]

    if names is not None:
        names = set(names)
        checks.known_methods(names, {row.name for row in METHODS})
        checks.applicable_methods(names, {row.name for row in wanted})
        wanted = [row for row in wanted if row.name in names]
    chosen = [Setting(row, value, block) for row in wanted for value in values(row)]
    for setting in chosen:
        # factories check their arguments: better now than after the first settings have run
        setting.method()
    return chosen


def compare(
    layers: list[Captured],
    *,
    which: list[Setting] | None = None,
    score: Callable[[Any], float] | None = None,
    progress: Callable[[str], None] = lambda label: None,
    repeats: int = 3,
    partial: str | Path | None = None,
) -> Comparison:
    """Runs each setting on each layer, under a causal mask, against dense attention.

    What methods share out among kv heads is shared among those of the layers.

    Args:
      layers: Captured tensors, all of the same shapes.
      which: Settings to run; default those of `settings()`.
      score: What the whole model costs with an attention inside, such as bits per byte:
        `score(attention)`, where `attention(q, k, v, *, mask, x, positions) -> out` is compiled,
        and need not be again where mask, q, k and v are alike those of the layers. It is for whole
        sequences, whose positions are 0, 1, ... None for dense.
      progress: Called with a label before each piece of work.
      repeats: Timed runs per layer; the median counts.
      partial: A JSON file that keeps each setting's figures as they come, so that a run that was
        stopped goes on where it was; removed once all are there.

    Raises:
      ValueError: if there is no layer or setting, layers differ in shape, or there is nothing to
        leave out because the sequence is not longer than a tile.
    """
    which = settings() if which is None else which
    checks.positive(repeats=repeats, settings=len(which))
    checks.same_layers(layers)
    mask = causal()
    q_len, heads, dim = layers[0].q.shape
    (kv_len, kv_heads), v_dim = layers[0].k.shape[:2], layers[0].v.shape[-1]
    blocks = {setting.block or BLOCK for setting in which}
    checks.longer_than_a_tile(min(q_len, kv_len), max(blocks))
    itemsize = layers[0].q.dtype.itemsize
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "v_dim": v_dim}
    tensors = (x for layer in layers for x in layer)
    store = Store(
        partial, fingerprint(tensors, repeats, score is None, Result._fields, sorted(blocks))
    )

    progress("dense")
    dense = jax.jit(lambda q, k, v: attend(q, k, v, mask=mask, return_lse=True))
    references, dense_seconds = _timed(dense, layers, repeats)
    dense_plan = block_mask(mask, q_len, kv_len, block_q=BLOCK, block_kv=BLOCK)
    dense_cost = attend_cost(dense_plan, **sizes, itemsize=itemsize)
    dense_backward = attend_backward_cost(dense_plan, **sizes, itemsize=itemsize)
    visible = pairs_planned(dense_plan, mask, heads)
    dense_score = store.get("dense score", lambda: None if score is None else score(None))

    results, tiles = [], {}
    programs: dict[str, _Programs] = {}
    for setting in which:
        progress(setting.label)
        name = setting.row.name if setting.row.control_traced else setting.label
        known = name in programs
        program = programs.setdefault(name, _Programs.of(setting, mask))
        plan_of, under = (functools.partial(f, setting.operand) for f in program)
        run = functools.partial(under, mask)
        operands = [layer[:2] for layer in layers]
        planned, plan_seconds = _timed(plan_of, operands, repeats, compiled=known)
        tiles[setting.label] = [_tiles(each, mask, heads) for each in planned]

        def figures(
            setting=setting,
            plan_of=plan_of,
            under=under,
            run=run,
            planned=planned,
            plan_seconds=plan_seconds,
        ):
            # inside the model first: what that compiles need not be run once more before the clock
            under_own = _Inside(under, mask, layers[0])
            cost = None if score is None else score(under_own)
            outs, seconds = _timed(run, layers, repeats, compiled=under_own.compiled)
            errors = [
                output_error(out, full)
                for (out, _), (full, _) in zip(outs, references, strict=True)
            ]
            recall = [
                recalled_mass(lse, full)
                for (_, lse), (_, full) in zip(outs, references, strict=True)
            ]
            # what is decided on the way needs no plan
            plans_first = planned[0].walked is None
            nothing = Cost(0.0, 0.0)
            planning = plan_cost(plan_of, *layers[0][:2]) if plans_first else nothing
            whole = backward = nothing
            for plan, _, found, _ in planned:
                scored = None if found is None else found.scored
                attending = attend_cost(plan, **sizes, itemsize=itemsize, scored=scored)
                whole = whole.plus(planning).plus(attending)
                backward = backward.plus(attend_backward_cost(plan, **sizes, itemsize=itemsize))
            result = Result(
                label=setting.label,
                method=setting.row.name,
                # masks as plans see them, whose tiles may be of tokens in another order
                density=[
                    visible_density(each.tiles, follow(mask, each.orders, heads), heads).tolist()
                    for each in planned
                ],
                token_density=[(_pairs(each, heads) / visible).tolist() for each in planned],
                recall=[share.tolist() for share in recall],
                error=[error.relative.tolist() for error in errors],
                largest_error=[error.largest.tolist() for error in errors],
                cosine=[error.cosine.tolist() for error in errors],
                plan_seconds=plan_seconds if plans_first else 0.0,
                seconds=seconds,
                dense_seconds=dense_seconds,
                plan_flops=planning.flops * len(layers),
                flops=whole.flops,
                dense_flops=dense_cost.flops * len(layers),
                backward_flops=backward.flops,
                dense_backward_flops=dense_backward.flops * len(layers),
                bytes=whole.bytes,
                dense_bytes=dense_cost.bytes * len(layers),
                overflowed=any(
                    bool(part.overflowed.any()) for each in planned for part in parts_of(each.tiles)
                ),
                score=cost,
            )
            return result._asdict()

        results.append(Result(**store.get(setting.label, figures)))
    store.discard()
    return Comparison(results, tiles, dense_score, q_len, heads, repeats)


class _Inside:
    """A method as a model's attention, which knows whether it ran as it is timed."""

    def __init__(self, under: Callable[..., Any], mask: Mask, layer: Captured):
        self._under, self._kind = under, _kind((mask, *layer))
        self.compiled = False

    def __call__(self, q, k, v, *, mask, x, positions):
        # while a program of the model's is traced, this one is not compiled by itself
        if not _compat.is_traced((mask, q, k, v)):
            self.compiled |= _kind((mask, q, k, v)) == self._kind
        return self._under(mask, q, k, v)[0]


def _kind(operands: Any) -> Any:
    """What a compiled program is for."""
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(operands)]
    return jax.tree.structure(operands), shapes


def _pairs(planned: _Planned, heads: int) -> np.ndarray:
    """The pairs of tokens attended to, per head."""
    seen = follow(planned.mask, planned.orders, heads)
    assert seen is not None
    return pairs_planned(planned.tiles, seen, heads)


def _tiles(planned: _Planned, mask: Mask, heads: int) -> np.ndarray:
    """How much of each tile is computed, tokens in their own places, of what can be seen there.

    Tiles of few queries are taken together, as many as are as tall as wide.
    """
    shares, grid = tile_shares(planned.tiles, heads), widest_part(planned.tiles).grid
    if not planned.orders.moved:
        together = max(1, grid.block_kv // grid.block_q)
        missing = (0, 0), (0, -shares.shape[1] % together), (0, 0)
        padded = np.pad(shares, missing, constant_values=np.nan)
        return np.nanmean(padded.reshape(heads, -1, together, shares.shape[-1]), axis=2)
    visible, _ = candidates(mask, grid, (), heads)
    return in_place(shares, planned.orders, grid) * np.asarray(visible)


def _timed(
    run: Callable[..., Any],
    layers: Sequence[tuple[Array, ...]],
    repeats: int,
    *,
    compiled: bool = False,
) -> tuple[list[Any], float]:
    """Results of all layers, and seconds for all: the sum of each layer's median."""
    if not compiled:
        jax.block_until_ready(run(*layers[0]))
    results, total = [], 0.0
    for layer in layers:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            result = jax.block_until_ready(run(*layer))
            times.append(time.perf_counter() - start)
        results.append(result)
        total += float(np.median(times))
    return results, total
