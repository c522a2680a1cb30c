"""What `gpu_compile` compiles of `attend` as it is called with plans that are no list of tiles.

Pooled columns and levels of a `BlockPyramid`; groups of tokens, of which small ones share a tile.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

# first: it says to jax what has to be said before that is loaded
from benchmarks import gpu_compile as common  # isort: skip

import jax
import jax.numpy as jnp

import jsparse as js
from benchmarks.gpu_compile import Case
from jsparse.attention import kernels
from jsparse.attention import mosaic as adapter

# exact, and means of 2, 4 and 8 tokens: runs of 16 columns
TOP_LEVEL = 3
CAUSAL: dict[str, Any] = {"options": lambda: {"mask": js.masks.causal()}}


class Kind(NamedTuple):
    """A kind of plan.

    Attributes:
      shapes: `shapes(case)` are those of its arrays.
      plan: `plan(case, arrays)` makes it of these.
    """

    shapes: Callable[[Case], tuple[tuple[tuple[int, ...], str], ...]]
    plan: Callable[[Case, list[jax.Array]], Any]


def _lists(case: Case) -> tuple[int, ...]:
    return 1, case.heads, -(-case.q_len // case.block_q)


def _list_shapes(case: Case) -> tuple[tuple[tuple[int, ...], str], ...]:
    assert case.width is not None
    return ((*_lists(case), case.width), "int32"), (_lists(case), "int32")


def _tiles(case: Case, entries: jax.Array, counts: jax.Array) -> js.BlockMask:
    sizes = {"q_len": case.q_len, "kv_len": case.q_len}
    return js.BlockMask.from_lists(
        entries, counts, **sizes, block_q=case.block_q, block_kv=case.block_kv
    )


def _pooled_shapes(case: Case) -> tuple[tuple[tuple[int, ...], str], ...]:
    blocks = 1, -(-case.q_len // case.block_kv), case.kv_heads
    return (
        *_list_shapes(case),
        ((*blocks, case.dim), case.dtype),
        ((*blocks, case.v_dim), case.dtype),
        (blocks, "float32"),
    )


def _grouped_shapes(case: Case) -> tuple[tuple[tuple[int, ...], str], ...]:
    assert case.width is not None
    order, offsets = (1, case.heads, case.q_len), (1, case.heads, case.width + 1)
    return tuple((shape, "int32") for shape in (order, order, offsets, offsets))


POOLED = Kind(
    _pooled_shapes,
    lambda case, arrays: js.BlockPyramid.from_pooled(_tiles(case, *arrays[:2]), *arrays[2:]),
)
LEVELS = Kind(
    lambda case: (*_list_shapes(case), _list_shapes(case)[0]),
    lambda case, arrays: js.BlockPyramid.from_levels(
        _tiles(case, *arrays[:2]), arrays[2], top_level=TOP_LEVEL
    ),
)
GROUPS = Kind(_grouped_shapes, lambda case, arrays: js.TokenGroups(*arrays))

# of other lengths where kernels could be the same: Mosaic compiles equal ones once per process
KINDS = {
    Case("pooled columns", width=8): POOLED,
    Case("pooled columns, causal", width=8, q_len=4096, **CAUSAL): POOLED,
    Case("pooled columns, dim 64, tiles 64 x 64", 64, 64, 64, 64, width=16): POOLED,
    Case("levels", width=8): LEVELS,
    Case("levels, causal", width=8, q_len=4096, **CAUSAL): LEVELS,
    # as many groups as `width` says
    Case("groups of 512 tokens", kv_heads=16, width=16): GROUPS,
    Case("groups of 512 tokens, causal", kv_heads=16, q_len=4096, width=8, **CAUSAL): GROUPS,
    Case(
        "groups of 16 tokens, dim 64, share tiles", 64, 64, 64, 64, kv_heads=16, width=512
    ): GROUPS,
}
CASES = tuple(KINDS)


def compiled_passes(case: Case, sharding: Any) -> Iterator[dict[str, Any]]:
    """Compiles attention to a plan, lowering and merging included, then its gradients."""
    kind = KINDS[case]
    shapes = (
        ((1, case.q_len, case.heads, case.dim), case.dtype),
        ((1, case.q_len, case.kv_heads, case.dim), case.dtype),
        ((1, case.q_len, case.kv_heads, case.v_dim), case.dtype),
        *kind.shapes(case),
    )
    inputs = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]

    def attention(q, k, v, *arrays):
        plan = kind.plan(case, list(arrays))
        return js.attend(q, k, v, plan, return_lse=True, implementation="mosaic", **case.options())

    def gradients(q, k, v, *arrays):
        # pooled keys and values have gradients too
        floats = [n for n, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

        def changed(q, k, v, *values):
            mixed = list(arrays)
            for n, value in zip(floats, values, strict=True):
                mixed[n] = value
            return attention(q, k, v, *mixed)

        outputs, pullback = jax.vjp(changed, q, k, v, *(arrays[n] for n in floats))
        return pullback(jax.tree.map(jnp.ones_like, outputs))

    for which, function in (("forward", attention), ("gradients", gradients)):
        layouts: list[tuple[int, int]] = []
        # what is asked of this machine is answered by the chip that it is compiled for
        with (
            mock.patch.object(kernels, "capability", return_value="9.0"),
            mock.patch.object(jax, "default_backend", return_value="gpu"),
            mock.patch.dict(adapter.CHIPS, {"9": _telling_all(which, layouts)}),
        ):
            gates = partial(_gates, layouts)
            yield common.measure(case, which, function, inputs, layouts, gates)


def _telling_all(which: str, layouts: list[tuple[int, int]]) -> adapter.Chip:
    """Hopper's kernels, which tell how each of a pass is laid out: parts have passes of their own.

    Args:
      which: "forward" or "gradients".
      layouts: Is given the stages and bytes of shared memory of each kernel at least.
    """
    last: list[tuple[int, int]] = []
    chip = common.telling(adapter.CHIPS["9"], last)

    def kept(compute: Callable[..., Any]) -> Callable[..., Any]:
        def run(*operands):
            found = compute(*operands)
            layouts.extend(last)
            return found

        return run

    if which == "forward":
        return chip._replace(forward=chip.forward._replace(compute=kept(chip.forward.compute)))
    return chip._replace(backward=chip.backward._replace(gradients=kept(chip.backward.gradients)))


def _gates(layouts: list[tuple[int, int]], row: dict[str, Any]) -> list[tuple[str, bool]]:
    wanted, found = len(layouts), len(row["registers"])
    return [
        (f"{found} kernels were compiled, of {wanted} at least", found < wanted),
        # a part of few columns may have one tile, beside which nothing goes on
        *common.hopper_gates(row, overlaps=False),
    ]
