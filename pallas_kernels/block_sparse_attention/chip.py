"""What a chip has for block-sparse attention: a forward kernel, and kernels for the gradients."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import configurations
from pallas_kernels.block_sparse_attention.logits import Tiles
from pallas_kernels.block_sparse_attention.walk import Lists

Config = Any  # a frozen dataclass, of each kernel's own fields


class Forward(NamedTuple):
    """A chip's forward kernel.

    Attributes:
      compute: As a call, given a configuration; further arrays follow the lists.
      heights: How many queries its tiles may have, ascending.
      limit: `limit(block_q, block_kv, dim, v_dim)`: what of the chip is in the way, or None.
      default_config: `default_config(tiles, dim, v_dim)`: what is shipped, None where nothing fits.
      others: `others(block_q, block_kv)`: what may be worth timing besides, where it is legal.
      layout_refusal: `layout_refusal(config, block_q, block_kv, dim, v_dim)`: why a program cannot
        be laid out so, or None.
      shared_memory: `shared_memory(block_q, block_kv, dim, v_dim, config)`: bytes of it that a
        program asks for, barriers apart.
      lengths: How many keys its tiles may have, ascending.
      operation: Its name among the keys of configurations.
      for_one_tile: `for_one_tile(tiles, v_dim)`: how programs are laid out that meet a single tile
        each; None where there is no such way.
    """

    compute: Callable[..., tuple[jax.Array, ...]]
    heights: tuple[int, ...]
    limit: Callable[[int, int, int, int], str | None]
    default_config: Callable[[Tiles, int, int], Config | None]
    others: Callable[[int, int], Iterable[Config]]
    layout_refusal: Callable[[Config, int, int, int, int], str | None]
    shared_memory: Callable[[int, int, int, int, Config], int]
    lengths: tuple[int, ...] = (64, 128)
    operation: str = "forward"
    for_one_tile: Callable[[Tiles, int], Config] | None = None

    def height(self, rows: int) -> int:
        """The queries of the tile that so many are worth filling up to; as many if none is."""
        # memory is copied by eight rows
        return next((h for h in self.heights if rows <= h < max(2 * rows, 16)), rows)

    def refusal(self, dtype: Any, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
        """Why it cannot take a problem, or None if it can.

        Args:
          dtype: Of q, k and v.
          block_q: Queries per tile.
          block_kv: Keys per tile.
          dim: Width of q and k, padded to a multiple of 64.
          v_dim: Width of v, padded to a multiple of 64.
        """
        if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
            return f"its matrix products take bfloat16 or float16, not {jnp.dtype(dtype).name}."
        if block_q not in self.heights:
            return f"it takes tiles of {_any_of(self.heights)} queries, not {block_q}."
        if block_kv not in self.lengths:
            return f"it takes tiles of {_any_of(self.lengths)} keys, not {block_kv}."
        if max(dim, v_dim) > 256:
            return f"it takes dim and v_dim up to 256, not {dim} and {v_dim}."
        reason = self.limit(block_q, block_kv, dim, v_dim)
        if reason is None and self.default_config(Tiles(block_q, block_kv), dim, v_dim) is None:
            reason = (
                f"tiles of {block_q} x {block_kv} with dim {dim} and v_dim {v_dim} do not fit in "
                "shared memory; take smaller tiles."
            )
        return reason

    def candidates(self, block_q: int, block_kv: int, dim: int, v_dim: int) -> tuple[Config, ...]:
        """The configurations worth timing, the default first; none where nothing fits."""
        return configurations.candidates(
            self.default_config(Tiles(block_q, block_kv), dim, v_dim),
            self.others(block_q, block_kv),
            lambda config: self.layout_refusal(config, block_q, block_kv, dim, v_dim),
        )

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        lists: Lists,
        tiles: Tiles,
        *more: jax.Array,
        config: Config | None = None,
    ) -> tuple[jax.Array, ...]:
        """Computes attention over the listed tiles.

        Args:
          q: [batch, q_len, heads, dim], bf16 or f16; q_len a multiple of a tile's, dim of 64.
          k: [batch, kv_len, kv_heads, dim]; kv_len a multiple of a tile's.
          v: [batch, kv_len, kv_heads, v_dim]; v_dim a multiple of 64.
          lists: For each tile of queries the tiles of keys.
          tiles: Tile sizes, and what happens to logits.
          *more: Further arrays, where the kernel takes some.
          config: How a program is laid out.

        Returns:
          `out [batch, q_len, heads, v_dim]` in q's dtype; `lse [batch, heads, q_len]`, natural log,
          f32. A row that sees no key has `out = 0`, `lse = -inf`. Then what else the kernel gives.

        Raises:
          NotImplementedError: if the kernel cannot take this problem.
          ValueError: if it cannot be laid out by `config`.
        """
        sizes = tiles.block_q, tiles.block_kv, q.shape[3], v.shape[3]
        reason = self.refusal(q.dtype, *sizes)
        if reason:
            raise NotImplementedError("The Mosaic block-sparse forward: " + reason)
        default = self.default_config(tiles, *sizes[2:])
        usual = self.default_config(Tiles(*sizes[:2]), *sizes[2:])
        # many vectors of keys ask for registers that what was timed had to spare
        many = tiles.column_values > 2 or default != usual
        operation = f"{self.operation}, many values" if many else self.operation
        chosen = config or choose(
            configurations.key(operation, tiles.changes, q.dtype, *sizes),
            default,
            lambda tuned: self.layout_refusal(tuned, *sizes),
            self.compute,
            (q, k, v, lists, *more),
            tiles,
        )
        reason = self.layout_refusal(chosen, *sizes)
        if reason:
            raise ValueError(f"config={chosen} is not legal here: {reason}")
        return self.compute(q, k, v, lists, *more, tiles, chosen)


def _any_of(numbers: tuple[int, ...]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


class Problem(NamedTuple):
    """The arrays that backward kernels read, in the shapes of the forward; lengths are whole tiles.

    `lse2` is the log-sum-exp in base 2, +inf where a row saw nothing. `delta` is the row sum of
    `out * d_out`, less the gradient of the lse.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    lse2: jax.Array
    delta: jax.Array


