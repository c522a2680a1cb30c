"""What the adapters of GPU kernels share: refusals, widths, the rule, the frame of a gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsparse.attention.block_sparse import Lists
from jsparse.attention.lanes import indices
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.packing import Filling
from jsparse.attention.separation import Separated, separate
from jsparse.core.blocks import CellRule, Cells
from jsparse.types import Mask
from pallas_kernels import _compat
from pallas_kernels.ring import LANES

# tiles of so many queries are what kernels take
LEAST_QUERIES = 16


def capability() -> str | None:
    """The compute capability of this machine's default device, such as "9.0"; None if no GPU."""
    if jax.default_backend() != "gpu":
        return None
    return str(getattr(jax.devices()[0], "compute_capability", "unknown"))


def device_refusal(wanted: str, fits: Callable[[str], bool]) -> str | None:
    """Why a kernel does not run on this machine, or None.

    Args:
      wanted: What it needs, in words.
      fits: Whether a GPU of a compute capability, such as "9.0", will do.
    """
    found = capability()
    if found is None:
        return f"it needs {wanted}; the default backend is {jax.default_backend()}."
    return None if fits(found) else f"it needs {wanted}; this one has {found}."


def hopper_refusal() -> str | None:
    """Why a kernel for Hopper alone does not run on this machine, or None."""
    if _compat.interpreting():
        return None
    wanted = "a Hopper GPU (compute capability 9.0)"
    return device_refusal(wanted, lambda found: found.startswith("9."))


def seen_cells(
    cells: Cells,
    kv_count: int,
    *,
    batches: int,
    heads: int,
    q_cells: int,
    kv_cells: int,
    forced: CellRule | None = None,
) -> Separated | str:
    """What tells a kernel which cells are seen: 1, 2 if they are forced too, else 0; or why not.

    Args:
      cells: Which key cells a query cell may see.
      kv_count: Key cells that there are.
      batches: Sequences.
      heads: Query heads.
      q_cells: Query cells, padding included.
      kv_cells: Key cells, padding included.
      forced: Which are forced, where they are seen; default none.
    """

    def seen(logit, q_cell, kv_cell, batch, head):
        found = cells.visible(batch, head, q_cell, kv_cell) & (kv_cell < kv_count)
        value = jnp.float32(1)
        if forced is not None:
            value = jnp.where(forced(batch, head, q_cell, kv_cell), jnp.float32(2), value)
        return jnp.where(found, value, jnp.float32(0))

    return separate(seen, batches=batches, heads=heads, q_len=q_cells, kv_len=kv_cells)


