"""Query heads that share a list go as rows of one tile, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import attend as attending
from jsparse.attention import xla
from jsparse.attention.block_sparse import block_sparse_attention
from jsparse.attention.packing import Rows
from jsparse.testing import CASES, Problem
from pallas_kernels import _compat
from tests.inputs import on_device, qkv

CAUSAL = js.masks.causal()
EVERYTHING = next(case for case in CASES if case.name == "everything")


def problem_of(**changes):
    """The suite's case with every option, of other sizes, lists shared in groups."""
    changes = {"block_q": 1, "list_heads": EVERYTHING.kv_heads, **changes}
    return Problem(dataclasses.replace(EVERYTHING, **changes))


def close(got, expected, tolerance):
    for mine, true in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        mine, true = np.asarray(mine, np.float64), np.asarray(true, np.float64)
        finite = np.isfinite(true)
        np.testing.assert_array_equal(np.isfinite(mine), finite)
        size = max(1.0, np.abs(true[finite]).max(initial=0.0))
        np.testing.assert_allclose(mine[finite], true[finite], rtol=0, atol=tolerance * size)


@pytest.fixture
def executed(monkeypatch):
    """The tiles that calls come to, (heads, queries, keys)."""
    seen = []

    def record(operands, plan, mask, rule, passes):
        seen.append((operands.q.shape[-2], plan.block_q, plan.block_kv))
        return block_sparse_attention(operands, plan, mask, rule, passes)

    monkeypatch.setattr(attending, "block_sparse_attention", record)
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": (2, 4, 41, 59)},
        # one list for all; several queries in a tile, for which the bias has no rows of its own
        {"heads": 6, "list_heads": 1, "block_q": 3, "bias": (6, 1, 59)},
        {"heads": 8, "kv_heads": 1, "list_heads": 1, "block_q": 2, "bias": (41, 59)},
        {"heads": 16, "kv_heads": 1, "list_heads": 1, "bias": (2, 1, 41, 1)},
    ],
    ids=str,
)
def test_every_option_against_float64(changes, executed):
    problem = problem_of(**changes)
    case = problem.case
    got = problem.value_and_gradients(js.attend)(problem.operands)
    close(got, problem.exact(), problem.tolerance())
    group = case.heads // case.kv_heads
    assert set(executed) == {(case.kv_heads, group * case.block_q, case.block_kv)}


@pytest.mark.numbers
def test_lists_per_query_head_and_full_tiles_stay_apart(executed):
    q, k, v = qkv(64)
    tiles = jnp.ones((4, 64, 4), bool)
    sizes = {"q_len": 64, "kv_len": 64, "block_kv": 16}
    js.attend(q, k, v, js.BlockMask.from_dense(tiles, **sizes, block_q=1))
    js.attend(q, k, v, js.BlockMask.from_dense(tiles[:1, ::64], **sizes, block_q=64))
    assert executed == [(4, 1, 16), (4, 64, 16)]


@pytest.mark.numbers
def test_a_group_of_too_many_rows_is_packed_in_equal_parts(executed, monkeypatch):
    q, k, v = qkv(7, 20, heads=6, kv_heads=1)
    tiles = np.random.default_rng(0).random((1, 4, 3)) < 0.7
    plan = js.BlockMask.from_dense(on_device(tiles), q_len=7, kv_len=20, block_q=2, block_kv=8)
    options = {"mask": CAUSAL, "score_mod": lambda s, b, h, i, j: s + 0.1 * h * j}
    # tiles have 5 rows at most: 2 of 6 heads with 2 queries each
    monkeypatch.setattr(attending, "Rows", lambda enough: Rows(enough, 5))
    got = js.attend(q, k, v, plan, **options, return_lse=True, implementation="xla")
    assert executed == [(3, 4, 8)]
    want = js.attend(q, k, v, plan, **options, return_lse=True, implementation="reference")
    close(got, want, 200 * 2.0**-23)


@pytest.mark.newest
def test_second_derivatives():
    problem = problem_of(q_len=9, kv_len=20, batch=(), bias=(1, 1, 20))

    def curvature(implementation):
        def slope(operands):
            def loss(operands):
                def attention(*args, **options):
                    return js.attend(*args, **options, implementation=implementation)

                return problem.loss(*problem.run(attention, operands))

            return sum(jnp.sin(g).sum() for g in jax.tree.leaves(jax.grad(loss)(operands)))

        return jax.jit(jax.grad(slope))(problem.operands)

    got, expected = curvature("xla"), curvature("reference")
    for name in expected:
        size = float(jnp.abs(expected[name]).max())
        np.testing.assert_allclose(got[name], expected[name], atol=2e-4 * size, err_msg=name)


def test_a_nan_stays_in_its_row_and_head_and_empty_rows_are_zero():
    q, k, v = qkv(24)
    tiles = np.random.default_rng(0).random((2, 24, 3)) < 0.7
    tiles[:, 5] = False
    plan = js.BlockMask.from_dense(on_device(tiles), q_len=24, kv_len=24, block_q=1, block_kv=8)
    run = jax.jit(lambda q: js.attend(q, k, v, plan, return_lse=True, implementation="xla"))
    clean, clean_lse = run(q)
    assert not clean[5].any()
    assert jnp.isneginf(clean_lse[:, 5]).all()
    out, lse = run(q.at[7, 1].set(jnp.nan))
    hit = np.zeros((24, 4), bool)
    hit[7, 1] = True
    np.testing.assert_array_equal(np.isnan(out).all(-1), hit)
    np.testing.assert_array_equal(np.isnan(lse), hit.T)
    np.testing.assert_array_equal(np.asarray(out)[~hit], np.asarray(clean)[~hit])


def test_kernels_take_a_group_that_fills_their_tiles():
    q, k, v = qkv(12, 32, heads=16, kv_heads=1, dim=16)
    tiles = np.random.default_rng(0).random((1, 12, 2)) < 0.7
    plan = js.BlockMask.from_dense(on_device(tiles), q_len=12, kv_len=32, block_q=1, block_kv=16)
    options = {"mask": CAUSAL, "score_mod": lambda s, b, h, i, j: s + 0.1 * h}

    def loss(q, k, v, implementation):
        out = js.attend(q, k, v, plan, **options, implementation=implementation)
        return jnp.sin(out).sum(), out

    def run(implementation):
        of_inputs = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(of_inputs, static_argnums=3)(q, k, v, implementation)

    with _compat.triton_interpreter():
        got = jax.block_until_ready(run("triton"))
    close(got, run("reference"), 200 * 2.0**-23)


@pytest.mark.newest
def test_mosaic_on_packed_rows():
    q, k, v = qkv(16, 128, heads=8, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    tiles = on_device([[[True, False], [True, True]]])
    plan = js.BlockMask.from_dense(tiles, q_len=16, kv_len=128, block_q=8, block_kv=64)
    # what query 0 may see ends inside the first tile of keys
    options = {"mask": js.masks.causal(offset=50)}
    with _compat.interpreter(_compat.HOPPER):
        run = jax.jit(lambda *x: js.attend(*x, plan, **options, implementation="mosaic"))
        got = jax.block_until_ready(run(q, k, v))
    want = js.attend(q, k, v, plan, **options, implementation="reference")
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    # probabilities and outputs are rounded to bf16, as in the reference
    np.testing.assert_allclose(got, want, atol=3 * 2.0**-8 * float(jnp.abs(v).max()))
    assert xla.LEAST_QUERIES > 16
