"""`vmap` of attention: the mapped axis becomes a part of the batch.

Batching the loops themselves would drag every carry along, and a loop around them would compute
one small problem after the other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jsparse.attention.logits import LogitRule, Operands
from jsparse.types.pytree import batched_values, map_batched


def as_one_batch(
    compute: Callable[..., Any], rule: LogitRule, sizes: Any, *, gradient: bool = False
) -> Callable[..., Any]:
    """A pass of attention whose `vmap` is one call with a longer batch.

    What a sequence's index does not lead to (a captured array or a scale that is mapped, the
    gradient by either, the batch index that a predicate gets) is computed one by one instead.

    Args:
      compute: `compute(operands, lists, *sequences, rule, sizes)`; `sequences` have a batch axis.
      rule: What happens to logits.
      sizes: Of one call.
      gradient: Whether it computes the gradient by the operands, not `(out, lse)`.

    Returns:
      A function of `operands, lists, *sequences`.
    """

    def once(operands, lists, *sequences):
        return compute(operands, lists, *sequences, rule, sizes)

    attention = jax.custom_batching.custom_vmap(once)
    one_by_one = jax.custom_batching.sequential_vmap(once)

    @attention.def_vmap
    def in_one_batch(count, mapped, operands, lists, *sequences):
        modifiers = operands.scale, operands.captured
        of_modifiers = mapped[0].scale, mapped[0].captured
        by_index = not any(jax.tree.leaves(of_modifiers))
        by_index &= not (gradient and jax.tree.leaves(modifiers))
        if lists.mask is not None:
            # what has no batch axis has no entry per sequence
            of_mask = mapped[1].mask
            by_index &= sum(jax.tree.leaves(of_mask)) == sum(batched_values(of_mask))
            by_index &= not lists.mask.by_batch_index
        if not by_index:
            axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
            result = jax.vmap(one_by_one, axes)(operands, lists, *sequences)
            return result, jax.tree.map(lambda _: True, result)

        def flat(x: Array, is_mapped: bool) -> Array:
            core = x.shape[1 + is_mapped :]
            return jnp.broadcast_to(x, (count, sizes.batches, *core)).reshape(-1, *core)

        def shared(x: Array, is_mapped: bool) -> Array:
            return flat(x, is_mapped) if is_mapped or len(x) > 1 else x

        def apart(x: Array) -> Array:
            return x.reshape(count, sizes.batches, *x.shape[1:])

        # the gradient by what sequences share is wanted for each call of its own
        of_bias = flat if gradient else shared
        together = operands._replace(
            **{name: flat(getattr(operands, name), getattr(mapped[0], name)) for name in "qkv"},
            bias=jax.tree.map(of_bias, operands.bias, mapped[0].bias),
        )
        # indices and counts are of one batch
        listed = lists._replace(mask=None)
        are_mapped = jax.tree.leaves(mapped[1]._replace(mask=None))
        of_lists = flat if any(are_mapped) else shared
        mask = lists.mask
        if mask is not None:
            mask = map_batched(lambda _, x, is_mapped: shared(x, is_mapped), mask, mapped[1].mask)
        listed = jax.tree.map(of_lists, listed, mapped[1]._replace(mask=None))
        lists = listed._replace(mask=mask)
        longer = as_one_batch(
            compute,
            _within_calls(rule, sizes.batches),
            sizes._replace(batches=count * sizes.batches),
            gradient=gradient,
        )
        result = longer(
            together,
            lists,
            *(flat(x, m) for x, m in zip(sequences, mapped[2:], strict=True)),
        )
        result = jax.tree.map(apart, result)
        if isinstance(result, Operands) and result.bias is not None:
            if operands.bias.shape[mapped[0].bias] == 1:
                result = result._replace(bias=result.bias.sum(1, keepdims=True))
        return result, jax.tree.map(lambda _: True, result)

    return attention


def _within_calls(rule: LogitRule, batches: int) -> LogitRule:
    """The rule for several calls' sequences end to end: score_mod counts those of one."""
    score_mod = rule.score_mod
    if score_mod is None:
        return rule

    def counted(captured, logits, batch, *where):
        return score_mod(captured, logits, batch % batches, *where)

    return rule._replace(score_mod=counted)
