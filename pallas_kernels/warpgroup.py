"""What a consumer warpgroup does that JAX's interpreter cannot: tensor cores and register layouts.

Two sets of the same functions. `Hopper` is what runs on the chip. `Interpreted` reads the same
references, so that races on shared memory are still found, and computes with `jnp` in f32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat

Ref = Any


class Hopper:
    """wgmma, and registers in the layout of its accumulator."""

    # lane semantics take explicit layouts and exist in every supported version
    compiler_params = plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )

    @staticmethod
    def rows(size: int, value: float) -> jax.Array:
        """A number per row of an accumulator."""
        fill = jnp.full((size,), value, jnp.float32)
        return plgpu.layout_cast(fill, plgpu.Layout.WGMMA.reduce(1))

    @staticmethod
    def tile(shape: tuple[int, int], value: float) -> jax.Array:
        """An accumulator."""
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)

    @staticmethod
    def iota(shape: tuple[int, int], axis: int) -> jax.Array:
        """The position along an axis, int32."""
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    @staticmethod
    def load_rows(ref: Ref) -> jax.Array:
        """A vector with an element per row of an accumulator."""
        return _compat.load(ref, plgpu.Layout.WGMMA.reduce(1))

    @staticmethod
    def load_columns(ref: Ref) -> jax.Array:
        """A vector with an element per column of an accumulator."""
        return _compat.load(ref, plgpu.Layout.WGMMA.reduce(0))

    @staticmethod
    def product_nt(a: Ref, b: Ref, start: jax.Array | None = None) -> jax.Array:
        """`a @ b.T`, plus `start`, in f32, both operands in shared memory."""

        def issue(accumulator):
            plgpu.wgmma(accumulator, a, _compat.transpose(b))
            return accumulator[...] if start is None else None

        if start is not None:
            return pl.run_state(issue)(plgpu.ACC.init(start))  # pyright: ignore
        return pl.run_scoped(issue, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    @staticmethod
    def add_product(accumulator: jax.Array, a: jax.Array, b: Ref) -> jax.Array:
        """`accumulator + a @ b` in f32, `a` in registers, `b` in shared memory."""

        def issue(ref):
            plgpu.wgmma(ref, a, b)

        return pl.run_state(issue)(plgpu.ACC.init(accumulator))  # pyright: ignore


class Interpreted:
    """The same values on the CPU."""

    compiler_params = plgpu.CompilerParams()

    @staticmethod
    def rows(size: int, value: float) -> jax.Array:
        """A number per row of an accumulator."""
        return jnp.full((size,), value, jnp.float32)

    @staticmethod
    def tile(shape: tuple[int, int], value: float) -> jax.Array:
        """An accumulator."""
        return jnp.full(shape, value, jnp.float32)

    @staticmethod
    def iota(shape: tuple[int, int], axis: int) -> jax.Array:
        """The position along an axis, int32."""
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    @staticmethod
    def load_rows(ref: Ref) -> jax.Array:
        """A vector with an element per row of an accumulator."""
        return ref[...]

    @staticmethod
    def load_columns(ref: Ref) -> jax.Array:
        """A vector with an element per column of an accumulator."""
        return ref[...]

    @staticmethod
    def product_nt(a: Ref, b: Ref, start: jax.Array | None = None) -> jax.Array:
        """`a @ b.T`, plus `start`, in f32."""
        left, right = a[...], b[...]
        # wgmma reads as the copy engine writes; ordinary reads like these want a fence between
        plgpu.commit_smem()
        product = _dot(left, right, 1)
        return product if start is None else start + product

    @staticmethod
    def add_product(accumulator: jax.Array, a: jax.Array, b: Ref) -> jax.Array:
        """`accumulator + a @ b` in f32."""
        right = b[...]
        plgpu.commit_smem()
        return accumulator + _dot(a, right, 0)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dimensions)


def warpgroup() -> type[Hopper] | type[Interpreted]:
    """The functions for a kernel that is traced now."""
    return Interpreted if _compat.interpreting() else Hopper
