"""The kernels of attention maps in JAX's interpreter, which also looks for data races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention.map_scores import map_maxima, map_sums
from jsparse.core.softmax_blocks import map_blocks
from pallas_kernels import _compat
from tests.inputs import on_device, qkv

EPS = np.finfo(np.float32).eps


def compare(q, k, **options):
    """Holds sums and maxima to those of XLA, of the same inputs in f32."""
    exact = map_blocks(q.astype(jnp.float32), k.astype(jnp.float32), **options)
    with _compat.interpreter():
        got = [
            jax.block_until_ready(function(q, k, implementation="mosaic", **options))
            for function in (map_sums, map_maxima)
        ]
    # roundings of the logarithm and of exponentials in base 2, of as many rows as a tile has
    for x, y, rows in zip(got, exact[:2], (options["block_q"], 1), strict=True):
        np.testing.assert_allclose(x, y, rtol=64 * EPS, atol=64 * EPS * rows)
    return exact


@pytest.mark.newest
def test_masks_grouped_heads_odd_lengths_and_rows_that_see_nothing():
    q, k, _ = qkv(100, 150, heads=4, kv_heads=2, dim=40, batch=(2,), dtype=jnp.bfloat16)
    ids = np.sort(np.random.default_rng(1).integers(0, 3, (2, 150)), axis=1)
    q_ids = on_device(ids[:, 50:], jnp.int32).at[:, :5].set(-1)
    mask = js.masks.causal() & js.masks.segments(q_ids, on_device(ids, jnp.int32))
    found = compare(q, k, block_q=64, block_kv=64, scale=0.2, mask=mask)
    assert np.isneginf(found.lse[..., :5]).all()
    assert (np.asarray(found.sums) == 0).any()


@pytest.mark.newest
def test_two_consumers_halves_of_tiles_and_whole_tiles_before_masked_ones():
    q, k, _ = qkv(128, 384, heads=1, kv_heads=1, dim=64, dtype=jnp.float16)
    mask = js.masks.causal() & js.masks.sliding_window(left=255)
    found = compare(q, k, block_q=128, block_kv=128, mask=mask)
    assert np.asarray(found.sums).all()


@pytest.mark.newest
def test_more_tiles_than_a_warpgroup_has_rows():
    """Numbers that wait are written in groups; here one that is full and one that is not."""
    q, k, _ = qkv(64, 64 * 66, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    compare(q, k, block_q=64, block_kv=64)


def test_refusals_name_the_reason():
    q, k, _ = qkv(64, dim=64)
    with pytest.raises(NotImplementedError, match="a Hopper GPU"):
        map_sums(q, k, implementation="mosaic")
    with pytest.raises(ValueError, match="implementation='cuda' must be one of 'xla', 'mosaic'"):
        map_maxima(q, k, implementation="cuda")
    with pytest.raises(ValueError, match="block_q=0"):
        map_sums(q, k, block_q=0)
    half = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    with _compat.interpreter():
        for arrays, options, said in (
            ((q, k), {}, "not float32"),
            (half, {"block_q": 32}, "not 32 x 128"),
            (half, {"scale": -1.0}, "a scale above 0"),
        ):
            with pytest.raises(NotImplementedError, match=said):
                map_sums(*arrays, implementation="mosaic", **options)
