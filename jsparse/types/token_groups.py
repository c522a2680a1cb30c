"""Groups of tokens: attention inside a group and nowhere else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.types.integers import as_int32
from jsparse.types.pytree import array_field, pytree_dataclass


@pytree_dataclass
class TokenGroups:
    """A permutation of queries and of keys that puts each group's tokens side by side.

    Group `g` owns the queries `q_order[..., q_offsets[g] : q_offsets[g + 1]]` and the keys
    `kv_order[..., kv_offsets[g] : kv_offsets[g + 1]]`; offsets are true lengths, so groups may be
    empty or uneven. Tokens after the last offset belong to no group. The heads axis is 1, kv_heads
    or heads; that of the other side is the same or 1.

    An entry of an order that names no token counts as padding, and so does one whose token a group
    has already; a token that no entry names belongs to no group. Offsets count as if cut to the
    number of tokens, and none below the one before it.
    """

    q_order: Int[Array, "*q_batch q_heads q_len"] = array_field(core_ndim=2)
    kv_order: Int[Array, "*kv_batch kv_heads kv_len"] = array_field(core_ndim=2)
    q_offsets: Int[Array, "*q_batch q_heads groups_plus_1"] = array_field(core_ndim=2)
    kv_offsets: Int[Array, "*kv_batch kv_heads groups_plus_1"] = array_field(core_ndim=2)

    @classmethod
    def from_ids(
        cls,
        q_ids: Int[Array, "*q_batch q_heads q_len"],
        kv_ids: Int[Array, "*kv_batch kv_heads kv_len"],
        *,
        groups: int,
    ) -> "TokenGroups":
        """Groups tokens by id; ids outside [0, groups) belong to no group.

        Order inside a group is the original order.

        Raises:
          ValueError: if ids are not integers, `groups` is not positive, or the two sides' heads or
            batch axes do not broadcast to each other's.
        """
        checks.positive(groups=groups)
        checks.integers(q_ids=q_ids, kv_ids=kv_ids)
        checks.groups_of_both_sides(q_ids.shape, kv_ids.shape)
        q_order, q_offsets = _sort_by_group(as_int32(q_ids), groups)
        kv_order, kv_offsets = _sort_by_group(as_int32(kv_ids), groups)
        return cls(q_order, kv_order, q_offsets, kv_offsets)

    @property
    def groups(self) -> int:
        """Number of groups, empty ones included."""
        return self.q_offsets.shape[-1] - 1

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.q_order.shape[-1]

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.kv_order.shape[-1]

    @property
    def list_heads(self) -> int:
        """How many groupings there are per sequence: 1, kv_heads or heads; a side may share."""
        return max(self.q_order.shape[-2], self.kv_order.shape[-2])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch axes of the groupings, of both sides together."""
        return jnp.broadcast_shapes(self.q_order.shape[:-2], self.kv_order.shape[:-2])

    def q_ids(self) -> Int[Array, "*batch list_heads q_len"]:
        """The group of each query, -1 for none."""
        return _group_of(as_int32(self.q_order), as_int32(self.q_offsets))

    def kv_ids(self) -> Int[Array, "*batch list_heads kv_len"]:
        """The group of each key, -1 for none."""
        return _group_of(as_int32(self.kv_order), as_int32(self.kv_offsets))

    def without_missing_tokens(self) -> "TokenGroups":
        """The groups as they count: orders that are permutations, offsets that are in range.

        Groups that are so already are only read.
        """
        sides = (self.q_order, self.q_offsets), (self.kv_order, self.kv_offsets)
        (q_order, q_offsets), (kv_order, kv_offsets) = (
            _permuted(as_int32(order), as_int32(offsets)) for order, offsets in sides
        )
        return dataclasses.replace(
            self, q_order=q_order, kv_order=kv_order, q_offsets=q_offsets, kv_offsets=kv_offsets
        )

    def q_inverse(self) -> Int[Array, "*batch list_heads q_len"]:
        """Where each query stands in `q_order`; `q_len` for one that does not."""
        order = as_int32(self.q_order)
        return _first_places(order, jnp.ones(order.shape, bool))

    def kv_runs(
        self,
    ) -> tuple[Int[Array, "*batch list_heads q_len"], Int[Array, "*batch list_heads q_len"]]:
        """Where in `kv_order` the keys begin, and where they end, of each query of `q_order`.

        Neither falls from one query to the next. A query without keys has an empty run.
        """
        places = jnp.arange(self.q_len, dtype=jnp.int32)
        group = _searchsorted(self.q_offsets, places, side="right") - 1
        first = jnp.clip(group, 0, self.groups)
        end = jnp.clip(group + 1, 0, self.groups)
        end = jnp.where(group < 0, first, end)
        take = functools.partial(jnp.take_along_axis, self.kv_offsets, axis=-1)
        return take(first), take(end)

    def visible(self) -> Bool[Array, "*batch list_heads q_len kv_len"]:
        """Who may see whom, as one bool per pair; for tests and small inputs."""
        q_ids, kv_ids = self.q_ids()[..., :, None], self.kv_ids()[..., None, :]
        return (q_ids == kv_ids) & (q_ids >= 0)


