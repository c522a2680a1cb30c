"""BLASST: tiles skipped by a threshold on the running softmax. 2025, arXiv:2512.12087."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention.planned import no_params, no_state
from jsparse.attention.skipping import attend_skipping
from jsparse.core.tiling import block_mask
from jsparse.types import BlockMask, Method, TileGrid


class BlasstInfo(NamedTuple):
    """What was done to which tiles.

    Attributes:
      scored: The tiles whose logits were computed: those that the mask touches.
      kept: Those of them that were not skipped, for each query head.
      state: A step of decoding needs nothing from the one before.
    """

    scored: BlockMask
    kept: BlockMask
    state: tuple[()] = ()

    @property
    def sparsity(self) -> Float[Array, "*batch heads"]:
        """The share of the tiles whose logits were computed that was skipped."""
        scored = self.scored.kv_num_blocks.sum(-1)
        return 1.0 - self.kept.kv_num_blocks.sum(-1) / jnp.maximum(scored, 1)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How a head's sparsity and its threshold go together: `threshold * kv_len = a * exp(b * S)`.

    Attributes:
      a: Of prefill, at least 0.
      b: Of prefill, in [0, 20].
      decode_a: Of decoding.
      decode_b: Of decoding.
    """

    a: float
    b: float
    decode_a: float
    decode_b: float

    def scale_factor(self, target_sparsity: float, *, decode: bool) -> float:
        """What to divide by the number of keys to have a threshold that skips such a share."""
        a, b = (self.decode_a, self.decode_b) if decode else (self.a, self.b)
        return a * math.exp(b * target_sparsity)


def blasst(
    *,
    threshold: float | Float[Array, "*heads"] = 1e-3,
    decode_threshold: float | Float[Array, "*heads"] = 1e-4,
    scale_factor: float | Float[Array, "*heads"] | None = None,
    decode_scale_factor: float | Float[Array, "*heads"] | None = None,
    calibration: Sequence[Calibration] | None = None,
    target_sparsity: float = 0.5,
    block_q: int = 128,
    block_kv: int = 128,
) -> Method:
    """Skips tiles in which every query's largest weight is small beside its largest one so far.

    Attention goes along all tiles that the mask touches, keys from 0 upwards, and skips the second
    half of a tile's work: see `js.attend_skipping`. Nothing is estimated or stored beforehand.
    `plan` makes the same walk without values, which costs more than it saves: it is for looking at,
    and for attending to the same tiles again. It is of logits without bias, cap or `score_mod`.

    A call with one query is a step of decoding, which has thresholds of its own. A scale factor, or
    a calibration at `target_sparsity`, takes a threshold's place: the threshold is then the factor
    over the number of keys up to the last query, at most 1.

    Args:
      threshold: In [0, 1], a number or one per query head; 0 skips nothing. 1e-3 in the authors'
        emulation of prefill.
      decode_threshold: The same for decoding; 1e-4 there.
      scale_factor: Threshold times `kv_len`, above 0, a number or one per query head; their
        examples have 1000.
      decode_scale_factor: The same for decoding; 20 there.
      calibration: What `jsparse.planning.search_scale_factors` found for each query head.
      target_sparsity: The share of tiles that calibrated heads are to skip, in (0, 1]; fitted
        between 0.1 and 0.9.
      block_q: Queries per tile, which are skipped together.
      block_kv: Keys per tile.

    Differs from the paper:
      Thresholds above 1, which a scale factor gives short inputs, count as 1: the authors' kernel
      would skip tiles that hold a row's largest logit. The gradient is that of attention over the
      kept tiles; theirs drops those tiles that are small beside the final sum. While decoding, each
      query head of a group skips for itself; theirs skip together. Thresholds, factors and
      calibrations may differ by head; theirs are one for a model. All queries of a tile vote
      together, where some of their kernels let groups of 32 or 64 rows vote apart.

    Raises:
      ValueError: if a number is out of range, or both factors and a calibration are given.
    """
    checks.unit_interval(threshold=threshold, decode_threshold=decode_threshold)
    checks.factors(scale_factor=scale_factor, decode_scale_factor=decode_scale_factor)
    checks.fractions(target_sparsity=target_sparsity)
    checks.positive(block_q=block_q, block_kv=block_kv)
    checks.calibrations(calibration or (), Calibration)
    checks.factor_or_calibration(calibration, scale_factor, decode_scale_factor)

    def threshold_of(q, k, positions):
        if positions is not None:
            checks.positions_fit(positions, q.shape[-3])
        heads, decode = q.shape[-2], q.shape[-3] == 1
        fixed, factor = threshold, scale_factor
        if decode:
            fixed, factor = decode_threshold, decode_scale_factor
        if calibration is not None:
            checks.one_per_head(heads, calibration=calibration)
            each = [head.scale_factor(target_sparsity, decode=decode) for head in calibration]
            factor = jnp.asarray(each, jnp.float32)
        if factor is None:
            checks.per_head(heads, threshold=fixed)
            return fixed
        checks.per_head(heads, scale_factor=factor)
        # keys up to the last query: a cache has room for more
        length = k.shape[-3] if positions is None else positions[..., -1:] + 1
        return jnp.minimum(factor / length, 1.0)

    def skipping(q, k, v, mask, positions, **options):
        rows = 1 if q.shape[-3] == 1 else block_q
        grid = TileGrid(q.shape[-3], k.shape[-3], rows, block_kv)
        if mask is None:
            every = jnp.ones((1, grid.q_blocks, grid.kv_blocks), bool)
            scored = BlockMask.from_dense(every, **grid._asdict(), width=grid.kv_blocks)
        else:
            scored = block_mask(mask, **grid._asdict())
        limit = threshold_of(q, k, positions)
        out, lse, kept = attend_skipping(q, k, v, scored, threshold=limit, mask=mask, **options)
        return out, lse, BlasstInfo(scored, kept)

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        values = jnp.zeros((*k.shape[:-1], 1), k.dtype)
        info = skipping(q, k, values, mask, positions)[-1]
        return info.kept, info

    def attend(
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
        bias: Any = None,
        score_mod: Any = None,
        sinks: Any = None,
        softcap: Any = None,
        scale: Any = None,
        return_lse: bool = False,
        implementation: str | None = None,
    ) -> tuple[Any, Any]:
        out, lse, info = skipping(
            q,
            k,
            v,
            mask,
            positions,
            bias=bias,
            score_mod=score_mod,
            sinks=sinks,
            softcap=softcap,
            scale=scale,
            implementation=implementation,
        )
        return ((out, lse) if return_lse else out), info

    return Method(no_params, plan, attend, no_state)
