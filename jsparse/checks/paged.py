"""Checks of paged caches and of what is asked of them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jsparse.checks.debug import when_known
from jsparse.checks.values import integers


def page_table(k: Any, v: Any, table: Any, lengths: Any) -> None:
    """Pages, tables and lengths fit each other."""
    for name, x in (("k", k), ("v", v)):
        if getattr(x, "ndim", None) != 4:
            raise ValueError(
                f"{name} has shape {getattr(x, 'shape', None)}; expected [pages, page_size, "
                "kv_heads, dim]."
            )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} must agree in [pages, page_size, kv_heads].")
    if k.dtype != v.dtype:
        raise ValueError(f"k holds {k.dtype} and v {v.dtype}; cast them to one dtype first.")
    integers(page_table=table, lengths=lengths)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"page_table has shape {table.shape}; expected [batch, table_width], neither of them 0."
        )
    if lengths.shape != table.shape[:1]:
        raise ValueError(
            f"lengths has shape {lengths.shape}; a page_table of {table.shape} needs "
            f"{table.shape[:1]}."
        )


def paged_operands(q: Any, cache: Any) -> None:
    """Queries are of a paged cache's sequences."""
    if not hasattr(cache, "page_table"):
        raise ValueError(
            f"cache is {type(cache).__name__}; it must be a PagedKV, as js.PagedKV.from_table and "
            "js.cache.paged.empty make."
        )
    batch = len(cache.lengths)
    if getattr(q, "ndim", None) != 4 or len(q) != batch:
        raise ValueError(
            f"q has shape {getattr(q, 'shape', None)}; a cache of {batch} sequences needs "
            f"[{batch}, q_len, heads, dim]."
        )


def page_plan(plan: Any, cache: Any, q_len: int) -> None:
    """A plan lists pages of a cache's tables for the queries at hand."""
    if not hasattr(plan, "kv_indices"):
        raise ValueError(
            f"plan is {type(plan).__name__}; pages are selected by a BlockMask. Groups and "
            "pyramids take js.attend."
        )
    given = plan.q_len, plan.kv_len, plan.block_kv
    if given != (q_len, cache.kv_len, cache.page_size) or q_len % plan.block_q:
        raise ValueError(
            f"The plan has q_len={plan.q_len}, kv_len={plan.kv_len}, block_q={plan.block_q}, "
            f"block_kv={plan.block_kv}; for this q and cache it needs q_len={q_len}, "
            f"kv_len={cache.kv_len}, block_kv={cache.page_size} and a block_q that divides q_len."
        )


def new_tokens(k: Any, v: Any, counts: Any, cache: Any) -> None:
    """Tokens to append are of a cache's sequences, heads and widths."""
    for name, x, pool in (("k", k, cache.k), ("v", v, cache.v)):
        wanted = len(cache.lengths), *pool.shape[2:]
        if getattr(x, "ndim", None) != 4 or (len(x), *x.shape[2:]) != wanted or not x.shape[1]:
            batch, heads, width = wanted
            raise ValueError(
                f"{name} has shape {getattr(x, 'shape', None)}; this cache takes "
                f"[{batch}, length, {heads}, {width}]."
            )
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k has {k.shape[1]} new tokens and v {v.shape[1]}; they must agree.")
    if counts is not None:
        one_per_sequence(cache, counts=counts)


def one_per_sequence(cache: Any, **arrays: Any) -> None:
    """An integer for each sequence of a cache."""
    integers(**arrays)
    for name, array in arrays.items():
        if array.shape != cache.lengths.shape:
            raise ValueError(
                f"{name} has shape {array.shape}; expected one integer per sequence, "
                f"{cache.lengths.shape}."
            )


def sequences_exist(batch: int, **arrays: Any) -> None:
    """Numbers of sequences are such; traced ones are looked at under `debug_checks` alone."""
    for name, array in arrays.items():

        def report(given: Any, name: str = name) -> None:
            for index in np.flatnonzero((np.asarray(given) < 0) | (np.asarray(given) >= batch)):
                raise ValueError(
                    f"{name}[{index}]={given[index]} names no sequence: there are {batch}, "
                    "counted from 0."
                )

        when_known(report, array)


def one_bool_per_sequence(cache: Any, **arrays: Any) -> None:
    """A bool for each sequence of a cache."""
    for name, array in arrays.items():
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if shape != cache.lengths.shape or dtype != jnp.bool_:
            raise ValueError(
                f"{name} has shape {shape} and holds {dtype}; expected one bool per sequence, "
                f"{cache.lengths.shape}."
            )
