"""What a consumer warpgroup does that JAX's interpreter cannot: tensor cores and register layouts.

Two sets of the same functions. `Hopper` is what runs on the chip. `Interpreted` reads the same
references, so that races on shared memory are still found, and computes with `jnp` in f32.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat

Ref = Any


class Registers:
    """Arrays in registers, laid out as tensor cores leave an accumulator."""

    layout: plgpu.Layout
    height: int  # rows of an accumulator that a warpgroup holds

    # lane semantics take explicit layouts and exist in every supported version
    compiler_params = plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )

    @classmethod
    def rows(cls, size: int, value: float) -> jax.Array:
        """A number per row of an accumulator."""
        fill = jnp.full((size,), value, jnp.float32)
        return plgpu.layout_cast(fill, cls.layout.reduce(1))

    @classmethod
    def tile(cls, shape: tuple[int, int], value: float) -> jax.Array:
        """An accumulator."""
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), cls.layout)

    @classmethod
    def iota(cls, shape: tuple[int, int], axis: int) -> jax.Array:
        """The position along an axis, int32."""
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=cls.layout)

    @classmethod
    def load_tile(cls, ref: Ref) -> jax.Array:
        """An accumulator's rows and columns of f32."""
        return _compat.load(ref, cls.layout)

    @classmethod
    def load_rows(cls, ref: Ref) -> jax.Array:
        """A vector with an element per row of an accumulator."""
        return _compat.load(ref, cls.layout.reduce(1))

    @classmethod
    def load_columns(cls, ref: Ref) -> jax.Array:
        """A vector with an element per column of an accumulator."""
        return _compat.load(ref, cls.layout.reduce(0))

    @classmethod
    def store(cls, ref: Ref, value: jax.Array) -> None:
        """Writes registers, whatever that costs: rows as long as banks are many are no matter."""
        _compat.store(ref, value)

    @classmethod
    def along(cls, vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
        """An accumulator that repeats a vector with an element per place on an axis."""
        # a row of an accumulator looks the same in registers on Hopper and on Blackwell
        return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (axis,)), cls.layout)

    @classmethod
    def any_row(cls, rows: jax.Array) -> jax.Array:
        """Whether one of the rows of a warp is true; each warp is told of its own rows."""
        return jnp.any(rows) if _compat.interpreting() else _compat.any_in_warp(rows, cls.layout)


