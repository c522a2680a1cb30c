"""`debug_checks`: lists are read entry by entry before they are used."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jsparse import _compat

# part of the key of jit's cache: a function traced without checks is traced again
_checking = jax.make_user_context(False)


def debug_checks(enabled: bool = True) -> Any:
    """Checks every list of tiles that attention is given while the context is entered.

    For `js.attend_paged` also the lengths, and the entries of page tables that the plan selects.
    Not the levels of a pyramid, the orders of groups, nor whether the parts of a tuple overlap.

    An entry that counts but names no block, or stands out of order, is an error then, which says
    which entry that is; without checks it counts as padding, or leaves open what is computed.
    Lists that are concrete raise ValueError at the call. Traced ones are checked when they are
    there: by a callback, whose ValueError the runtime wraps in an error of its own and raises
    where a result is waited for.

        with js.debug_checks():
            out = js.attend(q, k, v, plan)

    Args:
      enabled: False switches the checks off inside of where they are on.
    """
    return _checking(enabled)


def listed_entries(plan: Any) -> None:
    """Under `debug_checks`, that the lists of a plan are what they should be."""
    if not _checking.value:
        return
    lists, counts, blocks = plan.kv_indices, plan.kv_num_blocks, plan.grid.kv_blocks

    def report(*numbers: Any) -> None:
        _raise_if_bad(*map(np.asarray, numbers), shape=lists.shape, blocks=blocks)

    if _compat.is_traced((lists, counts)):
        first = _first_bad(lists, counts, blocks)
    else:
        with _compat.at_once():
            first = _first_bad(lists, counts, blocks)
    when_known(report, *first)


def listed_pages(cache: Any, plan: Any) -> None:
    """Under `debug_checks`, that what a plan selects of a paged cache is there, in one place."""
    if not _checking.value:
        return
    table, lengths = cache.page_table, cache.lengths

    def report(*numbers: Any) -> None:
        _raise_if_no_page(*map(np.asarray, numbers), cache=shape, table=table.shape)

    shape = cache.pages, cache.page_size
    if _compat.is_traced((table, lengths, plan)):
        first = _first_bad_page(cache, plan)
    else:
        with _compat.at_once():
            first = _first_bad_page(cache, plan)
    when_known(report, *first)


def when_known(report: Callable[..., None], *numbers: Array) -> None:
    """Calls `report` with numbers: now, or if they are traced under `debug_checks`, later."""
    if not _compat.is_traced(numbers):
        report(*numbers)
    elif _checking.value:
        jax.debug.callback(report, *numbers)


def _first_bad(lists: Array, counts: Array, blocks: int) -> tuple[Array, ...]:
    """Whether there is a bad entry, which one is first, and it, the one before it, its count."""
    width = lists.shape[-1]
    numbers = jnp.arange(width)
    before = jnp.concatenate([jnp.full_like(lists[..., :1], -1), lists[..., :-1]], -1)
    wrong = (lists < 0) | (lists >= blocks) | (lists <= before)
    bad = (numbers < counts[..., None]) & wrong
    # a wrong count is told at its row's first entry
    bad |= ((counts < 0) | (counts > width))[..., None] & (numbers == 0)
    bad = bad.reshape(-1)
    index = jnp.argmax(bad)
    of_entries = lists.reshape(-1)[index], before.reshape(-1)[index]
    return bad.any(), index, *of_entries, counts.reshape(-1)[index // width]


def _first_bad_page(cache: Any, plan: Any) -> tuple[Array, ...]:
    """The lengths; whether a selected entry is bad, which one is first, it, and its other place.

    That is -1 where it has none.
    """
    table, pages, width = cache.page_table, cache.pages, cache.table_width
    selected = plan.to_dense().any((1, 2)) & (jnp.arange(width) < cache.page_counts()[:, None])
    exists = cache.exists(table)
    place = jnp.broadcast_to(jnp.arange(width), table.shape)
    page = jnp.where(selected & exists, table, pages)
    lowest = jnp.full(pages, width).at[page].min(place, mode="drop")
    elsewhere = jnp.take(lowest, page, mode="fill", fill_value=width)
    moved = selected & exists & (elsewhere < place)
    bad = (selected & ~exists) | moved
    index = jnp.argmax(bad.reshape(-1))
    other = jnp.where(moved, elsewhere, -1).reshape(-1)[index]
    return cache.lengths, bad.any(), index, table.reshape(-1)[index], other


def _raise_if_no_page(
    lengths, bad, index, page, other, *, cache: tuple[int, int], table: tuple[int, ...]
) -> None:
    pages, page_size = cache
    room = table[1] * page_size
    for sequence in np.flatnonzero((lengths < 0) | (lengths > room)):
        raise ValueError(
            f"lengths[{sequence}]={lengths[sequence]} must be between 0 and {room}, the tokens "
            f"of {table[1]} pages."
        )
    if not bad:
        return
    sequence, place = (int(i) for i in np.unravel_index(int(index), table))
    entry = f"page_table[{sequence}, {place}]={page}"
    if other < 0:
        raise ValueError(
            f"{entry} names no page: there are {pages}, counted from 0. Leave it out of the plan."
        )
    raise ValueError(
        f"{entry} stands at place {other} of a table too; a page has one place in all tables that "
        "share it. Copy it to a page of its own."
    )


def _raise_if_bad(bad, index, entry, before, count, *, shape: tuple[int, ...], blocks: int) -> None:
    if not bad:
        return
    *row, number = (int(i) for i in np.unravel_index(int(index), shape))
    if not 0 <= count <= shape[-1]:
        raise ValueError(
            f"kv_num_blocks[{', '.join(map(str, row))}]={count} must be between 0 and the width of "
            f"the lists, {shape[-1]}. BlockMask.from_lists brings counts into that range."
        )
    place = f"kv_indices[{', '.join(map(str, [*row, number]))}]={entry}"
    if not 0 <= entry < blocks:
        raise ValueError(
            f"{place} names no block: there are {blocks}, counted from 0. Leave it out of "
            "kv_num_blocks, or check kv_len and block_kv."
        )
    raise ValueError(
        f"{place} stands after {before}; entries must be ascending and unique. "
        "BlockMask.from_lists takes them in any order."
    )
