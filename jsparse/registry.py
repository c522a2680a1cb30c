"""METHODS: one literal row per method. Tests, the README table and the CLI read it."""

from collections.abc import Callable
from typing import NamedTuple

from jsparse.types import Method


class Row(NamedTuple):
    """What is known of a method without running it.

    Attributes:
      name: The factory's name, and that of its file, oracle and test.
      family: The folder that holds it.
      factory: Makes the method; every argument has the paper's default.
      summary: What it does, in under ten words.
      paper: The source: an arXiv id, or a venue where there is none.
      year: Of the paper.
      causal: Whether it serves causal attention.
      bidirectional: Whether it serves attention without a causal mask.
      training_free: Whether it works on a trained model as it is, without parameters of its own.
      needs_state: Whether it carries state over steps or layers.
      needs_key: Whether it samples.
    """

    name: str
    family: str
    factory: Callable[..., Method]
    summary: str
    paper: str
    year: int
    causal: bool
    bidirectional: bool
    training_free: bool
    needs_state: bool = False
    needs_key: bool = False


METHODS: tuple[Row, ...] = ()
