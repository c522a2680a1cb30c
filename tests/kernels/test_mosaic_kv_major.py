"""Rows that list a tile of keys, gathered for the Hopper kernel, in JAX's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import kv_major, mosaic_kv_major
from jsparse.attention.attend import prepare
from jsparse.attention.block_sparse import Sizes
from pallas_kernels import _compat
from tests.inputs import on_device, qkv


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """How often the way was gone."""
    calls, forward = [], mosaic_kv_major.forward

    def counted(*arguments):
        calls.append(arguments)
        return forward(*arguments)

    monkeypatch.setattr(mosaic_kv_major, "forward", counted)
    return calls


def routed(q_blocks, *, heads, kv_blocks, block_q=1, kv_len=None, seed=0):
    """Two tiles of some for each tile of queries and head, one, or none; garbage after the last."""
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.random((heads, q_blocks, kv_blocks)).argsort(-1)[..., :2], -1)
    counts = np.where(rng.random((heads, q_blocks)) < 0.7, 2, 1)
    counts[:, 5] = 0
    indices = np.where(np.arange(2) < counts[..., None], indices, 2**31 - 1)
    sizes = {"q_len": q_blocks * block_q, "kv_len": kv_len or 64 * kv_blocks}
    overflowed = jnp.zeros(heads, bool)
    lists = on_device(indices, jnp.int32), on_device(counts, jnp.int32), overflowed
    return js.BlockMask(*lists, **sizes, block_q=block_q, block_kv=64)


def compare(q, k, v, plan, **options):
    """Holds outputs to the f32 reference, within the rounding of parts, probabilities and sums."""

    def run(q, k, v, implementation):
        call = {"return_lse": True, "implementation": implementation, **options}
        return js.attend(q, k, v, plan, **call)

    with _compat.interpreter():
        out, lse = jax.block_until_ready(jax.jit(lambda q, k, v: run(q, k, v, "mosaic"))(q, k, v))
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    want, want_lse = run(q, k, v, "reference")
    assert np.isneginf(want_lse).any()
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    # probabilities are rounded once, the parts and the output too
    allowed = 3 * float(jnp.finfo(out.dtype).eps) / 2 * np.asarray(run(q, k, jnp.abs(v), "xla")[0])
    assert (np.abs(np.asarray(out, np.float32) - want) <= allowed + 1e-6).all()


@pytest.mark.newest
def test_queries_with_lists_of_their_own_under_a_mask(taken):
    plan = routed(48, heads=1, kv_blocks=3, kv_len=170)
    q, k, v = qkv(48, 170, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    ids = on_device(np.arange(170) // 90, jnp.int32)
    mask = js.masks.causal(offset=100) & js.masks.segments(ids[100:148], ids)
    compare(q, k, v, plan, mask=mask)
    assert len(taken) == 1


@pytest.mark.slow
@pytest.mark.newest
def test_spans_chunks_heads_and_a_rule(taken, monkeypatch):
    monkeypatch.setattr(kv_major, "_ROWS", 16)
    monkeypatch.setattr(kv_major, "_CHUNKS", 1)
    plan = routed(16, heads=2, kv_blocks=3, block_q=3)
    q, k, v = qkv(48, 192, heads=2, kv_heads=1, batch=(2,), dim=64, v_dim=40, dtype=jnp.bfloat16)
    slopes = on_device([0.1, 0.3], jnp.float32)
    compare(
        q,
        k,
        v,
        plan,
        mask=js.masks.causal(),
        score_mod=lambda logit, b, h, i, j: logit - slopes[h] * jnp.abs(i - j) * 0.1 + 0.2 * b,
    )
    assert len(taken) == 1


@pytest.mark.slow
def test_a_nan_stays_with_who_lists_it_and_gradients_are_gathered_too(taken):
    plan = routed(48, heads=1, kv_blocks=3)
    q, k, v = qkv(48, 192, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)

    def loss(operands, implementation):
        out = js.attend(*operands, plan, implementation=implementation)
        return jnp.sin(out.astype(jnp.float32)).sum()

    with _compat.interpreter():
        got = jax.block_until_ready(jax.grad(loss)((q, k, v), "mosaic"))
        spoilt = jax.block_until_ready(
            js.attend(
                q.at[7].set(jnp.nan), k, v.at[:64].set(jnp.nan), plan, implementation="mosaic"
            )
        )
    want = jax.grad(loss)(tuple(x.astype(jnp.float32) for x in (q, k, v)), "reference")
    for mine, true in zip(got, want, strict=True):
        error = np.linalg.norm(np.asarray(mine, np.float32) - true)
        assert error <= 2**-7 * np.linalg.norm(true)
    listed = np.asarray(plan.to_dense())[0, :, 0]
    broken = np.isnan(np.asarray(spoilt, np.float32)).any((1, 2))
    np.testing.assert_array_equal(broken, listed | (np.arange(48) == 7))
    assert len(taken) == 2


def sizes(**changes):
    return Sizes(**{**dict(batches=1, heads=1, kv_heads=1, block_q=1, block_kv=64, q_blocks=64,
                           kv_blocks=4, ragged=False), **changes})  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "width", "pays"),
    [
        ({}, 2, True),
        ({}, 1, False),  # a tile of keys has few queries
        ({}, 4, False),  # lists may hold all blocks, or one
        ({"block_q": 8, "block_kv": 128}, 2, False),  # short tiles have kernels
        ({"block_kv": 32}, 2, False),
    ],
)
def test_lists_for_which_rows_are_gathered(changes, width, pays):
    s = sizes(**changes)
    lists = js.attention.block_sparse.Lists(
        jnp.zeros((1, 1, s.q_blocks, width), jnp.int32), jnp.zeros((1, 1, s.q_blocks)), None
    )
    assert mosaic_kv_major.pays(lists, s) == pays


def test_what_keys_look_up_by_sequence_is_left_to_rows():
    ids = on_device(np.zeros((2, 64)), jnp.int32)
    q, k, v = qkv(64, heads=1, kv_heads=1, dim=64, batch=(2,), dtype=jnp.bfloat16)
    for mask, refused in ((js.masks.causal(), False), (js.masks.segments(ids, ids), True)):
        problem = prepare(q, k, v, mask=mask)
        found = mosaic_kv_major.refusal(
            problem.operands, problem.mask, problem.rule, sizes(batches=2, kv_blocks=1)
        )
        assert (found is not None) == refused
