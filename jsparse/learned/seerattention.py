"""SeerAttention: a gate that has learnt the map of attention. Gao et al. 2024, arXiv:2410.13276."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsparse import _compat, checks
from jsparse.attention.map_scores import map_maxima
from jsparse.attention.planned import Queries, planned
from jsparse.core import blocks, selection
from jsparse.core.distillation import gate_loss as gate_loss
from jsparse.core.distillation import shares_of_rows
from jsparse.core.pooling import Pool, max_blocks, mean_blocks, min_blocks
from jsparse.core.rotary import rotary, unrotated
from jsparse.types import BlockMask, Mask, Method, TileGrid


class SeerAttentionInfo(NamedTuple):
    """The gate's logits per tile, -inf where nothing is visible; what `gate_loss` trains."""

    gate_logits: Float[Array, "*batch heads q_blocks kv_blocks"]


def gate_targets(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    block_size: int = 64,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Array, "*batch heads q_blocks kv_blocks"]:
    """The largest true probability of each tile, each row of tiles divided by its sum.

    Attention over all pairs is computed tile by tile; nothing of the size of the map is kept, and
    nothing has a gradient.

    Args:
      q: Queries, positions applied.
      k: Keys, positions applied.
      block_size: Tokens per block, on both sides.
      mask: Who may see whom; the gate's.
      scale: Factor on the logits, default `dim ** -0.5`. What else a layer does to them, a softcap
        or sinks, is not in the targets.
    """
    largest = map_maxima(q, k, block_q=block_size, block_kv=block_size, scale=scale, mask=mask)
    return shares_of_rows(largest)


