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
    """Checks every plan that attention is given, entry by entry, while the context is entered.

    That is lists of tiles, the levels of a pyramid, and the orders and offsets of groups; for
    `js.attend_paged` also the lengths, and the entries of page tables that the plan selects. Not
    whether the parts of a tuple overlap.

    An entry that counts but names no block, level or token, or stands out of order, is an error
    then, which says which entry that is; without checks it counts as padding, or leaves open what
    is computed.
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

    when_known(report, *_found(_first_bad, lists, counts, blocks))


def blocks_exist(outside: Any, lists: Any, kv_indices: Any, kv_blocks: int) -> None:
    """Lists name no block past the last one; traced ones may, except under `debug_checks`.

    `lists` are what became of the `kv_indices` that were given, which may be wider integers.
    """
    shape = outside.shape
    given = None if _compat.is_traced(kv_indices) else kv_indices

    def report(some: Any, index: Any, entry: Any) -> None:
        if some:
            place = tuple(int(i) for i in np.unravel_index(int(index), shape))
            entry = entry if given is None else np.asarray(given)[place]
            raise ValueError(
                f"kv_indices[{', '.join(map(str, place))}] holds block {int(entry)}; there are "
                f"{kv_blocks}, counted from 0. Check kv_len and block_kv, and that kv_num_blocks "
                "leaves out the padding."
            )

    if outside.size:
        index = jnp.argmax(outside.reshape(-1))
        when_known(report, outside.any(), index, lists.reshape(-1)[index])


def listed_levels(pyramid: Any) -> None:
    """Under `debug_checks`, that entries of a pyramid have levels that there are."""
    if not _checking.value:
        return
    levels, top_level = pyramid.levels, pyramid.top_level

    def report(*numbers: Any) -> None:
        _raise_if_no_level(*map(np.asarray, numbers), shape=levels.shape, top_level=top_level)

    when_known(report, *_found(_first_bad_level, pyramid))


def grouped_tokens(groups: Any) -> None:
    """Under `debug_checks`, that the orders and offsets of groups are what they should be."""
    if not _checking.value:
        return
    for side, order, offsets in (
        ("q", groups.q_order, groups.q_offsets),
        ("kv", groups.kv_order, groups.kv_offsets),
    ):

        def report(*numbers: Any, side: str = side, shapes=(order.shape, offsets.shape)) -> None:
            _raise_if_bad_offset(*map(np.asarray, numbers[:4]), side=side, shapes=shapes)
            _raise_if_bad_token(*map(np.asarray, numbers[4:]), side=side, shape=shapes[0])

        found = _found(_first_bad_offset, offsets, order.shape[-1])
        when_known(report, *found, *_found(_first_bad_token, order, offsets))


def listed_pages(cache: Any, plan: Any) -> None:
    """Under `debug_checks`, that what a plan selects of a paged cache is there, in one place."""
    if not _checking.value:
        return
    table = cache.page_table

    def report(*numbers: Any) -> None:
        _raise_if_no_page(*map(np.asarray, numbers), cache=shape, table=table.shape)

    shape = cache.pages, cache.page_size
    when_known(report, *_found(_first_bad_page, cache, plan))


def when_known(report: Callable[..., None], *numbers: Array) -> None:
    """Calls `report` with numbers: now, or if they are traced under `debug_checks`, later."""
    if not _compat.is_traced(numbers):
        report(*numbers)
    elif _checking.value:
        jax.debug.callback(report, *numbers)


def _found(find: Callable[..., tuple[Array, ...]], *arguments: Any) -> tuple[Array, ...]:
    """What a search finds: now, also where something else is traced, or if its own input is, later.

    Args:
      find: The search.
      *arguments: Its arrays, plans and sizes.
    """
    if _compat.is_traced(arguments):
        return find(*arguments)
    with _compat.at_once():
        return find(*arguments)


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


def _first_bad_level(pyramid: Any) -> tuple[Array, ...]:
    """Whether an entry that counts has no level, which one is first, and what it has."""
    levels = jnp.asarray(pyramid.levels)
    bad = pyramid.block_mask.entries() & ((levels < 0) | (levels > pyramid.top_level))
    index = jnp.argmax(bad.reshape(-1))
    return bad.any(), index, levels.reshape(-1)[index]


def _first_bad_offset(offsets: Array, length: int) -> tuple[Array, ...]:
    """Whether there is a bad offset, which one is first, it, and the one before it."""
    before = jnp.concatenate([jnp.zeros_like(offsets[..., :1]), offsets[..., :-1]], -1)
    bad = ((offsets < before) | (offsets > length)).reshape(-1)
    index = jnp.argmax(bad)
    return bad.any(), index, offsets.reshape(-1)[index], before.reshape(-1)[index]


def _first_bad_token(order: Array, offsets: Array) -> tuple[Array, ...]:
    """Whether an entry of a group is bad, which one is first, it, and its token's other place.

    That is -1 where it has none.
    """
    length = order.shape[-1]
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), order.shape)
    grouped = (places >= offsets[..., :1]) & (places < offsets[..., -1:])
    exists = (order >= 0) & (order < length)
    tokens = jnp.where(grouped & exists, order, length).reshape(-1, length)
    rows = jnp.arange(len(tokens))[:, None]
    first = jnp.full_like(tokens, length).at[rows, tokens]
    first = first.min(places.reshape(tokens.shape), mode="drop")
    elsewhere = jnp.take_along_axis(first, tokens, -1, mode="clip").reshape(order.shape)
    moved = grouped & exists & (elsewhere < places)
    bad = (grouped & ~exists) | moved
    index = jnp.argmax(bad.reshape(-1))
    other = jnp.where(moved, elsewhere, -1).reshape(-1)[index]
    return bad.any(), index, order.reshape(-1)[index], other


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


def _raise_if_no_level(bad, index, level, *, shape: tuple[int, ...], top_level: int) -> None:
    if bad:
        raise ValueError(
            f"levels[{_place(index, shape)}]={level} is no level: they run from 0 to "
            f"top_level={top_level}. Leave an entry that is not wanted out of the list."
        )


def _raise_if_bad_offset(
    bad, index, offset, before, *, side: str, shapes: tuple[tuple[int, ...], ...]
) -> None:
    if bad:
        of_order, shape = shapes
        raise ValueError(
            f"{side}_offsets[{_place(index, shape)}]={offset} must be between 0 and the number of "
            f"tokens, {of_order[-1]}, and not below the one before it, {before}. "
            "TokenGroups.from_ids counts the tokens of each group."
        )


def _raise_if_bad_token(bad, index, token, other, *, side: str, shape: tuple[int, ...]) -> None:
    if not bad:
        return
    entry = f"{side}_order[{_place(index, shape)}]={token}"
    if other < 0:
        raise ValueError(
            f"{entry} names no token: there are {shape[-1]}, counted from 0. Tokens of no group "
            "stand behind the last offset."
        )
    raise ValueError(
        f"{entry} stands at place {other} too; a token is in one group. TokenGroups.from_ids makes "
        "orders from the group of each token."
    )


def _place(index: Any, shape: tuple[int, ...]) -> str:
    return ", ".join(str(int(i)) for i in np.unravel_index(int(index), shape))


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
