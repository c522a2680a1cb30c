"""Whole windows: each query sees those windows of which a mask shows it every token."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jsparse import checks
from jsparse.types import Frame, Mask, TileBounds, TileGrid, pytree_dataclass, static_field
from jsparse.types.mask import Index, TileClassifier


@pytree_dataclass
class WholeWindows(Mask):
    """Query `i` sees window `w` where `mask` lets it see all keys of the window."""

    mask: Mask
    size: int = static_field()
    stride: int = static_field()
    kv_len: int = static_field()

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        inner = frame._replace(kv_len=self.kv_len)
        return self.mask.visible_run(q_index, kv_index * self.stride, self.size, inner)

    def classifier(self, grid: TileGrid) -> TileClassifier:
        tokens = self._of_tokens(grid)
        classify = self.mask.classifier(tokens)
        # the last windows of a tile reach into the next tiles
        further = -(-(self.size - self.stride) // tokens.block_kv)

        def bounds(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            inner = frame._replace(kv_len=self.kv_len)
            some, every = classify(q_block, kv_block, inner)
            for n in range(1, further + 1):
                beyond = jnp.minimum(kv_block + n, tokens.kv_blocks - 1)
                every &= classify(q_block, beyond, inner).every
            return TileBounds(some, every)

        return bounds

    def max_tiles(self, grid: TileGrid) -> int:
        return min(grid.kv_blocks, self.mask.max_tiles(self._of_tokens(grid)))

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        self.mask.check_lengths(q_len, self.kv_len)

    def _of_tokens(self, grid: TileGrid) -> TileGrid:
        """The tiles of the tokens that windows begin in."""
        return TileGrid(grid.q_len, self.kv_len, grid.block_q, grid.block_kv * self.stride)


def whole_windows(mask: Mask, *, size: int, stride: int, kv_len: int) -> Mask:
    """Lets each query see those windows of keys of which `mask` shows it every key.

    Window `w` is of the keys from `w * stride` to `w * stride + size - 1`. What stands for a window
    then holds nothing that the query may not see.

    Args:
      mask: Who may see which key.
      size: Keys per window, a multiple of `stride`.
      stride: Keys between the beginnings of two windows.
      kv_len: How many keys there are; windows are the keys of the mask that is returned.

    Raises:
      ValueError: if a number is not positive, or `stride` does not divide `size`.
    """
    checks.positive(size=size, stride=stride, kv_len=kv_len)
    checks.multiple(of=stride, size=size)
    return WholeWindows(mask, size, stride, kv_len)
