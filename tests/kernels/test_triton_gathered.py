"""The Triton kernels where tiles have few tokens on one side, which are gathered: interpreted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import kv_major, triton_columns
from jsparse.testing import CASES, Problem
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import triton
from tests.attention.exact import close
from tests.inputs import on_device, qkv

EVERYTHING = next(case for case in CASES if case.name == "everything")
attend = functools.partial(js.attend, implementation="triton")
# few queries, and few keys, to a tile
SIDES = {"queries": (1, 16), "columns": (16, 1)}


@pytest.fixture(autouse=True)
def interpreter():
    # around the whole test: gradients are traced after the call that they belong to
    with _compat.triton_interpreter():
        yield


@pytest.fixture
def small_pieces(monkeypatch):
    """Several spans, several chunks for most tiles, and several programs for a chunk."""
    monkeypatch.setattr(kv_major, "_ROWS", 32)
    monkeypatch.setattr(kv_major, "_CHUNKS", 1)
    # queries are gathered wherever that can be
    monkeypatch.setattr(kv_major, "_LEAST_LISTED", 1)
    monkeypatch.setattr(kv_major, "_LEAST_RATIO", 1)
    monkeypatch.setattr(triton_columns, "_KEPT", 1)
    config = triton.Config(16, 16)
    monkeypatch.setattr(triton, "default_config", lambda *sizes, **which: config)


def leaves(tree):
    return jax.tree.leaves(tree)


SLOW = [pytest.mark.slow]


@pytest.mark.newest
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=str(changes), marks=marks)
        for changes, marks in (
            ({"block_q": 1, "list_heads": 4, "bias": (2, 4, 41, 59)}, SLOW),
            # packed: two rows to a query and their own bias, whose gradient the kernel sums
            ({"block_q": 1, "list_heads": 2, "block_kv": 48, "bias": (2, 4, 41, 1)}, []),
            ({"block_q": 3, "kv_heads": 4, "list_heads": 1, "bias": (41, 1)}, SLOW),
            ({"block_q": 32, "block_kv": 1, "list_heads": 4, "density": 0.3}, SLOW),
            # a list for both heads of a group, whose gradients are summed in one program
            ({"block_q": 16, "block_kv": 3, "list_heads": 2, "bias": (2, 4, 41, 1)}, []),
            ({"block_q": 16, "block_kv": 8, "list_heads": 1, "bias": (41, 59)}, SLOW),
        )
    ],
)
def test_every_option_against_float64(changes, small_pieces):
    problem = Problem(dataclasses.replace(EVERYTHING, **changes))
    got = problem.value_and_gradients(attend)(problem.operands)
    close(leaves(got), leaves(problem.exact()), problem.tolerance())


def uneven(side):
    """Lists from empty to full, with entries past their ends that name no block, or a listed one.

    Row of tiles 1 is empty; block 0 is in all other lists, block 3 in none.
    """
    block_q, block_kv = SIDES[side]
    q_len, kv_len = (70, 64) if side == "queries" else (64, 70)
    rows, columns = -(-q_len // block_q), -(-kv_len // block_kv)
    rng = np.random.default_rng(0)
    tiles = rng.random((4, rows, columns)) < rng.random((4, rows, 1))
    tiles[..., 0], tiles[..., 3], tiles[:, 1] = True, False, False
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}
    plan = js.BlockMask.from_dense(on_device(tiles), **sizes)
    past = jnp.arange(plan.width) >= plan.kv_num_blocks[..., None]
    garbage = on_device([-7, 3, 2**31 - 1])[jnp.arange(plan.width) % 3]
    plan = dataclasses.replace(plan, kv_indices=jnp.where(past, garbage, plan.kv_indices))
    return plan, np.repeat(np.repeat(tiles, block_q, 1), block_kv, 2)[:, :q_len, :kv_len]


@pytest.mark.newest
@pytest.mark.parametrize("side", SIDES)
def test_broken_numbers_reach_only_who_lists_them(side):
    plan, pairs = uneven(side)
    q, k, v = qkv(plan.q_len, plan.kv_len)

    def total(q, k, v, implementation):
        out, lse = js.attend(q, k, v, plan, return_lse=True, implementation=implementation)
        # what is no number gives no gradient to the rest
        fine = jnp.where(jnp.isfinite(out), out, 0.0), jnp.where(jnp.isfinite(lse), lse, 0.0)
        return sum(jnp.sin(x).sum() for x in fine), (out, lse)

    run = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True), static_argnums=3)
    clean = run(q, k, v, "triton")
    close(leaves(clean), leaves(run(q, k, v, "reference")), 200 * 2.0**-23)
    rows = ~pairs.any((0, 2))
    assert rows.any()
    assert not np.asarray(clean[1][0])[rows].any()
    assert np.isneginf(np.asarray(clean[1][1])[:, rows]).all()

    # nobody lists block 3: it is not read, and a rerun is the same bit by bit
    hidden = np.flatnonzero(~pairs.any((0, 1)))[0]
    again = run(q, *(x.at[hidden].set(jnp.nan) for x in (k, v)), "triton")
    jax.tree.map(np.testing.assert_array_equal, clean, again)

    # a query's nan stays in its row and head, and gets into the gradients of what it lists
    (d_q, d_k, _), (out, _) = run(q.at[40, 1].set(jnp.nan), k, v, "triton")
    hit = np.zeros(out.shape[:2], bool)
    hit[40, 1] = True
    np.testing.assert_array_equal(np.isnan(out).all(-1), hit)
    for x, y in ((out, clean[1][0]), (d_q, clean[0][0])):
        np.testing.assert_array_equal(np.asarray(x)[~hit], np.asarray(y)[~hit])
    reached = np.isnan(d_k).any(-1)
    assert reached.any()
    assert not reached[~pairs[1, 40]].any()
    assert not reached[:, 1].any()

    # so does that of a value, and of a key, for all who list it
    place = 20 if pairs[:2, :, 20].any() else 21
    for x, y in ((k.at[place, 0].set(jnp.nan), v), (k, v.at[place, 0].set(jnp.nan))):
        out = np.asarray(run(q, x, y, "triton")[1][0])
        hit = pairs[..., place].T & (np.arange(4) < 2)
        np.testing.assert_array_equal(np.isnan(out).all(-1), hit)
        np.testing.assert_array_equal(out[~hit], np.asarray(clean[1][0])[~hit])


@pytest.mark.newest
@pytest.mark.parametrize("side", ["queries", pytest.param("columns", marks=SLOW)])
def test_16_bits_are_as_good_as_those_of_xla(side):
    plan, _ = uneven(side)
    q, k, v = qkv(plan.q_len, plan.kv_len, dim=24, v_dim=40, dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]

    def loss(q, k, v, implementation):
        options = {"mask": js.masks.causal(), "implementation": implementation}
        out = js.attend(q, k, v, plan, **options)
        return jnp.sin(out.astype(jnp.float32)).sum(), out

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    mine, twin = (leaves(run(q, k, v, name)) for name in ("triton", "xla"))
    true = leaves(run(*exact, "reference"))
    for a, b, c in zip(mine, twin, true, strict=True):
        assert a.dtype == jnp.bfloat16
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        # the same roundings, of sums in another order
        assert np.linalg.norm(a - c) <= 1.5 * np.linalg.norm(b - c)


@pytest.mark.parametrize("side", SIDES)
def test_the_choice_falls_on_it_where_mosaic_cannot(side):
    plan, _ = uneven(side)
    found = js.explain(*qkv(plan.q_len, plan.kv_len), plan)
    assert found.implementation == "triton"
    assert set(found.refused) == {"mosaic"}


@pytest.mark.parametrize(
    ("block_q", "block_kv", "dim", "reason"),
    [
        (1, 24, 16, "16, 32, 64 or 128 keys, or of fewer than 16, not 24"),
        (144, 1, 16, "16, 32, 64 or 128 queries, or of fewer than 16, not 144"),
        (1, 48, 257, "128 keys, or of fewer than 16, not 48"),
        (1, 16, 257, "up to 256, not 320"),
        (16, 1, 257, "up to 256, not 320"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(block_q, block_kv, dim, reason):
    q, k, v = qkv(48, heads=1, kv_heads=1, dim=dim)
    tiles = jnp.ones((1, -(-48 // block_q), 48 // block_kv), bool)
    sizes = {"q_len": 48, "kv_len": 48, "block_q": block_q, "block_kv": block_kv}
    plan = js.BlockMask.from_dense(tiles, **sizes)
    with pytest.raises(NotImplementedError, match=reason):
        attend(q, k, v, plan)
    if block_q == 144:
        return
    with pytest.raises(NotImplementedError, match="queries or more, not 1|keys,? or|up to"):
        js.attend_skipping(q, k, v, plan, threshold=0.1, implementation="triton")