def _sort_by_group(ids: Array, groups: int) -> tuple[Array, Array]:
    ids = jnp.where((ids >= 0) & (ids < groups), ids, groups)
    order = jnp.argsort(ids, axis=-1, stable=True).astype(jnp.int32)
    ids = jnp.take_along_axis(ids, order, axis=-1)
    return order, _searchsorted(ids, jnp.arange(groups + 1, dtype=ids.dtype), side="left")


@jax.jit
def _permuted(order: Array, offsets: Array) -> tuple[Array, Array]:
    """An order and offsets as they count: tokens of no group go behind the others.

    Nothing is sorted, and nothing depends on whether there was something to mend.
    """
    length = order.shape[-1]
    offsets, places = _in_range(offsets, length), jnp.arange(length, dtype=jnp.int32)
    grouped = (places >= offsets[..., :1]) & (places < offsets[..., -1:])
    first = _first_places(order, grouped)
    counts = grouped & (jnp.take_along_axis(first, order, -1, mode="fill", fill_value=-1) == places)
    counts &= order >= 0  # which would be read from the end
    before = jnp.pad(
        jnp.cumsum(counts, -1, dtype=jnp.int32), [(0, 0)] * (order.ndim - 1) + [(1, 0)]
    )
    missing = first == length
    behind = before[..., -1:] + jnp.cumsum(missing, -1, dtype=jnp.int32) - 1
    rows = jnp.arange(order.size // length)[:, None]
    found = jnp.zeros_like(order).reshape(-1, length)
    for taken, target, tokens in (
        (counts, before[..., :-1], order),
        (missing, behind, jnp.broadcast_to(places, order.shape)),
    ):
        target = jnp.where(taken, target, length).reshape(-1, length)
        found = found.at[rows, target].set(tokens.reshape(-1, length), mode="drop")
    return found.reshape(order.shape), jnp.take_along_axis(before, offsets, -1)


def _in_range(offsets: Array, length: int) -> Array:
    """Offsets as they count."""
    return jax.lax.cummax(jnp.clip(offsets, 0, length), axis=offsets.ndim - 1)


@jax.jit
def _group_of(order: Array, offsets: Array) -> Array:
    """The group of each token, -1 for none."""
    offsets, places = _in_range(offsets, order.shape[-1]), jnp.arange(order.shape[-1])
    # a token may stand in a group and behind the last one, too
    grouped = (places >= offsets[..., :1]) & (places < offsets[..., -1:])
    group = _searchsorted(offsets, _first_places(order, grouped), side="right") - 1
    return jnp.where(group < offsets.shape[-1] - 1, group, -1)


def _first_places(order: Array, counted: Array) -> Int[Array, "..."]:
    """Where each token stands first among the entries that count; past the end where nowhere."""
    length = order.shape[-1]
    # negative ones would count from the end
    tokens = jnp.where(counted & (order >= 0), order, length).reshape(-1, length)
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    rows = jnp.arange(len(tokens))[:, None]
    found = jnp.full_like(tokens, length).at[rows, tokens].min(places, mode="drop")
    return found.reshape(order.shape)


def _searchsorted(rows: Array, values: Array, *, side: str) -> Int[Array, "..."]:
    """Where values, one set for all rows or one per row, would go in each sorted row."""
    values = jnp.broadcast_to(values, (*rows.shape[:-1], values.shape[-1]))
    search = functools.partial(jnp.searchsorted, side=side)
    found = jax.vmap(search)(rows.reshape(-1, rows.shape[-1]), values.reshape(-1, values.shape[-1]))
    return found.reshape(values.shape).astype(jnp.int32)
