"""The Mosaic kernel that skips tiles on the way, in JAX's interpreter, against XLA's loops.

Small on purpose: the interpreter makes a host call for every access to shared memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import mosaic as adapter
from jsparse.attention.attend import choose, prepare
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import mosaic_skipping
from tests.inputs import on_device, qkv

THRESHOLD = 0.1  # 2.3 below the largest before


def leveled(q_len, levels, *, signs=1.0, heads=1, dim=64):
    """Logits of the level of a tile of 64 keys, or of a key, times the sign of a query, nearly."""
    kv_len = 64 * len(levels)
    q, k, v = (np.array(x) for x in qkv(q_len, kv_len, heads=heads, kv_heads=1, dim=dim))
    q *= 0.1
    q[..., 0] = dim**0.5 * np.broadcast_to(signs, q_len)[:, None]
    k[..., 0] = np.repeat(levels, 64)[:, None] if np.ndim(levels) == 1 else levels.reshape(-1, 1)
    return [on_device(x, jnp.bfloat16) for x in (q, k, v)]


def every_tile(q_len, kv_len, block_q, block_kv=64):
    tiles = np.ones((1, -(-q_len // block_q), -(-kv_len // block_kv)), bool)
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}
    return js.BlockMask.from_dense(on_device(tiles), **sizes)


def compare(q, k, v, plan, threshold=THRESHOLD, **options):
    """Holds the kernel to XLA's loops, which get zeros where values are none; what is kept."""

    def run(q, k, v, implementation):
        call = {"threshold": threshold, "implementation": implementation, **options}
        return js.attend_skipping(q, k, v, plan, **call)

    with _compat.interpreter():
        out, lse, kept = jax.block_until_ready(
            jax.jit(lambda q, k, v: run(q, k, v, "mosaic"))(q, k, v)
        )
    exact = (jnp.nan_to_num(x.astype(jnp.float32)) for x in (q, k, v))
    want, want_lse, want_kept = jax.jit(lambda q, k, v: run(q, k, v, "xla"))(*exact)
    tiles = np.asarray(kept.to_dense())
    np.testing.assert_array_equal(tiles, want_kept.to_dense())
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    # probabilities and the output are rounded once, of values that are at most 5
    unit = float(jnp.finfo(out.dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=2 * 5 * unit)
    return tiles


@pytest.mark.newest
def test_two_consumers_and_no_rows_past_the_end_decide_over_a_tile():
    # the second consumer's queries find the first tile the least; those past the end, of which
    # all logits are 0, would keep the last, as none of the others does
    signs = np.where(np.arange(100) < 64, 1.0, -1.0)
    q, k, v = leveled(100, [6.0, 0.0, 3.0], signs=signs)
    # what is skipped is not read
    kept = compare(q, k, v.at[128:].set(jnp.nan), every_tile(100, 192, 128))
    assert kept.tolist() == [[[True, True, False]]]


@pytest.mark.newest
def test_tiles_are_met_in_their_order_and_what_is_hidden_has_no_say(monkeypatch):
    # one tile at a time, and nothing of the next
    config = mosaic_skipping.Config(stages=1, ahead=False)
    kernel = mosaic_skipping.SKIPPING._replace(default_config=lambda *_: config)
    monkeypatch.setitem(adapter.CHIPS, "9", adapter.CHIPS["9"]._replace(skipping=kernel))
    levels = np.repeat([9.0, 5.0, 0.0, 5.5], 64).reshape(4, 64)
    levels[1, :10] = 9.0
    q, k, v = leveled(60, levels)
    # the first tile is hidden, and so are keys of the second; the third is the first that is whole
    ids = on_device(np.where(np.arange(256) < 74, 1, 0), jnp.int32)
    mask = js.masks.segments(jnp.zeros(60, jnp.int32), ids)
    v = v.at[:64].set(jnp.nan).at[128:192].set(jnp.nan)
    kept = compare(q, k, v, every_tile(60, 256, 64), mask=mask)
    assert kept.tolist() == [[[False, True, False, True]]]


@pytest.mark.slow
@pytest.mark.newest
def test_heads_with_thresholds_lists_and_a_rule_of_their_own():
    q, k, v = leveled(200, [3.0, 0.0, 1.0, 4.0], heads=2)
    # a row of lists is empty, one begins late
    tiles = np.ones((2, 2, 4), bool)
    tiles[0, 0], tiles[1, 1, 0] = False, False
    plan = js.BlockMask.from_dense(
        on_device(tiles), q_len=200, kv_len=250, block_q=128, block_kv=64
    )
    q = q.at[7, 1].set(jnp.nan)
    slopes = on_device([0.0, 0.1], jnp.float32)
    options = {
        "mask": js.masks.causal(offset=100),
        "score_mod": lambda logit, b, h, i, j: logit - slopes[h] * jnp.abs(i - j) * 0.01,
    }
    threshold = on_device([0.2, 0.0], jnp.float32)

    def run(q, k, v, implementation):
        call = {"threshold": threshold, "implementation": implementation, **options}
        return js.attend_skipping(q, k[:250], v[:250], plan, **call)

    with _compat.interpreter():
        out, lse, kept = jax.block_until_ready(run(q, k, v, "mosaic"))
    want = run(*(x.astype(jnp.float32) for x in (q, k, v)), "reference")
    np.testing.assert_array_equal(kept.to_dense(), want[2].to_dense())
    found = np.asarray(kept.to_dense()).sum(-1).tolist()
    assert found[0] == [0, 2]
    assert found[1][0] == 4  # a nan keeps them all
    np.testing.assert_allclose(lse, want[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float32), want[0], atol=2**-5)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [True, False])
