"""Overlapping windows of tokens, and what stands for the tokens of one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks


class Windows(NamedTuple):
    """Window `i` is of the `size` tokens from `i * stride` on; `stride` divides `size`.

    There are only whole ones: the last tokens may be in none.
    """

    size: int
    stride: int

    def count(self, length: int) -> int:
        """How many windows so many tokens have."""
        return max(0, (length - self.size) // self.stride + 1)

    def of(
        self, x: Float[Array, "*batch length heads dim"]
    ) -> Float[Array, "*batch windows size heads dim"]:
        """The tokens of each window."""
        checks.multiple(of=self.stride, size=self.size)
        length, heads, dim = x.shape[-3:]
        count, parts = self.count(length), self.size // self.stride
        whole = x[..., : (count + parts - 1) * self.stride if count else 0, :, :]
        strides = whole.reshape(*x.shape[:-3], -1, self.stride, heads, dim)
        # neighbouring windows share strides of tokens
        shifted = [strides[..., n : n + count, :, :, :] for n in range(parts)]
        return jnp.concatenate(shifted, axis=-3)


class Compression(NamedTuple):
    """Makes one key, or value, of those of a window.

    Attributes:
      init: `init(key, *, size, heads, dim) -> params`.
      apply: `apply(params, windows [*batch, windows, size, heads, dim]) -> [*batch, windows, heads,
        dim]`, in f32.
    """

    init: Callable[..., Any]
    apply: Callable[[Any, Array], Array]


def mean() -> Compression:
    """Averages the tokens of a window; nothing is learned."""
    return Compression(
        lambda key, *, size, heads, dim: (),
        lambda params, windows: windows.astype(jnp.float32).mean(-3),
    )


def weighted() -> Compression:
    """Sums a window's tokens with learned weights, per head; at first their mean."""

    def init(key, *, size, heads, dim):
        return {
            "weights": jnp.full((size, heads), 1 / size),
            "positions": _positions(size, heads, dim),
        }

    def apply(params, windows):
        return jnp.einsum("...shd,sh->...hd", _placed(params, windows), params["weights"])

    return Compression(init, apply)


def linear() -> Compression:
    """Maps the tokens of a window to one by a learned matrix, per head."""

    def init(key, *, size, heads, dim):
        return {
            "kernel": jax.nn.initializers.glorot_uniform(in_axis=(0, 2), batch_axis=1)(
                key, (size, heads, dim, dim)
            ),
            "positions": _positions(size, heads, dim),
        }

    def apply(params, windows):
        return jnp.einsum("...shd,shde->...he", _placed(params, windows), params["kernel"])

    return Compression(init, apply)


def mlp(*, hidden: int | None = None) -> Compression:
    """Maps the tokens of a window to one by a perceptron with a hidden layer, one for all heads.

    Args:
      hidden: Width of the hidden layer; default twice that of a token.

    Raises:
      ValueError: if `hidden` is not positive.
    """
    if hidden is not None:
        checks.positive(hidden=hidden)

    def init(key, *, size, heads, dim):
        width = 2 * dim if hidden is None else hidden
        glorot = jax.nn.initializers.glorot_uniform
        first, second = jax.random.split(key)
        return {
            "hidden": glorot(in_axis=(0, 1))(first, (size, dim, width)),
            "bias": jnp.zeros(width),
            "kernel": glorot()(second, (width, dim)),
            "positions": _positions(size, heads, dim),
        }

    def apply(params, windows):
        inside = jnp.einsum("...shd,sde->...he", _placed(params, windows), params["hidden"])
        return jax.nn.relu(inside + params["bias"]) @ params["kernel"]

    return Compression(init, apply)


def _positions(size: int, heads: int, dim: int) -> Float[Array, "size heads dim"]:
    """What is added to tokens by their place in a window."""
    return jnp.zeros((size, heads, dim))


def _placed(params: Any, windows: Array) -> Float[Array, "*batch windows size heads dim"]:
    return windows.astype(jnp.float32) + params["positions"]
