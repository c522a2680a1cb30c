"""The Triton kernels for lists of tokens: heads that fill no product, latents; interpreted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import jsparse as js
from jsparse.testing import CASES, Problem
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention.triton_pieces import columns
from pallas_kernels.block_sparse_attention.triton_tokens import run_of
from tests.attention.exact import close
from tests.inputs import on_device, qkv

EVERYTHING = next(case for case in CASES if case.name == "everything")
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def interpreter():
    # around the whole test: gradients are traced after the call that they belong to
    with _compat.triton_interpreter():
        yield


def tokens(q_len, kv_len, list_heads, block_kv=1):
    """Lists from empty to full for each query, those of query 5 empty; nobody lists tile 3."""
    rng = np.random.default_rng(0)
    tiles = rng.random((list_heads, q_len, kv_len // block_kv)) < rng.random((list_heads, q_len, 1))
    tiles[:, 5], tiles[..., 3] = False, False
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_q": 1, "block_kv": block_kv}
    return js.BlockMask.from_dense(on_device(tiles), **sizes)


def everything_of(plan, implementation, q, k, v):
    """Output, log-sum-exp and gradients."""

    def loss(q, k, v):
        options = {"mask": js.masks.causal(offset=plan.kv_len - plan.q_len), "return_lse": True}
        out, lse = js.attend(q, k, v, plan, **options, implementation=implementation)
        seen = jnp.where(jnp.isfinite(lse), lse, 0.0).sum()
        return jnp.sin(out.astype(jnp.float32)).sum() + seen, (out, lse)

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)


@pytest.mark.parametrize(
    ("group", "block_kv"),
    [(3, 1), *(pytest.param(*x, marks=SLOW) for x in ((1, 1), (8, 1), (16, 1), (3, 16)))],
)
def test_heads_that_fill_no_product(group, block_kv):
    # the last query's filled rows end outside of the arrays, and another head's lie after them
    q, k, v = qkv(21, 64, heads=2 * group, kv_heads=2, dim=16)
    plan = tokens(21, 64, 2, block_kv)
    assert js.explain(q, k, v, plan).implementation == "triton"
    # what nobody lists is not read
    hidden = slice(3 * block_kv, 4 * block_kv)
    k, v = (x.at[hidden].set(jnp.nan) for x in (k, v))
    got = everything_of(plan, "triton", q, k, v)
    expected = everything_of(plan, "xla", q, k, v)
    assert not np.asarray(got[1][0])[5].any()
    close(jax.tree.leaves(got), jax.tree.leaves(expected), 200 * 2.0**-23)


@pytest.mark.newest
def test_every_option_against_float64():
    changes = {"block_q": 1, "block_kv": 1, "list_heads": 2, "bias": (2, 4, 41, 59)}
    problem = Problem(dataclasses.replace(EVERYTHING, **changes))
    attend = functools.partial(js.attend, implementation="triton")
    got = problem.value_and_gradients(attend)(problem.operands)
    close(jax.tree.leaves(got), jax.tree.leaves(problem.exact()), problem.tolerance())


@pytest.mark.parametrize(
    ("heads", "v_dim", "block_kv"), [(16, 512, 1), pytest.param(40, 576, 16, marks=SLOW)]
)
def test_latents_of_deepseek(heads, v_dim, block_kv):
    q, k, _ = qkv(9, 64, heads=heads, kv_heads=1, dim=576, dtype=jnp.bfloat16)
    v, plan = k[..., :v_dim], tokens(9, 64, 1, block_kv)
    assert js.explain(q, k, v, plan).implementation == "triton"
    mine, twin = (jax.tree.leaves(everything_of(plan, x, q, k, v)) for x in ("triton", "xla"))
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    true = jax.tree.leaves(everything_of(plan, "reference", *wide))
    for a, b, c in zip(mine, twin, true, strict=True):
        a, b, c = (np.asarray(jnp.where(jnp.isfinite(x), x, 0), np.float64) for x in (a, b, c))
        # the same roundings, of sums in another order
        assert np.linalg.norm(a - c) <= 1.5 * np.linalg.norm(b - c) + 1e-6 * np.linalg.norm(c)


@pytest.mark.parametrize(
    ("width", "sizes"), [(16, [16]), (256, [256]), (320, [256, 64]), (576, [512, 64])]
)
def test_pieces_are_powers_of_two_end_to_end(width, sizes):
    found = columns(width)
    assert [piece.size for piece in found] == sizes
    assert [piece.start for piece in found] == [sum(sizes[:n]) for n in range(len(sizes))]


def test_repeated_rows_are_written_nowhere():
    """Programs from the last rows to the first: what one writes too much, no later one mends."""

    def kernel(out):
        start = 3 * (7 - pl.program_id(0))
        rows = run_of(start, 3, 16)
        rows.write(out, (), (pl.ds(0, 4),), rows.along((16, 4), 0))

    shape = jax.ShapeDtypeStruct((48, 4), jnp.int32)
    written = pl.pallas_call(kernel, shape, grid=(8,), interpret=True)()
    np.testing.assert_array_equal(written[:24], np.repeat(np.arange(24)[:, None], 4, axis=1))
