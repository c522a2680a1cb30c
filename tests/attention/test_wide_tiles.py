"""Tiles that are too large for XLA's sums of products are computed in smaller ones."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse import _compat
from jsparse.attention import attend as attending
from jsparse.attention import kv_major, lanes, xla, xla_backward
from jsparse.attention.block_sparse import Lists, Sizes
from jsparse.testing import CASES, Problem
from tests.attention.test_query_major import close

# later versions have no largest sum
pytestmark = pytest.mark.numbers
EVERYTHING = next(case for case in CASES if case.name == "everything")
LARGEST = 2**15 - 1


def products(block_q, block_kv, group=1, **which):
    """What becomes of lists of one row with the tiles 2 and 0, and of their sizes."""
    sizes = Sizes(1, 1, 1, block_q, block_kv, 2, 4, ragged=False)
    ids, counts = jnp.array([[[[2, 0, 9], [1, 9, 9]]]]), jnp.array([[[2, 1]]])
    return lanes.in_products(Lists(ids, counts, None), sizes, group, **which)


@pytest.mark.parametrize("group", [1, 3, 32])
@pytest.mark.parametrize("dim", [64, 256, 576])
@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 128), (512, 1024), (96, 192), (256, 32)])
def test_no_sum_is_larger_than_the_largest(block_q, block_kv, dim, group, monkeypatch):
    monkeypatch.setattr(_compat, "LARGEST_SUM", {"cpu": LARGEST})
    block_q *= group
    lists, sizes = products(block_q, block_kv, group, per_row=dim, per_column=dim)
    rows, columns = sizes.block_q, sizes.block_kv
    assert columns <= 128
    assert columns * dim <= LARGEST
    # a group too large for that is not parted
    assert rows * max(columns, dim) <= LARGEST or rows % (2 * group)
    # no smaller than they must be, and a token's rows together
    assert rows == block_q or 2 * rows * max(columns, dim) > LARGEST
    assert rows % group == 0
    # the tokens of each row of the problem, in their order
    down, across = block_q // rows, block_kv // columns
    for row, tiles in enumerate(([2, 0], [1])):
        tokens = np.concatenate([np.arange(t * block_kv, (t + 1) * block_kv) for t in tiles])
        for part in range(row * down, (row + 1) * down):
            count = int(lists.kv_num_blocks[0, 0, part])
            ids = np.asarray(lists.kv_indices[0, 0, part, :count])
            np.testing.assert_array_equal(
                (ids[:, None] * columns + np.arange(columns)).ravel(), tokens
            )
    assert (sizes.q_blocks, sizes.kv_blocks) == (2 * down, 4 * across)
    assert lists.kv_indices.shape == (1, 1, 2 * down, 3 * across)


def test_what_is_small_enough_stays(monkeypatch):
    monkeypatch.setattr(_compat, "LARGEST_SUM", {"cpu": LARGEST})
    assert products(128, 128, per_row=192)[1].block_q == 128
    monkeypatch.setattr(_compat, "LARGEST_SUM", {})
    assert products(4096, 4096, per_row=512)[1] == Sizes(1, 1, 1, 4096, 4096, 2, 4, ragged=False)


@pytest.fixture
def cut(monkeypatch):
    """Tiles of the contract's sizes are cut too; the ways in which they were."""
    found = []

    def watched(lists, sizes, *rest, **which):
        result = lanes.in_products(lists, sizes, *rest, **which)
        found.append((sizes.block_q // result[1].block_q, sizes.block_kv // result[1].block_kv))
        return result

    for module in (xla, xla_backward, kv_major):
        monkeypatch.setattr(module, "in_products", watched)
    monkeypatch.setattr(_compat, "LARGEST_SUM", {"cpu": 8 * 8 - 1})
    monkeypatch.setattr(lanes, "_LEAST_ROWS", 4)
    # not from the cache: what was compiled for other tiles would be found there
    monkeypatch.setattr(attending, "_compiled", attending._executed)
    return found


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"bias": (2, 4, 41, 59)}, xla.PASSES),
        # packed: rows of a token are not parted
        ({"list_heads": 2, "bias": (2, 1, 41, 59), "empty_rows": True}, xla.PASSES),
        ({"list_heads": 1, "heads": 4, "kv_heads": 4, "bias": (41, 1)}, xla.PASSES),
        ({"block_q": 1, "list_heads": 4, "bias": (4, 1, 59)}, kv_major.PASSES),
    ],
    ids="bias packed shared gathered".split(),
)
def test_every_option_against_float64(changes, passes, cut, monkeypatch):
    problem = Problem(dataclasses.replace(EVERYTHING, **changes))
    monkeypatch.setattr(kv_major, "passes", lambda plan: passes)
    got = problem.value_and_gradients(js.attend)(problem.operands)
    close(got, problem.exact(), problem.tolerance())
    assert len(cut) == 2, "forward and backward"
    assert all(down * across > 1 for down, across in cut)