def pad_width(x: Array, width: int) -> Array:
    """Fills the last axis with zeros up to `width`."""
    missing = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def lanes(x: Array) -> int:
    """The width that products of 16 bits take for an array's last axis."""
    return -(-x.shape[-1] // LANES) * LANES


def pad_lanes(x: Array) -> Array:
    """Fills the last axis with zeros up to such a width."""
    return pad_width(x, lanes(x))


def padded(
    x: Float[Array, "batch tokens heads dim"], tokens: int
) -> Float[Array, "batch more_tokens heads more_dim"]:
    """Fills with zeros up to so many tokens, and to a width that products take; no gradient."""
    x = jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0), (0, 0)))
    return pad_width(jax.lax.stop_gradient(x), -(-x.shape[3] // LANES) * LANES)


def tile_rule(
    operands: Operands,
    mask: Mask | None,
    rule: LogitRule,
    filling: Filling,
    q_len: int,
    kv_len: int,
    ragged: bool,
    **options: Any,
) -> Separated | str | None:
    """What happens to logits, as kernels take it; None where only a constant scales them.

    Args:
      operands: Of attention.
      mask: Who may see whom.
      rule: What changes logits.
      filling: Rows appended to each tile of queries.
      q_len: Queries, padding included, those rows not.
      kv_len: Keys, padding included.
      ragged: Whether there is padding among the keys.
      **options: What the kernel can do; see `separate`.

    Returns:
      The parts of the rule, or a sentence that says why it cannot be split.
    """
    if mask is None and operands.bias is None and not ragged and not rule.changes_logits:
        return None
    modify = modifier(operands, rule)

    def on_scalars(logit, filled, kv_index, batch, head):
        q_index = filling.row(filled)
        logit = modify(logit, q_index, kv_index, batch, head)
        return rule.hide(logit, mask, q_index, kv_index, batch, head, ragged=ragged)

    batches, _, heads, _ = operands.q.shape
    lengths = {"q_len": filling.length(q_len), "kv_len": kv_len}
    sizes = {"batches": batches, "heads": heads, **lengths}
    return separate(on_scalars, **sizes, **options)


def modifier(operands: Operands, rule: LogitRule) -> Callable[..., Array]:
    """What changes a logit before the mask: a function of it and of its place, on scalars."""
    bias = operands.bias

    def modify(logit, q_index, kv_index, batch, head):
        extra = None
        if bias is not None:
            query, true_head = rule.owner(q_index, head)
            position = (batch, true_head, query, kv_index)
            at = tuple(i if n > 1 else 0 for i, n in zip(position, bias.shape, strict=True))
            extra = bias[at]
        return rule.modify(
            logit, extra, operands.scale, operands.captured, q_index, kv_index, batch, head
        )

    return modify


def kept_entries(
    kept: Int[Array, "batch heads q_blocks width"], lists: Lists
) -> Bool[Array, "batch heads q_blocks width"]:
    """Which entries of lists kernels kept, of what they wrote: nothing where none is listed."""
    listed = indices(kept.shape[-1]) < lists.kv_num_blocks[..., None]
    listed = jnp.repeat(listed, kept.shape[1] // listed.shape[1], axis=1)
    return listed & (kept != 0)


def row_terms(
    out: Float[Array, "batch q_len heads v_dim"],
    lse: Float[Array, "batch heads q_len"],
    d_out: Float[Array, "batch q_len heads v_dim"],
    d_lse: Float[Array, "batch heads q_len"],
) -> tuple[Float[Array, "batch heads q_len"], Float[Array, "batch heads q_len"]]:
    """What the derivative of a softmax wants per row: the lse in base 2, and delta.

    The lse of a row that saw nothing is +inf, so that its probabilities are 0. Delta is the row sum
    of `out * d_out`, less the gradient of the lse.
    """
    empty = jnp.isneginf(lse)
    delta = jnp.swapaxes((out * d_out.astype(jnp.float32)).sum(-1), 1, 2)
    return jnp.where(empty, jnp.inf, lse / np.log(2.0)), delta - jnp.where(empty, 0.0, d_lse)


def gradients(
    operands: Operands,
    split: Callable[[Operands], Any],
    kernels: Callable[[Any], tuple[Array, Array, Array, Any]],
) -> Operands:
    """The gradient by every operand, from what kernels compute.

    Args:
      operands: Of attention.
      split: Gives the parts of the rule, as `tile_rule` does.
      kernels: Gives, for these parts, the gradients by q, k and v, of padded width, and those by
        the parts' `values`, per sequence, head and token even where values are shared; None for
        values without a gradient.
    """

    def parts_of(operands: Operands) -> Any:
        parts = split(operands)
        assert not isinstance(parts, str)  # the forward pass was refused then
        return parts

    def values(operands: Operands):
        parts = parts_of(operands)
        return parts.values if parts else ()

    computed, pullback = jax.vjp(values, operands)
    d_q, d_k, d_v, d_values = kernels(parts_of(operands))
    (d_modifiers,) = pullback(
        jax.tree.map(_cotangent, d_values, computed, is_leaf=lambda x: x is None)
    )
    q, k, v = operands[:3]
    return d_modifiers._replace(
        q=d_q[..., : q.shape[-1]], k=d_k[..., : k.shape[-1]], v=d_v[..., : v.shape[-1]]
    )


def _cotangent(gradient: Array | None, value: Array) -> Any:
    """A gradient per sequence, head and token, summed where the value is shared."""
    if gradient is None:
        integral = not jnp.issubdtype(value.dtype, jnp.inexact)
        return np.zeros(value.shape, jax.dtypes.float0) if integral else jnp.zeros_like(value)
    shared = tuple(n for n in range(value.ndim) if value.shape[n] == 1)
    return gradient.sum(shared, keepdims=True)
