"""The names of JAX's Mosaic GPU that move between versions or are not public.

Nothing else in this package imports from `jax._src` or looks at a version.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import config
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
)
from jax.experimental.pallas import mosaic_gpu as plgpu


def interpreting() -> bool:
    """Whether a kernel traced now is for JAX's interpreter on the CPU."""
    mode = config.pallas_tpu_interpret_mode_context_manager.value
    return isinstance(mode, InterpretGPUParams)


@contextlib.contextmanager
def interpreter(**options: Any) -> Iterator[None]:
    """Runs the Mosaic GPU kernels traced inside in JAX's interpreter, looking for data races.

    Args:
      **options: Fields of JAX's `InterpretGPUParams` to change.

    Raises:
      RuntimeError: at the end, if a data race was found.
    """
    options = {"detect_races": True, "uninitialized_memory": "nan", **options}
    try:
        with force_gpu_interpret_mode(InterpretGPUParams(**options)):
            yield
        jax.effects_barrier()
        # None where no kernel ran
        races = gpu_callbacks._races
        if races is not None and races.races_found:
            raise RuntimeError("The interpreter found a data race in a kernel; its log says where.")
    finally:
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