def test_tiles_of_128_keys_and_values_wider_than_keys(ahead, monkeypatch):
    config = mosaic_skipping.Config(stages=2, ahead=ahead)
    kernel = mosaic_skipping.SKIPPING._replace(default_config=lambda *_: config)
    monkeypatch.setitem(adapter.CHIPS, "9", adapter.CHIPS["9"]._replace(skipping=kernel))
    q, k, v = leveled(64, [6.0, 6.0, 0.0, 0.0, 3.0, 9.0])
    v = jnp.concatenate([v, v + 1], -1)
    kept = compare(q, k, v, every_tile(64, 384, 64, 128))
    assert kept.tolist() == [[[True, False, True]]]


@pytest.mark.slow
def test_the_gradient_is_that_of_the_tiles_kept():
    q, k, v = leveled(64, [6.0, 0.0, 5.0])
    plan = every_tile(64, 192, 64)

    def loss(operands, implementation):
        call = {"threshold": THRESHOLD, "implementation": implementation}
        out, lse, kept = js.attend_skipping(*operands, plan, **call)
        return jnp.sin(out.astype(jnp.float32)).sum() + jnp.cos(lse).sum(), kept

    # not one program: some versions of the interpreter stop when several kernels share one
    with _compat.interpreter():
        got, kept = jax.block_until_ready(jax.grad(loss, has_aux=True)((q, k, v), "mosaic"))
    exact = tuple(x.astype(jnp.float32) for x in (q, k, v))
    want, _ = jax.grad(loss, has_aux=True)(exact, "xla")
    assert kept.to_dense().tolist() == [[[True, False, True]]]
    assert not np.asarray(got[1], np.float32)[64:128].any()
    for mine, true in zip(got, want, strict=True):
        error = np.linalg.norm(np.asarray(mine, np.float32) - true)
        assert error <= 2**-7 * np.linalg.norm(true)


def test_the_choice_falls_on_it_and_what_it_cannot_do_is_refused_in_a_sentence():
    def chosen(block_q=128, block_kv=128, **sizes):
        q, k, v = qkv(128, heads=1, kv_heads=1, **{"dim": 64, "dtype": jnp.bfloat16, **sizes})
        problem = prepare(q, k, v, every_tile(128, 128, block_q, block_kv))
        return choose(problem._replace(log_threshold=jnp.zeros((1, 1))))

    with _compat.interpreter(detect_races=False):
        assert chosen().implementation == "mosaic"
        assert chosen(64, 64, dim=256).implementation == "mosaic"
        for change, reason in (
            ({"block_q": 32}, "64 or 128 queries, not 32"),
            ({"block_kv": 32}, "64 or 128 keys, not 32"),
            ({"dtype": jnp.float32}, "bfloat16 or float16, not float32"),
            ({"dim": 192, "v_dim": 256}, "do not fit in shared memory"),
        ):
            refused = chosen(**change).refused["mosaic"]
            assert refused.startswith("where tiles are skipped ")
            assert reason in refused
    with _compat.interpreter(_compat.BLACKWELL, detect_races=False):
        assert "skip none on the way" in chosen().refused["mosaic"]


def test_a_layout_that_holds_one_tile_holds_no_next_one():
    refusal = mosaic_skipping.SKIPPING.layout_refusal
    assert "stages must be at least 2" in refusal(mosaic_skipping.Config(1), 64, 64, 64, 64)
    assert refusal(mosaic_skipping.Config(1, ahead=False), 64, 64, 64, 64) is None
    for config in mosaic_skipping.SKIPPING.candidates(128, 128, 128, 128):
        assert refusal(config, 128, 128, 128, 128) is None
