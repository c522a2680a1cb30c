"""What `gpu_compile` compiles of attention maps: row lse with sums, and with maxima, for Hopper."""

from collections.abc import Iterator
from functools import partial
from typing import Any

# first: it says to jax what has to be said before that is loaded
from benchmarks import gpu_compile as common  # isort: skip

import jax

import jsparse as js
from benchmarks.gpu_compile import IDS, Case
from jsparse.attention import map_scores
from jsparse.attention.attend import prepare
from jsparse.types import TileGrid
from pallas_kernels.attention_map import mosaic

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
KERNELS = {"sums": mosaic.tile_sums, "maxima": mosaic.tile_maxima}


def compiled_passes(case: Case, sharding: Any) -> Iterator[dict[str, Any]]:
    """Compiles the log-sum-exp of rows with either kernel of tiles."""
    shapes = (
        ((1, case.q_len, case.heads, case.dim), case.dtype),
        ((1, case.q_len, case.kv_heads, case.dim), case.dtype),
        *case.arrays,
    )
    inputs = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
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
