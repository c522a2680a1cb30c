"""`attention_fn`: any method inside Flax's own multi-head attention, NNX and Linen."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.functional import sparse_attention
from jsparse.masks import causal, dense
from jsparse.types import Mask, Method


def attention_fn(
    method: Method | None = None,
    *,
    mask: Mask | None = None,
    params: Any = (),
    implementation: str | None = None,
) -> Callable[..., Array]:
    """Makes an `attention_fn` for Flax's own multi-head attention, NNX and Linen.

    Both pass what they have by keyword, and Linen only those that the function spells out, so all
    are spelled out here. What has no counterpart raises; nothing is dropped.

    Args:
      method: What chooses the pairs to compute; default all that the masks allow.
      mask: A jsparse mask, applied besides the array that the module passes. Prefer it: an array
        has one bool per pair of tokens.
      params: The method's parameters.
      implementation: See `js.attend`.

    Raises:
      ValueError: if `method` or `mask` is of another type; from the function that is made, if the
        method has parameters and `params` are none.
    """
    if method is not None:
        checks.method_type(method)
    if mask is not None:
        checks.mask_type(mask)

    def attention(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        force_fp32_for_softmax: bool = True,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> Array:
        checks.no_dropout(dropout_rate, deterministic)
        checks.not_given(
            precision=precision,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            module=module,
        )
        whole = own_mask
        if mask is not None:
            array = dense(jnp.broadcast_to(mask, _pairs(mask, query, key)).astype(bool))
            whole = array if whole is None else whole & array
        if is_causal:
            # Flax counts both sides from 0, so its diagonal starts at the top left
            whole = causal(offset=0) if whole is None else whole & causal(offset=0)
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        options = {"bias": bias, "implementation": implementation}
        if method is None:
            return attend(query, key, value, mask=whole, **options)
        return sparse_attention(query, key, value, method, params=params, mask=whole, **options)

    own_mask = mask
    return attention


def _pairs(mask: Array, query: Array, key: Array) -> tuple[int, ...]:
    """The shape of a mask array with its two token axes in full, the rest as it came."""
    checks.mask_array(mask, query, key)
    return (*mask.shape[:-2], query.shape[-3], key.shape[-3])
