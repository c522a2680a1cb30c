"""Pooling, scores, grouped heads and what a mask leaves to choose from, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core import blocks, heads, pooling, scores
from jsparse.types import TileGrid
from tests.inputs import on_device, qkv

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("length", "block"), [(24, 8), (21, 8), (3, 8), (7, 1)])
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_blocks_are_pooled_over_the_tokens_they_have(length, block, batch):
    x = RNG.normal(size=(*batch, length, 2, 5)).astype(np.float32)
    parts = [x[..., i : i + block, :, :].astype(np.float64) for i in range(0, length, block)]
    counts = [part.shape[-3] for part in parts]
    assert pooling.block_counts(length, block).tolist() == counts
    sums = np.stack([part.sum(-3) for part in parts], -3)
    means = np.stack([part.mean(-3) for part in parts], -3)
    np.testing.assert_allclose(pooling.sum_blocks(on_device(x), block), sums, atol=1e-5)
    np.testing.assert_allclose(pooling.mean_blocks(on_device(x), block), means, atol=1e-6)
    largest = np.stack([part.max(-3) for part in parts], -3)
    np.testing.assert_array_equal(pooling.max_blocks(on_device(x), block), largest)


def test_blocks_of_arrays_with_room_are_pooled_over_true_tokens():
    x = RNG.normal(size=(4, 24, 2, 5)).astype(np.float32)
    lengths = on_device([24, 13, 8, 0], jnp.int32)
    for name in ("sum", "mean", "max", "min"):
        pool = getattr(pooling, f"{name}_blocks")
        roomy = np.where(
            np.arange(24)[:, None, None] < np.array(lengths)[:, None, None, None], x, 9
        )
        roomy[3] = np.nan
        found = np.asarray(pool(on_device(roomy), 8, lengths))
        assert found.shape == (4, 3, 2, 5)
        for n, length in enumerate(lengths.tolist()):
            blocks_of = -(-length // 8)
            if length:
                alone = pool(on_device(x[n, :length]), 8)
                np.testing.assert_array_equal(found[n, :blocks_of], alone)
            assert not found[n, blocks_of:].any()


def test_pooling_sums_16_bits_in_32():
    x = jnp.full((4096, 1, 1), 1.0, jnp.bfloat16)
    assert pooling.sum_blocks(x, 4096)[0, 0, 0] == 4096
    large = jnp.full((64, 1, 1), 60_000.0, jnp.float16)
    assert jnp.isfinite(pooling.sum_blocks(large, 64)).all()
    np.testing.assert_allclose(pooling.mean_blocks(large, 64), large[:1].astype(jnp.float32))


def test_heads_are_expanded_and_summed():
    x = on_device(RNG.normal(size=(3, 7, 2, 5)), jnp.float32)
    expanded = heads.expand_kv_heads(x, 6)
    for head in range(6):
        np.testing.assert_array_equal(expanded[:, :, head], x[:, :, head // 3])
    _, transpose = jax.vjp(lambda x: heads.expand_kv_heads(x, 6), x)
    weights = on_device(RNG.normal(size=expanded.shape), jnp.float32)
    np.testing.assert_allclose(heads.sum_groups(weights, 2), transpose(weights)[0], atol=1e-6)


def test_pooled_logits_are_products_of_blocks():
    q, k, _ = qkv(5, 7, batch=(2,))
    got = scores.pooled_logits(q, k, scale=0.5)
    for b, h, i, j in np.ndindex(2, 4, 5, 7):
        np.testing.assert_allclose(got[b, h, i, j], 0.5 * q[b, i, h] @ k[b, j, h // 2], atol=1e-5)


def test_candidates_are_what_a_mask_leaves_with_its_first_and_last():
    ids = on_device([[0] * 20 + [1] * 20, [0] * 40])
    mask = js.masks.causal() & js.masks.segments(ids)
    visible, forced = blocks.candidates(mask, TileGrid(40, 40, 10, 10), (2,), 3)
    assert visible.shape == forced.shape == (2, 3, 4, 4)
    own = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(visible[0, 1], own)
    np.testing.assert_array_equal(
        forced[0, 2], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    np.testing.assert_array_equal(visible[1, 0], np.tril(np.ones((4, 4))))
    np.testing.assert_array_equal(forced[1, 0], np.eye(4) + (np.arange(4) == 0) > 0)
    visible, forced = blocks.candidates(None, TileGrid(40, 40, 10, 10), (2,), 3)
    assert visible.all()
    assert not forced.any()
