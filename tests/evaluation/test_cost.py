"""The accountant against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.evaluation import Cost, attend_backward_cost, attend_cost, count_flops, plan_cost
from tests.inputs import on_device

SIZES = {"heads": 4, "kv_heads": 2, "dim": 16, "v_dim": 24}


def plan_of(list_heads):
    """Tiles of 32 x 16 over 64 queries and 48 keys: 2 rows of 3; rows list 2 and 3 of them."""
    tiles = on_device([[True, False, True], [True, True, True]])
    tiles = jnp.broadcast_to(tiles, (list_heads, 2, 3))
    return js.BlockMask.from_dense(tiles, q_len=64, kv_len=48, block_q=32, block_kv=16)


@pytest.mark.parametrize("list_heads", [1, 2, 4])
def test_attend_forward_and_backward_by_hand(list_heads):
    plan = plan_of(list_heads)
    tiles = 5 * 4
    forward = attend_cost(plan, **SIZES)
    assert forward.flops == tiles * 2 * 32 * 16 * (16 + 24)
    # q and out of 64 rows and 4 heads; k and v of 16 keys per tile; 4 bytes each
    assert forward.bytes == 4 * (64 * 4 * (16 + 24) + tiles * 16 * (16 + 24))
    backward = attend_backward_cost(plan, **SIZES)
    # q k^T, ds k, ds^T q are products over dim; do v^T, p^T do over v_dim
    assert backward.flops == tiles * 2 * 32 * 16 * (3 * 16 + 2 * 24)
    per_tile = 32 * (16 + 24 + 2 + 2 * 16)
    assert backward.bytes == 4 * (2 * 64 * 4 * 24 + tiles * per_tile + 2 * 48 * 2 * (16 + 24))
    half = attend_cost(plan, **SIZES, itemsize=2)
    assert half == Cost(forward.flops, forward.bytes / 2)


def test_what_is_skipped_on_the_way_costs_its_logits_and_keys():
    kept = js.BlockMask.from_dense(jnp.ones((4, 2, 1), bool) & jnp.eye(2, 3, dtype=bool),
                                   q_len=64, kv_len=48, block_q=32, block_kv=16)  # fmt: skip
    cost = attend_cost(kept, **SIZES, scored=plan_of(1))
    assert cost.flops == 2 * 32 * 16 * (20 * 16 + 8 * 24)
    assert cost.bytes == 4 * (64 * 4 * (16 + 24) + 16 * (20 * 16 + 8 * 24))
    assert attend_cost(kept, **SIZES, scored=kept) == attend_cost(kept, **SIZES)
    # tiles that all sequences share are looked at by each
    three = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape)), kept)
    assert attend_cost(three, **SIZES, scored=plan_of(1)).flops == 3 * cost.flops


@pytest.mark.parametrize("cost", [attend_cost, attend_backward_cost])
def test_parts_of_a_plan_cost_what_each_costs(cost):
    columns = jnp.zeros((4, 2, 48), bool).at[:, 1, 7].set(True)
    columns = js.BlockMask.from_dense(columns, q_len=64, kv_len=48, block_q=32, block_kv=1)
    both, tiles = cost((plan_of(4), columns), **SIZES), cost(plan_of(4), **SIZES)
    assert both == tiles.plus(cost(columns, **SIZES))
    # 4 columns of 32 queries beside 20 tiles of 32 x 16
    assert both.flops == pytest.approx(tiles.flops * (1 + 4 / 16 / 20))


def test_plans_of_other_kinds_cost_the_tiles_that_they_come_down_to():
    groups = js.TokenGroups.from_ids(*[jnp.arange(256)[None] // 64] * 2, groups=4)
    assert attend_cost(groups, **SIZES).flops == 4 * 4 * 2 * 64 * 64 * (16 + 24)
    # rows list 2 and 3 of 3 blocks; a row of tiles has one column to see, of a tile of 16
    tiles, zeros = plan_of(2), jnp.zeros((3, 2, 1))
    pooled = js.BlockPyramid.from_pooled(tiles, zeros, zeros, zeros[..., 0])
    columns = 4 * 2 * 32 * 16 * (16 + 24)
    assert attend_cost(pooled, **SIZES).flops == attend_cost(tiles, **SIZES).flops + columns
    levels = js.BlockPyramid.from_levels(tiles, jnp.ones_like(tiles.kv_indices))
    assert attend_cost(levels, **SIZES).flops == attend_cost(tiles, **SIZES).flops / 2


def test_cost_of_a_causal_prompt_follows_the_block_formula():
    """Tiles of a causal plan: M (M + 1) / 2, of which top-k rows keep k (k + 1) / 2 + (M - k) k."""
    blocks, keep = 32, 5
    rows = np.minimum(np.arange(blocks) + 1, keep)
    tiles = np.arange(blocks) < rows[:, None]
    sizes = {"q_len": 512, "kv_len": 512, "block_q": 16, "block_kv": 16}
    sparse = js.BlockMask.from_dense(on_device(tiles)[None], **sizes)
    dense = js.block_mask(js.masks.causal(), **sizes)
    share = attend_cost(sparse, **SIZES).share(attend_cost(dense, **SIZES))
    expected = (keep * (keep + 1) / 2 + (blocks - keep) * keep) / (blocks * (blocks + 1) / 2)
    assert share.flops == pytest.approx(expected, rel=1e-12)


def test_count_flops_of_products_scans_and_elements():
    a, b = jnp.ones((3, 8, 5)), jnp.ones((3, 5, 7))
    assert count_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 2 * 3 * 8 * 5 * 7

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=6)[0]

    assert count_flops(scanned, jnp.ones((4, 4))) == 6 * 2 * 4**3
    assert count_flops(jax.jit(lambda x: jnp.exp(x) + 1.0), jnp.ones((10,))) == 20
    # moves and integers are not floating-point operations
    assert count_flops(lambda x, i: (x.T.reshape(-1), i + 1), jnp.ones((4, 5)), jnp.arange(3)) == 0


def test_plan_cost_of_pooled_scores():
    """Planning by block means is at least its score product and its inputs."""
    q, k = jnp.ones((256, 4, 16)), jnp.ones((256, 2, 16))
    method = js.mean_pooled(block_size=32, density=0.5)
    cost = plan_cost(jax.jit(lambda q, k: method.plan((), q, k, mask=js.masks.causal())[0]), q, k)
    product, pooling = 2 * 4 * 8 * 8 * 16, 8 * (4 + 2) * 16
    assert product + pooling <= cost.flops <= 3 * (product + (4 + 2) * 256 * 16)
    lists = 4 * (4 * 8 * 8 + 4 * 8) + 4  # int32 lists and counts, a bool per head
    assert cost.bytes == 4 * 256 * 6 * 16 + lists


def test_costs_add():
    assert Cost(1.0, 2.0).plus(Cost(3.0, 5.0)) == Cost(4.0, 7.0)
