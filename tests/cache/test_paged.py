"""A paged cache holds what was appended, whatever is shared, forgotten or given back between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.cache import paged
from jsparse.nn.cache import KVCache
from tests.attention.exact import close
from tests.inputs import on_device

BATCH, PAGES, PAGE, MAX_LEN, KV_HEADS, DIM = 3, 9, 4, 22, 2, 8
append = jax.jit(paged.append)
share_prefix, truncate, release = map(jax.jit, (paged.share_prefix, paged.truncate, paged.release))


def empty(**changes):
    sizes = {"pages": PAGES, "page_size": PAGE, "max_len": MAX_LEN, "kv_heads": KV_HEADS}
    return paged.empty(BATCH, **{**sizes, "dim": DIM, "v_dim": 6, **changes})


def tokens(length, seed):
    """Keys that nobody else has, values that go with them."""
    rng = np.random.default_rng(seed)
    k = on_device(rng.normal(size=(BATCH, length, KV_HEADS, DIM)), jnp.float32)
    return k, 2 * k[..., :6]


def held(cache, sequence):
    """The keys of a sequence, in order; its values go with them."""
    length, table = int(cache.lengths[sequence]), np.asarray(cache.page_table)[sequence]
    t = np.arange(length)
    k, v = (np.asarray(x)[table[t // PAGE], t % PAGE] for x in (cache.k, cache.v))
    np.testing.assert_array_equal(v, 2 * k[..., :6])
    return k


def same(cache, expected):
    for sequence, keys in enumerate(expected):
        np.testing.assert_array_equal(held(cache, sequence), np.concatenate(keys))


def listed_pages(cache):
    return np.asarray(cache.page_table)[np.asarray(cache.listed())]


@pytest.mark.parametrize("seed", range(3))
def test_any_steps_against_lists_of_tokens(seed):
    """Each step either does what it does to lists, or says that it could not."""
    rng = np.random.default_rng(seed)
    cache, expected, lost = empty(), [[np.zeros((0, KV_HEADS, DIM))] for _ in range(BATCH)], set()
    overflows = 0
    for step in range(40):
        kind = rng.choice(["append", "append", "one", "share", "truncate", "release"])
        if kind in ("append", "one"):
            length = 6 if kind == "append" else 1
            k, v = tokens(length, 100 * seed + step)
            counts = rng.integers(0, length + 1, BATCH)
            before = cache
            cache = append(cache, k, v, on_device(counts))
            free = PAGES - len(np.unique(listed_pages(before)))
            for b, count in enumerate(counts):
                fits = int(before.lengths[b]) + count <= cache.kv_len
                # no more pages than all could need together, so that nobody goes without
                if fits and free >= BATCH * 3 and b not in lost:
                    assert not cache.overflowed[b]
                if not fits and count:
                    assert cache.overflowed[b]
                if cache.overflowed[b]:
                    assert cache.lengths[b] == before.lengths[b]
                    overflows += b not in lost
                    lost.add(b)
                else:
                    expected[b].append(np.asarray(k)[b, :count])
        elif kind == "share":
            sources, lengths = rng.integers(0, BATCH, BATCH), rng.integers(0, MAX_LEN, BATCH)
            cache = share_prefix(cache, on_device(sources), on_device(lengths))
            expected = [
                [np.concatenate(expected[source])[:length]]
                for source, length in zip(sources, lengths, strict=True)
            ]
            lost = {b for b, source in enumerate(sources) if source in lost}
        elif kind == "truncate":
            lengths = rng.integers(0, MAX_LEN, BATCH)
            cache = truncate(cache, on_device(lengths))
            expected = [[np.concatenate(own)[:n]] for own, n in zip(expected, lengths, strict=True)]
        else:
            finished = rng.random(BATCH) < 0.4
            cache = release(cache, on_device(finished))
            for b in np.flatnonzero(finished):
                expected[b] = [np.zeros((0, KV_HEADS, DIM))]
                lost.discard(b)
        same(cache, expected)
        assert set(np.flatnonzero(cache.overflowed)) == lost
    assert overflows


def test_a_pool_that_is_full_overwrites_nothing_and_a_release_makes_room():
    k, v = tokens(16, 0)
    # pages for sequences 0 and 1; sequence 2 needs four, of which one is left
    cache = append(empty(), k, v)
    np.testing.assert_array_equal(cache.overflowed, [False, False, True])
    np.testing.assert_array_equal(cache.lengths, [16, 16, 0])
    # one more page is there, for one of the two that ask
    cache = append(cache, k[:, :1], v[:, :1])
    np.testing.assert_array_equal(cache.overflowed, [False, True, True])
    np.testing.assert_array_equal(cache.lengths, [17, 16, 0])
    same(cache, [[k[0], k[0, :1]], [k[1]], [k[2, :0]]])
    # what is lost stays lost until the sequence begins anew
    cache = append(cache, k[:, :1], v[:, :1])
    np.testing.assert_array_equal(cache.lengths, [18, 16, 0])
    cache = release(cache, on_device([True, False, True]))
    assert not np.isin(listed_pages(cache), np.asarray(cache.page_table)[[0, 2]]).any()
    cache = append(cache, k, v, on_device([0, 0, 16]))
    np.testing.assert_array_equal(cache.overflowed, [False, True, False])
    same(cache, [[k[0, :0]], [k[1]], [k[2]]])


def test_what_a_table_lists_past_the_length_is_free():
    k, v = tokens(4, 0)
    cache = empty(pages=2)
    stale = dataclasses.replace(cache, page_table=cache.page_table.at[0, :2].set(jnp.arange(2)))
    cache = append(stale, k, v, on_device([0, 4, 4]))
    assert not cache.overflowed.any()
    same(cache, [[k[0, :0]], [k[1]], [k[2]]])


def test_a_table_that_is_full_says_so():
    k, v = tokens(MAX_LEN + 2, 0)
    cache = append(empty(pages=20), k, v, on_device([24, 23, 3]))
    assert not cache.overflowed.any()
    cache = append(cache, k[:, :1], v[:, :1])
    np.testing.assert_array_equal(cache.overflowed, [True, False, False])
    np.testing.assert_array_equal(cache.lengths, [24, 24, 4])


def test_shared_pages_are_stored_once_and_written_by_nobody():
    k, v = tokens(6, 0)
    cache = append(empty(), k, v, on_device([6, 0, 0]))
    cache = share_prefix(cache, jnp.zeros(BATCH, int), jnp.full(BATCH, 6))
    assert len(np.unique(listed_pages(cache))) == 2
    more, more_v = tokens(3, 1)
    grown = append(cache, more, more_v)
    same(grown, [[k[0], more[b]] for b in range(BATCH)])
    # the full page is still shared, the one that was half full is three
    tables = np.asarray(grown.page_table)
    assert len(set(tables[:, 0])) == 1
    assert len(set(tables[:, 1])) == BATCH
    shared = np.unique(listed_pages(cache))
    np.testing.assert_array_equal(np.asarray(grown.k)[shared], np.asarray(cache.k)[shared])


def test_a_page_that_somebody_left_a_nan_in_is_as_good_as_new():
    k, v = tokens(4, 0)
    cache = append(empty(pages=3), k * jnp.nan, v * jnp.nan)
    cache = append(release(cache, jnp.ones(BATCH, bool)), k[:, :1], v[:, :1])
    assert jnp.isfinite(cache.k).all()
    assert jnp.isfinite(cache.v).all()


def test_decoding_by_pages_is_decoding_in_one_piece():
    """A prompt of uneven lengths, then steps of one token, as the layers of `js.nn` take them."""
    heads, prompt = 4, 9
    rng = np.random.default_rng(0)
    lengths = np.array([9, 4, 6])
    whole = KVCache.empty((BATCH,), MAX_LEN, KV_HEADS, DIM)
    cache = empty(pages=20, v_dim=DIM)

    @jax.jit
    def step(q, k, v, counts, whole, cache):
        cache = paged.append(cache, k, v, counts)
        start = whole.length
        whole = dataclasses.replace(whole.append(k, v), length=start + counts)
        # the last of the new queries are true
        first = start + counts - q.shape[1]
        mask = js.masks.causal(offset=first)
        options = {"return_lse": True, "implementation": "xla"}
        of_whole = js.attend(q, whole.k, whole.v, mask=mask, **options)
        return js.attend_paged(q, cache, **options), of_whole, whole, cache

    for length, counts in ((prompt, lengths), *((1, np.ones(BATCH, int)),) * 4):
        q, k, v = (
            on_device(rng.normal(size=(BATCH, length, n, DIM)), jnp.float32)
            for n in (heads, KV_HEADS, KV_HEADS)
        )
        by_pages, in_one, whole, cache = step(q, k, v, on_device(counts), whole, cache)
        close(by_pages, in_one, 16 * 2.0**-23)
    np.testing.assert_array_equal(cache.lengths, lengths + 4)
    assert not cache.overflowed.any()


K, V = tokens(2, 0)
SENTENCES = {
    "heads": (
        lambda: paged.append(empty(), K[:, :, :1], V),
        r"k has shape \(3, 2, 1, 8\); this cache takes \[3, length, 2, 8\]",
    ),
    "width": (lambda: paged.append(empty(), K, K), r"v has shape .* \[3, length, 2, 6\]"),
    "lengths": (lambda: paged.append(empty(), K, V[:, :1]), "k has 2 new tokens and v 1"),
    "counts": (
        lambda: paged.append(empty(), K, V, jnp.ones(2, int)),
        r"counts has shape \(2,\); expected one integer per sequence, \(3,\)",
    ),
    "counts of floats": (lambda: paged.append(empty(), K, V, jnp.ones(3)), "counts holds float32"),
    "sources": (
        lambda: paged.share_prefix(empty(), on_device([0, 3, 1]), jnp.ones(3, int)),
        r"sources\[1\]=3 names no sequence: there are 3",
    ),
    "finished": (
        lambda: paged.release(empty(), jnp.ones(3, int)),
        "finished has shape .* and holds int32; expected one bool per sequence",
    ),
    "pages": (lambda: empty(pages=0), "pages=0 must be a positive int"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_sentence(name, without_shape_checks):
    call, message = SENTENCES[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_traced_source_that_is_none_loses_its_tokens_openly():
    k, v = tokens(2, 0)
    cache = share_prefix(append(empty(), k, v), on_device([-1, 3, 0]), jnp.full(BATCH, 2))
    np.testing.assert_array_equal(cache.overflowed, [True, True, False])
    same(cache, [[k[0, :0]], [k[0, :0]], [k[0]]])
