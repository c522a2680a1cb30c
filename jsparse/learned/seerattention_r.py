"""SeerAttention-R: gates for single queries, for decoding. Gao et al. 2025, arXiv:2506.08889."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import _compat, checks
from jsparse.attention.map_scores import map_maxima
from jsparse.attention.planned import Queries, planned
from jsparse.core import blocks, selection
from jsparse.core.appending import tokens_from
from jsparse.core.distillation import gate_loss as gate_loss
from jsparse.core.distillation import shares_of_rows
from jsparse.core.group_queries import GroupQuery, projected
from jsparse.core.pooling import Pool, max_blocks, mean_blocks, min_blocks
from jsparse.core.rotary import rotary, unrotated
from jsparse.masks import causal
from jsparse.types import BlockMask, Mask, Method, TileGrid

# queries whose own blocks are pooled at once
_POOLED_ROWS = 64


class SeerAttentionRInfo(NamedTuple):
    """The gate's logits, which `gate_loss` trains, and what the next step starts from.

    Attributes:
      gate_logits: Per kv head, query and block; -inf where nothing is visible.
      state: The gate's keys of whole blocks so far, for `state` of the next step.
    """

    gate_logits: Float[Array, "*batch kv_heads q_len kv_blocks"]
    state: Float[Array, "*batch kv_blocks kv_heads gate_dim"]


def gate_targets(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    block_size: int = 64,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Array, "*batch kv_heads q_len kv_blocks"]:
    """The largest true probability of each query, block and group of heads, as shares of a query.

    Causal attention over all pairs is computed block by block; nothing of the size of the map is
    kept, and nothing has a gradient.

    Args:
      q: Queries, positions applied; the last of the tokens.
      k: Keys, positions applied.
      block_size: Keys per block.
      mask: Who may see whom besides.
      scale: Factor on the logits, default `dim ** -0.5`. What else a layer does to them, a softcap
        or sinks, is not in the targets.
    """
    whole = causal() if mask is None else causal() & mask
    sizes = {"block_q": 1, "block_kv": block_size, "scale": scale, "mask": whole}
    by_group = *q.shape[:-2], k.shape[-2], -1, q.shape[-1]
    if whole.heads > 1:
        # which knows heads by their place among all
        largest = map_maxima(q, k, **sizes)
        largest = largest.reshape(*largest.shape[:-3], k.shape[-2], -1, *largest.shape[-2:])
        return shares_of_rows(largest.max(-3))
    members = jnp.moveaxis(q.reshape(by_group), -2, 0)

    def larger(largest, queries):
        return jnp.maximum(largest, map_maxima(queries, k, **sizes)), None

    # a head of each group at a time: a score for each head, query and block is a large array
    largest = map_maxima(members[0], k, **sizes)
    return shares_of_rows(_compat.scan(larger, largest, members[1:])[0])


class _Gate(NamedTuple):
    """What makes queries and keys of the gate, of such as attention has."""

    block_size: int
    gate_dim: int
    group_query: GroupQuery
    k_pools: tuple[Pool, ...]
    rope_base: float | None

    @functools.partial(jax.jit, static_argnums=0)
    def score(
        self, params: Any, q: Array, k: Array, positions: Array | None, state: Array | None
    ) -> tuple[Array, Array]:
        """Logits, visible or not, and the keys of whole blocks."""
        q_len, kv_len, kv_heads = q.shape[-3], *k.shape[-3:-1]
        offset = Queries.of(q, k, positions).offset
        start = jnp.asarray(kv_len - q_len if offset is None else offset)
        places = jnp.broadcast_to(start, q.shape[:-3])[..., None] + jnp.arange(q_len)
        own_block = places // self.block_size
        own = self.keys(params, self.own_blocks(k, places), own_block * self.block_size)
        if state is None:
            every = jnp.broadcast_to(jnp.arange(kv_len), k.shape[:-2])
            pooled = self.pool(self.plain(k, every))
            keys = self.keys(params, pooled, every[..., :: self.block_size])
        else:
            keys = self.added(state, own, places)
        queries = self.queries(params, q, places, kv_heads)
        logits = jnp.einsum("...tke,...ske->...kts", queries, keys)
        of_own = jnp.einsum("...tke,...tke->...kt", queries, own)[..., None]
        in_own = jnp.arange(logits.shape[-1]) == own_block[..., None, :, None]
        return jnp.where(in_own, of_own, logits) * self.gate_dim**-0.5, keys

    def queries(self, params: Any, q: Array, places: Array, kv_heads: int) -> Array:
        """One per kv head: [*batch, q_len, kv_heads, gate_dim]."""
        q = self.plain(q, places)
        made = self.group_query.apply(
            params["q"], q.reshape(*q.shape[:-2], kv_heads, -1, q.shape[-1])
        )
        flat = made.reshape(*made.shape[:-3], -1, self.gate_dim)
        # the mean of scores is that of the mean query
        return self.placed(flat, places, params.get("q_norm")).reshape(made.shape).mean(-2)

    def keys(self, params: Any, pooled: Array, places: Array) -> Array:
        """Of blocks that begin at those places."""
        made = jnp.einsum("...bkd,kde->...bke", pooled, params["k"])
        return self.placed(made, places, params.get("k_norm"))

    def plain(self, x: Array, places: Array) -> Array:
        """Tokens as they were before their positions."""
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        return x if self.rope_base is None else unrotated(x, places, base=self.rope_base)

    def placed(self, x: Array, places: Array, scale: Array | None) -> Array:
        """What is made of tokens, normalised where there is a scale, turned to where it stands."""
        if scale is not None:
            x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale
        return x if self.rope_base is None else rotary(x, places, base=self.rope_base)

    def pool(self, x: Array, **length: Array) -> Array:
        """What is made of each block, side by side."""
        return jnp.concatenate([of(x, self.block_size, **length) for of in self.k_pools], axis=-1)

    def own_blocks(self, k: Array, places: Int[Array, "*batch q_len"]) -> Array:
        """The block of each query, pooled over its tokens up to that query."""
        q_len, block_size = places.shape[-1], self.block_size
        first = places[..., :1] // block_size * block_size
        # tokens of as many blocks as those are, wherever the first query stands in its own
        count = -(-(q_len - 1) // block_size) + 1
        near = first + jnp.arange(count * block_size)
        tokens = self.plain(tokens_from(k, first[..., 0], count * block_size), near)
        tokens = tokens.reshape(*k.shape[:-3], count, block_size, *k.shape[-2:])

        def one(number):
            block, place = jnp.divmod(places[..., number] - first[..., 0], block_size)
            block = block[..., None, None, None, None]
            own = jnp.take_along_axis(tokens, block, axis=-4)[..., 0, :, :, :]
            return self.pool(own, length=place + 1)[..., 0, :, :]

        found = jax.lax.map(one, jnp.arange(q_len), batch_size=min(q_len, _POOLED_ROWS))
        return jnp.moveaxis(found, 0, -3)

    def added(self, state: Array, own: Array, places: Int[Array, "*batch q_len"]) -> Array:
        """The keys so far, with those of the blocks that queries are the last tokens of."""

        def add(known, new, places):
            whole = (places + 1) % self.block_size == 0
            block = jnp.where(whole, places // self.block_size, len(known))
            return known.at[block].set(new, mode="drop")

        for _ in places.shape[:-1]:
            add = jax.vmap(add)
        return add(state, own, places)


def seerattention_r(
    *,
    block_size: int = 64,
    token_budget: int = 4096,
    threshold: float | Float[Array, "*kv_heads"] | None = None,
    gate_dim: int = 128,
    group_query: GroupQuery | None = None,
    k_pools: Sequence[Pool] = (max_blocks, min_blocks, mean_blocks),
    qk_norm: bool = True,
    rope_base: float | None = 10_000.0,
    width: int | None = None,
) -> Method:
    """Attends, for each query and kv head, to the blocks that a learned gate finds probable.

    One query of the gate is made of those of a group of heads, which share its list; one key of
    each block of keys. Both are taken as they are before their rotary positions, and turned again:
    the query to where it stands, the key to where its block begins. It is causal, and the last
    visible block of a query is always kept. It learns by `gate_loss` alone: nothing reaches it
    through the output, and nothing reaches q and k through the gate. The keys of whole blocks are
    in `info.state`: given to the next step, it is only added to, so that a step scores blocks and
    pools one.

    Args:
      block_size: Keys per block; 64 in the paper.
      token_budget: Keys per query, in whole blocks and at least one, the last one included; 4096 in
        the paper.
      threshold: In the budget's place, the least share of a query that a block must have, in
        [0, 1], a number or one per kv head.
      gate_dim: Width of the gate's queries and keys, even; 128 in the paper.
      group_query: What makes a query of a group's: `js.group_queries.projected()` in the paper and
        by default, `mean_projected`, `mean`, `separate`.
      k_pools: What is made of a block of keys, side by side; functions as those of
        `jsparse.core.pooling`.
      qk_norm: Whether the gate's queries and keys are divided by their root mean square and scaled
        feature by feature; on in the authors' training.
      rope_base: Base of the positions that q and k carry, with halves paired as in `js.nn`; None
        where they carry none, and then the gate has none. Keys carry 0, 1, ...: a layer that is
        called with other `positions` needs None.
      width: Most blocks a query can hold; default the budget's, or all. Queries that need more are
        marked `overflowed`.

    Differs from the paper:
      A block that a query stands in is pooled over the tokens up to it, in training and after. The
      authors pool all of it in training, tokens ahead included, and give it a score of 0 while
      decoding. The last block counts inside the budget. A share equal to the threshold is enough.
      A prompt has lists like any other queries; the authors attend to it densely.

    Raises:
      ValueError: if a number is out of range, there is no pool, or `gate_dim` is not that of
        queries which are not projected.
    """
    checks.positive(block_size=block_size, token_budget=token_budget, gate_dim=gate_dim)
    if threshold is not None:
        checks.unit_interval(threshold=threshold)
    checks.multiple(of=2, gate_dim=gate_dim)
    checks.some(k_pools=k_pools)
    if rope_base is not None:
        checks.positive_number(rope_base=rope_base)
    of_group = projected() if group_query is None else group_query
    gate = _Gate(block_size, gate_dim, of_group, tuple(k_pools), rope_base)

    def init(key, *, num_heads, num_kv_heads, dim, features):
        of_q, of_k = jax.random.split(key)
        group = num_heads // num_kv_heads
        sizes = {"kv_heads": num_kv_heads, "group": group, "dim": dim, "gate_dim": gate_dim}
        glorot = jax.nn.initializers.glorot_uniform(in_axis=1, out_axis=2, batch_axis=0)
        shape = num_kv_heads, len(k_pools) * dim, gate_dim
        params = {
            "q": of_group.init(of_q, **sizes),
            "k": glorot(of_k, shape),
        }
        scales = {"q_norm": jnp.ones(gate_dim), "k_norm": jnp.ones(gate_dim)}
        return {**params, **scales} if qk_norm else params

    def init_state(k, v):
        """That of a step before the first, for keys of this shape."""
        kv_blocks = -(-k.shape[-3] // block_size)
        return jnp.zeros((*k.shape[:-3], kv_blocks, k.shape[-2], gate_dim), jnp.float32)

    def restrict(mask: Mask | None, queries: Queries) -> Mask:
        own = causal(offset=queries.offset)
        return own if mask is None else own & mask

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        if threshold is not None:
            checks.per_kv_head(k.shape[-2], threshold=threshold)
        grid = TileGrid(q.shape[-3], k.shape[-3], 1, block_size)
        logits, keys = gate.score(params, q, k, positions, state)
        whole = restrict(mask, Queries.of(q, k, positions))
        checks.mask_heads(whole.heads, q.shape[-2])
        visible, _ = blocks.candidates(whole, grid, q.shape[:-3], whole.heads)
        if whole.heads > 1:
            # a list is for all that some head of a group sees
            by_group = *visible.shape[:-3], k.shape[-2], -1, *visible.shape[-2:]
            visible = visible.reshape(by_group).any(-3)
        logits = jnp.where(visible, logits, -jnp.inf)
        rules = {"visible": visible, "forced": blocks.last_visible(visible)}
        chosen, room = jax.lax.stop_gradient(logits), width
        if threshold is None:
            # known before any data, so that lists are no wider under `jit`
            most = min(grid.kv_blocks, max(1, token_budget // block_size))
            room = most if width is None else min(width, most)
            keep = selection.top_k(chosen, most, **rules)
        else:
            limit = jnp.asarray(threshold, jnp.float32)[..., None, None]
            keep = selection.above_share(chosen, limit, **rules)
        tiles = BlockMask.from_dense(keep, **grid._asdict(), width=room)
        return tiles, SeerAttentionRInfo(logits, keys)

    method = planned(plan, init=init, restrict=restrict, init_state=init_state)
    return method._replace(rope_base=rope_base)
