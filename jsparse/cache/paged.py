"""A paged cache: pages are handed out as sequences grow, shared, and given back.

All of it is data, so a step of decoding is one jitted function of the cache; donate it, and pages
are written where they are. A page is free that no table lists under its sequence's length.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse import checks
from jsparse.types import PagedKV


def empty(
    batch: int,
    *,
    pages: int,
    page_size: int,
    max_len: int,
    kv_heads: int,
    dim: int,
    v_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> PagedKV:
    """A cache whose sequences have no token yet.

    Args:
      batch: Sequences.
      pages: Pages that they have together.
      page_size: Tokens of a page.
      max_len: Tokens that a sequence may have; rounded up to whole pages.
      kv_heads: Heads of keys and values.
      dim: Width of keys.
      v_dim: Width of values, default that of keys.
      dtype: Of both.

    Raises:
      ValueError: if a size is not positive.
    """
    v_dim = dim if v_dim is None else v_dim
    checks.positive(batch=batch, pages=pages, page_size=page_size, max_len=max_len)
    checks.positive(kv_heads=kv_heads, dim=dim, v_dim=v_dim)
    k, v = (jnp.zeros((pages, page_size, kv_heads, width), dtype) for width in (dim, v_dim))
    table = jnp.full((batch, -(-max_len // page_size)), -1, jnp.int32)
    return PagedKV.from_table(k, v, table, jnp.zeros(batch, jnp.int32))


def append(
    cache: PagedKV,
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads v_dim"],
    counts: Int[Array, " batch"] | None = None,
) -> PagedKV:
    """Writes tokens after those that are there, in free pages where the last one is full.

    A sequence gets all its new tokens or, where its table or the pool has no room for them, none,
    and `overflowed` says so; it takes no more then until it is released. So what a sequence holds
    is always the beginning of what it was given. Pages go to the first sequences first, and once
    one goes without, those after it that need a page do too. A page that is shared is never
    written: a sequence that goes on in the middle of one goes on in a copy.

    Args:
      cache: Of which nothing that is listed changes.
      k: New keys.
      v: New values.
      counts: How many of them each sequence takes, the first ones. Default: all.

    Raises:
      ValueError: if arrays do not fit the cache.
    """
    checks.new_tokens(k, v, counts, cache)
    counts = jnp.full_like(cache.lengths, k.shape[1]) if counts is None else counts
    return _appended(cache, k, v, counts)


# as one program also where the caller is none
@jax.jit
def _appended(cache: PagedKV, k: Array, v: Array, counts: Array) -> PagedKV:
    length, page_size = k.shape[1], cache.page_size
    start, counts = cache.lengths, jnp.clip(counts, 0, length).astype(jnp.int32)
    end = start + jnp.where(cache.overflowed, 0, counts)

    # the pages that new tokens may come to stand in, from that of the last token on
    most = (length + page_size - 2) // page_size + 1
    place = start[:, None] // page_size + jnp.arange(most, dtype=jnp.int32)
    page = jnp.take_along_axis(cache.page_table, place, axis=1, mode="fill", fill_value=-1)
    touched = (place * page_size < end[:, None]) & (end > start)[:, None]
    begun = touched & (place * page_size < start[:, None])
    uses = _uses(cache)
    own = begun & (jnp.take(uses, page, mode="clip") == 1)
    needed = touched & ~own
    # a page that was begun and is gone cannot be gone on with
    fits = (end <= cache.kv_len) & ~(begun & ~cache.exists(page)).any(1)
    needed &= fits[:, None]
    demand = needed.sum(1)
    fits &= (demand == 0) | (jnp.cumsum(demand) <= (uses == 0).sum())

    free = jnp.nonzero(uses == 0, size=needed.size, fill_value=cache.pages)[0].astype(jnp.int32)
    number = jnp.cumsum(needed.reshape(-1)).reshape(needed.shape) - 1
    given = jnp.where(needed & fits[:, None], free[jnp.maximum(number, 0)], cache.pages)
    target = jnp.where(given < cache.pages, place, cache.table_width)
    sequence = jnp.arange(len(start), dtype=jnp.int32)[:, None]
    table = cache.page_table.at[sequence, target].set(given, mode="drop")

    token = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    written = (token < end[:, None]) & fits[:, None]
    home = jnp.take_along_axis(table, token // page_size, axis=1, mode="clip")
    home = jnp.where(written, home, cache.pages)
    # of a new page what is not written yet is 0: the sequence that had it may have left a nan there
    filled = place[..., None] * page_size + jnp.arange(page_size) < start[:, None, None]

    def write(pool: Array, new: Array) -> Array:
        begin = jnp.where(filled[..., None, None], jnp.take(pool, page, axis=0, mode="clip"), 0)
        pool = pool.at[given].set(begin.astype(pool.dtype), mode="drop")
        return pool.at[home, token % page_size].set(new.astype(pool.dtype), mode="drop")

    return PagedKV(
        write(cache.k, k),
        write(cache.v, v),
        table,
        jnp.where(fits, end, start),
        cache.overflowed | ~fits,
    )


def share_prefix(
    cache: PagedKV, sources: Int[Array, " batch"], lengths: Int[Array, " batch"]
) -> PagedKV:
    """Gives each sequence the first tokens of another in place of its own, in the same pages.

    For several answers to one prompt, or the next step of a beam search. Pages that nobody lists
    any more are free.

    Args:
      cache: Of which the pages stay as they are.
      sources: Whose tokens each sequence takes; its own number leaves it its own.
      lengths: How many of them, at most.

    Raises:
      ValueError: if there are not as many integers as sequences, or a concrete source is none of
        them. A traced one makes an empty sequence that has `overflowed`.
    """
    checks.one_per_sequence(cache, sources=sources, lengths=lengths)
    batch = len(cache.lengths)
    checks.sequences_exist(batch, sources=sources)
    # negative ones would count from the end
    sources = jnp.where(sources < 0, batch, sources)
    taken = PagedKV(
        cache.k,
        cache.v,
        jnp.take(cache.page_table, sources, axis=0, mode="fill", fill_value=-1),
        jnp.take(cache.lengths, sources, mode="fill", fill_value=0),
        jnp.take(cache.overflowed, sources, mode="fill", fill_value=True),
    )
    return truncate(taken, lengths)


def truncate(cache: PagedKV, lengths: Int[Array, " batch"]) -> PagedKV:
    """Forgets the tokens of each sequence past a length, such as drafts that were refused.

    Pages past it that no other sequence lists are free.

    Raises:
      ValueError: if there are not as many integers as sequences.
    """
    checks.one_per_sequence(cache, lengths=lengths)
    lengths = jnp.clip(lengths, 0, cache.lengths).astype(jnp.int32)
    kept = PagedKV(cache.k, cache.v, cache.page_table, lengths, cache.overflowed)
    places = jnp.arange(cache.table_width)
    table = jnp.where(places < kept.page_counts()[:, None], cache.page_table, -1)
    return PagedKV(cache.k, cache.v, table, lengths, cache.overflowed)


def release(cache: PagedKV, finished: Bool[Array, " batch"]) -> PagedKV:
    """Empties those sequences that are finished, and gives back their pages.

    Raises:
      ValueError: if there are not as many bools as sequences.
    """
    checks.one_bool_per_sequence(cache, finished=finished)
    left = truncate(cache, jnp.where(finished, 0, cache.lengths))
    overflowed = cache.overflowed & ~finished
    return PagedKV(left.k, left.v, left.page_table, left.lengths, overflowed)


def _uses(cache: PagedKV) -> Int[Array, " pages"]:
    """How many tables list each page."""
    page = jnp.where(cache.listed(), cache.page_table, cache.pages)
    return jnp.zeros(cache.pages, jnp.int32).at[page].add(1, mode="drop")
