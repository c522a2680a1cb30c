"""The kernel of antidiagonals in JAX's interpreter, which also looks for data races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.estimators.xattention import antidiagonal_scores
from pallas_kernels import _compat
from pallas_kernels.attention_map import mosaic_cells
from tests.inputs import on_device, qkv


def compare(q, k, **options):
    """Holds the kernel's sums to those of XLA, of the same inputs in f32."""
    exact = antidiagonal_scores(
        q.astype(jnp.float32), k.astype(jnp.float32), implementation="xla", **options
    )
    with _compat.interpreter():
        got = jax.block_until_ready(antidiagonal_scores(q, k, implementation="mosaic", **options))
    # numerators keep 16 bits; sums of products in another order
    np.testing.assert_allclose(got, exact, rtol=2.0**-15, atol=2.0**-15)
    return np.asarray(exact)


@pytest.mark.newest
def test_masks_grouped_heads_odd_lengths_and_rows_that_see_nothing():
    # 29 query and 141 key cells of 8 tokens, the last ones not full; two tiles of keys
    q, k, _ = qkv(229, 1125, heads=4, kv_heads=2, dim=40, batch=(2,), dtype=jnp.bfloat16)
    ids = np.sort(np.random.default_rng(1).integers(0, 3, (2, 1125)), axis=1)
    q_ids = on_device(ids[:, -229:], jnp.int32).at[:, :80].set(-1)
    mask = js.masks.causal() & js.masks.segments(q_ids, on_device(ids, jnp.int32))
    found = compare(q, k, stride=8, block_size=32, mask=mask, norm=0.5)
    assert not found[:, :, :2].any()
    assert (found[:, :, 3:] == 0).any()


@pytest.mark.newest
def test_two_consumers_a_ring_that_is_short_and_tiles_that_are_not_listed(monkeypatch):
    # the first of two tiles of 128 query cells sees one of two tiles of key cells
    q, k, _ = qkv(4 * 256, heads=1, kv_heads=1, dim=192, dtype=jnp.float16)
    config = mosaic_cells.Config(stages=2)
    monkeypatch.setattr(mosaic_cells, "default_config", lambda *_: config)
    compare(q, k, stride=4, block_size=128, mask=js.masks.causal())


@pytest.mark.newest
def test_blocks_of_more_cells_than_a_sum_and_than_there_are():
    q, k, _ = qkv(40, 150, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    found = compare(q, k, stride=1, block_size=128)
    np.testing.assert_allclose(found.sum(-1), 40, rtol=1e-5)


def test_refusals_name_the_reason():
    q, k, _ = qkv(64, dim=64)
    sizes = {"stride": 4, "block_size": 32, "implementation": "mosaic"}
    with pytest.raises(NotImplementedError, match="a Hopper GPU"):
        antidiagonal_scores(q, k, **sizes)
    with pytest.raises(ValueError, match="implementation='cuda' must be one of 'xla', 'mosaic'"):
        antidiagonal_scores(q, k, **{**sizes, "implementation": "cuda"})
    half = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    with _compat.interpreter():
        for arrays, options, said in (
            ((q, k), {}, "not float32"),
            (half, {"block_size": 12}, "4, 8, 16, 32, 64 or 128 cells, not 3"),
            (half, {"block_size": 8}, "4, 8 or 16 key cells, not 2"),
            (half, {"norm": -1.0}, "a scale above 0"),
        ):
            with pytest.raises(NotImplementedError, match=said):
                antidiagonal_scores(*arrays, **{**sizes, **options})
