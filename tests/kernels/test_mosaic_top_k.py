"""The kernel of the best products in JAX's interpreter, which also looks for data races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention.best_blocks import best_blocks
from pallas_kernels import _compat
from pallas_kernels.top_k import mosaic
from tests.inputs import on_device, qkv


def both(q, k_means, **options):
    """What XLA and the kernel find."""
    exact = jax.jit(lambda *x: best_blocks(*x, **options, implementation="xla"))(q, k_means)
    with _compat.interpreter():
        got = jax.jit(lambda *x: best_blocks(*x, **options, implementation="mosaic"))(q, k_means)
        got = jax.block_until_ready(got)
    return got, exact


def small_integers(q_len, blocks, *, heads, kv_heads, dim, batch=1):
    """Products that are exact, few and often equal."""
    rng = np.random.default_rng(0)
    q, k = (
        on_device(rng.integers(-1, 2, (batch, *shape, dim)))
        for shape in ((q_len, heads), (blocks, kv_heads))
    )
    return q.astype(jnp.bfloat16), k.astype(jnp.float32)


@pytest.mark.newest
def test_ties_masks_and_forced_blocks_are_those_of_xla():
    # three tiles of blocks, the last not full; the queries are in the middle of the keys
    q, means = small_integers(150, 150, heads=2, kv_heads=1, dim=40, batch=2)
    ids = np.sort(np.random.default_rng(1).integers(0, 2, (2, 600)), axis=1)
    offset = on_device([300, 450])
    q_ids = jnp.take_along_axis(on_device(ids, jnp.int32), offset[:, None] + jnp.arange(150), 1)
    q_ids = q_ids.at[:, :3].set(-1)
    mask = js.masks.causal(offset=offset) & js.masks.segments(q_ids, on_device(ids, jnp.int32))
    # NaNs of both signs, infinities, both zeros
    means = means.at[0, 5].set(jnp.nan).at[1, 70].set(-jnp.nan).at[0, 99].set(jnp.inf)
    means = means.at[1, 8].set(0.0).at[1, 9].set(-0.0)
    got, exact = both(q, means, block=4, kv_len=600, top_k=5, mask=mask, offset=offset)
    jax.tree.map(np.testing.assert_array_equal, got, exact)
    assert {0, 2, 5} < set(np.unique(got.counts).tolist())
    own = (offset[:, None] + jnp.arange(150)) // 4
    assert (got.indices == own[:, None, :, None]).any(-1)[:, :, 3:].all()


@pytest.mark.newest
def test_products_are_as_precise_as_f32_and_rings_may_be_short(monkeypatch):
    """Of as many places as there can be; no mask, nothing is forced."""
    config = mosaic.Config(stages=1)
    monkeypatch.setattr(mosaic, "default_config", lambda *_: config)
    q, means, _ = qkv(64, 200, heads=1, kv_heads=1, dim=64, batch=(1,))
    q = q.astype(jnp.bfloat16)
    options = {"block": 1, "kv_len": 200, "mask": None, "offset": jnp.zeros(1, jnp.int32)}
    got, exact = both(q, means, top_k=64, **options)
    np.testing.assert_array_equal(got.indices, exact.indices)
    # sums of 64 products of 24 bits, in another order
    np.testing.assert_allclose(got.scores, exact.scores, rtol=1e-5, atol=2.0**-18)


def test_refusals_name_the_reason():
    q, means, _ = qkv(70, 80, heads=1, kv_heads=1, dim=64, batch=(1,))
    options = {"block": 1, "kv_len": 80, "mask": None, "offset": jnp.zeros(1, jnp.int32)}
    options["implementation"] = "mosaic"
    with pytest.raises(NotImplementedError, match="a Hopper GPU"):
        best_blocks(q, means, top_k=2, **options)
    with pytest.raises(ValueError, match="implementation='cuda' must be one of 'xla', 'mosaic'"):
        best_blocks(q, means, top_k=2, **{**options, "implementation": "cuda"})
    half = q.astype(jnp.bfloat16)
    wide = jnp.pad(half, [(0, 0)] * 3 + [(0, 512)]), jnp.pad(means, [(0, 0)] * 3 + [(0, 512)])
    with _compat.interpreter():
        for arrays, top_k, said in (
            ((q, means), 2, "bfloat16, not float32"),
            ((half, means), 65, "up to 64 of each row in registers, not 65"),
            (wide, 2, "no room for a tile of 3 parts of keys of width 576"),
        ):
            with pytest.raises(NotImplementedError, match=said):
                best_blocks(*arrays, top_k=top_k, **options)
