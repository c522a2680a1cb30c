"""The scorers, as `benchmarks.gpu` checks and times them: kernel, XLA, dense attention beside.

Each is held to what XLA makes of the same inputs before it is timed. Dense attention is that of
our own kernel, causal as they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jsparse as js
from benchmarks import roofline
from jsparse.attention.best_blocks import best_blocks
from jsparse.attention.blocks_of_windows import Problem, blocks_of_windows
from jsparse.attention.map_scores import map_maxima, map_sums
from jsparse.attention.tuning import milliseconds
from jsparse.core.pooling import mean_blocks
from jsparse.core.windows import Windows
from jsparse.estimators.xattention import antidiagonal_scores

BLOCK, TOP_K, GROUP = 128, 8, 8
# of native sparse attention
WINDOWS, SELECTED, SELECTED_TOP_K = Windows(32, 16), 64, 16
# numerators of 16 bits and more, and as many roundings of logarithms as a sum has terms
TOLERANCE = 2.0**-12


class Sizes(NamedTuple):
    """Of one timed problem; width 128."""

    length: int
    heads: int = 16
    kv_heads: int = 4
    dim: int = 128

    @property
    def problem(self) -> roofline.Problem:
        """Its causal tiles."""
        rows = self.length // BLOCK
        tiles = self.heads * rows * (rows + 1) / 2
        sizes = self.heads, self.kv_heads, self.length, self.length, self.dim, 0, tiles
        return roofline.Problem(*sizes, BLOCK, BLOCK)


FULL = tuple(Sizes(length) for length in (8192, 32768, 131072))
DRY = (Sizes(512, 2, 1, 64),)


class Scorer(NamedTuple):
    """What is timed.

    Attributes:
      name: Of its rows.
      run: `run(q, k, implementation)`, which gives an array, or several of which the last counts.
      work: Its kernels' work.
    """

    name: str
    run: Callable[..., Any]
    work: Callable[[Sizes], tuple[roofline.Work, ...]]


def _of_map(scores: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, name: scores(q, k, mask=js.masks.causal(), implementation=name)


def _of_antidiagonals(stride: int) -> Scorer:
    def run(q, k, name):
        sizes = {"stride": stride, "block_size": BLOCK, "mask": js.masks.causal()}
        return antidiagonal_scores(q, k, **sizes, implementation=name)

    return Scorer(
        f"antidiagonals, stride {stride}",
        run,
        lambda sizes: (roofline.antidiagonals(sizes.problem, stride, BLOCK // stride),),
    )


def _best(q: jax.Array, k: jax.Array, name: str) -> Any:
    return best_blocks(
        q,
        mean_blocks(k, BLOCK),
        block=BLOCK,
        kv_len=k.shape[1],
        top_k=TOP_K,
        mask=js.masks.causal(),
        offset=jnp.zeros(len(q), jnp.int32),
        implementation=name,
    )


def _work_of_best(sizes: Sizes) -> tuple[roofline.Work, ...]:
    blocks = sizes.length // BLOCK
    problem = sizes.problem._replace(kv_len=blocks, block_kv=1)
    return (roofline.best_columns(problem, 3, TOP_K),)


def _of_windows(q: jax.Array, k: jax.Array, name: str) -> Any:
    kv_len, heads = k.shape[1], q.shape[2]
    k_windows = WINDOWS.of(k).astype(jnp.float32).mean(-3).astype(k.dtype)
    seen = js.masks.whole_windows(js.masks.causal(), **WINDOWS._asdict(), kv_len=kv_len)
    # attention to windows is not timed here; its lse would be about that of so many zeros
    count = jnp.maximum((jnp.arange(kv_len) - WINDOWS.size + 1) // WINDOWS.stride + 1, 0)
    lse = jnp.broadcast_to(jnp.log(count.astype(jnp.float32)), (len(q), heads, kv_len))
    rules = seen.flatten_batch(()), q.shape[3] ** -0.5, None, jnp.zeros(len(q), jnp.int32), 1, 2
    problem = Problem(q, k_windows, lse, WINDOWS, SELECTED, kv_len, *rules)
    return blocks_of_windows(problem, SELECTED_TOP_K, name)


def _work_of_windows(sizes: Sizes) -> tuple[roofline.Work, ...]:
    per_tile = BLOCK // WINDOWS.stride
    windows = sizes.length // WINDOWS.stride
    problem = sizes.problem._replace(kv_len=windows, block_kv=per_tile)
    return (roofline.best_blocks_of_windows(problem, SELECTED_TOP_K),)


def _work_of_map(sizes: Sizes) -> tuple[roofline.Work, ...]:
    return roofline.row_lse(sizes.problem), roofline.tile_scores(sizes.problem)


SCORERS = (
    Scorer("sums of the map", _of_map(map_sums), _work_of_map),
    Scorer("maxima of the map", _of_map(map_maxima), _work_of_map),
    _of_antidiagonals(16),
    _of_antidiagonals(8),
    Scorer("best 8 blocks", _best, _work_of_best),
    Scorer("16 blocks of windows", _of_windows, _work_of_windows),
)


def timings(scorer: Scorer, sizes: Sizes, implementation: str, budget: float) -> dict[str, Any]:
    """Milliseconds of a scorer by its kernel and by XLA, and of dense attention.

    Args:
      scorer: What is timed.
      sizes: On what.
      implementation: By what.
      budget: About how many milliseconds each is timed.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    heads = sizes.heads, sizes.kv_heads, sizes.kv_heads
    q, k, v = (
        jax.random.normal(key, (1, sizes.length, n, sizes.dim), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    runs = {
        name: jax.jit(lambda q, k, name=name: scorer.run(q, k, name))
        for name in dict.fromkeys((implementation, "xla"))
    }
    found = {name: jax.tree.leaves(run(q, k))[-1] for name, run in runs.items()}
    difference = _difference(found[implementation], found["xla"])
    if not difference < TOLERANCE:
        raise ArithmeticError(f"the kernel and XLA differ by {difference:.1e} of the norm")
    mask = js.masks.causal()
    dense = jax.jit(lambda q, k, v: js.attend(q, k, v, mask=mask, implementation=implementation))
    calls = {name: lambda run=run: run(q, k) for name, run in runs.items()}
    calls["dense attention"] = lambda: dense(q, k, v)
    times = {
        name: milliseconds(call, jax.block_until_ready, budget) for name, call in calls.items()
    }
    device = roofline.DEVICES.get(jax.devices()[0].device_kind)
    work = scorer.work(sizes)
    return {
        "scorer": scorer.name,
        **sizes._asdict(),
        "difference": difference,
        "ms": times,
        "of_dense": times[implementation] / times["dense attention"],
        "gflop": sum(x.flops for x in work) / 1e9,
        "mbyte": sum(x.bytes for x in work) / 1e6,
        "expected_ms": device and sum(x.expected_ms(device) for x in work),
    }


def _difference(ours: jax.Array, theirs: jax.Array) -> float:
    a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
    # past the last of the chosen there is no number
    a, b = (np.where(np.isneginf(x), 0.0, x) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def summary(row: dict[str, Any]) -> str:
    """One line of the log."""
    times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in row["ms"].items())
    at_best = row["expected_ms"]
    best = "" if at_best is None else f"; {at_best:.3f} at best"
    return f"{row['scorer']}, T {row['length']}: {times} ({row['of_dense']:.1%} of dense{best})"
