"""What `gpu_compile` compiles of scorers for Hopper.

Of attention maps the row lse with sums, and with maxima; sums over antidiagonals of cells; the best
blocks of each query by their mean keys.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

# first: it says to jax what has to be said before that is loaded
from benchmarks import gpu_compile as common  # isort: skip

import jax

import jsparse as js
from benchmarks.gpu_compile import IDS, Case
from jsparse.attention import antidiagonals, best_blocks, blocks_of_windows, map_scores
from jsparse.attention.attend import prepare
from jsparse.core.blocks import cells_of
from jsparse.core.windows import Windows
from jsparse.types import TileGrid
from pallas_kernels.attention_map import mosaic, mosaic_cells
from pallas_kernels.block_sparse_attention.walk import ROWS
from pallas_kernels.top_k import mosaic as top_k
from pallas_kernels.top_k import mosaic_sums as top_k_of_sums
from pallas_kernels.top_k.kept import places

CASES = (
    Case("map, dim 64", 64, 64),
    Case("map, dim 128"),
    Case("map, dim 128, tiles 64 x 64", block_q=64, block_kv=64),
    Case("map, dim 256", 256, 256),
    Case("map, causal", options=lambda: {"mask": js.masks.causal()}),
    Case("map, causal, dim 256", 256, 256, options=lambda: {"mask": js.masks.causal()}),
    Case(
        "map, segments, odd length",
        q_len=8000,
        options=lambda ids: {"mask": js.masks.causal() & js.masks.segments(ids[:, :8000])},
        arrays=(IDS,),
    ),
)
ANTIDIAGONALS = (
    Case("antidiagonals, stride 16"),
    Case("antidiagonals, stride 16, causal", options=lambda: {"mask": js.masks.causal()}),
    Case(
        "antidiagonals, stride 8, causal, dim 64", 64, options=lambda: {"mask": js.masks.causal()}
    ),
    Case(
        "antidiagonals, stride 16, segments, dim 256, odd length",
        256,
        q_len=8000,
        options=lambda ids: {"mask": js.masks.causal() & js.masks.segments(ids[:, :8000])},
        arrays=(IDS,),
    ),
)
BEST = (
    Case("best 8 blocks, causal", options=lambda: {"mask": js.masks.causal()}, width=8),
    Case("best 64 blocks", width=64),
    Case(
        "best 16 blocks, causal, dim 64", 64, options=lambda: {"mask": js.masks.causal()}, width=16
    ),
    Case(
        "best 64 blocks, segments, dim 256",
        256,
        options=lambda ids: {"mask": js.masks.causal() & js.masks.segments(ids)},
        arrays=(IDS,),
        width=64,
    ),
)
# blocks of 64 keys by windows of 32, one every 16
WINDOWS = (
    Case("16 blocks of windows", heads=64, block_kv=64, width=16),
    Case("64 blocks of windows, dim 64", 64, heads=16, block_kv=64, width=64),
    Case("16 blocks of windows, dim 192, softcap", 192, heads=64, block_kv=64, width=16),
    Case("16 blocks of windows, dim 256", 256, heads=16, block_kv=64, width=16),
    Case(
        "16 blocks of windows, segments",
        heads=64,
        block_kv=64,
        options=lambda ids: {"mask": js.masks.segments(ids)},
        arrays=(IDS,),
        width=16,
    ),
    Case(
        "16 blocks of windows, decode",
        batch=8,
        q_len=1,
        kv_len=32768,
        heads=64,
        block_kv=64,
        options=lambda offset: {"offset": offset},
        arrays=(((8,), "int32"),),
        width=16,
    ),
)
KERNELS = {"sums": mosaic.tile_sums, "maxima": mosaic.tile_maxima}


def compiled_passes(case: Case, sharding: Any) -> Iterator[dict[str, Any]]:
    """Compiles the log-sum-exp of rows with either kernel of tiles."""
    inputs = _inputs(case, sharding)
    grid = TileGrid(case.q_len, case.q_len, case.block_q, case.block_kv)
    sizes = case.block_q, case.block_kv, common.widths(case)[0]
    config = mosaic.default_config(*sizes)
    assert config is not None
    layouts = [(config.stages, mosaic.shared_memory(*sizes, config))]
    for name, kernel in KERNELS.items():

        def scores(q, k, *arrays, kernel=kernel):
            return map_scores.by_kernels(kernel, prepare(q, k, k, **case.options(*arrays)), grid)

        # of maxima there is one exponential per row and tile, after all products
        halves = name == "sums" and case.block_kv > config.columns
        gates = partial(common.hopper_gates, overlaps=halves)
        yield common.measure(case, name, scores, inputs, layouts, gates)


def compiled_antidiagonals(case: Case, sharding: Any) -> Iterator[dict[str, Any]]:
    """Compiles the block sums of a case whose name says its stride."""
    stride = int(case.name.split("stride ")[1].split(",")[0])
    problem = antidiagonals.Problem(
        *(1, case.heads, stride, case.block_q // stride),
        *(-(-case.q_len // stride),) * 2,
        rows=2 * ROWS,
    )
    sizes = problem.rows, problem.group, common.widths(case)[0]
    config = mosaic_cells.default_config(*sizes)
    layouts = [(config.stages, mosaic_cells.shared_memory(*sizes, config))]

    def sums(q, k, *arrays):
        mask = case.options(*arrays).get("mask")
        grid = TileGrid(case.q_len, case.q_len, stride, stride)
        scale = case.dim**-0.5 / stride
        return antidiagonals.by_kernel(problem, q, k, cells_of(mask, grid), scale)

    # a softmax goes on beside the products of the other consumer
    gates = partial(common.hopper_gates, overlaps=False)
    yield common.measure(case, "sums", sums, _inputs(case, sharding), layouts, gates)


def compiled_best(case: Case, sharding: Any) -> Iterator[dict[str, Any]]:
    """Compiles the choice of as many blocks as a case's lists are wide."""
    assert case.width is not None
    q, k, *arrays = _inputs(case, sharding)
    blocks = -(-case.q_len // case.block_kv)
    means = jax.ShapeDtypeStruct((1, blocks, *k.shape[2:]), "float32", sharding=sharding)
    grid = best_blocks.grid_of(q, means)
    sizes = grid.block_q, 3, common.widths(case)[0], case.width
    config = top_k.default_config(*sizes)
    assert config is not None
    layouts = [(config.stages, top_k.shared_memory(*sizes, config))]

    def best(q, means, *arrays):
        mask = case.options(*arrays).get("mask")
        cells = cells_of(mask, TileGrid(case.q_len, case.q_len, 1, case.block_kv))
        own = None if mask is None else jax.numpy.arange(case.q_len)[None] // case.block_kv
        return best_blocks.by_kernel(q, means, cells, own, case.width)

    # what is compared goes on beside the products of other consumers
    gates = partial(common.hopper_gates, overlaps=False)
    yield common.measure(case, "best", best, [q, means, *arrays], layouts, gates)


def compiled_windows(case: Case, sharding: Any) -> Iterator[dict[str, Any]]:
    """Compiles the choice of as many blocks, by windows, as a case's lists are wide."""
    assert case.width is not None
    windows, kv_len = Windows(32, 16), case.kv_len or case.q_len
    shapes = (
        ((case.batch, case.q_len, case.heads, case.dim), case.dtype),
        ((case.batch, windows.count(kv_len), case.kv_heads, case.dim), case.dtype),
        ((case.batch, case.heads, case.q_len), "float32"),
        *case.arrays,
    )
    inputs = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]

    def problem(q, k_windows, lse, *arrays):
        options = case.options(*arrays)
        offset = options.get("offset", jax.numpy.full(case.batch, kv_len - case.q_len))
        seen = js.masks.causal(offset=offset)
        tokens = options.get("mask")
        of_windows = js.masks.whole_windows(
            seen if tokens is None else seen & tokens, size=32, stride=16, kv_len=kv_len
        )
        softcap = 30.0 if "softcap" in case.name else None
        rules = of_windows, case.dim**-0.5, softcap, offset, 1, 2, tokens
        return blocks_of_windows.Problem(q, k_windows, lse, windows, case.block_kv, kv_len, *rules)

    given = problem(*(jax.numpy.zeros(x.shape, x.dtype) for x in inputs))
    grid = blocks_of_windows.grid_of(given)
    keys = len(blocks_of_windows.weights_of(windows, case.block_kv))
    sizes = common.widths(case)[0], places(case.width)
    of_columns = len(blocks_of_windows.term_of(given, grid).column_values)
    config = top_k_of_sums.default_config(grid.block_q, keys, *sizes, of_columns)
    assert config is not None
    layouts = [(config.stages, top_k_of_sums.shared_memory(grid.block_q, *sizes, config))]

    def best(*arrays):
        return blocks_of_windows.by_kernel(problem(*arrays), case.width)

    gates = partial(common.hopper_gates, overlaps=config.at_once > 1)
    yield common.measure(case, "best", best, inputs, layouts, gates)


def _inputs(case: Case, sharding: Any) -> list[jax.ShapeDtypeStruct]:
    shapes = (
        ((1, case.q_len, case.heads, case.dim), case.dtype),
        ((1, case.q_len, case.kv_heads, case.dim), case.dtype),
        *case.arrays,
    )
    return [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