def seerattention(
    *,
    block_size: int = 64,
    threshold: float | Float[Array, "*heads"] = 2e-3,
    density: float | Float[Array, "*heads"] | None = None,
    gate_dim: int = 128,
    q_pools: Sequence[Pool] = (mean_blocks,),
    k_pools: Sequence[Pool] = (max_blocks, min_blocks, mean_blocks),
    rope_base: float | None = 10_000.0,
    dense_rows: int = 2,
    width: int | None = None,
) -> Method:
    """Keeps the tiles that a learned gate finds probable, and the last visible one of each row.

    The gate is a product of pooled queries and keys, each projected: it looks at them as they are
    before their rotary positions, which are turned back for it, and turns what is pooled to where
    its block begins. It learns by `gate_loss` alone: nothing reaches it through the output, and
    nothing reaches q and k through the gate.

    Args:
      block_size: Tokens per block, on both sides; 64 in the paper.
      threshold: Least share of a row that a tile must have to be kept, in [0, 1], a number or one
        per query head; 5e-4 to 5e-3 in the authors' examples.
      density: In the threshold's place, the share of causal tiles to keep, in (0, 1], a number or
        one per query head: as many of each row.
      gate_dim: Width of the gate's queries and keys, even; 128 in the paper.
      q_pools: What is made of a block of queries, side by side; functions as those of
        `jsparse.core.pooling`.
      k_pools: The same of keys.
      rope_base: Base of the positions that q and k carry, with halves paired as in `js.nn`; None
        where they carry none, and then the gate has none. Keys carry 0, 1, ...: a layer that is
        called with other `positions` needs None.
      dense_rows: Rows of tiles at the end that keep all they see; 2 in the authors' code.
      width: Most tiles a row can hold; default all. Rows that need more are marked `overflowed`.

    Differs from the paper:
      The last visible tile of a row, the diagonal when causal, is always kept; theirs may leave a
      row empty. A share equal to the threshold is enough. Ragged blocks pool the tokens they have.
      Queries are always projected; the authors leave out theirs where widths are equal. Gates
      begin with weights that keep the size of what is pooled; the authors' have the deviation that
      the model's have.

    Raises:
      ValueError: if a number is out of range, or there is no pool.
    """
    checks.positive(block_size=block_size, gate_dim=gate_dim)
    checks.unit_interval(threshold=threshold)
    if density is not None:
        checks.fractions(density=density)
    checks.multiple(of=2, gate_dim=gate_dim)
    checks.non_negative(dense_rows=dense_rows)
    checks.some(q_pools=q_pools, k_pools=k_pools)
    if rope_base is not None:
        checks.positive_number(rope_base=rope_base)

    def init(key, *, num_heads, num_kv_heads, dim, features):
        of_q, of_k = jax.random.split(key)
        normal = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        return {
            "q": normal(of_q, (num_heads, len(q_pools) * dim, gate_dim)),
            "k": normal(of_k, (num_kv_heads, len(k_pools) * dim, gate_dim)),
        }

    def pooled(x, pools, weights, start, **length):
        """Blocks of tokens as the gate sees them; the first token stands at `start`."""
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        if rope_base is not None:
            places = jnp.broadcast_to(start, x.shape[:-3])[..., None] + jnp.arange(x.shape[-3])
            x = unrotated(x, places, base=rope_base)
        found = jnp.concatenate([pool(x, block_size, **length) for pool in pools], axis=-1)
        found = jnp.einsum("...bhd,hde->...bhe", found, weights)
        if rope_base is None:
            return found
        return rotary(found, places[..., ::block_size], base=rope_base)

    @jax.jit
    def gate(params, q, k, positions, length):
        offset = Queries.of(q, k, positions).offset
        start = k.shape[-3] - q.shape[-3] if offset is None else offset
        of_q = pooled(q, q_pools, params["q"], start)
        of_k = pooled(k, k_pools, params["k"], 0, **({} if length is None else {"length": length}))
        group = q.shape[-2] // k.shape[-2]
        of_q = of_q.reshape(*of_q.shape[:-2], -1, group, gate_dim)
        logits = jnp.einsum("...qkge,...ske->...kgqs", of_q, of_k) * gate_dim**-0.5
        return logits.reshape(*logits.shape[:-4], -1, *logits.shape[-2:])

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        checks.per_head(q.shape[-2], threshold=threshold)
        if density is not None:
            checks.per_head(q.shape[-2], density=density)
        grid = TileGrid(q.shape[-3], k.shape[-3], block_size, block_size)
        visible, _ = blocks.candidates(mask, grid, q.shape[:-3], q.shape[-2])
        offset = Queries.of(q, k, positions).offset
        length = None
        if offset is not None and mask is not None:
            length = _true_keys(visible, offset + grid.q_len, grid)
        logits = jnp.where(visible, gate(params, q, k, positions, length), -jnp.inf)
        last_rows = jnp.arange(grid.q_blocks)[:, None] >= grid.q_blocks - dense_rows
        columns = -(-(grid.kv_len if length is None else length) // block_size)
        keep = _selected(logits, visible, blocks.last_visible(visible) | last_rows, columns)
        tiles = BlockMask.from_dense(keep, **grid._asdict(), width=width)
        return tiles, SeerAttentionInfo(logits)

    def _count(columns, most) -> Int[Array, "..."]:
        """Tiles per row of each sequence and head: of so many columns, `most` at most."""
        # by table, as f32 rounds some of the products up
        numbers = jnp if _compat.is_traced(density) else np
        # of a triangle, so many columns per row are about that share
        share = 1 - (1 - numbers.asarray(density, float)) ** 0.5
        counts = (numbers.arange(most + 1)[:, None] * share.reshape(-1)).astype(int)
        return jnp.maximum(1, jnp.asarray(counts, jnp.int32)[columns])

    def _selected(
        logits, visible, forced, columns
    ) -> Bool[Array, "*batch heads q_blocks kv_blocks"]:
        chosen = jax.lax.stop_gradient(logits)
        if density is not None:
            count = _count(columns, logits.shape[-1])[..., None, None]
            return selection.top_k(chosen, count, visible=visible) | (visible & forced)
        limit = jnp.asarray(threshold, jnp.float32)[..., None, None]
        return selection.above_share(chosen, limit, visible=visible, forced=forced)

    return planned(plan, init=init)._replace(rope_base=rope_base)


@functools.partial(jax.jit, static_argnames="grid")
def _true_keys(
    visible: Bool[Array, "*batch heads q_blocks kv_blocks"], end: Int[Array, "..."], grid: TileGrid
) -> Int[Array, "*batch"]:
    """How many keys there are: those up to the last query, and further blocks that are seen.

    What follows them is the room of a cache.
    """
    seen = jnp.where(visible.any((-3, -2)), jnp.arange(1, grid.kv_blocks + 1), 0).max(-1)
    end = jnp.broadcast_to(end, seen.shape)
    further = seen > -(-end // grid.block_kv)
    return jnp.minimum(jnp.where(further, seen * grid.block_kv, end), grid.kv_len)
