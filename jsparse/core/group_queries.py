"""One query of a gate for the query heads that share a kv head.

Its makers are built of functions of this module, so that gates that are alike compare equal and
share their compiled programs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jsparse import checks

_glorot = jax.nn.initializers.glorot_uniform


class GroupQuery(NamedTuple):
    """Makes the gate's query of those of a group of heads.

    Attributes:
      init: `init(key, *, kv_heads, group, dim, gate_dim) -> params`.
      apply: `apply(params, q [*batch, q_len, kv_heads, group, dim])`, of queries without positions,
        in f32, to `[*batch, q_len, kv_heads, queries, gate_dim]`; scores of several are averaged.
    """

    init: Callable[..., Any]
    apply: Callable[[Any, Array], Array]


def projected() -> GroupQuery:
    """Adds up a projection of each head's query; Qproj of the authors, the paper's choice."""
    return GroupQuery(_init_of_heads, _project_heads)


def mean_projected() -> GroupQuery:
    """Projects the mean of the queries; Qavgproj of the authors."""
    return GroupQuery(_init_of_groups, _project_mean)


def mean() -> GroupQuery:
    """Takes the mean of the queries, which are `gate_dim` wide; Qavg of the authors."""
    return GroupQuery(_init_nothing, _mean)


def separate() -> GroupQuery:
    """Scores by each query, which are `gate_dim` wide; Qorig of the authors."""
    return GroupQuery(_init_nothing, _each)


def _init_of_heads(key, *, kv_heads, group, dim, gate_dim) -> Array:
    glorot = _glorot(in_axis=(1, 2), out_axis=3, batch_axis=0)
    return glorot(key, (kv_heads, group, dim, gate_dim))


def _init_of_groups(key, *, kv_heads, group, dim, gate_dim) -> Array:
    return _glorot(in_axis=1, out_axis=2, batch_axis=0)(key, (kv_heads, dim, gate_dim))


def _init_nothing(key, *, kv_heads, group, dim, gate_dim) -> tuple[()]:
    checks.gate_width(gate_dim, dim)
    return ()


def _project_heads(weights: Array, q: Array) -> Array:
    return jnp.einsum("...kgd,kgde->...ke", q, weights)[..., None, :]


def _project_mean(weights: Array, q: Array) -> Array:
    return jnp.einsum("...kd,kde->...ke", q.mean(-2), weights)[..., None, :]


def _mean(nothing: Any, q: Array) -> Array:
    return q.mean(-2, keepdims=True)


def _each(nothing: Any, q: Array) -> Array:
    return q
