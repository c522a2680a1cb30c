"""The names of Pallas on GPUs that move between versions or are not public.

Nothing else in this package imports from `jax._src` or looks at a version.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import config
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
)
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

HOPPER, BLACKWELL = "9.0", "10.0"  # compute capabilities
# of the chip whose kernels are interpreted
_CAPABILITY = contextvars.ContextVar("capability", default=HOPPER)
# what every kernel is interpreted by, and part of what compiled functions are kept by
_MODE = config.pallas_tpu_interpret_mode_context_manager


def interpreting() -> bool:
    """Whether a Mosaic kernel traced now is for JAX's interpreter on the CPU."""
    return isinstance(_MODE.value, InterpretGPUParams)


def interpreted_capability() -> str:
    """The compute capability of the chip whose Mosaic kernels are traced for the interpreter."""
    return _CAPABILITY.get()


def interpreting_triton() -> bool:
    """Whether a Triton kernel traced now is to be computed by XLA, program by program."""
    return _MODE.value is True


@contextlib.contextmanager
def triton_interpreter() -> Iterator[None]:
    """Computes the Triton kernels traced inside by XLA, program by program, on any device."""
    before = _MODE.swap_local(True)
    try:
        yield
    finally:
        _MODE.set_local(before)


@contextlib.contextmanager
def interpreter(capability: str = HOPPER, **options: Any) -> Iterator[None]:
    """Runs the Mosaic GPU kernels traced inside in JAX's interpreter, looking for data races.

    Args:
      capability: The compute capability of the chip whose kernels these are.
      **options: Fields of JAX's `InterpretGPUParams` to change.

    Raises:
      RuntimeError: at the end, if a data race was found.
    """
    options = {"detect_races": True, "uninitialized_memory": "nan", **options}
    before = _CAPABILITY.set(capability)
    try:
        with force_gpu_interpret_mode(InterpretGPUParams(**options)):
            yield
        jax.effects_barrier()
        # None where no kernel ran
        races = gpu_callbacks._races
        if races is not None and races.races_found:
            raise RuntimeError("The interpreter found a data race in a kernel; its log says where.")
    finally:
        _CAPABILITY.reset(before)
        # what an exception leaves behind would deadlock the next kernel
        interpret_pallas_call.reset_gpu_interpret_mode_state()


def transpose(ref: Any) -> Any:
    """A view of a two-dimensional reference with its axes exchanged."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def load(ref: Any, layout: Any) -> jax.Array:
    """Reads a reference into registers in the given layout."""
    # before 0.11 the index was an argument
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)  # pyright: ignore


def any_in_warp(rows: jax.Array, layout: Any) -> jax.Array:
    """Whether one of the numbers that a warp holds is true, where `layout` is of accumulators."""
    flag = plgpu.ShapeDtypeStruct((), jnp.bool_, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(layout.reduce(1),), return_type=flag)
    def vote(_, rows):
        mine = functools.reduce(arith.ori, rows.registers.flat)
        everybody = arith.constant(ir.IntegerType.get_signless(32), -1)
        said = nvvm.vote_sync(everybody, vector.extract(mine, [], [0]), nvvm.VoteSyncKind.any)
        return FragmentedArray.splat(said, (), is_signed=False)

    return vote(rows)  # pyright: ignore


def any_in_warpgroups(rows: jax.Array, layout: Any, count: int) -> jax.Array:
    """Whether one of the numbers that `count` warpgroups hold is true; each waits for the others.

    `layout` is of accumulators.
    """
    flag = plgpu.ShapeDtypeStruct((), jnp.bool_, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(layout.reduce(1),), return_type=flag)
    def vote(_, rows):
        i32, i1 = (ir.IntegerType.get_signless(bits) for bits in (32, 1))
        mine = functools.reduce(arith.ori, rows.registers.flat)
        # Mosaic's own barriers are those of each warpgroup, from 0 upwards; there are 16
        said = llvm.inline_asm(
            i32,
            [arith.extui(i32, vector.extract(mine, [], [0]))],
            "{ .reg .pred mine, said; setp.ne.u32 mine, $1, 0; "
            f"barrier.cta.red.or.pred said, 15, {count * 128}, mine; "
            "selp.u32 $0, 1, 0, said; }",
            "=r,r",
            has_side_effects=True,
        )
        said = arith.trunci(i1, said)  # pyright: ignore
        return FragmentedArray.splat(said, (), is_signed=False)

    return vote(rows)  # pyright: ignore


def wait_load_in_warp() -> None:
    """Waits for what a warp loads from tensor memory, and not for the other warps."""

    @plgpu.inline_mgpu()
    def wait(_):
        nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.LOAD)

    wait()  # pyright: ignore


# mma.sync and cp.async, for GPUs before Hopper
HAS_MMA = hasattr(plgpu, "mma")  # since 0.11


def mma(acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`acc + a @ b`, each in the layout for its part."""
    return plgpu.mma(acc, a, b)  # pyright: ignore


def load_mma_left(ref: Any) -> jax.Array:
    """Reads a left operand of `mma` from shared memory."""
    return plgpu.load(ref, layout=plgpu.Layout.MMA_LHS(ref.dtype))  # pyright: ignore


def load_mma_right(ref: Any) -> jax.Array:
    """Reads a right operand of `mma` from shared memory."""
    return plgpu.load(ref, layout=plgpu.Layout.MMA_RHS(ref.dtype))  # pyright: ignore


def mma_left(x: jax.Array) -> jax.Array:
    """An array laid out as 16-bit accumulators are, which is the left operand of `mma` as it is."""
    layout = plgpu.Layout.MMA_LHS(x.dtype)  # pyright: ignore

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout),
    )
    def renamed(_, array):
        target = layout.to_mgpu()
        return FragmentedArray(
            _registers=array.registers.reshape(target.registers_shape(array.shape)),
            _layout=target,
            _is_signed=array.is_signed,
        )

    return renamed(x)  # pyright: ignore


def start_copy(source: Any, target: Any) -> None:
    """Starts to copy a tile, all of it inside its array, to shared memory by cp.async."""
    inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # pyright: ignore
    plgpu.copy_gmem_to_smem(source, target, oob_mode=inside)  # pyright: ignore


def wait_copies(running: int) -> None:
    """Waits for all but the last `running` copies of `start_copy`, and for the warpgroup."""
    plgpu.wait_gmem_to_smem(running)  # pyright: ignore


def store(ref: Any, value: jax.Array) -> None:
    """Writes registers of any layout to device or shared memory."""
    if hasattr(plgpu, "store"):  # since 0.12
        plgpu.store(ref, value, optimized=False)  # pyright: ignore
    else:
        ref[...] = value
