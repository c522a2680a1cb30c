"""Routing Transformer: attention inside clusters of tokens. Roy et al. 2020, arXiv:2003.05997."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsparse import checks
from jsparse.attention.grouped import Runs, run_tiles
from jsparse.attention.logits import ScoreMod
from jsparse.attention.planned import Queries
from jsparse.attention.reordered import attend_in_places
from jsparse.core import clustering, reordering
from jsparse.core.clustering import (
    Centroids,
    Normalize,
    Tally,
    UpdateRule,
    centroid_scores,
    closest_tokens,
    layer_norm,
    spherical_average,
)
from jsparse.core.merging import Part, merge
from jsparse.core.tiling import restrict
from jsparse.masks.causal import causal
from jsparse.masks.reordered import follow
from jsparse.types import BlockMask, Mask, Method, TileGrid, TokenGroups

# sides of tiles
_SIDES = (128, 64, 32)


class RoutingTransformerInfo(NamedTuple):
    """Which tokens stand where in the plan, and what learning needs.

    Attributes:
      q_order: The query of each place, some one where there is none.
      kv_order: The key of each place, some one where there is none.
      memberships: In how many clusters each query is, in 1 where its head is a local one.
      tally: Which tokens are closest to which centroid: what these are moved by.
      commitment: Mean squared distance of normalised keys to their closest centroids, and the same
        of queries that are routed by themselves. The paper adds 1e-4 of it to the loss.
      state: Nothing.
    """

    q_order: Int[Array, "*batch q_lists q_places"]
    kv_order: Int[Array, "*batch kv_heads kv_places"]
    memberships: Int[Array, "*batch q_lists q_len"]
    tally: Tally
    commitment: Float[Array, ""]
    state: tuple[()] = ()


class Places(NamedTuple):
    """Which token stands at which place, those of a cluster side by side.

    Attributes:
      q_order: Queries; -1 where there is none.
      kv_order: Keys; any one where there is none.
      first: Where the keys begin that the query of a place meets.
      end: Where they end. Neither falls from one place to the next.
      cluster: The cluster of each place of queries, -1 outside.
    """

    q_order: Int[Array, "*batch q_lists q_places"]
    kv_order: Int[Array, "*batch kv_heads kv_places"]
    first: Int[Array, "*batch q_lists q_places"]
    end: Int[Array, "*batch q_lists q_places"]
    cluster: Int[Array, "*batch q_lists q_places"]

    def beside(self, other: "Places") -> "Places":
        """The heads of both, these first."""
        return Places(*(jnp.concatenate(pair, axis=-2) for pair in zip(self, other, strict=True)))

    def padded(self, q_places: int, kv_places: int) -> "Places":
        """With so many places, new ones last and without tokens."""

        def longer(x, places, fill):
            return jnp.concatenate(
                [x, jnp.broadcast_to(fill, (*x.shape[:-1], places - x.shape[-1]))], axis=-1
            )

        last = self.end[..., -1:]
        return Places(
            longer(self.q_order, q_places, -1),
            longer(self.kv_order, kv_places, 0),
            longer(self.first, q_places, last),
            longer(self.end, q_places, last),
            longer(self.cluster, q_places, -1),
        )


def balanced_places(
    kv_scores: Float[Array, "*batch kv_heads kv_len clusters"],
    q_scores: Float[Array, "*batch heads q_len clusters"] | None,
    start: Int[Array, "*batch"],
    *,
    q_len: int,
    windows: tuple[int, int],
    exists: Bool[Array, "*batch kv_len"] | None = None,
) -> Places:
    """Gives each cluster the tokens that are closest to it, as many as any other has.

    A token may be in several clusters, or in none.

    Args:
      kv_scores: Of the keys.
      q_scores: Of the queries; None puts each query where its own key is.
      start: Where the first query stands among the keys.
      q_len: Queries.
      windows: How many queries and how many keys a cluster takes, at most as many as there are.
      exists: Which keys may be chosen; default all.
    """
    kv_len, clusters = kv_scores.shape[-2:]
    keys = closest_tokens(kv_scores, windows[1], exists=exists)
    if q_scores is None:
        own = jnp.where(keys < kv_len, keys - start[..., None, None, None], -1)
        queries = jnp.sort(jnp.maximum(own, -1), axis=-1)[..., -windows[0] :]
    else:
        queries = closest_tokens(q_scores, windows[0])
    count = (keys < kv_len).sum(-1, keepdims=True, dtype=jnp.int32)
    count = jnp.repeat(count, queries.shape[-3] // keys.shape[-3], axis=-3)
    cluster = jnp.broadcast_to(jnp.arange(clusters, dtype=jnp.int32)[:, None], queries.shape)
    first = cluster * windows[1]
    end = jnp.where(queries < 0, first, first + count)
    each = queries, jnp.minimum(keys, kv_len - 1), first, end, cluster
    return Places(*(x.reshape(*x.shape[:-2], -1) for x in each))


def own_places(
    kv_scores: Float[Array, "*batch kv_heads kv_len clusters"],
    q_scores: Float[Array, "*batch heads q_len clusters"] | None,
    start: Int[Array, "*batch"],
    *,
    q_len: int,
    exists: Bool[Array, "*batch kv_len"] | None = None,
) -> Places:
    """Gives each token to the cluster that is closest to it, however many that cluster has.

    Args:
      kv_scores: Of the keys.
      q_scores: Of the queries; None puts each query where its own key is.
      start: Where the first query stands among the keys.
      q_len: Queries.
      exists: Which keys are in a cluster; default all.
    """
    clusters = kv_scores.shape[-1]
    kv_ids = kv_scores.argmax(-1).astype(jnp.int32)
    if exists is not None:
        kv_ids = jnp.where(exists[..., None, :], kv_ids, -1)
    if q_scores is None:
        at = start[..., None, None] + jnp.arange(q_len, dtype=jnp.int32)
        q_ids = jnp.take_along_axis(kv_ids, at, axis=-1)
    else:
        q_ids = q_scores.argmax(-1).astype(jnp.int32)
    group = q_ids.shape[-2] // kv_ids.shape[-2]
    groups = TokenGroups.from_ids(q_ids, jnp.repeat(kv_ids, group, axis=-2), groups=clusters)
    cluster = jnp.take_along_axis(q_ids, groups.q_order, axis=-1)
    return Places(groups.q_order, groups.kv_order[..., ::group, :], *groups.kv_runs(), cluster)


def local_places(
    start: Int[Array, "*batch"],
    lists: tuple[int, int],
    *,
    q_len: int,
    kv_len: int,
    block: int,
    flange: int,
) -> Places:
    """Leaves tokens where they are; queries meet keys of their block and of `flange` around it.

    Args:
      start: Where the first query stands among the keys.
      lists: How many lists of places of queries, and of keys.
      q_len: Queries.
      kv_len: Keys.
      block: Tokens per block.
      flange: Blocks on either side.
    """
    at = start[..., None] + jnp.arange(q_len, dtype=jnp.int32)
    first, end = (jnp.clip((at // block + n) * block, 0, kv_len) for n in (-flange, flange + 1))
    order = (jnp.arange(length, dtype=jnp.int32) for length in (q_len, kv_len))
    outside = jnp.full(q_len, -1, jnp.int32)

    def listed(x, count):
        return jnp.broadcast_to(x[..., None, :], (*start.shape, count, x.shape[-1]))

    q_order, kv_order = (listed(x, count) for x, count in zip(order, lists, strict=True))
    return Places(q_order, kv_order, *(listed(x, lists[0]) for x in (first, end, outside)))


def mean_of_places(
    out: Float[Array, "*batch q_places heads v_dim"],
    q_order: Int[Array, "*batch q_lists q_places"],
    memberships: Int[Array, "*batch q_lists q_len"],
    *,
    eps: Float[Array, " heads"] | None = None,
) -> Float[Array, "*batch q_len heads v_dim"]:
    """Averages what each query got in its clusters, in f32; zeros for one that is in none.

    Args:
      out: What each place got.
      q_order: The query of each place, -1 for none.
      memberships: In how many clusters each query is.
      eps: Added to that number; default none, and then none is divided by 1.
    """
    total = reordering.add_up(out, q_order, memberships.shape[-1])
    count = jnp.repeat(memberships, out.shape[-2] // memberships.shape[-2], axis=-2)
    count = jnp.swapaxes(count, -1, -2).astype(jnp.float32)
    count = jnp.maximum(count, 1.0) if eps is None else count + eps
    return total / count[..., None]


def routing_transformer(
    *,
    clusters: int = 16,
    window: int | None = None,
    balanced: bool = True,
    shared: bool = True,
    normalize: Normalize = layer_norm,
    normalize_logits: bool = True,
    self_logit: float | None = None,
    by_rank: bool = False,
    count_eps: float | None = None,
    num_memory: int = 0,
    num_local_heads: int = 0,
    local_block: int = 256,
    flange: int = 1,
    update: UpdateRule | None = None,
) -> Method:
    """Attends inside clusters of tokens, each of them the closest to a centroid.

    Centroids are parameters that no gradient moves: `method.update(params, info)` moves them after
    a step of training, as `js.nn.SparseAttention` does by itself after `model.train()`. Begin with
    `core.clustering.centroids_of_tokens` of a first batch: drawn at random they tell little.

    Under a causal mask no output depends on a later *value*. Which tokens are in a balanced cluster
    does: the closest of the whole sequence are chosen, so that later tokens decide whether earlier
    ones are members, while training but not while decoding. `balanced=False` is free of that: a
    token is in its closest cluster alone, which depends on nothing else, and decoding equals the
    whole.

    Args:
      clusters: Centroids per kv head; 16 in the paper for 8192 tokens.
      window: Tokens per balanced cluster; default `ceil(length / clusters)`, where a cache counts
        with its room. 512 in the paper.
      balanced: Whether each cluster takes as many tokens as any other, as in the paper.
      shared: Whether a query is in the clusters of its own key, as where keys are the queries, in
        the paper's decoders (`js.nn.SparseAttention(share_qk=True)`). Otherwise queries are chosen
        among themselves, for encoders and for attention to another sequence.
      normalize: What makes vectors comparable: `layer_norm` of `core.clustering`, as in the paper,
        or `l2_norm` there.
      normalize_logits: Whether logits are products of normalised vectors too, as in the paper,
        where their `scale` is 1. The PyTorch port takes queries as they are, and normalised keys.
      self_logit: In place of a token's logit with itself in clusters, so that it is the last
        resort; -5e4 in the PyTorch port, where keys are the queries, None for its own, as in the
        paper.
      by_rank: Whether clusters hide later places too, for queries as many as keys, as the authors'
        code does in place of a causal mask. That is one where `shared`; otherwise it lets queries
        see later tokens, and misses earlier ones, and clusters have to be `balanced`.
      count_eps: Outputs of several clusters are summed and divided by their number plus this, 1e-2
        in the authors' code, 1e-5 in the PyTorch port; default by their number.
      num_memory: Learned keys and values per head and cluster that each query sees, for causal
        queries that find no earlier key. `density_report` counts them by their weights beside a
        logit of zero, not as one each.
      num_local_heads: Of the first kv heads, how many attend to blocks of neighbours instead; half
        of them in most of the paper's models.
      local_block: Tokens of such a block; 256 in the paper.
      flange: How many blocks on either side are seen too; 1 in the paper.
      update: How centroids move; default `spherical_average` of `core.clustering`, or
        `counted_average` there, as in the authors' code.

    Differs from the paper:
      Query heads of a group follow the centroids of their kv head. There are no relative positions
      by rank, nor hashes in place of centroids. What a mask hides, such as padding, can be chosen
      and then takes a place for nothing, and moves centroids; zeros do not. With `return_lse`, a
      query's sum of exponentials is over all its clusters, a key that it meets twice counted twice.
      Sinks are in each of them.

    Raises:
      ValueError: if a number is out of range.
    """
    checks.positive(clusters=clusters, local_block=local_block)
    if window is not None:
        checks.positive(window=window)
    checks.non_negative(num_memory=num_memory, num_local_heads=num_local_heads, flange=flange)
    if self_logit is not None:
        checks.finite(self_logit=self_logit)
    if count_eps is not None:
        checks.positive_number(count_eps=count_eps)
    checks.ranks_of_clusters(by_rank, balanced, shared)
    rule = spherical_average(normalize=normalize) if update is None else update

    def init(key, *, num_heads, num_kv_heads, dim, features):
        checks.at_most(num_kv_heads - 1, num_local_heads=num_local_heads)
        of_means, of_k, of_v = jax.random.split(key, 3)
        sizes = num_kv_heads - num_local_heads, clusters
        means = normalize(jax.random.normal(of_means, (*sizes, dim)))
        params: dict[str, Any] = {"centroids": Centroids.of(means)}
        if num_memory:
            shape = (*sizes, num_memory, dim)
            params["memory_k"] = jax.random.normal(of_k, shape)
            params["memory_v"] = jax.random.normal(of_v, shape)
        return params

    def laid_out(q, k, positions) -> tuple[tuple[int, int], TileGrid, int | None]:
        """Queries and keys per cluster, the tiles, and a bound on how many a row of them needs."""
        q_len, kv_len = q.shape[-3], k.shape[-3]
        size = -(-kv_len // clusters) if window is None else window
        q_size = -(-q_len // clusters) if window is None and not shared else size
        windows = min(q_size, q_len), min(size, kv_len)
        q_places, kv_places = q_len, kv_len
        if balanced:
            q_places, kv_places = (clusters * n for n in windows)
        if num_local_heads:
            q_places, kv_places = max(q_places, q_len), max(kv_places, kv_len)
        grid = TileGrid(q_places, kv_places, _block_q(windows[0]), _side(windows[1]))
        width = _widest_row(clusters, windows, grid) if balanced else None
        if num_local_heads and width is not None:
            # wherever the first query stands in its block
            blocks = (grid.block_q - 2) // local_block + 2 + 2 * flange
            width = max(width, (blocks * local_block - 2) // grid.block_kv + 2)
        return windows, grid, None if width is None else min(width, grid.kv_blocks)

    def route(params, q, k, positions) -> tuple[Places, RoutingTransformerInfo]:
        batch_shape, (q_len, heads, dim) = q.shape[:-3], q.shape[-3:]
        kv_len, kv_heads = k.shape[-3:-1]
        group, routed_heads = heads // kv_heads, kv_heads - num_local_heads
        means = params["centroids"].means
        checks.centroids_fit(means.shape, (routed_heads, clusters, dim))
        if shared:
            checks.at_most(kv_len, q_len=q_len)
        offset = Queries.of(q, k, positions).offset
        start = jnp.broadcast_to(kv_len - q_len if offset is None else offset, batch_shape)
        # what a cache has room for is not there yet
        exists = None if offset is None else jnp.arange(kv_len) < start[..., None] + q_len
        keys = normalize(k[..., num_local_heads:, :])
        scores, q_scores = centroid_scores(keys, means), None
        seen = clustering.tally(keys, means, exists=exists)
        distance = clustering.commitment(keys, means, exists=exists)
        if not shared:
            queries = normalize(q[..., num_local_heads * group :, :])
            of_each = jnp.repeat(means, group, axis=0)
            q_scores = centroid_scores(queries, of_each)
            own = clustering.tally(queries, of_each)
            own = (x.reshape(routed_heads, group, *x.shape[1:]).sum(1) for x in own)
            seen = Tally(*map(jnp.add, seen, own))
            distance += clustering.commitment(queries, of_each)
        windows, grid, _ = laid_out(q, k, positions)
        if balanced:
            places = balanced_places(
                scores, q_scores, start, q_len=q_len, windows=windows, exists=exists
            )
        else:
            places = own_places(scores, q_scores, start, q_len=q_len, exists=exists)
        if num_local_heads:
            lists = num_local_heads * (1 if shared else group), num_local_heads
            beside = local_places(
                start, lists, q_len=q_len, kv_len=kv_len, block=local_block, flange=flange
            )
            places = beside.padded(grid.q_len, grid.kv_len).beside(
                places.padded(grid.q_len, grid.kv_len)
            )
        order = places.q_order
        ones = jnp.ones((*batch_shape, order.shape[-1], order.shape[-2], 1))
        memberships = reordering.add_up(ones, order, q_len)[..., 0]
        memberships = jnp.swapaxes(memberships, -1, -2).astype(jnp.int32)
        order = jnp.maximum(order, 0)
        return places, RoutingTransformerInfo(order, places.kv_order, memberships, seen, distance)

    def in_places(mask, q, k, info, heads) -> Mask | None:
        """What hides one place from another besides its cluster."""
        lengths = q.shape[-3], k.shape[-3]
        orders = reordering.Orders.of(info)
        moved = follow(mask, orders, heads, lengths)
        if not by_rank:
            return moved
        checks.same_shape("lengths of queries and keys", lengths[:1], lengths[1:])
        return causal(offset=0) if moved is None else moved & causal(offset=0)

    def tiles_of(places, info, q, k, positions, mask) -> BlockMask:
        _, grid, width = laid_out(q, k, positions)
        tiles = run_tiles(Runs(places.first, places.end), grid, width=width)
        # heads that share places share lists, unless the mask tells them apart
        lists = q.shape[-2] if mask is not None and mask.heads > 1 else tiles.list_heads
        hidden = in_places(mask, q, k, info, lists)
        return tiles if hidden is None else restrict(tiles, hidden)

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        places, info = route(params, q, k, positions)
        return tiles_of(places, info, q, k, positions, mask), info

    def for_logits(x, local):
        """With the heads that are routed normalised."""
        if not normalize_logits:
            return x
        routed = normalize(x[..., local:, :]).astype(x.dtype)
        return jnp.concatenate([x[..., :local, :], routed], axis=-2)

    def attend_in_clusters(
        params: Any,
        q: Any,
        k: Any,
        v: Any,
        *,
        x: Any = None,
        positions: Any = None,
        mask: Any = None,
        state: Any = None,
        key: Any = None,
        score_mod: Any = None,
        return_lse: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        heads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
        places, info = route(params, q, k, positions)
        tiles = tiles_of(places, info, q, k, positions, mask)
        visible: Mask = Runs(*(_per_head(y, heads) for y in (places.first, places.end)))
        hidden = in_places(mask, q, k, info, heads)
        if self_logit is not None:
            offset = Queries.of(q, k, positions).offset
            start = k.shape[-3] - q.shape[-3] if offset is None else offset
            start = jnp.broadcast_to(start, q.shape[:-3]).reshape(-1)
            score_mod = _last_resort(self_logit, start, num_local_heads * group, score_mod)
        q, k = for_logits(q, num_local_heads * group), for_logits(k, num_local_heads)
        out, lse = attend_in_places(
            q,
            k,
            v,
            tiles,
            q_order=info.q_order,
            kv_order=info.kv_order,
            mask=visible if hidden is None else visible & hidden,
            score_mod=score_mod,
            **options,
        )
        if num_memory:
            pairs = params["memory_k"], params["memory_v"]
            logits = {name: options.get(name) for name in ("scale", "softcap")}
            remembered = of_memory(
                reordering.gather(q, info.q_order), *pairs, places.cluster, group=group, **logits
            )
            out, lse = merge([(out, lse), remembered])
        eps = None
        if count_eps is not None:
            eps = jnp.where(jnp.arange(heads) < num_local_heads * group, 0.0, count_eps)
        out = mean_of_places(out, places.q_order, info.memberships, eps=eps).astype(v.dtype)
        if return_lse:
            out = out, reordering.log_add_up(lse, places.q_order, q.shape[-3])
        return out, info

    def moved(params, info):
        return {**params, "centroids": rule(params["centroids"], info.tally)}

    # a step of decoding that attended to all keys would know nothing of clusters
    return Method(init, plan, attend_in_clusters, lambda k, v: (), moved)


def of_memory(
    q: Float[Array, "*batch q_places heads dim"],
    memory_k: Float[Array, "routed_heads clusters num_memory dim"],
    memory_v: Float[Array, "routed_heads clusters num_memory v_dim"],
    cluster: Int[Array, "*batch q_lists q_places"],
    *,
    group: int,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
) -> Part:
    """Attends from each place to what its cluster remembers; `lse = -inf` outside clusters.

    Args:
      q: Queries in their places.
      memory_k: Learned keys of the kv heads that are routed, the last ones.
      memory_v: Learned values.
      cluster: The cluster of each place, -1 outside.
      group: Query heads per kv head.
      scale: See `js.attend`.
      softcap: See `js.attend`.
    """
    heads = q.shape[-2]
    cluster = _per_head(cluster, heads)
    # local heads, the first ones, are in no cluster: any entry will do
    of_head = jnp.maximum(jnp.arange(heads) // group - (heads // group - len(memory_k)), 0)
    k, v = (y[of_head[:, None], jnp.maximum(cluster, 0)] for y in (memory_k, memory_v))
    logits = jnp.einsum("...phd,...hpmd->...hpm", q.astype(jnp.float32), k)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    lse = jnp.where(cluster < 0, -jnp.inf, jax.nn.logsumexp(logits, axis=-1))
    out = jnp.einsum("...hpm,...hpmd->...phd", jax.nn.softmax(logits, axis=-1), v)
    return out, lse


def _last_resort(self_logit: float, start: Array, local: int, score_mod: Any) -> ScoreMod:
    """Changes each token's logit with itself after the local heads, then as `score_mod` says."""

    def changed(logit, batch, head, q_index, kv_index):
        itself = (q_index + start[batch] == kv_index) & (head >= local)
        logit = jnp.where(itself, self_logit, logit)
        return logit if score_mod is None else score_mod(logit, batch, head, q_index, kv_index)

    return changed


def _per_head(x: Array, heads: int) -> Array:
    return jnp.repeat(x, heads // x.shape[-2], axis=-2)


def _side(tokens: int) -> int:
    """Of a tile: one that divides a cluster, or a small one that wastes little at its ends."""
    return next((side for side in _SIDES if tokens % side == 0 or tokens >= 4 * side), _SIDES[-1])


def _block_q(tokens: int) -> int:
    """Of a tile with the queries of one cluster, where those are few."""
    return tokens if tokens < _SIDES[-1] else _side(tokens)


def _widest_row(clusters: int, windows: tuple[int, int], grid: TileGrid) -> int:
    """The most tiles that a row of them needs for the whole clusters of its queries."""
    first = np.arange(0, clusters * windows[0], grid.block_q)
    last = np.minimum(first + grid.block_q, clusters * windows[0]) - 1
    begin = first // windows[0] * windows[1] // grid.block_kv
    stop = -(-(last // windows[0] + 1) * windows[1] // grid.block_kv)
    return int((stop - begin).max())