class Hopper(Registers):
    """wgmma, and registers in the layout of its accumulator."""

    layout = plgpu.Layout.WGMMA
    height = 64

    @staticmethod
    def ballot(members: int) -> tuple[Any, ...]:
        """The scratch of a vote among so many warpgroups: none, for they have an instruction."""
        return ()

    @classmethod
    def vote(
        cls,
        rows: jax.Array,
        ballot: Sequence[Ref],
        member: jax.Array,
        members: int,
        number: jax.Array,
    ) -> jax.Array:
        """Whether one of the rows of several warpgroups is true.

        Args:
          rows: bool, a number per row of an accumulator.
          ballot: What `ballot` asked for.
          member: Which of them this is.
          members: How many they are. All of them vote, and each waits for the others.
          number: That of the vote, from 0 on.
        """
        return _compat.any_in_warpgroups(rows, cls.layout, members)

    @staticmethod
    def together(
        body: Callable[..., tuple[jax.Array, ...]],
        accumulators: tuple[jax.Array, ...],
        values: tuple[jax.Array, ...],
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Computes while products that were started go on.

        Args:
          body: `body(*products, *values) -> values`, with a `HopperProducts` per accumulator.
          accumulators: What products are added to.
          values: Arrays that `body` changes.

        Returns:
          The accumulators, with all products in them, and the changed values.
        """
        count = len(accumulators)

        def run(refs):
            changed = body(*map(HopperProducts, refs[:count]), *(ref[...] for ref in refs[count:]))
            for ref, value in zip(refs[count:], changed, strict=True):
                ref[...] = value

        state = *map(plgpu.ACC.init, accumulators), *values  # pyright: ignore
        results: Any = pl.run_state(run)(state)
        return results[:count], results[count:]


class Blackwell(Registers):
    """Registers in a layout that reads and writes tensor memory and, swizzled, shared memory.

    The products of its tensor cores are no part of this: they lie in tensor memory, which JAX's
    interpreter knows.
    """

    layout = plgpu.Layout.TCGEN05
    height = 128

    @staticmethod
    def wait_load() -> None:
        """Waits for what a warp loads from tensor memory; others may be elsewhere."""
        plgpu.wait_load_tmem() if _compat.interpreting() else _compat.wait_load_in_warp()


class HopperProducts:
    """An accumulator to which products are added, in the order in which they are started."""

    def __init__(self, ref: Ref):
        self._ref = ref

    def add(self, a: Ref | jax.Array, b: Ref) -> None:
        """Starts to add `a @ b`, `a` in shared memory or in registers, `b` in shared memory."""
        plgpu.wgmma(self._ref, a, b)

    def add_nt(self, a: Ref | jax.Array, b: Ref) -> None:
        """Starts to add `a @ b.T`, `a` in shared memory or in registers, `b` in shared memory."""
        plgpu.wgmma(self._ref, a, _compat.transpose(b))

    def wait(self, running: int) -> None:
        """Waits until only the last `running` products still go on, and reads nothing."""
        plgpu.wgmma_wait(running)

    def read(self, running: int = 0) -> jax.Array:
        """Waits until only the last `running` products, of all accumulators, still go on."""
        return plgpu.wgmma_accumulator_load(self._ref, wait_n=running)


class Interpreted:
    """The same values on the CPU."""

    compiler_params = plgpu.CompilerParams()
    height = Hopper.height

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
    def load_tile(ref: Ref) -> jax.Array:
        """An accumulator's rows and columns of f32."""
        return ref[...]

    @staticmethod
    def load_rows(ref: Ref) -> jax.Array:
        """A vector with an element per row of an accumulator."""
        return ref[...]

    @staticmethod
    def load_columns(ref: Ref) -> jax.Array:
        """A vector with an element per column of an accumulator."""
        return ref[...]

    @staticmethod
    def store(ref: Ref, value: jax.Array) -> None:
        """Writes registers."""
        ref[...] = value

    @staticmethod
    def along(vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
        """An accumulator that repeats a vector with an element per place on an axis."""
        return lax.broadcast_in_dim(vector, shape, (axis,))

    @staticmethod
    def any_row(rows: jax.Array) -> jax.Array:
        """Whether one of the rows is true."""
        return jnp.any(rows)

    @staticmethod
    def ballot(members: int) -> tuple[Any, ...]:
        """Room for two votes: who is at the next one is still read by who is at the last."""
        return plgpu.SMEM((2, members), jnp.int32), plgpu.Barrier(num_arrivals=members)

    @classmethod
    def vote(
        cls,
        rows: jax.Array,
        ballot: Sequence[Ref],
        member: jax.Array,
        members: int,
        number: jax.Array,
    ) -> jax.Array:
        """Whether one of the rows of several warpgroups is true."""
        said, done = ballot
        place = lax.rem(number, jnp.int32(2))
        said[place, member] = cls.any_row(rows).astype(jnp.int32)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        votes = [said[place, n] for n in range(members)]
        return functools.reduce(jnp.maximum, votes) > 0

    @staticmethod
    def together(
        body: Callable[..., tuple[jax.Array, ...]],
        accumulators: tuple[jax.Array, ...],
        values: tuple[jax.Array, ...],
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Computes while products that were started go on."""
        started: list[tuple[InterpretedProducts, Ref]] = []
        products = tuple(InterpretedProducts(x, started) for x in accumulators)
        changed = body(*products, *values)
        return tuple(product.read() for product in products), changed


class InterpretedProducts:
    """The same sums, with reads of shared memory for as long as tensor cores would read."""

    def __init__(self, value: jax.Array, started: list[tuple["InterpretedProducts", Ref]]):
        self._value, self._started = value, started

    def add(self, a: Ref | jax.Array, b: Ref) -> None:
        """Adds `a @ b`."""
        self._add(a, b, 0)

    def add_nt(self, a: Ref | jax.Array, b: Ref) -> None:
        """Adds `a @ b.T`."""
        self._add(a, b, 1)

    def _add(self, a: Ref | jax.Array, b: Ref, axis: int) -> None:
        self._value = self._value + dot(a[...], b[...], axis)
        # wgmma reads as the copy engine writes; ordinary reads like these want a fence between
        plgpu.commit_smem()
        self._started.append((self, b))

    def read(self, running: int = 0) -> jax.Array:
        """The sum, once only the last `running` products still go on."""
        ended = len(self._started) - running
        assert all(product is not self for product, _ in self._started[ended:])
        self.wait(running)
        return self._value

    def wait(self, running: int) -> None:
        """Waits until only the last `running` products still go on, and reads nothing."""
        ended = len(self._started) - running
        for _, ref in self._started[:ended]:
            # until now the tensor cores may have read it, so nobody may have written to it
            ref[...]
        plgpu.commit_smem()
        del self._started[:ended]


def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Sums over the columns of `a` and an axis of `b`, in f32."""
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dimensions)


Operations = type[Registers] | type[Interpreted]


def warpgroup() -> type[Hopper] | type[Interpreted]:
    """The functions for a Hopper kernel that is traced now."""
    return Interpreted if _compat.interpreting() else Hopper


def product_nt(start: jax.Array, a: Ref, b: Ref) -> jax.Array:
    """`start + a @ b.T`, both in shared memory."""
    ((product,), ()) = warpgroup().together(lambda x: x.add_nt(a, b) or (), (start,), ())
    return product
