"""explain counts what attend computes."""

import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import qkv


def test_counts_of_a_causal_window():
    q, k, v = qkv(1024, heads=4, kv_heads=2, dim=16, batch=(2,))
    mask = js.masks.causal() & js.masks.sliding_window(left=255)
    found = js.explain(q, k, v, mask=mask)
    per_head = 1 + 2 + 6 * 3
    assert (found.tiles, found.computed) == (2 * 4 * 64, 2 * 4 * per_head)
    assert found.full == 2 * 4 * 7  # the tile one left of the diagonal, in all rows but the first
    assert found.flops == 2 * 4 * per_head * 2 * 128 * 128 * 32
    assert found.backward_flops == 2.5 * found.flops
    assert found.implementation == "xla"
    assert set(found.refused) == {"mosaic", "triton"}
    assert not found.overflowed
    text = str(found)
    assert "168 of 512 (32.8 %) of 128 x 128" in text
    assert "56 full, 112 partly masked" in text


def test_an_overflowed_plan_is_named():
    q, k, v = qkv(64)
    tiles = jnp.ones((1, 4, 4), bool)
    plan = js.BlockMask.from_dense(tiles, q_len=64, kv_len=64, block_q=16, block_kv=16, width=2)
    found = js.explain(q, k, v, plan)
    assert found.overflowed
    assert "too narrow" in str(found)


def test_a_plan_that_no_executor_takes():
    q, k, v = qkv(8)
    ids = jnp.zeros((1, 8), int)
    with pytest.raises(NotImplementedError, match="TokenGroups"):
        js.explain(q, k, v, js.TokenGroups.from_ids(ids, ids, groups=1))


def test_counts_follow_lists_per_head():
    q, k, v = qkv(64)
    tiles = np.zeros((2, 4, 4), bool)
    tiles[0] = np.eye(4)
    tiles[1] = True
    plan = js.BlockMask.from_dense(jnp.asarray(tiles), q_len=64, kv_len=64, block_q=16, block_kv=16)
    assert js.explain(q, k, v, plan).computed == 2 * 4 + 2 * 16
