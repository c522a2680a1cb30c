"""HISA: an indexer picks tokens, inside the blocks that it picks first. 2026, arXiv:2603.28458."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jsparse import _compat, checks
from jsparse.attention.attend import attend
from jsparse.attention.planned import Queries
from jsparse.core import selection
from jsparse.core.appending import tokens_from, written
from jsparse.core.low_precision import Stored, hadamard, rounded, stored
from jsparse.core.pooling import mean_blocks
from jsparse.core.rotary import rotary
from jsparse.core.running_top_k import TileScores, running_top_k
from jsparse.core.tile_scores import relu_weighted
from jsparse.core.tiling import block_mask
from jsparse.masks.any_head import any_head
from jsparse.types import BlockMask, Frame, LatentStates, Mask, Method, TileGrid
from jsparse.types.block_mask import dense_to_lists

# queries at a time: of two stages, of one, and how many keys those meet at once
_ROWS, _FLAT_ROWS, _FLAT_KEYS = 16, 128, 1024


class Indexed(NamedTuple):
    """What the indexer makes of hidden states: several small queries, one key per token."""

    q: Float[Array, "*batch q_len index_heads index_dim"]
    weights: Float[Array, "*batch q_len index_heads"]
    k: Float[Array, "*batch kv_len index_dim"]

    def flat(self) -> "Indexed":
        """With one batch axis."""
        q, weights, k = self
        return Indexed(
            q.reshape(-1, *q.shape[-3:]),
            weights.reshape(-1, *weights.shape[-2:]),
            k.reshape(-1, *k.shape[-2:]),
        )


class HisaState(NamedTuple):
    """What a step of decoding starts from.

    Attributes:
      keys: The indexer's keys so far, in their own dtype.
      means: The mean of those of each block, in f32; None where there is no first stage.
    """

    keys: Stored
    means: Float[Array, "*batch kv_blocks index_dim"] | None


class HisaInfo(NamedTuple):
    """What tokens were chosen by, for `index_loss` and for the next step.

    Attributes:
      indexed: The indexer's queries, weights and keys.
      state: Its keys so far and the means of their blocks, for `state` of the next step.
    """

    indexed: Indexed
    state: HisaState


def select_tokens(
    indexed: Indexed,
    *,
    top_k: int,
    block_kv: int,
    block_top_k: int | None,
    mask: Mask | None = None,
) -> BlockMask:
    """Chooses for each query the tokens with the largest index scores, in two stages or in one.

    A token's score is a sum over the indexer's heads of `weight * relu(q k)`. The first stage
    scores blocks by their mean keys in the same way; first and last visible block of a query are
    always among them. Nothing has a gradient.

    Args:
      indexed: What the indexer made of hidden states.
      top_k: Tokens per query; more than there are keys is all of them.
      block_kv: Tokens per block.
      block_top_k: Blocks per query, at least 2; None looks at every token instead.
      mask: Who may see whom; as heads choose together, from what any of them sees.

    Raises:
      ValueError: if a number is out of range, or blocks do not hold `top_k` tokens.
    """
    checks.positive(top_k=top_k, block_kv=block_kv)
    checks.room_for_both_ends(block_top_k)
    checks.room_for_tokens(min(top_k, indexed.k.shape[-2]), block_kv, block_top_k)
    keys = Stored(indexed.k, None)
    means = None if block_top_k is None else _mean_keys(keys, block_kv)
    return _chosen(indexed, HisaState(keys, means), top_k, block_kv, block_top_k, mask)


def _mean_keys(keys: Stored, block_kv: int, length: Array | None = None) -> Array:
    return mean_blocks(keys.read()[..., None, :], block_kv, length)[..., 0, :]


def _chosen(
    indexed: Indexed,
    state: HisaState,
    top_k: int,
    block_kv: int,
    block_top_k: int | None,
    mask: Mask | None,
) -> BlockMask:
    """The tokens of each query, of the indexer's stored keys; those in `indexed` are not read."""
    batch_shape, q_len = indexed.q.shape[:-3], indexed.q.shape[-3]
    kv_len = state.keys.numbers.shape[-2]

    def flattened(x):
        return jax.lax.stop_gradient(x.reshape(-1, *x.shape[len(batch_shape) :]))

    q, weights, keys = jax.tree.map(flattened, (indexed.q, indexed.weights, state.keys))
    q, whole = q.astype(jnp.float32), None
    if mask is not None:
        whole = any_head(mask).flatten_batch(batch_shape)
    top_k = min(top_k, kv_len)
    if block_top_k is None:
        lists, counts = _in_one_stage(q, weights, keys, top_k, whole)
    else:
        blocks, means = min(block_top_k, -(-kv_len // block_kv)), flattened(state.means)
        lists, counts = _in_two_stages(q, weights, keys, means, top_k, block_kv, blocks, whole)
    lists = lists.reshape(*batch_shape, 1, q_len, -1)
    counts = counts.reshape(*batch_shape, 1, q_len)
    return BlockMask(lists, counts, jnp.zeros(counts.shape[:-1], bool), q_len, kv_len, 1, 1)


def _in_one_stage(
    q: Array, weights: Array, keys: Stored, top_k: int, mask: Mask | None
) -> tuple[Array, Array]:
    batches, q_len = q.shape[:2]
    kv_len = keys.numbers.shape[1]
    grid = TileGrid(q_len, kv_len, min(_FLAT_ROWS, q_len), min(_FLAT_KEYS, kv_len))
    rows = [(0, 0), (0, grid.q_blocks * grid.block_q - q_len), (0, 0)]
    q, weights = jnp.pad(q, [*rows, (0, 0)]), jnp.pad(weights, rows)
    columns = [(0, 0), (0, grid.kv_blocks * grid.block_kv - kv_len), (0, 0)]
    keys = jax.tree.map(lambda x: jnp.pad(x, columns[: x.ndim]), keys)

    def score(batch, head, q_tile, kv_tile):
        def cut(x, tile, size):
            return jax.lax.dynamic_slice_in_dim(x[batch], tile * size, size)

        queries, of_heads = (cut(x, q_tile, grid.block_q) for x in (q, weights))
        tile = jax.tree.map(lambda x: cut(x, kv_tile, grid.block_kv), keys)
        scores = relu_weighted(queries, of_heads, tile.read())
        row = q_tile * grid.block_q + jnp.arange(grid.block_q)[:, None]
        column = kv_tile * grid.block_kv + jnp.arange(grid.block_kv)
        return TileScores(scores, _visible(mask, row, column, q_len, kv_len, batch))

    tiles = None if mask is None else block_mask(mask, **grid._asdict())
    best = running_top_k(score, top_k, grid, batches=batches, tiles=tiles)
    return best.indices, best.counts


@functools.partial(jax.jit, static_argnames=("top_k", "block_kv", "block_top_k"))
def _in_two_stages(
    q: Array,
    weights: Array,
    keys: Stored,
    means: Array,
    top_k: int,
    block_kv: int,
    block_top_k: int,
    mask: Mask | None,
) -> tuple[Array, Array]:
    batches, q_len = q.shape[:2]
    kv_len = keys.numbers.shape[1]
    rows = min(_ROWS, q_len)
    chunks = -(-q_len // rows)
    pad = [(0, 0), (0, chunks * rows - q_len), (0, 0)]
    q, weights = jnp.pad(q, [*pad, (0, 0)]), jnp.pad(weights, pad)
    grid = TileGrid(q_len, kv_len, 1, block_kv)
    classify = None if mask is None else mask.classifier(grid)
    block = jnp.arange(grid.kv_blocks)

    def one_chunk(index):
        batch, chunk = jnp.divmod(index, chunks)
        row = chunk * rows + jnp.arange(rows)[:, None]
        queries, of_heads = (
            jax.lax.dynamic_slice_in_dim(x[batch], chunk * rows, rows) for x in (q, weights)
        )
        scores = relu_weighted(queries, of_heads, means[batch])
        seen = jnp.ones(scores.shape, bool)
        if classify is not None:
            known = jnp.minimum(row, q_len - 1)
            seen = classify(known, block, Frame(q_len, kv_len, batch)).some
            seen = jnp.broadcast_to(seen, scores.shape)
        ends = jnp.where(seen, block, -1).max(-1), jnp.argmax(seen, axis=-1)
        forced = (block == ends[0][:, None]) | (block == ends[1][:, None])
        chosen = selection.top_k(scores, block_top_k, visible=seen, forced=forced)
        blocks = dense_to_lists(chosen, block_top_k)
        counted = jnp.arange(block_top_k) < chosen.sum(-1, keepdims=True)
        tokens = (blocks[..., None] * block_kv + jnp.arange(block_kv)).reshape(rows, -1)
        # read after they are gathered: there are as many as in the chosen blocks, not in the cache
        near = jax.tree.map(lambda x: x.at[batch, tokens].get(mode="clip"), keys).read()
        logits = jnp.einsum("rhd,rtd->rth", queries, near, preferred_element_type=jnp.float32)
        scores = jnp.einsum("rth,rh->rt", jax.nn.relu(logits), of_heads.astype(jnp.float32))
        seen = jnp.repeat(counted, block_kv, axis=-1) & (tokens < kv_len)
        seen &= _visible(mask, row, jnp.minimum(tokens, kv_len - 1), q_len, kv_len, batch)
        width = min(top_k, tokens.shape[1])
        best = selection.top_k(scores, width, visible=seen)
        places = dense_to_lists(best, width)
        return jnp.take_along_axis(tokens, places, axis=-1), best.sum(-1, dtype=jnp.int32)

    lists, counts = jax.lax.map(one_chunk, jnp.arange(batches * chunks))
    lists = lists.reshape(batches, chunks * rows, -1)[:, :q_len]
    return lists, counts.reshape(batches, -1)[:, :q_len]


def _visible(
    mask: Mask | None,
    row: Array,
    column: Array,
    q_len: int,
    kv_len: int,
    batch: Array,
    head: Array | int = 0,
) -> Bool[Array, "rows columns"]:
    if mask is None:
        return jnp.ones(jnp.broadcast_shapes(row.shape, column.shape), bool)
    known = jnp.minimum(row, q_len - 1), jnp.minimum(column, kv_len - 1)
    return mask.visible(*known, Frame(q_len, kv_len, batch, head))


class _Given(NamedTuple):
    """What the loss compares the indexer with; lists are in chunks of queries, None for all."""

    q: Array
    k: Array
    lists: Array | None
    counts: Array
    mask: Mask | None
    sinks: Array | None


class _Target(NamedTuple):
    """Of some queries: their attention to some tokens, what is seen, and whether they count."""

    share: Float[Array, "rows columns"]
    shown: Bool[Array, "rows columns"]
    counts: Bool[Array, " rows"]
    batch: Array
    tokens: Array


@functools.partial(jax.jit, static_argnames=("scale", "softcap"))
def index_loss(
    indexed: Indexed,
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    plan: BlockMask | None = None,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, ""]:
    """How far the indexer's softmax is from true attention: a KL divergence, mean over queries.

    The target is the attention of all heads, each to what it sees, added up and normalised; it has
    no gradient, nor have q, k and sinks: only the indexer learns from this. It is computed for some
    queries at a time, and their gradient with it. Queries that see nothing count as zero.

    Args:
      indexed: What the indexer made of hidden states.
      q: The attention's queries.
      k: Its keys.
      plan: The tokens of each query, as `select_tokens` lists them, for training while attention is
        sparse. Default all, for training the indexer alone beside dense attention.
      mask: Who may see whom.
      scale: Factor on the attention's logits, default `dim ** -0.5`.
      softcap: What caps these logits, as in `js.attend`.
      sinks: A logit per head, as there; of a head whose sink takes more, what is left counts less.

    Raises:
      ValueError: if the indexer or the plan is of other tokens than q and k, if `softcap` is not a
        finite number above 0, or `sinks` are not one per head.
    """
    checks.token_lists(plan)
    if plan is not None:
        checks.plan_lengths(plan, q.shape[-3], k.shape[-3])
    checks.an_indexer_for(indexed, q, k)
    batch_shape, (q_len, heads, dim) = q.shape[:-3], q.shape[-3:]
    told_apart = 1 if mask is None else mask.heads
    checks.mask_heads(told_apart, heads)
    if softcap is not None:
        checks.soft_cap(softcap)
    if sinks is not None:
        checks.sinks_shape(sinks, heads)
    kv_len, kv_heads = k.shape[-3:-1]
    by_head = (kv_heads, heads // kv_heads) if told_apart > 1 else (1, 1)
    batches, rows = math.prod(batch_shape), min(_ROWS, q_len)
    factor = dim**-0.5 if scale is None else scale
    chunks = -(-q_len // rows)

    def in_chunks(x):
        """The queries of all sequences, those of one step together."""
        padded = jnp.pad(x, [(0, 0), (0, chunks * rows - q_len), *[(0, 0)] * (x.ndim - 2)])
        return padded.reshape(batches * chunks, rows, *x.shape[2:])

    def product(of_q, of_k, result, queries, keys):
        """Products with all keys; where rows have lists, each with its own tokens."""
        of_k = of_k if plan is None else f"r{of_k}"
        return jnp.einsum(
            f"{of_q},{of_k}->{result}", queries, keys, preferred_element_type=jnp.float32
        )

    def keys_of(x, batch, tokens):
        return x[batch] if plan is None else x[batch, tokens]

    def target_of(given: _Given, index, queries, lists, counts) -> _Target:
        batch, chunk = jnp.divmod(index, chunks)
        row = chunk * rows + jnp.arange(rows)
        tokens = jnp.broadcast_to(jnp.arange(kv_len), (rows, kv_len)) if plan is None else lists
        listed = jnp.arange(tokens.shape[-1]) < counts[:, None]

        def seen_by(head):
            return listed & _visible(given.mask, row[:, None], tokens, q_len, kv_len, batch, head)

        own = jax.vmap(seen_by, out_axes=1)(jnp.arange(told_apart)).reshape(rows, *by_head, -1)
        queries = queries.reshape(rows, kv_heads, heads // kv_heads, dim)
        logits = product("rkgd", "tkd", "rkgt", queries, keys_of(given.k, batch, tokens))
        # a head that sees nothing has a softmax too; it does not count in the end
        some_of_head = own.any(-1, keepdims=True)
        logits = logits * factor
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        logits = jnp.where(own | ~some_of_head, logits, -jnp.inf)
        target = jax.nn.softmax(logits, axis=-1)
        if given.sinks is not None:
            # of keys and sink together, the share that keys have
            lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            target *= jax.nn.sigmoid(lse - given.sinks.reshape(kv_heads, -1, 1))
        target = jnp.where(some_of_head, target, 0.0).sum((1, 2))
        # nor does a row of which no head sees anything
        seen = own.any((1, 2))
        some = seen.any(-1, keepdims=True)
        # sinks may leave nothing of a row
        total = target.sum(-1, keepdims=True)
        target /= jnp.where(total == 0, 1.0, total)
        return _Target(target, seen | ~some, (row < q_len) & some[:, 0], batch, tokens)

    def divergence(queries, weights, keys, target: _Target):
        inside = product("rhd", "td", "rth", queries, keys)
        scores = jnp.einsum("rth,rh->rt", jax.nn.relu(inside), weights)
        scores = jnp.where(target.shown, scores, -jnp.inf)
        log_share = jnp.where(target.shown, jax.nn.log_softmax(scores, axis=-1), 0.0)
        share = target.share
        log_target = jnp.log(jnp.where(share > 0, share, 1.0))
        found = (share * (log_target - log_share)).sum(-1)
        return jnp.where(target.counts, found, 0.0).sum() / (batches * q_len)

    def of_chunks(flat, given):
        fixed = jnp.arange(batches * chunks), in_chunks(given.q), given.lists, given.counts
        return (in_chunks(flat.q), in_chunks(flat.weights)), fixed

    @jax.custom_vjp
    def loss(flat: Indexed, given: _Given):
        def one_chunk(inputs):
            (queries, weights), fixed = inputs
            target = target_of(given, *fixed)
            keys = keys_of(flat.k, target.batch, target.tokens)
            return divergence(queries, weights, keys, target)

        return jax.lax.map(one_chunk, of_chunks(flat, given)).sum()

    # the loss is a number: while its gradient is wanted, that of a chunk is computed with it. Each
    # adds to the gradient of the keys what it has for its own ones; left to JAX, it would add an
    # array of all keys
    def loss_fwd(indexed, given):
        # what devices have alike, each of them gives a gradient of its own
        flat, given = _compat.varying_alike((indexed, given))

        def step(d_k, inputs):
            (queries, weights), fixed = inputs
            target = target_of(given, *fixed)
            keys = keys_of(flat.k, target.batch, target.tokens)
            of_chunk = jax.value_and_grad(divergence, argnums=(0, 1, 2))
            found, (*d_learned, d_keys) = of_chunk(queries, weights, keys, target)
            places = (target.batch,) if plan is None else (target.batch, target.tokens)
            return d_k.at[places].add(d_keys.astype(jnp.float32)), (found, d_learned)

        none = jnp.zeros(flat.k.shape, jnp.float32)
        d_k, (found, d_learned) = _compat.scan(step, none, of_chunks(flat, given))
        d_q, d_weights = (x.reshape(batches, -1, *x.shape[2:])[:, :q_len] for x in d_learned)
        return found.sum(), (indexed, Indexed(d_q, d_weights, d_k.astype(flat.k.dtype)))

    def loss_bwd(residuals, cotangent):
        indexed, gradient = residuals
        gradient = jax.tree.map(
            lambda x: (x.astype(jnp.float32) * cotangent).astype(x.dtype), gradient
        )
        return _compat.summed_like(gradient, indexed), None

    loss.defvjp(loss_fwd, loss_bwd)
    q, k = (jax.lax.stop_gradient(x.reshape(batches, *x.shape[-3:])) for x in (q, k))
    lists, counts = None, jnp.full((batches, q_len), kv_len)
    if plan is not None:
        shape = *batch_shape, 1, q_len
        lists = jnp.broadcast_to(plan.kv_indices, (*shape, plan.width))
        lists = in_chunks(lists.reshape(batches, q_len, -1))
        counts = jnp.broadcast_to(plan.kv_num_blocks, shape).reshape(batches, q_len)
    whole = None if mask is None else mask.flatten_batch(batch_shape)
    if sinks is not None:
        sinks = jax.lax.stop_gradient(sinks.astype(jnp.float32))
    return loss(indexed.flat(), _Given(q, k, lists, in_chunks(counts), whole, sinks))


def hisa(
    *,
    top_k: int = 2048,
    block_kv: int = 128,
    block_top_k: int | None = 64,
    index_heads: int = 64,
    index_dim: int = 128,
    rotary_dim: int = 64,
    rope_base: float = 10_000.0,
    index_dtype: Any = None,
    power_of_two_scales: bool = False,
) -> Method:
    """Attends to the tokens that a small indexer of hidden states picks, the same for all heads.

    It is not causal by itself: pass the mask that attention is under, such as `js.masks.causal()`.
    `block_top_k=None` is the lightning indexer of DeepSeek sparse attention, which scores every
    token. `info.indexed` is what `index_loss` trains the indexer by: no gradient reaches it through
    the output, nor hidden states through it. Attention over one latent key and value per token is
    that of one kv head, as `js.nn.LatentAttention` has it; the indexer's queries are then made of
    its low-rank queries, for which `x` is `js.LatentStates(x, q_latent)`. While decoding,
    `info.state` has the indexer's keys, of `index_dtype`, and the mean keys of blocks, of which a
    step makes those anew that its tokens are in.

    Args:
      top_k: Tokens per query, at most as many as its blocks hold; 2048 in the paper.
      block_kv: Tokens per block of the first stage; 128 in the paper.
      block_top_k: Blocks per query, at least 2: the first and the last visible one are included;
        64 in the paper. None skips the first stage.
      index_heads: Heads of the indexer; 64 in DeepSeek-V3.2.
      index_dim: Features of each; 128 there.
      rotary_dim: How many of them, the first ones, turn with position; even, 64 there; 0 for none.
      rope_base: Base of that rotation.
      index_dtype: What the indexer's queries and keys are rounded to, such as float8_e4m3fn (after
        a Hadamard transform) or bfloat16; default f32.
      power_of_two_scales: Whether scales of eight bits, one per vector, are rounded up to powers of
        two, ue8m0 in the authors' code.

    Differs from the paper:
      Where there are no low-rank queries, which only latent attention has, the indexer's queries
      are made of hidden states. Ties go to the lower token. Mean keys are not rounded again, nor
      are the scores of blocks.

    Raises:
      ValueError: if a number is out of range, or blocks do not hold `top_k` tokens.
    """
    checks.positive(top_k=top_k, block_kv=block_kv, index_heads=index_heads, index_dim=index_dim)
    checks.room_for_both_ends(block_top_k)
    checks.room_for_tokens(top_k, block_kv, block_top_k)
    checks.non_negative(rotary_dim=rotary_dim)
    checks.multiple(of=2, rotary_dim=rotary_dim)
    checks.at_most(index_dim, rotary_dim=rotary_dim)
    checks.positive_number(rope_base=rope_base)
    if index_dtype is not None:
        checks.floating(index_dtype=index_dtype)
    eight_bits = index_dtype is not None and jnp.dtype(index_dtype).itemsize == 1
    if eight_bits:
        checks.power_of_two(index_dim=index_dim)
    checks.scales_of_eight_bits(power_of_two_scales, eight_bits)

    def init(key, *, num_heads, num_kv_heads, dim, features):
        normal = jax.nn.initializers.lecun_normal()
        of_q, of_k, of_weights = jax.random.split(key, 3)
        features, of_queries = LatentStates.of(features)
        return {
            "q": normal(of_q, (of_queries, index_heads * index_dim)),
            "k": normal(of_k, (features, index_dim)),
            "k_scale": jnp.ones(index_dim),
            "k_bias": jnp.zeros(index_dim),
            "weights": normal(of_weights, (features, index_heads)),
        }

    def placed(x, positions):
        turned = rotary(x[..., :rotary_dim], positions, base=rope_base)
        return jnp.concatenate([turned, x[..., rotary_dim:]], axis=-1) if rotary_dim else x

    def index(params, x, positions) -> tuple[Indexed, Stored]:
        """Of the tokens of `x` alone, which nothing reaches through the indexer; and what to keep.

        That nobody learns by: what is kept is read at another step.
        """
        states = jax.lax.stop_gradient(LatentStates.of(x))
        x, q_latent = (y.astype(jnp.float32) for y in states)
        q = (q_latent @ params["q"]).reshape(*x.shape[:-1], index_heads, index_dim)
        k = jax.nn.standardize(x @ params["k"], epsilon=1e-6)
        k = (k * params["k_scale"] + params["k_bias"])[..., None, :]
        weights = (x @ params["weights"]) * (index_heads * index_dim) ** -0.5
        q, k = (placed(y, positions) for y in (q, k))
        if eight_bits:
            q, k = hadamard(q), hadamard(k)
        k = k[..., 0, :]
        scales = {"power_of_two": power_of_two_scales}
        q, whole = rounded(q, index_dtype, **scales), rounded(k, index_dtype, **scales)
        kept = stored(jax.lax.stop_gradient(k), index_dtype, **scales)
        return Indexed(q, weights, whole), kept

    def indexed_tokens(params, q, k, x, positions, state) -> HisaInfo:
        states = LatentStates.of(x)
        checks.hidden_states(states.x, q, params["k"].shape[0])
        checks.query_latents(states.q_latent, q, params["q"].shape[0])
        batch_shape, q_len, kv_len = q.shape[:-3], q.shape[-3], k.shape[-3]
        offset = Queries.of(q, k, positions).offset
        start = jnp.broadcast_to(kv_len - q_len if offset is None else offset, batch_shape)
        own, kept = index(params, x, start[..., None] + jnp.arange(q_len))
        if state is None:
            checks.keys_of_all_tokens(q_len, kv_len)
            means = None if block_top_k is None else _mean_keys(kept, block_kv)
            return HisaInfo(own, HisaState(kept, means))
        so_far = jax.tree.map(lambda x, new: written(x, new, start), state.keys, kept)
        means = None if block_top_k is None else mean_keys(so_far, state.means, start, q_len)
        # all keys in f32, which the choice does not read: a program leaves out what is not used
        every = written(state.keys.read(), own.k, start)
        return HisaInfo(own._replace(k=every), HisaState(so_far, means))

    def mean_keys(keys, known, start, q_len):
        """Of each block; those alone are made that the newest tokens are in."""
        # of so many tokens, wherever the first stands in its own block
        new, kv_blocks = -(-(q_len - 1) // block_kv) + 1, known.shape[-2]
        if new >= kv_blocks:
            return _mean_keys(keys, block_kv, start + q_len)
        first = jnp.clip(start // block_kv, 0, kv_blocks - new)

        def near(x):
            one_head = x.reshape(*start.shape, x.shape[start.ndim], 1, -1)
            found = tokens_from(one_head, first * block_kv, new * block_kv)
            return found.reshape(*start.shape, -1, *x.shape[start.ndim + 1 :])

        newest = jax.tree.map(near, keys)
        made = _mean_keys(newest, block_kv, start + q_len - first * block_kv)
        return written(known, made, first)

    def init_state(k, v):
        """That of a step before the first, for keys and values of these shapes."""
        batch_shape, kv_blocks = k.shape[:-3], -(-k.shape[-3] // block_kv)
        keys = Stored.zeros((*k.shape[:-2], index_dim), index_dtype)
        means = jnp.zeros((*batch_shape, kv_blocks, index_dim), jnp.float32)
        return HisaState(keys, None if block_top_k is None else means)

    def choose(params, q, k, x, positions, mask, state):
        info = indexed_tokens(params, q, k, x, positions, state)
        return _chosen(info.indexed, info.state, top_k, block_kv, block_top_k, mask), info

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        return choose(params, q, k, x, positions, mask, state)

    def attend_to_tokens(
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
        **options: Any,
    ) -> tuple[Any, Any]:
        tokens, info = choose(params, q, k, x, positions, mask, state)
        return attend(q, k, v, tokens, mask=mask, **options), info

    return Method(init, plan, attend_to_tokens, init_state, of_latents=True)
