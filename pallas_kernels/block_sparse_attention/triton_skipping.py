"""The forward pass that skips tiles on the way, by Pallas' Triton backend."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention import triton
from pallas_kernels.block_sparse_attention.triton_pieces import Softmax, read

_LOWEST = float(jnp.finfo(jnp.float32).min)


class Skipping(NamedTuple):
    """Which tiles a program leaves out on its way along the list.

    Those in which each query's largest logit, in base 2, is less than the largest before plus
    `log2_threshold`, f32 [batch, heads] and not positive. Queries from `q_len` on are padding and
    have no say.
    """

    log2_threshold: jax.Array
    q_len: int


def refusal(dtype: Any, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why this kernel cannot take a problem, or None; see `triton.refusal`.

    A program decides over a whole tile before it takes any exponential of it, so it holds all of
    the tile's logits.
    """
    reason = triton.refusal(dtype, block_q, block_kv, dim, v_dim)
    if reason:
        return reason
    for name, tokens in (("queries", block_q), ("keys", block_kv)):
        if tokens < triton.LEAST_SIDE:
            return f"where tiles are skipped it takes tiles of 16 {name} or more, not {tokens}."
    largest = triton.default_config(128, 128, max(dim, v_dim), dtype, rule=True, backward=False)
    if block_q > largest.own or block_kv > largest.other:
        return (
            f"where tiles are skipped it takes at most {largest.own} queries by {largest.other} "
            f"keys of {max(dim, v_dim)} {jnp.dtype(dtype).name}, not {block_q} by {block_kv}."
        )
    return None


def forward(
    problem: triton.Problem,
    kv_indices: jax.Array,
    kv_num_blocks: jax.Array,
    skipping: Skipping,
    tiles: triton.Tiles,
    config: triton.Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes attention over the listed tiles, less those that are skipped on the way.

    Of a tile that is skipped the logits are computed and nothing else; its values are not read.

    Args:
      problem: The arrays.
      kv_indices: As for `triton.forward`.
      kv_num_blocks: As for `triton.forward`.
      skipping: What is skipped.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out; its pieces must be whole tiles.

    Returns:
      `out` and `lse` of `triton.forward`, and int32 [batch, heads, q_blocks, width]: 1 where an
      entry of the list was kept, 0 where it was skipped, anything past the list's end.

    Raises:
      NotImplementedError: if the kernel cannot take this problem.
    """
    batches, q_len, heads, dim = problem.q.shape
    v_dim, dtype = problem.v.shape[-1], problem.v.dtype
    reason = refusal(dtype, tiles.block_q, tiles.block_kv, dim, v_dim)
    if reason:
        raise NotImplementedError("The Triton attention that skips tiles: " + reason)
    chosen = config or triton.config_of(
        problem, tiles, tiles.block_q, tiles.block_kv, backward=False
    )

    def skipping_kernel(q_ref, k_ref, v_ref, indices_ref, counts_ref, limits_ref, *refs):
        *value_refs, out_ref, lse_ref, kept_ref = refs
        row, walk = triton.row_of(problem, indices_ref, counts_ref, tiles, chosen)
        look = row.logits(q_ref, k_ref, value_refs)
        limit = limits_ref[row.batch, row.head]
        q_index = row.tokens.along((chosen.own,), 0)

        def step(number, softmax):
            there = walk.tokens(number)
            logits = look(there)
            # finite: a row that sees nothing here is below it even where it saw nothing before
            least = jnp.maximum(softmax.peak + limit, _LOWEST)
            least = jnp.where(q_index < skipping.q_len, least, jnp.inf)
            # number by number, for a maximum would pass over a nan
            below = logits * tiles.to_base_2 < least[:, None]
            keep = jnp.where(below, 0, 1).max(axis=1).max(axis=0)
            kept_ref[row.batch, row.head, walk.at[-1], number] = keep
            return lax.cond(
                keep > 0,
                lambda: softmax.add(logits, tiles.to_base_2, read(v_ref, row.keys(there))),
                lambda: softmax,
            )

        start = Softmax.of_nothing(chosen.own, v_dim)
        row.write(out_ref, lse_ref, *triton.loop(*walk.steps, step, start).results())

    kept = jax.ShapeDtypeStruct((batches, heads, *kv_indices.shape[2:]), jnp.int32)
    arrays = *problem[:3], kv_indices, kv_num_blocks, skipping.log2_threshold
    return triton.call(
        skipping_kernel,
        chosen,
        triton.programs(problem, tiles, chosen),
        [*triton.out_and_lse(problem), kept],
    )(*arrays, *problem.values)
