"""What `gpu_compile` compiles of `attend_paged` as it is called: tables, lists, kernel, merging."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

# first: it says to jax what has to be said before that is loaded
from benchmarks import gpu_compile as common  # isort: skip

import jax

import jsparse as js
from benchmarks.gpu_compile import Case
from jsparse.attention import kernels
from jsparse.attention import mosaic as adapter

# a query or some for each of some sequences
DECODE: dict[str, Any] = {
    **{"batch": 8, "q_len": 1, "kv_len": 32768, "heads": 32, "kv_heads": 8, "block_q": 1},
}
CASES = (
    Case("attend_paged, every page of 16", **DECODE, block_kv=16),
    Case("attend_paged, 32 pages of 64 per kv head", **DECODE, block_kv=64, width=32),
    Case(
        "attend_paged, 4 new tokens, window, score_mod, pages of 64",
        **{**DECODE, "q_len": 4, "block_q": 4},
        block_kv=64,
        options=lambda slopes: {
            "mask": js.masks.sliding_window(left=4096),
            "score_mod": lambda logit, batch, head, q, kv: logit + slopes[head] * kv,
        },
        arrays=(((32,), "float32"),),
    ),
)


def compiled_passes(case: Case, sharding: Any) -> Iterator[dict[str, Any]]:
    """Compiles a step of decoding over a cache whose pages are all in use."""
    assert case.kv_len is not None
    table_width = case.kv_len // case.block_kv
    pool = case.batch * table_width, case.block_kv, case.kv_heads
    lists = case.batch, case.kv_heads, -(-case.q_len // case.block_q)
    shapes = (
        ((case.batch, case.q_len, case.heads, case.dim), case.dtype),
        ((*pool, case.dim), case.dtype),
        ((*pool, case.v_dim), case.dtype),
        ((case.batch, table_width), "int32"),
        ((case.batch,), "int32"),
        ((*lists, case.width or 1), "int32"),
        (lists, "int32"),
        *case.arrays,
    )
    inputs = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]

    def step(q, k, v, table, lengths, pages, counts, *arrays):
        cache, plan = js.PagedKV.from_table(k, v, table, lengths), None
        if case.width is not None:
            sizes = {"q_len": case.q_len, "kv_len": case.kv_len, "block_q": case.block_q}
            plan = js.BlockMask.from_lists(pages, counts, **sizes, block_kv=case.block_kv)
        options = case.options(*arrays)
        return js.attend_paged(q, cache, plan, implementation="mosaic", **options)

    layouts: list[tuple[int, int]] = []
    chip = common.telling(adapter.CHIPS["9"], layouts)
    # what is asked of this machine is answered by the chip that it is compiled for
    with (
        mock.patch.object(kernels, "capability", return_value="9.0"),
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.dict(adapter.CHIPS, {"9": chip}),
    ):
        # two small programs on a multiprocessor are the overlap of each other
        yield common.measure(
            case,
            "forward",
            step,
            inputs,
            layouts,
            lambda row: common.hopper_gates(row, overlaps=False),
        )
