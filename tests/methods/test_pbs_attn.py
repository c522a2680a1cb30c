"""PBS-Attn against its oracle, and the checks of its specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention.reordered import attend_reordered
from jsparse.core import pooling, reordering
from jsparse.estimators.pbs_attn import last_queries_attention, order_in_segments
from tests.inputs import on_device, qkv
from tests.oracles import pbs_attn as oracle

CAUSAL = js.masks.causal()
DOCUMENTS = CAUSAL & js.masks.segments(jnp.repeat(jnp.arange(3), 20)[:55])
WINDOW = CAUSAL & js.masks.sliding_window(left=30) & js.masks.lengths(50, 41)
WORKED_K = on_device([0, 3, 1, 2, 1, 0, 2, 0, 5], jnp.float32)[:, None, None]


def planned(q, k, mask=CAUSAL, **arguments):
    """A plan and its info, compiled: operation by operation it would be many small programs."""
    method = js.pbs_attn(**arguments)
    return jax.jit(lambda q, k: method.plan((), q, k, mask=mask))(q, k)


def pairs_of(plan, info):
    """A plan without batch axes as bools [heads, q_len, kv_len], keys in their own places."""
    pairs = np.asarray(plan.to_dense()).repeat(plan.block_q, 1).repeat(plan.block_kv, 2)
    pairs = pairs[:, : plan.q_len, : plan.kv_len]
    order = np.asarray(info.kv_order).repeat(len(pairs) // len(info.kv_order), 0)
    return np.take_along_axis(pairs, order.argsort(-1)[:, None], -1)


def test_worked_example():
    settings = {"block_size": 2, "segment_size": 4, "threshold": 0.6}
    q = jnp.ones((9, 1, 1))
    plan, info = planned(q, WORKED_K, **settings)
    np.testing.assert_array_equal(info.kv_order[0], [1, 3, 2, 0, 6, 4, 5, 7, 8])
    for row in (2, 3):
        np.testing.assert_allclose(info.block_scores[0, row, :2], [0.880797, 0.119203], atol=1e-6)
    # the last query alone, over 2.5, 0.5, 1.5 and 0: the first block reaches the threshold
    np.testing.assert_array_equal(plan.to_dense()[0, 4], [1, 1, 0, 0, 1])
    # the authors average a zero row in, which here is a token like others
    zero = jnp.zeros((1, 1, 1))
    q, k = jnp.concatenate([q, zero]), jnp.concatenate([WORKED_K, zero])
    plan, info = planned(q, k, **settings)
    expected = [0.442299, 0.162713, 0.268268, 0.126721, 0.0]
    np.testing.assert_allclose(info.block_scores[0, 4], expected, atol=1e-6)
    np.testing.assert_array_equal(
        plan.to_dense()[0],
        [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]],
    )


@pytest.mark.parametrize(
    ("q_len", "kv_len", "block", "segment", "causal"),
    [
        (64, 64, 4, 16, True),
        (45, 45, 8, 16, True),
        (21, 40, 4, 8, True),
        (30, 24, 4, 8, True),
        (3, 37, 8, 8, False),
    ],
)
def test_order_scores_tiles_and_output_equal_the_oracle(q_len, kv_len, block, segment, causal):
    q, k, v = qkv(q_len, kv_len, dim=8)
    q = 2 * q
    mask = CAUSAL if causal else None

    @jax.jit
    def run(threshold):
        method = js.pbs_attn(block_size=block, segment_size=segment, threshold=threshold)
        plan, info = method.plan((), q, k, mask=mask)
        out = js.sparse_attention(q, k, v, method, mask=mask, implementation="reference")
        return plan.to_dense(), info, out

    offset = kv_len - q_len if causal else kv_len
    sizes = {"block": block, "visible": np.tri(q_len, kv_len, offset, dtype=bool)}
    w = oracle.weights(q, k, segment=segment, **sizes)
    order = oracle.orders(w, segment=segment, kv_len=kv_len)
    scores, chosen_from, kept = oracle.block_scores(q, k, order, segment=segment, **sizes)
    for threshold in ([0.3] * 4, [0.8] * 4, [0.2, 0.5, 0.9, 1.0]):
        tiles, info, out = run(on_device(threshold))
        np.testing.assert_array_equal(info.kv_order, order)
        np.testing.assert_allclose(info.block_scores, scores, rtol=2e-5, atol=2e-6)
        expected = oracle.select(scores, chosen_from, kept, threshold)
        np.testing.assert_array_equal(tiles, expected)
        expected = oracle.attention(q, k, v, order, expected, **sizes)
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_orders_are_permutations_of_segments_by_falling_weight():
    q, k, _ = qkv(75, batch=(2,))
    _, info = planned(q, k, block_size=8, segment_size=24)
    order = np.asarray(info.kv_order)
    weights = np.asarray(last_queries_attention(q, k, last=8, length=72, mask=CAUSAL))
    inside, tokens = order[..., :72], np.arange(72)
    ranked = np.take_along_axis(weights, inside, -1)
    assert (np.diff(ranked.reshape(2, 4, 3, 24)) <= 0).all()
    again = np.sort(inside.reshape(2, 4, 3, 24)).reshape(2, 4, 72)
    np.testing.assert_array_equal(again, np.broadcast_to(tokens, (2, 4, 72)))
    np.testing.assert_array_equal(order[..., 72:], np.broadcast_to([72, 73, 74], (2, 4, 3)))
    assert (inside != tokens).any()


def test_equal_weights_stay_in_their_order():
    order = order_in_segments(jnp.ones((1, 32)), segment_size=16, kv_len=35)
    np.testing.assert_array_equal(order[0], np.arange(35))


@pytest.mark.parametrize(("length", "threshold"), [(50, 1.0), (16, 0.1), (13, 0.1)])
def test_within_a_segment_and_with_all_the_mass_it_is_dense(length, threshold):
    q, k, v = qkv(length)
    method = js.pbs_attn(block_size=8, segment_size=16, threshold=threshold)

    @jax.jit
    def run(q, k, v):
        out, info = method.attend((), q, k, v, mask=CAUSAL, implementation="reference")
        dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
        return out, dense, info.kv_order

    out, dense, order = run(q, k, v)
    assert (order is None) == (length <= 16)
    np.testing.assert_allclose(out, dense, atol=2e-6)


def test_all_blocks_in_any_order_inside_segments_are_dense_attention():
    q, k, v = qkv(45)
    rng = np.random.default_rng(0)

    @jax.jit
    def run(order):
        mask = js.masks.reordered(CAUSAL, heads=4, kv_order=order)
        plan = js.block_mask(mask, 45, 45, block_q=8, block_kv=8)
        return attend_reordered(
            q, k, v, plan, kv_order=order, mask=mask, implementation="reference"
        )

    dense = run(jnp.tile(jnp.arange(45), (4, 1)))
    np.testing.assert_allclose(
        dense, js.attend(q, k, v, mask=CAUSAL, implementation="reference"), atol=2e-6
    )
    for segment in (8, 16, 45):
        ends = [(start, min(start + segment, 45)) for start in range(0, 45, segment)]
        order = [
            np.concatenate([rng.permutation(np.arange(*ends_)) for ends_ in ends]) for _ in range(4)
        ]
        np.testing.assert_allclose(run(on_device(np.stack(order))), dense, atol=2e-6)


def test_own_segment_and_the_block_of_key_0_are_always_kept():
    q, k, _ = qkv(100, seed=4)
    settings = {"block_size": 8, "segment_size": 32, "threshold": 1e-6}
    plan, info = planned(q, k, **settings)
    tiles, order = np.asarray(plan.to_dense()), np.asarray(info.kv_order)
    for head, row, column in np.ndindex(tiles.shape):
        tokens = order[head, 8 * column : 8 * column + 8]
        if tokens.min() <= 8 * row + 7 and (row // 4 == column // 4 or 0 in tokens):
            assert tiles[head, row, column]
    free, _ = planned(q, k, **settings, force_first_block=False)
    assert (tiles & ~np.asarray(free.to_dense())).any()


def test_sorting_gathers_scattered_keys_in_fewer_blocks():
    """One hot key per block: unsorted, every block holds as much; sorted, one in eight does."""
    rng = np.random.default_rng(0)
    length, block = 1024, 16
    q, k = (0.05 * rng.normal(size=(length, 1, 16)) for _ in range(2))
    q[:, :, 0] += 6
    k[np.arange(0, length, block) + rng.integers(0, block, length // block), :, 0] += 8
    q, k = on_device(q, jnp.float32), on_device(k, jnp.float32)

    def last_row(segment):
        sizes = {"block_size": block, "segment_size": segment}
        plan, _ = planned(q, k, **sizes, force_first_block=False)
        return np.asarray(plan.to_dense())[0, -1, : -segment // block].mean()

    assert last_row(block) > 0.85
    assert last_row(8 * block) <= 1 / 8


def test_output_and_gradients_are_those_of_the_pairs_in_their_own_places():
    """Through every modification of logits, against dense attention told which pairs there are."""
    q, k, v = qkv(55, dim=8)
    rng = np.random.default_rng(1)
    bias = on_device(rng.normal(size=(4, 55, 55)), jnp.float32)
    slopes = on_device(rng.normal(size=4), jnp.float32)
    settings = {"block_size": 8, "threshold": 0.3}
    pairs = on_device(pairs_of(*planned(q, k, DOCUMENTS, **settings)))

    def options(bias, slopes):
        def score_mod(logit, batch, head, q_index, kv_index):
            return logit + slopes[head] * jnp.sin(0.3 * (q_index - 2.0 * kv_index))

        sinks = on_device([0.5, -1.0, 0.0, 2.0])
        return {"bias": bias, "score_mod": score_mod, "sinks": sinks, "return_lse": True}

    def ours(q, k, v, *changes):
        method = js.pbs_attn(**settings)
        return js.sparse_attention(q, k, v, method, mask=DOCUMENTS, **options(*changes))

    def dense(q, k, v, *changes):
        mask = DOCUMENTS & js.masks.dense(pairs)
        return js.attend(q, k, v, mask=mask, implementation="reference", **options(*changes))

    def value_and_gradients(run):
        def loss(*operands):
            out, lse = run(*operands)
            return jnp.sin(out).sum() + lse.sum() / 8, (out, lse)

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))
        (_, outputs), gradients = compiled(q, k, v, bias, slopes)
        return outputs, gradients

    got, expected = value_and_gradients(ours), value_and_gradients(dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), got[0], expected[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), got[1], expected[1])


def test_a_shared_order_follows_the_mean_of_its_group():
    q, k, v = qkv(55)
    method = js.pbs_attn(block_size=8, threshold=0.3, share_in_group=True)

    @jax.jit
    def run(q, k, v):
        out, info = method.attend((), q, k, v, mask=WINDOW)
        return out, *method.plan((), q, k, mask=WINDOW), info.kv_order

    out, plan, info, order = run(q, k, v)
    np.testing.assert_array_equal(order, info.kv_order)
    weights = last_queries_attention(q, k, last=8, length=48, mask=WINDOW)
    expected = order_in_segments(weights.reshape(2, 2, 48).mean(1), segment_size=16, kv_len=55)
    np.testing.assert_array_equal(order, expected)
    mask = WINDOW & js.masks.dense(on_device(pairs_of(plan, info)))
    expected = js.attend(q, k, v, mask=mask, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=5e-6)


def test_a_cache_longer_than_what_it_holds():
    """Queries stand where `positions` says, and keys after them change nothing."""
    q, k, v = qkv(24, 96, batch=(2,))
    starts = on_device([40, 9])
    call = {"mask": js.masks.causal(offset=starts), "positions": starts[:, None] + jnp.arange(24)}
    method = js.pbs_attn(block_size=8, threshold=0.5)

    @jax.jit
    def run(k, v):
        plan, info = method.plan((), q, k, **call)
        out, _ = method.attend((), q, k, v, implementation="reference", **call)
        return plan.to_dense(), info.kv_order, out

    tiles, order, out = map(np.asarray, run(k, v))
    held = (jnp.arange(96) < starts[:, None] + 24)[..., None, None]
    _, _, alone = run(jnp.where(held, k, 7.0), jnp.where(held, v, 7.0))
    np.testing.assert_array_equal(alone, out)
    for n, row, column in np.ndindex(2, 3, 12):
        rows = int(starts[n]) + 8 * row + np.arange(8)
        tokens = order[n, 0, 8 * column : 8 * column + 8]
        if column // 2 in rows // 16 and tokens.min() <= rows[-1]:
            assert tiles[n, 0, row, column]


def test_blocks_can_be_pooled_by_their_largest():
    q, k, _ = qkv(30)
    pools = {"query_pool": pooling.max_blocks, "key_pool": pooling.max_blocks}
    _, info = planned(q, k, block_size=8, segment_size=8, **pools)
    moved = np.asarray(reordering.reorder(k, info.kv_order))
    row = np.asarray(q)[24:, 1].max(0)
    logits = np.stack([moved[n : n + 8, 1].max(0) @ row / 4 for n in (0, 8, 16)])
    shares = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(info.block_scores[1, 3, :3], shares, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"segment_size": 0}, "segment_size=0"),
        ({"segment_size": 200}, "segment_size=200 must be a multiple of 128"),
        ({"threshold": 0.0}, r"threshold=0.0 must lie in \(0, 1\]"),
        ({"threshold": 1.5}, "threshold=1.5"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.pbs_attn(**arguments)


def test_thresholds_must_be_as_many_as_heads():
    q, k, _ = qkv(32)
    with pytest.raises(ValueError, match=r"threshold has shape \(3,\)"):
        js.pbs_attn(threshold=jnp.full(3, 0.5)).plan((), q, k)
