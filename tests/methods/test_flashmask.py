"""FlashMask: the twelve mask types with their counts, tiles, and attention under them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.masks.flashmask import causal_document_columns, sliding_window_columns
from jsparse.types import Frame, TileGrid
from tests.inputs import on_device, qkv
from tests.oracles import flashmask as oracle

CASES = oracle.cases()


def factory(name):
    columns, causal, _, _ = CASES[name]
    if columns is not None:
        columns = on_device(columns)[None]
    return js.flashmask(startend_row_indices=columns, causal=causal)


def mask_of(name, q_len=16):
    columns, causal, _, _ = CASES[name]
    if columns is None:
        return js.masks.causal()
    return js.masks.intervals(on_device(columns)[None], causal=causal, q_len=q_len)


def pairs_of(name):
    definition = CASES[name][2]
    return np.array([[bool(definition(i, j)) for j in range(16)] for i in range(16)])


@pytest.mark.parametrize("name", CASES)
def test_the_columns_encode_the_definition(name):
    columns, causal, _, count = CASES[name]
    pairs = pairs_of(name)
    assert pairs.sum() == count
    mask = mask_of(name).flatten_batch(())
    seen = mask.visible(jnp.arange(16)[:, None], jnp.arange(16), Frame(16, 16))
    np.testing.assert_array_equal(seen, pairs)
    if columns is not None:
        decoded = oracle.pairs_from_columns(columns, causal=causal, q_len=16)
        np.testing.assert_array_equal(decoded, pairs)


def test_tiles_of_the_causal_document_mask():
    classify = mask_of("causal document").flatten_batch(()).classifier(TileGrid(16, 16, 4, 4))
    bounds = classify(jnp.arange(4)[:, None], jnp.arange(4), Frame(16, 16))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    # 0 is empty, 1 partial, 2 full
    np.testing.assert_array_equal(bounds.some.astype(int) + bounds.every, expected)


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_sound(name):
    pairs = pairs_of(name)
    classify = mask_of(name).flatten_batch(()).classifier(TileGrid(16, 16, 5, 3))
    bounds = classify(jnp.arange(4)[:, None], jnp.arange(6), Frame(16, 16))
    for a, b in np.ndindex(4, 6):
        tile = pairs[5 * a : 5 * a + 5, 3 * b : 3 * b + 3]
        assert bounds.some[a, b] or not tile.any()
        assert not bounds.every[a, b] or tile.all()


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_dense_attention(name):
    q, k, v = qkv(16, dim=8)
    weights = np.random.default_rng(0).normal(size=q.shape)
    method = factory(name)

    def loss(q, k, v):
        out = js.sparse_attention(q, k, v, method, implementation="xla")
        return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    expected = oracle.attention_and_gradients(q, k, v, pairs_of(name), weights)
    for got, true in zip((out, *gradients), expected, strict=True):
        # sums of a few hundred roundings of f32
        np.testing.assert_allclose(got, true, rtol=0, atol=200 * 2**-24 * np.abs(true).max())


def test_a_query_that_sees_no_key_gives_zero_and_no_gradient():
    q, k, v = qkv(16, dim=8)
    # every key is hidden from the queries 6, 7 and 8
    columns = jnp.tile(on_device([6, 9], jnp.int32), (1, 16, 1))
    method = js.flashmask(startend_row_indices=columns)

    def run(q):
        return js.sparse_attention(q, k, v, method, return_lse=True, implementation="xla")

    out, lse = run(q)
    assert not out[6:9].any()
    assert jnp.isneginf(lse[:, 6:9]).all()
    assert jnp.isfinite(lse[:, :6]).all()
    gradient = jax.grad(lambda q: run(q)[0].sum())(q)
    assert jnp.isfinite(gradient).all()
    assert not gradient[6:9].any()


def test_hash_buckets():
    """Queries and keys sorted by bucket; inside a bucket the original order is causal."""
    columns, original, buckets = oracle.hash_columns(np.random.default_rng(1).integers(0, 3, 16))
    mask = js.masks.intervals(on_device(columns)[None], causal=False, q_len=16).flatten_batch(())
    seen = mask.visible(jnp.arange(16)[:, None], jnp.arange(16), Frame(16, 16))
    for i, j in np.ndindex(16, 16):
        assert bool(seen[i, j]) == (buckets[i] == buckets[j] and original[j] <= original[i])


def test_hidden_keys_change_nothing_and_get_no_gradient():
    q, k, v = qkv(16, dim=8)
    columns = on_device(CASES["eviction"][0])[None].at[0, 5].set(0)
    run = jax.jit(
        lambda k, v: js.sparse_attention(
            q, k, v, js.flashmask(startend_row_indices=columns), implementation="xla"
        )
    )
    changed, plain = run(k.at[3].add(5.0), v.at[3].add(5.0)), run(k, v)
    # key 3 is seen by the queries 3 to 8
    np.testing.assert_array_equal(changed[9:], plain[9:])
    np.testing.assert_array_equal(changed[:3], plain[:3])
    assert (changed[3:9] != plain[3:9]).any((1, 2)).all()
    d_k, d_v = jax.grad(lambda k, v: run(k, v).sum(), argnums=(0, 1))(k, v)
    assert not d_k[5].any()
    assert not d_v[5].any()


def test_causal_documents_are_attention_per_document():
    q, k, v = qkv(16, dim=8)
    out = js.sparse_attention(q, k, v, factory("causal document"))
    for start, end in ((0, 5), (5, 9), (9, 16)):
        part = slice(start, end)
        alone = js.attend(
            q[part], k[part], v[part], mask=js.masks.causal(), implementation="reference"
        )
        np.testing.assert_allclose(out[part], alone, atol=2e-6)


def test_bottom_right_alignment():
    columns = jnp.full((1, 128, 1), 127)
    mask = js.masks.intervals(columns, causal=True, q_len=127).flatten_batch(())
    seen = mask.visible(jnp.arange(127)[:, None], jnp.arange(128), Frame(127, 128))
    assert int(seen.sum()) == 127 + 127 * 128 // 2 == 8255


def test_one_mask_for_all_equals_one_per_kv_head():
    q, k, v = qkv(16, dim=8)
    columns = on_device(CASES["eviction"][0])[None]
    shared = js.sparse_attention(q, k, v, js.flashmask(startend_row_indices=columns))
    repeated = jnp.repeat(columns, 2, axis=0)
    per_head = js.flashmask(startend_row_indices=repeated)
    np.testing.assert_array_equal(js.sparse_attention(q, k, v, per_head), shared)
    different = repeated.at[1].set(17)
    mixed = js.sparse_attention(q, k, v, js.flashmask(startend_row_indices=different))
    plain = js.attend(q, k, v, mask=js.masks.causal())
    np.testing.assert_allclose(mixed[:, :2], shared[:, :2], atol=2e-6)
    np.testing.assert_allclose(mixed[:, 2:], plain[:, 2:], atol=2e-6)


def test_column_makers():
    columns = CASES["sliding"][0]
    np.testing.assert_array_equal(sliding_window_columns(16, window=4)[0], columns)
    ends = on_device(oracle.document((5, 4, 7))[1])
    columns = causal_document_columns(ends)[0]
    np.testing.assert_array_equal(columns, CASES["causal document"][0])


@pytest.mark.parametrize(
    ("columns", "causal", "message"),
    [
        (jnp.zeros((1, 16, 4), int), True, "4 bounds per key"),
        (jnp.zeros((1, 16, 1), int), False, "1 bounds per key"),
        (jnp.zeros((1, 16, 1)), True, "must hold integers"),
    ],
)
def test_bad_input_is_named(columns, causal, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        js.flashmask(startend_row_indices=columns, causal=causal)
