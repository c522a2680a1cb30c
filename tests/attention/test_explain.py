"""explain counts what attend computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import on_device, qkv


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


MASK = js.masks.causal() & js.masks.segments(jnp.repeat(jnp.arange(2), 150))
PLAN = js.block_mask(MASK, 300, 300, block_q=64, block_kv=64)


@pytest.mark.parametrize("mask", [None, js.masks.causal(), MASK], ids=["none", "static", "arrays"])
@pytest.mark.parametrize("plan", [None, PLAN], ids=["default", "plan"])
@pytest.mark.parametrize("transform", [jax.jit, jax.grad], ids=["jit", "grad"])
def test_what_is_known_is_counted_while_q_is_traced(transform, plan, mask):
    found = []

    def call(q, k, v):
        found.append(js.explain(q, k, v, plan, mask=mask))
        return q.sum()

    operands = qkv(300)
    transform(call)(*operands)
    assert found == [js.explain(*operands, plan, mask=mask)]


@pytest.mark.parametrize("traced", ["mask", "plan", "groups"])
def test_traced_tiles_are_not_counted(traced):
    q, k, v = qkv(64)

    def call(ids):
        mask = js.masks.segments(ids)
        plans = {
            "mask": lambda: None,
            "plan": lambda: js.block_mask(mask, 64, 64),
            "groups": lambda: js.TokenGroups.from_ids(ids[None], ids[None], groups=2),
        }
        js.explain(q, k, v, plans[traced](), mask=mask if traced == "mask" else None)

    with pytest.raises(ValueError, match="call it outside of jit"):
        jax.jit(call)(jnp.zeros(64, int))


def test_a_problem_that_no_implementation_takes():
    q, k, v = qkv(16)
    lists = js.BlockMask.from_dense(
        jnp.eye(4, dtype=bool)[None], q_len=16, kv_len=16, block_q=4, block_kv=4
    )
    pyramid = js.BlockPyramid.from_levels(lists, jnp.zeros_like(lists.kv_indices))
    with pytest.raises(NotImplementedError, match="act on pairs"):
        js.explain(q, k, v, pyramid, bias=jnp.zeros(16))


def test_counts_follow_lists_per_head():
    q, k, v = qkv(64)
    tiles = np.zeros((2, 4, 4), bool)
    tiles[0] = np.eye(4)
    tiles[1] = True
    plan = js.BlockMask.from_dense(on_device(tiles), q_len=64, kv_len=64, block_q=16, block_kv=16)
    assert js.explain(q, k, v, plan).computed == 2 * 4 + 2 * 16


def test_parts_of_a_plan_add_up():
    q, k, v = qkv(64)
    tiles = js.BlockMask.from_dense(
        jnp.eye(4, dtype=bool)[None], q_len=64, kv_len=64, block_q=16, block_kv=16
    )
    columns = jnp.zeros((1, 4, 64), bool).at[:, 1:, 3].set(True)
    columns = js.BlockMask.from_dense(columns, q_len=64, kv_len=64, block_q=16, block_kv=1)
    found = js.explain(q, k, v, (tiles, columns), mask=js.masks.causal())
    alone = [js.explain(q, k, v, part, mask=js.masks.causal()) for part in (tiles, columns)]
    assert [part.computed for part in found.parts] == [4 * 4, 4 * 3]
    assert [part.full for part in found.parts] == [0, 4 * 3]
    # 4 of 16 tiles, and 3 of their 64 columns of 16
    assert found.density == 4 / 16 + 3 / (4 * 64)
    for name in ("flops", "backward_flops", "bytes"):
        assert getattr(found, name) == sum(getattr(part, name) for part in alone)
    assert found.flops == 4 * (4 * 16 * 16 + 3 * 16) * 2 * 32
    assert not found.overflowed
    text = str(found)
    assert "part 2 of 2" in text
    assert "12 of 1024 (1.2 %) of 16 x 1" in text
    assert "26.2 % of the pairs" in text
    with pytest.raises(ValueError, match="empty tuple"):
        js.explain(q, k, v, ())
