"""The kernel of the best sums in JAX's interpreter, which also looks for data races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention.blocks_of_windows import Problem, blocks_of_windows, weights_of
from jsparse.core.running_top_k import Best
from jsparse.core.windows import Windows
from jsparse.hierarchical.nsa import select_blocks
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import walk
from pallas_kernels.block_sparse_attention.logits import Rule
from pallas_kernels.top_k import mosaic_sums
from tests.inputs import on_device, qkv


def both(arrays, problem, top_k):
    """What the kernel and XLA find of `problem(*arrays)`."""

    def by(implementation):
        return jax.jit(lambda *x: blocks_of_windows(problem(*x), top_k, implementation))

    exact = jax.block_until_ready(by("xla")(*arrays))
    with _compat.interpreter():
        got = jax.block_until_ready(by("mosaic")(*arrays))
    return got, exact


def same(got, exact):
    jax.tree.map(np.testing.assert_array_equal, got, exact)


def zeros_and_ones(q_len, count, *, heads, kv_heads, dim, batch=1):
    """Queries and keys whose probabilities are 0 or 1: at scale 200, under an lse of 0."""
    rng = np.random.default_rng(0)
    q = rng.random((batch, q_len, heads, dim)) < 0.3
    k = -(rng.random((batch, count, kv_heads, dim)) < 0.1).astype(np.float32)
    return on_device(q, jnp.bfloat16), on_device(k, jnp.bfloat16)


def lse_of(q, seen, count, kv_heads):
    """0, but -inf where a query sees no window, as attention has it."""
    batch, q_len, heads, _ = q.shape
    keys = jnp.zeros((batch, count, kv_heads, 1))
    lse = js.attend(jnp.zeros((*q.shape[:3], 1)), keys, keys, mask=seen, return_lse=True)[1]
    return jnp.where(jnp.isneginf(lse), lse, 0.0)


@pytest.mark.newest
@pytest.mark.parametrize("per_head", [False, True])
def test_ties_masks_and_forced_blocks_are_those_of_xla(per_head):
    # windows share three quarters, so that each of five has its own weight in a block
    windows, block, kv_len, q_len = Windows(8, 2), 4, 401, 70
    count = windows.count(kv_len)
    sizes = {"heads": 4, "kv_heads": 2, "dim": 40, "batch": 2}
    q, k = zeros_and_ones(q_len, count, **sizes)
    # the queries are in the middle of the keys; the first ones see nothing
    offset = on_device([200, 331])
    # thirty queries of the first sequence see its first blocks, which are forced
    ids = np.arange(kv_len) >= np.array([[230], [100]])
    q_ids = jnp.take_along_axis(on_device(ids, jnp.int32), offset[:, None] + jnp.arange(q_len), 1)
    tokens = js.masks.segments(q_ids.at[:, :3].set(-1), on_device(ids, jnp.int32))
    if per_head:
        # heads of a group see different windows, and one sees blocks that others do not
        ends = np.zeros((4, kv_len, 1), np.int32) + np.array([kv_len, 260, 300, 0])[:, None, None]
        tokens &= js.masks.intervals(on_device(ends), causal=True, q_len=q_len)
    whole = js.masks.causal(offset=offset) & tokens
    seen = js.masks.whole_windows(whole, size=8, stride=2, kv_len=kv_len)
    lse = lse_of(q, seen, count, 2)
    # what is not a number, in a query and in a window
    q, k = q.at[0, 57, 1, 0].set(jnp.nan), k.at[1, 150, 0, 3].set(-jnp.nan)

    def problem(q, k, lse):
        sizes = windows, block, kv_len, seen.flatten_batch((2,)), 200.0, None, offset
        return Problem(q, k, lse, *sizes, 2, 3, tokens.flatten_batch((2,)))

    assert weights_of(windows, block) == (1, 2, 2, 2, 1)
    got, exact = both((q, k, lse), problem, 9)
    same(got, exact)
    assert {0, 1, 9} <= set(np.unique(got.counts).tolist())
    assert (got.indices[0, :, 3:30, :2] == jnp.arange(2)).all()
    assert (got.indices[1, :, 3:, 0] >= 25).all()
    # scores are whole numbers, and of all that is chosen the last is often one of several equal
    scores = np.asarray(got.scores)
    numbers = scores[np.isfinite(scores)]
    np.testing.assert_array_equal(numbers, np.round(numbers))
    assert len(np.unique(numbers)) > 4
    assert np.isnan(scores[0, 0, 57]).any()


@pytest.mark.newest
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 192), (16, 1, 64)])
def test_probabilities_are_as_precise_as_f32(heads, kv_heads, dim):
    """Of a group of one, its logits capped, and of sixteen; by one consumer and by two."""
    windows, kv_len, q_len = Windows(32, 16), 1100, 70
    count = windows.count(kv_len)
    q, _, _ = qkv(q_len, heads=heads, kv_heads=kv_heads, dim=dim, batch=(1,))
    _, k, _ = qkv(count, heads=heads, kv_heads=kv_heads, dim=dim, batch=(1,), seed=1)
    q, k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    seen = js.masks.whole_windows(js.masks.causal(), size=32, stride=16, kv_len=kv_len)
    rules = {"scale": 0.2, "softcap": 3.0 if heads == 2 else None}
    lse = js.attend(q, k, k, mask=seen, return_lse=True, **rules)[1]

    def problem(q, k, lse):
        sizes = windows, 64, kv_len, seen.flatten_batch(()), *rules.values()
        return Problem(q, k, lse, *sizes, on_device([kv_len - q_len]), 1, 2)

    got, exact = both((q, k, lse), problem, 6)
    np.testing.assert_array_equal(got.indices, exact.indices)
    # sums of up to `8 * heads` exponentials of logits of a few units, each of 24 bits
    np.testing.assert_allclose(got.scores, exact.scores, rtol=2.0**-18)


@pytest.mark.newest
def test_a_step_of_decoding(monkeypatch):
    """Each sequence at a place of its own, one of them before any window; rings as short as can be.

    The last window is half in the last block, which has few keys.
    """
    config = mosaic_sums.Config(4, q_stages=1, at_once=3)
    monkeypatch.setattr(mosaic_sums, "default_config", lambda *_: config)
    windows, kv_len, heads = Windows(4, 4), 330, 4
    count = windows.count(kv_len)
    q, k = zeros_and_ones(1, count, heads=heads, kv_heads=2, dim=24, batch=3)
    offset = on_device([2, 200, 329])
    seen = js.masks.whole_windows(js.masks.causal(offset=offset), size=4, stride=4, kv_len=kv_len)
    lse = lse_of(q, seen, count, 2)

    def problem(q, k, lse, offset):
        mask = js.masks.causal(offset=offset)
        seen = js.masks.whole_windows(mask, size=4, stride=4, kv_len=kv_len)
        return Problem(q, k, lse, windows, 16, kv_len, seen, 200.0, None, offset)

    got, exact = both((q, k, lse, offset), problem, 4)
    same(got, exact)
    assert got.counts[:, 0, 0].tolist() == [1, 4, 4]
    assert got.indices[1, 0, 0].tolist()[-1] == 12


@pytest.mark.newest
def test_native_sparse_attention_chooses_by_it():
    q, k = zeros_and_ones(33, 15, heads=2, kv_heads=1, dim=16)
    options = {"windows": Windows(8, 4), "block_kv": 16, "top_k": 3, "kv_len": 64}
    options["mask"] = js.masks.whole_windows(js.masks.causal(), size=8, stride=4, kv_len=64)
    lse = lse_of(q, options["mask"], 15, 1)
    plan, scores = select_blocks(q, k, lse, scale=200.0, **options)
    asked = []
    compute = mosaic_sums.top_k
    with pytest.MonkeyPatch.context() as patch, _compat.interpreter():
        patch.setattr(mosaic_sums, "top_k", lambda *x: asked.append(1) or compute(*x))
        by_kernel = jax.block_until_ready(select_blocks(q, k, lse, scale=200.0, **options))
    assert asked
    same(by_kernel, (plan, scores))


def test_what_is_chosen_by_it_has_no_gradient():
    """A derivative of it can be asked for all the same, by all that it is computed of."""
    q, k = zeros_and_ones(33, 15, heads=2, kv_heads=1, dim=16)
    options = {"windows": Windows(8, 4), "block_kv": 16, "top_k": 3, "kv_len": 64}
    options["mask"] = js.masks.whole_windows(js.masks.causal(), size=8, stride=4, kv_len=64)
    lse = lse_of(q, options["mask"], 15, 1)

    def total(q, k, lse, scale):
        plan, scores = select_blocks(q, k, lse, scale=scale, **options)
        return scores.sum()

    asked = []
    compute = mosaic_sums.top_k
    with pytest.MonkeyPatch.context() as patch, _compat.interpreter():
        patch.setattr(mosaic_sums, "top_k", lambda *x: asked.append(1) or compute(*x))
        # traced and not run
        jax.eval_shape(jax.grad(total, argnums=(0, 1, 2, 3)), q, k, lse, on_device(200.0, q.dtype))
    assert asked


@pytest.mark.newest
def test_an_indexer_is_a_sum_of_another_rule():
    """`weight * relu(q k)` over heads, one key per token; scores may be negative."""
    rng = np.random.default_rng(0)
    q, k = rng.integers(-1, 2, (64, 3, 64)), rng.integers(-1, 2, (64, 64))
    weights = rng.integers(-2, 3, (3, 64))
    scores = np.einsum("hqk,hq->qk", np.maximum(np.einsum("qhd,kd->hqk", q, k), 0), weights)

    def term(product, q_index, kv_index, row_values, column_values):
        return row_values[0]() * jnp.maximum(product, 0.0)

    def causal(product, q_index, kv_index, row_values, column_values):
        return jnp.where(kv_index <= q_index, mosaic_sums.SEEN, 0.0)

    sums = mosaic_sums.Sums(
        (1.0,), Rule(term, (on_device(weights[None], jnp.float32),)), Rule(causal), forcing=False
    )
    everything = walk.Lists(*(jnp.full((1, 1, 1), n, jnp.int32) for n in (0, 0, 1)))
    with _compat.interpreter():
        columns, integers = mosaic_sums.top_k(
            on_device(q[None], jnp.bfloat16),
            on_device(k[None, :, None, None], jnp.bfloat16),
            everything,
            sums,
            block_q=64,
            count=8,
        )
        best = jax.block_until_ready(Best.unordered(columns, integers))
    for row, (got, numbers) in enumerate(zip(best.indices[0, 0], best.scores[0, 0], strict=True)):
        # the largest first, and of equal ones the first
        chosen = np.sort(np.lexsort((np.arange(row + 1), -scores[row, : row + 1]))[:8])
        assert got[: len(chosen)].tolist() == chosen.tolist()
        np.testing.assert_array_equal(numbers[: len(chosen)], scores[row, chosen])
    assert (np.asarray(best.scores)[0, 0, 7] < 0).any()


def test_refusals_name_the_reason():
    windows = Windows(4, 2)
    q, k, _ = qkv(70, 39, heads=2, kv_heads=1, dim=64, batch=(1,))
    seen = js.masks.whole_windows(js.masks.causal(), size=4, stride=2, kv_len=80)
    lse = jnp.zeros((1, 2, 70))

    def choose(q, k, top_k, implementation="mosaic", windows=windows, block=4):
        rules = seen.flatten_batch(()), 1.0, None, jnp.zeros(1, jnp.int32)
        problem = Problem(q, k, lse, windows, block, 80, *rules)
        return blocks_of_windows(problem, top_k, implementation)

    with pytest.raises(NotImplementedError, match="a Hopper GPU"):
        choose(q, k, 2)
    with pytest.raises(ValueError, match="implementation='cuda' must be one of 'xla', 'mosaic'"):
        choose(q, k, 2, "cuda")
    with pytest.raises(ValueError, match="size=3 must be a multiple of 2"):
        choose(q, k, 2, windows=Windows(3, 2))
    half = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    with _compat.interpreter():
        for arrays, options, said in (
            ((q, k), {"top_k": 2}, "bfloat16, not float32"),
            ((half[0], k), {"top_k": 2}, "bfloat16, not float32"),
            (half, {"top_k": 65, "windows": Windows(1, 1), "block": 1}, "in registers, not 65"),
            (half, {"top_k": 2, "block": 64}, "no room for 33 tiles of keys of width 64"),
        ):
            with pytest.raises(NotImplementedError, match=said):
                choose(*arrays, **options)