class Gradients(NamedTuple):
    """By each array of a problem and of its rule; None for values that are not f32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    row_values: tuple[jax.Array | None, ...]
    column_values: tuple[jax.Array | None, ...]


class Tunable(NamedTuple):
    """Backward kernels that can be laid out in more than one way.

    Attributes:
      d_queries: `d_queries(problem, lists, tiles, config)`.
      d_keys: `d_keys(problem, inverse, tiles, config, with_k=, with_v=)`.
      candidates: `candidates(own, other, dim, v_dim)`: the configurations worth timing, the default
        first, for tokens per tile that is owned and per tile that is met.
    """

    d_queries: Callable[..., Any]
    d_keys: Callable[..., Any]
    candidates: Callable[[int, int, int, int], tuple[Config, ...]]


class Backward(NamedTuple):
    """A chip's backward kernels.

    Attributes:
      gradients: `gradients(problem, lists, inverse, tiles)`: all of them; `lists` are for each tile
        of queries the tiles of keys, `inverse` for each tile of keys the tiles of queries.
      refusal: `refusal(block_q, block_kv, dim, v_dim)`: why it cannot take what the forward kernel
        takes, or None.
      layouts: `layouts(tiles, dim, v_dim)`: the stages and bytes of shared memory of its programs.
      tunable: What of it can be tuned.
    """

    gradients: Callable[[Problem, Lists, Lists, Tiles], Gradients]
    refusal: Callable[[int, int, int, int], str | None]
    layouts: Callable[[Tiles, int, int], Sequence[tuple[int, int]]]
    tunable: Tunable | None = None


def choose(
    key: configurations.Key,
    default: Config,
    refusal: Callable[[Config], str | None],
    kernel: Callable[..., Any],
    arrays: tuple[Any, ...],
    tiles: Tiles,
) -> Config:
    """How a kernel traced now, called as `kernel(*arrays, tiles, config)`, is laid out."""

    def trial(tuned: Config) -> None:
        configurations.compiles(
            lambda arrays, values: kernel(*arrays, tiles.bind(values), tuned), arrays, tiles.values
        )

    return configurations.chosen(key, default, refusal, trial)
