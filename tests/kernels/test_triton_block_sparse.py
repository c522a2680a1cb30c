"""The Triton kernels, computed by XLA program by program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.testing import FEATURES, AttentionSuite
from pallas_kernels import _compat
from tests.inputs import qkv


attend = functools.partial(js.attend, implementation="triton")


@pytest.fixture(autouse=True)
def interpreted():
    # gradients are traced after the call that they belong to
    with _compat.triton_interpreter():
        yield


class TestTriton(AttentionSuite):
    attention = staticmethod(attend)
    # those cases have tiles with a side below 16; others are tested below
    supports = FEATURES - {"rectangular_tiles"}
