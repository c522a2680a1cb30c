"""The largest entries of rows are those that sorting finds, whatever they are."""

import numpy as np
import pytest

from jsparse.core.largest import largest
from jsparse.types.counts import counted
from pallas_kernels.sortable import NOTHING
from tests.inputs import on_device


@pytest.mark.parametrize("columns", [0, 1, 31, 32, 33, 70, 1100])
def test_entries_are_counted(columns):
    holds = np.random.default_rng(columns).random((3, 5, columns)) < 0.6
    got = counted(on_device(holds))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, holds.cumsum(-1))


@pytest.mark.parametrize("values", [2, 7, 2**31 - 1])
def test_the_largest_are_found_and_of_equal_ones_the_first(values):
    rng = np.random.default_rng(values)
    rows, columns = 40, 37
    keys = rng.integers(-values, values, (rows, columns)).astype(np.int32)
    keys[rng.random(keys.shape) < 0.2] = NOTHING
    keys[0], keys[1, 1:] = NOTHING, NOTHING
    # rows that keep nothing, everything, and more than there is
    count = rng.integers(0, columns + 3, (rows, 1)).astype(np.int32)
    count[2:4] = [[0], [columns]]
    got = np.asarray(largest(on_device(keys), on_device(count)))
    for row, chosen, most in zip(keys, got, count[:, 0], strict=True):
        order = np.argsort(-row.astype(np.int64), kind="stable")
        expected = np.zeros(columns, bool)
        expected[[i for i in order if row[i] > NOTHING][:most]] = True
        np.testing.assert_array_equal(chosen, expected)
