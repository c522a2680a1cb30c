"""TokenGroups and BlockPyramid: their invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import on_device


def groups_of(q_ids, kv_ids, groups=4):
    return js.TokenGroups.from_ids(on_device(q_ids), on_device(kv_ids), groups=groups)


def test_groups_hold_their_tokens_in_order():
    rng = np.random.default_rng(0)
    q_ids, kv_ids = rng.integers(-1, 5, (2, 3, 20)), rng.integers(-1, 5, (2, 3, 30))
    q_ids[q_ids == 2] = 0  # group 2 has no query
    plan = groups_of(q_ids, kv_ids)
    for ids, order, offsets in (
        (q_ids, plan.q_order, plan.q_offsets),
        (kv_ids, plan.kv_order, plan.kv_offsets),
    ):
        order, offsets = np.asarray(order), np.asarray(offsets)
        for at in np.ndindex(2, 3):
            np.testing.assert_array_equal(np.sort(order[at]), np.arange(ids.shape[-1]))
            for group in range(4):
                members = order[at][offsets[at][group] : offsets[at][group + 1]]
                np.testing.assert_array_equal(members, np.flatnonzero(ids[at] == group))
    outside = (q_ids < 0) | (q_ids > 3)
    np.testing.assert_array_equal(plan.q_ids(), np.where(outside, -1, q_ids))
    same = (q_ids[..., :, None] == kv_ids[..., None, :]) & ~outside[..., None]
    np.testing.assert_array_equal(plan.visible(), same)


def test_the_inverse_puts_tokens_back():
    ids = np.random.default_rng(1).integers(0, 4, (1, 16))
    plan = groups_of(ids, ids)
    x = jnp.arange(16)[None]
    grouped = jnp.take_along_axis(x, plan.q_order, axis=-1)
    np.testing.assert_array_equal(jnp.take_along_axis(grouped, plan.q_inverse(), axis=-1), x)


def test_integers_that_int32_lacks_are_no_group_token_or_level(without_shape_checks):
    ids = np.array([[0, 2**32, 1, -(2**32), 1]])
    plan = js.TokenGroups.from_ids(ids, ids, groups=2)
    assert plan.q_ids().tolist() == [[0, -1, 1, -1, 1]]
    orders = np.array([[2**32, 1, 2, 3, 4]])
    offsets = np.array([[0, 2, 2**32 + 3]])
    wide = js.TokenGroups(orders, orders, offsets, offsets)
    assert wide.kv_ids().tolist() == [[-1, 0, 1, 1, 1]]
    assert wide.without_missing_tokens().kv_ids().tolist() == [[-1, 0, 1, 1, 1]]
    levels = np.where(np.eye(4, dtype=bool)[None, :, :1], 2**32, 0)
    plan = jax.jit(lambda lists: js.BlockPyramid.from_levels(lists, levels, top_level=1))(lists())
    assert (plan.levels > 1).tolist() == [[[True], [False], [False], [False]]]


def test_groups_under_jit_and_vmap():
    ids = on_device(np.random.default_rng(2).integers(0, 3, (4, 1, 12)))
    build = jax.jit(lambda i: js.TokenGroups.from_ids(i, i, groups=3))
    jax.tree.map(np.testing.assert_array_equal, jax.vmap(build)(ids), build(ids))


def test_groups_cost_no_table_of_groups_by_tokens():
    length, groups = 2**17, 2**11
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def build(i):
        plan = js.TokenGroups.from_ids(i, i, groups=groups)
        return plan, plan.q_ids()

    memory = jax.jit(build).lower(ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 4 * length  # such a table would take 2048


def lists():
    tiles = on_device(np.eye(4, dtype=bool))[None]
    return js.BlockMask.from_dense(tiles, q_len=16, kv_len=16, block_q=4, block_kv=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: groups_of(np.zeros((1, 4)), np.zeros((1, 4), int)), "q_ids holds float"),
        (lambda: groups_of(np.zeros((1, 4), int), np.zeros((1, 4), int), 0), "groups=0"),
        (
            lambda: groups_of(np.zeros((2, 4), int), np.zeros((3, 4), int)),
            r"q_ids has shape \(2, 4\) and kv_ids \(3, 4\); axes but the last must be the same",
        ),
        (
            lambda: js.BlockPyramid.from_levels(lists(), jnp.zeros((1, 4, 2), int)),
            "levels has shape",
        ),
        (
            lambda: js.BlockPyramid.from_pooled(
                lists(), jnp.zeros((3, 2, 8)), jnp.zeros((3, 2, 8)), jnp.zeros((3, 2))
            ),
            "pooled_k has 3 columns; there are 4 blocks",
        ),
        (
            lambda: js.BlockPyramid.from_pooled(
                lists(), jnp.zeros((4, 2, 8)), jnp.zeros((4, 1, 8)), jnp.zeros((4, 2))
            ),
            "must agree",
        ),
    ],
)
def test_bad_input_is_named(call, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        call()
