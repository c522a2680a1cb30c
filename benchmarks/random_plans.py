"""Plans drawn at random that benchmarks share, on any machine: groups, lists, tiles to skip."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jsparse as js

BLOCK = 128
# a tile whose logits stand so far below is skipped, one whose logits are as large never is
DROP, THRESHOLD = 40.0, 1e-6
# rows of tiles differ in so many ways in what they skip
KINDS = 16


def random_groups(length: int, density: float) -> jax.Array:
    """Groups of about equal size, their tokens anywhere."""
    groups = max(1, round(1 / density))
    ids = np.random.default_rng(0).permutation(np.arange(length) % groups)
    # what their number is, is static
    return js.TokenGroups.from_ids(*[jnp.asarray(ids[None, None])] * 2, groups=groups)


def random_lists(block_q: int, block_kv: int, list_heads: int) -> Callable[..., js.BlockMask]:
    """Lists of as many tiles for each row of tiles and head, drawn from some hundred of them."""

    def data(length: int, density: float) -> js.BlockMask:
        rng, blocks = np.random.default_rng(0), length // block_kv
        width = max(1, round(density * blocks))
        drawn = np.stack([np.sort(rng.permutation(blocks)[:width]) for _ in range(128)])
        lists = drawn[rng.integers(0, len(drawn), (1, list_heads, length // block_q))]
        return js.BlockMask.from_lists(
            jnp.asarray(lists, jnp.int32),
            jnp.full(lists.shape[:-1], width),
            q_len=length,
            kv_len=length,
            block_q=block_q,
            block_kv=block_kv,
        )

    return data


class Skipping(NamedTuple):
    """Listed tiles, and features that push the logits of those to be skipped down."""

    lists: js.BlockMask
    q: jax.Array
    k: jax.Array


def skipped(listed: float, dim: int) -> Callable[[int, float], Skipping]:
    """Lists of `listed` times as many tiles as are kept, at most all, for heads of width `dim`."""

    def data(length: int, density: float) -> Skipping:
        blocks = length // BLOCK
        rng = np.random.default_rng(0)
        kind = np.arange(blocks) % KINDS
        # a rank among the blocks of keys for each kind of row; the first block is of the kept ones,
        # for it is never skipped
        rank = rng.random((KINDS, blocks))
        rank[:, 0] = -1.0
        rank = rank.argsort(-1).argsort(-1)
        keep = max(1, round(density * blocks))
        tiles = (rank < round(min(blocks, listed * keep)))[kind]
        lists = js.BlockMask.from_dense(
            jnp.asarray(tiles[None]), q_len=length, kv_len=length, block_q=BLOCK, block_kv=BLOCK
        )
        q = np.repeat(np.eye(KINDS, dtype=np.float32)[kind], BLOCK, axis=0) * dim**0.5
        k = np.repeat(np.where(rank < keep, 0.0, -DROP).T.astype(np.float32), BLOCK, axis=0)
        return Skipping(lists, *(jnp.asarray(x[None, :, None]) for x in (q, k)))

    return data


def skip(
    q: jax.Array, k: jax.Array, v: jax.Array, data: Skipping, implementation: str | None
) -> Any:
    """Attention along the lists: out, lse and which tiles were kept."""
    q, k = (x.at[..., :KINDS].set(own.astype(x.dtype)) for x, own in ((q, data.q), (k, data.k)))
    return js.attend_skipping(
        q, k, v, data.lists, threshold=THRESHOLD, implementation=implementation
    )
