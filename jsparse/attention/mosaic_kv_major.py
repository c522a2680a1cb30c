"""Tiles of few queries on Hopper: the rows that list a tile of keys, gathered, by the same kernel.

A program that owns such a tile multiplies all rows of a warpgroup for the few that it has. Here the
rows that list one tile of keys are copied next to each other, in chunks as high as the kernel's
tiles, each of which meets that one tile; so products are dense, and keys and values come by TMA
once for each chunk. What a row gets from one entry of its list has a place of its own, and is
merged with the rest by its log-sum-exp. The lists turned round, their spans and places are those of
`kv_major`, which computes the same in XLA.

The copy of the queries costs what reading and writing them once for each entry costs: Hopper's copy
engine gathers no rows. Gradients are those of the Triton kernels that gather, or of `kv_major`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse.attention import kernels, kv_major, mosaic_rule
from jsparse.attention.block_sparse import Lists, Sizes
from jsparse.attention.kv_major import Chunks, Cut
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.mosaic_rule import Lengths
from jsparse.types import Mask
from pallas_kernels.block_sparse_attention import mosaic, walk
from pallas_kernels.block_sparse_attention.chip import Forward

_LOWEST = float(jnp.finfo(jnp.float32).min)


def pays(lists: Lists, sizes: Sizes) -> bool:
    """Whether this is the faster way for lists of these sizes.

    Where the list of a tile of few queries may hold all blocks, it may as well hold few of them.
    """
    s, width = sizes, lists.kv_indices.shape[-1]
    few = s.block_q < mosaic.SIDES[0] and s.block_kv >= walk.ROWS
    return few and width < s.kv_blocks and kv_major.pays_for(s.q_blocks, width, s)


def refusal(operands: Operands, mask: Mask | None, rule: LogitRule, sizes: Sizes) -> str | None:
    """What happens to logits that this cannot do, though tiles of rows may, or None."""
    some = jnp.zeros(1, jnp.int32)
    found = _split(operands, mask, rule, sizes, (some, some, some))
    return found if isinstance(found, str) else None


def forward(
    kernel: Forward, operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` in f32 over the listed tiles; lengths are whole tiles."""
    s, cut = sizes, Cut.of(lists, sizes)
    own = cut.chunk * s.block_q
    height, layout = kernel.height(own), kernel.for_one_tile
    assert layout is not None  # another way is gone without
    q, v_dim = kernels.pad_lanes(operands.q), operands.v.shape[-1]
    k, v = (kernels.pad_lanes(_head_by_head(x)) for x in operands[1:3])

    def span(carry, start, chunks: Chunks):
        batch, head, kv_block = (
            x.reshape(-1) for x in (chunks.batch, chunks.head, chunks.kv_block)
        )
        # where there is no member, what is computed of the first query is not read again
        members = jnp.maximum(chunks.members.reshape(-1, cut.chunk), 0)
        rows = (start + members)[..., None] * s.block_q + jnp.arange(s.block_q, dtype=jnp.int32)
        rows = jnp.pad(rows.reshape(-1, own), ((0, 0), (0, height - own)))
        batch_of, head_of = (jnp.repeat(x, height) for x in (batch, head))
        row_of = rows.reshape(-1)
        parts = _split(operands, lists.mask, rule, s, (row_of, batch_of, head_of))
        assert not isinstance(parts, str)  # refused before
        tiles = parts.tiles(rule, height, s.block_kv)
        out, lse = kernel(
            q[batch_of, row_of, head_of][None, :, None],
            k,
            v,
            _one_tile_each(chunks.total, batch * s.kv_heads + head // s.group, kv_block, s, parts),
            tiles,
            config=layout(tiles, v.shape[-1]),
        )
        out, lse = out[0, :, 0, :v_dim].astype(jnp.float32), lse[0, 0]
        out, lse = (_by_member(x, (len(batch), height), own, s) for x in (out, lse))
        seen = ~jnp.isneginf(lse)
        peaks, totals = jnp.where(seen, lse, _LOWEST), seen.astype(jnp.float32)
        return carry, kv_major.merged(peaks, totals, out, chunks)

    _, (out, lse) = kv_major.by_chunks(span, None, lists, s, cut)
    return jnp.swapaxes(out, 1, 2), lse


def _split(
    operands: Operands,
    mask: Mask | None,
    rule: LogitRule,
    sizes: Sizes,
    which: tuple[Array, Array, Array],
) -> mosaic_rule.Parts | str:
    """What happens to logits of gathered rows, of which arrays say row, sequence and head."""
    s, kv_len = sizes, operands.k.shape[1]
    row_of, batch_of, head_of = which
    kv_index_of = jnp.tile(jnp.arange(kv_len, dtype=jnp.int32), s.batches * s.kv_heads)

    def place(gathered, column, batch, head):
        # what is the same for all is no array, which a key could not be looked up beside
        batch = batch_of[gathered] if s.batches > 1 else batch
        head = head_of[gathered] if s.heads > 1 else head
        return row_of[gathered], kv_index_of[column], batch, head

    lengths = Lengths(1, 1, len(row_of), len(kv_index_of))
    return mosaic_rule.split(operands, mask, rule, lengths, place, ragged=s.ragged)


def _head_by_head(
    x: Float[Array, "batch kv_len kv_heads dim"],
) -> Float[Array, "1 all_tokens 1 dim"]:
    """All sequences and heads one after the other, as if they were one."""
    return jnp.swapaxes(x, 1, 2).reshape(1, -1, 1, x.shape[-1])


def _one_tile_each(
    total: Int[Array, ""], owner: Array, kv_block: Array, sizes: Sizes, parts: mosaic_rule.Parts
) -> walk.Lists:
    """For each chunk its tile of keys, none for those past the last."""
    numbers = jnp.arange(len(owner), dtype=jnp.int32)
    first, last = numbers, numbers + (numbers < total)
    ids = owner * sizes.kv_blocks + kv_block
    found = walk.Lists(*(x[None, None] for x in (ids, first, last)))
    # something may be hidden in each of them
    return found if parts.hide is None else found._replace(whole=found.first)


def _by_member(x: Array, shape: tuple[int, int], own: int, sizes: Sizes) -> Array:
    """What the kernel gives for the rows of each chunk, member by member."""
    rest = x.shape[1:]
    return x.reshape(*shape, *rest)[:, :own].reshape(-1, sizes.block_q, *rest)
