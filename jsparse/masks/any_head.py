"""Any head: each query sees what a mask shows to some query head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jsparse.types import Frame, Mask, TileBounds, TileGrid, pytree_dataclass
from jsparse.types.mask import Index, Range, TileClassifier


@pytree_dataclass
class AnyHead(Mask):
    """Visible where `mask` says so of a query head, whichever."""

    mask: Mask

    @property
    def heads(self) -> int:
        return 1

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        def of_head(head):
            return self.mask.visible(q_index, kv_index, frame._replace(head=head))

        return jax.vmap(of_head)(self._each()).any(0)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        return self._bounds(
            lambda head: self.mask.within(q_range, kv_range, frame._replace(head=head))
        )

    def classifier(self, grid: TileGrid) -> TileClassifier:
        inner = self.mask.classifier(grid)

        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            return self._bounds(lambda head: inner(q_block, kv_block, frame._replace(head=head)))

        return classify

    def max_tiles(self, grid: TileGrid) -> int:
        return min(grid.kv_blocks, self.mask.heads * self.mask.max_tiles(grid))

    def _each(self) -> Array:
        return jnp.arange(self.mask.heads)

    def _bounds(self, of_head: Callable[[Array], TileBounds]) -> TileBounds:
        return TileBounds(*(known.any(0) for known in jax.vmap(of_head)(self._each())))


def any_head(mask: Mask) -> Mask:
    """Lets each query see the keys that `mask` shows to any of its heads; the same for all heads.

    For what heads choose together: attention to it is under `mask` itself.

    Args:
      mask: Who may see whom.
    """
    return mask if mask.heads == 1 else AnyHead(mask)
