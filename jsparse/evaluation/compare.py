"""Every method against dense attention, on the same captured tensors, in the same run."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.attention.attend import attend
from jsparse.core.tiling import block_mask
from jsparse.evaluation.capture import Captured
from jsparse.evaluation.cost import attend_cost, count_flops
from jsparse.evaluation.metrics import output_error, recalled_mass, visible_density
from jsparse.masks import causal
from jsparse.registry import METHODS, Row
from jsparse.types import BlockMask, Method

BLOCK = 128


class Setting(NamedTuple):
    """One method at one value of what controls its density."""

    row: Row
    value: float | None

    @property
    def label(self) -> str:
        """The method, and its setting where it has one."""
        return self.row.name if self.value is None else f"{self.row.name} {self.value:g}"

    def method(self) -> Method:
        """The method at this setting."""
        if self.row.control is None or self.value is None:
            return self.row.factory()
        return self.row.factory(**{self.row.control: self.value})


class Result(NamedTuple):
    """Figures of one setting; lists are per layer, or per layer and head."""

    label: str
    method: str
    density: list[list[float]]
    recall: list[list[float]]
    error: list[list[float]]
    plan_seconds: float
    seconds: float
    dense_seconds: float
    flops: float
    dense_flops: float
    bytes: float
    dense_bytes: float
    score: float | None


class Comparison(NamedTuple):
    """All results, and the pictures' raw material: tiles [layer][heads, q_blocks, kv_blocks]."""

    results: list[Result]
    tiles: dict[str, list[np.ndarray]]
    dense_score: float | None
    q_len: int
    heads: int


def settings(names: Iterable[str] | None = None) -> list[Setting]:
    """All causal training-free methods of the registry, or those named, at their settings."""
    wanted = [row for row in METHODS if row.causal and row.training_free]
    if names is not None:
        wanted = [row for row in wanted if row.name in set(names)]
    return [Setting(row, value) for row in wanted for value in (row.settings or (None,))]


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

    Args:
      layers: Captured tensors, all of the same shapes.
      which: Settings to run; default all causal training-free ones.
      score: What the whole model costs with an attention inside, such as bits per byte:
        `score(attention)`, where `attention(q, k, v, *, mask, x) -> out`, None for dense.
      progress: Called with a label before each piece of work.
      repeats: Timed runs per layer; the median counts.
      partial: A JSON file that keeps each setting's figures as they come; those it has already are
        not computed again.
    """
    which = settings() if which is None else which
    mask = causal()
    q_len, heads, dim = layers[0].q.shape
    (kv_len, kv_heads), v_dim = layers[0].k.shape[:2], layers[0].v.shape[-1]
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "v_dim": v_dim}
    store = _Store(partial, layers)

    progress("dense")
    dense = jax.jit(lambda q, k, v: attend(q, k, v, mask=mask, return_lse=True))
    references = [dense(*layer) for layer in layers]
    dense_seconds = _median_seconds(dense, layers, repeats)
    dense_plan = block_mask(mask, q_len, kv_len, block_q=BLOCK, block_kv=BLOCK)
    dense_cost = attend_cost(dense_plan, **sizes)
    dense_score = store.get("dense score", lambda: None if score is None else score(None))

    results, tiles = [], {}
    for setting in which:
        progress(setting.label)
        method = setting.method()
        plan_of = jax.jit(lambda q, k, m=method: m.plan((), q, k, mask=mask)[0])
        plans = [plan_of(layer.q, layer.k) for layer in layers]
        tiles[setting.label] = [_tiles(plan, heads) for plan in plans]

        def figures(setting=setting, method=method, plan_of=plan_of, plans=plans):
            run = jax.jit(lambda q, k, v: method.attend((), q, k, v, mask=mask, return_lse=True)[0])
            outs = [run(*layer) for layer in layers]
            costs = [attend_cost(plan, **sizes) for plan in plans if plan is not None]
            planning = count_flops(plan_of, layers[0].q, layers[0].k)
            result = Result(
                label=setting.label,
                method=setting.row.name,
                density=[visible_density(plan, mask, heads).tolist() for plan in plans],
                recall=[
                    recalled_mass(lse, full).tolist()
                    for (_, lse), (_, full) in zip(outs, references, strict=True)
                ],
                error=[
                    output_error(out, full).tolist()
                    for (out, _), (full, _) in zip(outs, references, strict=True)
                ],
                plan_seconds=_median_seconds(lambda q, k, v: plan_of(q, k), layers, repeats),
                seconds=_median_seconds(run, layers, repeats),
                dense_seconds=dense_seconds,
                flops=planning * len(layers) + sum(cost.flops for cost in costs),
                dense_flops=dense_cost.flops * len(layers),
                bytes=sum(cost.bytes for cost in costs),
                dense_bytes=dense_cost.bytes * len(layers),
                score=None if score is None else score(_inside(method)),
            )
            return result._asdict()

        results.append(Result(**store.get(setting.label, figures)))
    return Comparison(results, tiles, dense_score, q_len, heads)


def _inside(method: Method):
    def attention(q, k, v, *, mask, x):
        return method.attend((), q, k, v, x=x, mask=mask)[0]

    return attention


def _tiles(plan: BlockMask, heads: int) -> np.ndarray:
    dense = np.asarray(plan.to_dense())
    return np.repeat(dense, heads // dense.shape[0], axis=0)


def _median_seconds(run: Callable[..., Any], layers: list[Captured], repeats: int) -> float:
    """Seconds for all layers: the sum of each layer's median."""
    total = 0.0
    for layer in layers:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(*layer))
            times.append(time.perf_counter() - start)
        total += float(np.median(times))
    return total


class _Store:
    """Figures kept in a file as they come, for these tensors and no others."""

    def __init__(self, path: str | Path | None, layers: list[Captured]):
        self.path = None if path is None else Path(path)
        sums = [float(jnp.abs(x).sum()) for layer in layers for x in layer]
        self.data: dict[str, Any] = {"tensors": sums}
        if self.path is not None and self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept.get("tensors") == sums:
                self.data = kept

    def get(self, label: str, compute: Callable[[], Any]) -> Any:
        """What is kept under a label, or computed and kept now."""
        if label not in self.data:
            self.data[label] = compute()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(self.data))
        return self.data[label]
