"""Tokens in another order: back again, across grouped heads, and attention that does not notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention.reordered import attend_reordered
from jsparse.core import reordering
from jsparse.types import Frame, TileGrid
from tests.inputs import on_device, qkv

RNG = np.random.default_rng(0)
CAUSAL = js.masks.causal()


def orders(heads, length, batch=()):
    rows = int(np.prod(batch, dtype=int)) * heads
    shuffled = np.stack([RNG.permutation(length) for _ in range(rows)])
    return on_device(shuffled.reshape(*batch, heads, length), jnp.int32)


def test_tile_orders_of_the_papers():
    draft = reordering.tile_order((1, 4, 4), (1, 2, 2))[0]
    assert draft.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    neighbourhood = reordering.tile_order((4, 6), (2, 3))[0]
    assert neighbourhood[:12].tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
    by_place = reordering.tile_order((3, 4), (3, 1))
    assert by_place[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert reordering.inverse(by_place)[0].tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    ragged = reordering.tile_order((3, 3), (2, 2))[0]
    assert ragged.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_restoring_undoes_reordering(batch):
    order = orders(4, 17, batch)
    x = on_device(RNG.normal(size=(*batch, 17, 4, 5)), jnp.float32)
    moved = jax.jit(reordering.reorder)(x, order)
    for at in np.ndindex(*batch, 4):
        lead, head = at[:-1], at[-1]
        np.testing.assert_array_equal(moved[lead][:, head], x[lead][order[at], head])
    np.testing.assert_array_equal(reordering.restore(moved, order), x)
    np.testing.assert_array_equal(
        jnp.take_along_axis(order, reordering.inverse(order), axis=-1),
        jnp.broadcast_to(jnp.arange(17), order.shape),
    )


def test_heads_are_repeated_on_the_side_that_has_fewer():
    _, k, _ = qkv(12, heads=4, kv_heads=2, batch=(2,))
    per_query_head = orders(4, 12)
    moved = reordering.reorder(k, per_query_head)
    assert moved.shape == (2, 12, 4, 16)
    for head in range(4):
        np.testing.assert_array_equal(moved[:, :, head], k[:, per_query_head[head], head // 2])
    q, _, _ = qkv(12, heads=4, batch=(2,))
    per_kv_head = orders(2, 12)
    moved = reordering.reorder(q, per_kv_head)
    for head in range(4):
        np.testing.assert_array_equal(moved[:, :, head], q[:, per_kv_head[head // 2], head])
    shared = orders(1, 12)
    np.testing.assert_array_equal(reordering.reorder(k, shared), k[:, shared[0]])


def test_gradients_go_back_to_where_the_tokens_stood():
    x, weights = on_device(RNG.normal(size=(2, 9, 2, 3)), jnp.float32)
    order = orders(2, 9)
    gradient = jax.grad(lambda x: (reordering.reorder(x, order) * weights).sum())(x)
    np.testing.assert_array_equal(gradient, reordering.restore(weights, order))


MASKS = {
    "causal": CAUSAL,
    "window": CAUSAL & js.masks.sliding_window(left=9),
    "streaming": CAUSAL & (js.masks.sinks(3) | js.masks.sliding_window(left=4)),
    "segments": CAUSAL & js.masks.segments(jnp.repeat(jnp.arange(3), 16)[:45]),
    "not": ~CAUSAL,
    "strided": CAUSAL & js.masks.strided(stride=5),
    "lengths": js.masks.lengths(40, 30),
}


# every mask, and every number of orders with the mask that knows positions alone: a program each
@pytest.mark.parametrize(
    ("name", "order_heads"),
    [
        pytest.param(name, (1, 2, 4)[n % 3], marks=[pytest.mark.slow] * (n % 2))
        for n, name in enumerate(MASKS)
        if name != "causal"
    ]
    + [
        ("causal", 4),
        pytest.param("causal", 1, marks=pytest.mark.slow),
        pytest.param("causal", 2, marks=pytest.mark.slow),
    ],
)
def test_attention_in_any_order_is_attention(name, order_heads):
    """Reordered tokens under the reordered mask and its tiles give the plain result, restored."""
    q, k, v = qkv(45, heads=4, kv_heads=2, dim=8, batch=(2,))
    q_order, kv_order = orders(order_heads, 45, (2,)), orders(order_heads, 45, (2,))
    weights = on_device(RNG.normal(size=q.shape), jnp.float32)

    def permuted(q, k, v):
        mask = js.masks.reordered(MASKS[name], heads=4, q_order=q_order, kv_order=kv_order)
        plan = js.block_mask(mask, 45, 45, block_q=8, block_kv=8)
        return attend_reordered(q, k, v, plan, q_order=q_order, kv_order=kv_order, mask=mask)

    def plain(q, k, v):
        return js.attend(q, k, v, mask=MASKS[name], implementation="reference")

    def value(run):
        return jax.jit(jax.value_and_grad(lambda *x: (run(*x) * weights).sum(), argnums=(0, 1, 2)))(
            q, k, v
        )

    np.testing.assert_allclose(permuted(q, k, v), plain(q, k, v), atol=4e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        value(permuted),
        value(plain),
    )


@pytest.mark.parametrize(
    ("shape", "order_heads", "batch"),
    [
        ((45, 45), 4, (2,)),
        ((45, 45), 2, ()),
        ((4, 1, 45), 2, ()),
        ((2, 4, 45, 1), 2, (2,)),
        ((4, 45, 45), 2, (2,)),
    ],
    ids=str,
)
def test_what_changes_logits_is_told_the_tokens_own_places(shape, order_heads, batch):
    q, k, v = qkv(45, heads=4, kv_heads=2, dim=8, batch=(2,))
    bias = on_device(RNG.normal(size=shape), jnp.float32)
    q_order, kv_order = orders(order_heads, 45, batch), orders(order_heads, 45, batch)

    def score_mod(logit, batch, head, q_index, kv_index):
        return logit + 0.1 * batch + jnp.cos(q_index + 0.5 * head) * jnp.sin(kv_index - 1.0 * head)

    changes = {"bias": bias, "score_mod": score_mod, "return_lse": True}

    @jax.jit
    def both(q, k, v):
        plain = js.attend(q, k, v, mask=CAUSAL, implementation="reference", **changes)
        mask = js.masks.reordered(CAUSAL, heads=4, q_order=q_order, kv_order=kv_order)
        here = {"q_order": q_order, "kv_order": kv_order, "mask": mask}
        return attend_reordered(q, k, v, None, implementation="reference", **here, **changes), plain

    got, expected = both(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-6), got, expected)


@pytest.mark.parametrize("name", MASKS)
def test_tiles_of_reordered_masks_are_sound(name):
    q_order, kv_order = orders(2, 45), orders(2, 45)
    mask = js.masks.reordered(MASKS[name], heads=2, q_order=q_order, kv_order=kv_order)
    flat, grid = mask.flatten_batch(()), TileGrid(45, 45, 8, 4)
    classify = flat.classifier(grid)
    for head in range(2):
        frame = Frame(45, 45, 0, head)
        pairs = np.asarray(flat.visible(jnp.arange(45)[:, None], jnp.arange(45), frame))
        original = MASKS[name].flatten_batch(())
        expected = original.visible(q_order[head][:, None], kv_order[head], Frame(45, 45))
        np.testing.assert_array_equal(pairs, expected)
        some, every = classify(jnp.arange(6)[:, None], jnp.arange(12), frame)
        for a, b in np.ndindex(6, 12):
            tile = pairs[8 * a : 8 * a + 8, 4 * b : 4 * b + 4]
            assert some[a, b] or not tile.any()
            assert not every[a, b] or tile.all()


def test_a_segment_wise_order_keeps_causal_tiles_sparse():
    """Keys sorted inside segments: tiles of later segments stay empty, earlier ones full."""
    within = orders(1, 16)[0]
    order = (jnp.arange(4)[:, None] * 16 + within).reshape(1, 64)
    mask = js.masks.reordered(CAUSAL, heads=1, kv_order=order).flatten_batch(())
    classify = mask.classifier(TileGrid(64, 64, 16, 16))
    some, every = classify(jnp.arange(4)[:, None], jnp.arange(4), Frame(64, 64))
    np.testing.assert_array_equal(some, np.tril(np.ones((4, 4), bool)))
    np.testing.assert_array_equal(every, np.tril(np.ones((4, 4), bool), -1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reordering.reorder(qkv(8)[0], jnp.zeros((1, 8))), "order holds float32"),
        (lambda: reordering.reorder(qkv(8)[0], orders(1, 9)), r"order has shape \(1, 9\)"),
        (lambda: reordering.reorder(qkv(8)[0], orders(3, 8)), "order has 3 heads and the array 4"),
        (
            lambda: reordering.reorder(qkv(8)[0], orders(1, 8, (2,))),
            r"order has batch axes \(2,\)",
        ),
        (lambda: reordering.tile_order((4, 4), (2,)), "one size per axis"),
        (lambda: reordering.tile_order((4, 4), (2, 0)), "tile=0"),
        (
            lambda: js.masks.reordered(CAUSAL, heads=4, q_order=orders(3, 8)),
            "heads=4 must be a multiple of 3",
        ),
        (
            lambda: js.masks.reordered(
                js.masks.dense(jnp.ones((2, 8, 8), bool)), heads=4, kv_order=orders(4, 8)
            ),
            "The mask has 2 heads; expected 1 or heads=4",
        ),
        (
            lambda: attend_reordered(*qkv(8), None, kv_order=orders(1, 8), bias=jnp.zeros((8, 7))),
            r"bias has shape \(1, 8, 7\)",
        ),
        (
            lambda: js.attend(
                *qkv(9), mask=js.masks.reordered(CAUSAL, heads=4, q_order=orders(1, 8))
            ),
            "q_order covers 8 tokens; the input has 9",
        ),
    ],
)
def test_bad_input_is_named(call, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        call()
