"""Head windows: each query head its own sinks and its own window."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.masks.causal import as_int32, key_position
from jsparse.types import (
    Frame,
    Mask,
    TileBounds,
    TileGrid,
    array_field,
    pytree_dataclass,
    static_field,
)
from jsparse.types.mask import Index, Range, Runs

# a window that no distance between two tokens exceeds
_ENDLESS = 2**30


@pytree_dataclass
class HeadWindows(Mask):
    """Head `h` sees the first `num_sink[h]` keys, and those from `window[h] - 1` before it on.

    Of distances between blocks those between their first tokens count. `right` is how many keys
    after its own a query sees; None is all.
    """

    num_sink: tuple[int, ...] = static_field()
    window: tuple[int, ...] = static_field()
    block_size: int = static_field(default=1)
    right: int | None = static_field(default=None)
    offset: Int[Array, "*batch"] | None = array_field(core_ndim=0, default=None)

    @property
    def heads(self) -> int:
        return len(self.window)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        num_sink, window = self._of_head(frame)
        position = q_index + key_position(self.offset, frame)
        near = self._distance(position, kv_index) < window
        if self.right is not None:
            near &= kv_index - position <= self.right
        return (kv_index < num_sink) | near

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        (q_first, q_last), (kv_first, kv_last) = q_range, kv_range
        num_sink, window = self._of_head(frame)
        offset = key_position(self.offset, frame)
        some = self._distance(q_first + offset, kv_last) < window
        every = self._distance(q_last + offset, kv_first) < window
        if self.right is not None:
            some &= kv_first - (q_last + offset) <= self.right
            every &= kv_last - (q_first + offset) <= self.right
        return TileBounds((kv_first < num_sink) | some, (kv_last < num_sink) | every)

    def max_tiles(self, grid: TileGrid) -> int:
        if not self._bounded:
            return grid.kv_blocks
        of_heads = zip(*self._most_tiles(grid), strict=True)
        return max(1, min(grid.kv_blocks, max(map(sum, of_heads))))

    def candidates(
        self, q_block: Index, grid: TileGrid, frame: Frame
    ) -> Int[Array, " count"] | None:
        if not self._bounded:
            return None
        num_sink, window = self._of_head(frame)
        first = grid.q_range(q_block)[0] + key_position(self.offset, frame)
        first = (first // self.block_size - (window - 1) // self.block_size) * self.block_size
        sinks = -(-num_sink // grid.block_kv)
        most_sinks, most_near = map(max, self._most_tiles(grid))
        # of a head with fewer sinks than another the last is named again
        first_keys = jnp.minimum(jnp.arange(most_sinks), sinks - 1)
        near = jnp.maximum(first // grid.block_kv, sinks) + jnp.arange(most_near)
        return jnp.concatenate([first_keys, near])

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs:
        num_sink, window = self._of_head(frame)
        kv_first, kv_last = grid.kv_range(kv_block)
        offset = key_position(self.offset, frame)
        size = self.block_size
        after = (kv_last // size - -window // size) * size
        first = 0 if self.right is None else grid.first_row(kv_first - offset - self.right)
        every = kv_first < num_sink
        end = jnp.where(every, grid.q_blocks, grid.end_row(after - offset))
        return Runs.one(jnp.where(every, 0, first), end)

    @property
    def _bounded(self) -> bool:
        """Whether every head sees few keys."""
        return self.right is not None and max(self.window) < _ENDLESS

    def _most_tiles(self, grid: TileGrid) -> tuple[list[int], list[int]]:
        """Per head the tiles of its sinks, and those of a row's window at most."""
        size, near = self.block_size, []
        for window in self.window:
            # from the first key of a block to what the last query sees
            before = (window - 1) // size * size + size - 1
            keys = before + grid.block_q + (self.right or 0)
            whole = size % grid.block_kv == 0
            near.append(-(-keys // grid.block_kv) if whole else (keys - 2) // grid.block_kv + 2)
        return [-(-count // grid.block_kv) for count in self.num_sink], near

    def _distance(self, q_position: Index, kv_position: Index) -> Index:
        size = self.block_size
        if size == 1:
            return q_position - kv_position
        return (q_position // size - kv_position // size) * size

    def _of_head(self, frame: Frame) -> tuple[Array, Array]:
        return jnp.asarray(self.num_sink)[frame.head], jnp.asarray(self.window)[frame.head]


def head_windows(
    *,
    num_sink: Sequence[int],
    window: Sequence[int | None],
    block_size: int = 1,
    right: int | None = None,
    offset: Int[Array, "*batch"] | int | None = None,
) -> Mask:
    """Lets each query head see the first keys and a window, as many of either as it is given.

    Keys after the query are left visible, unless `right` says how many; combine with `causal()`.

    Args:
      num_sink: Per query head, how many keys at the start every query sees, at least 0.
      window: Per query head, how many keys up to the own one are visible, that one included, at
        least 1; None is all.
      block_size: Tokens per block, counted from key 0, by which windows are cut: a query sees the
        blocks whose first key is less than `window` before the first one of its own.
      right: How many keys after the own one are visible, at least 0; None is all. Those at the
        start always are. With it the rows of a plan are as short as the windows.
      offset: The key index that query 0 sits at, per sequence; see `js.masks.causal`.

    Raises:
      ValueError: if the two differ in length, a number is out of range, or `offset` is not an
        integer.
    """
    checks.same_number_of_heads(num_sink=num_sink, window=window)
    checks.positive(block_size=block_size)
    if right is not None:
        checks.non_negative(right=right)
    for first, near in zip(num_sink, window, strict=True):
        checks.non_negative(num_sink=first)
        if near is not None:
            checks.positive(window=near)
    windows = tuple(_ENDLESS if near is None else near for near in window)
    return HeadWindows(tuple(num_sink), windows, block_size, right, as_int32(offset=offset))
