"""Dataclasses that JAX may rebuild with anything in their fields."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

T = TypeVar("T")


def static_field(**kwargs: Any) -> Any:
    """Marks a field as part of the tree's structure: hashable, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def array_field(*, core_ndim: int, **kwargs: Any) -> Any:
    """Marks an array field whose last `core_ndim` axes are its own; axes before them are batch."""
    return dataclasses.field(metadata={"core_ndim": core_ndim}, **kwargs)


def flatten_batch(tree: T, batch_shape: tuple[int, ...]) -> T:
    """Brings the batch axes of every array field to one; what all sequences share stays one entry.

    Index the result with `entry(len(array), batch)`.
    """
    return map_batched(lambda core_ndim, x: flatten_axes(x, core_ndim, batch_shape), tree)


def map_batched(function: Callable[..., Any], tree: T, *others: Any) -> T:
    """Applies `function(core_ndim, value, *of_others)` to each field that may have batch axes.

    Other fields stay as they are.
    """
    changes: dict[str, Any] = {}
    carried: dict[str, Any] = {}
    for field in dataclasses.fields(tree):  # type: ignore[arg-type]
        value, *rest = (getattr(x, field.name) for x in (tree, *others))
        if value is None:
            continue
        if "core_ndim" in field.metadata:
            changes[field.name] = function(field.metadata["core_ndim"], value, *rest)
        elif dataclasses.is_dataclass(value):
            of = changes if field.init else carried
            of[field.name] = map_batched(function, value, *rest)
    changed = dataclasses.replace(tree, **changes) if changes else tree  # type: ignore[type-var]
    return carrying(changed, **carried) if carried else changed


def carrying(tree: T, **values: Any) -> T:
    """A copy with fields that no constructor takes, so that `dataclasses.replace` drops them."""
    copy = object.__new__(type(tree))
    for field in dataclasses.fields(tree):  # type: ignore[arg-type]
        value = values.get(field.name, getattr(tree, field.name))
        object.__setattr__(copy, field.name, value)
    return copy


def batched_values(tree: Any) -> Iterator[Any]:
    """What the fields that may have batch axes hold."""
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if "core_ndim" in field.metadata and value is not None:
            yield value
        elif dataclasses.is_dataclass(value):
            yield from batched_values(value)


def flatten_axes(x: jax.Array, core_ndim: int, batch_shape: tuple[int, ...]) -> jax.Array:
    """Brings all axes before the last `core_ndim` to one, of length 1 where they all are."""
    split = x.ndim - core_ndim
    batch, core = x.shape[:split], x.shape[split:]
    if any(size > 1 for size in batch):
        x = jnp.broadcast_to(x, (*batch_shape, *core))
    return x.reshape(-1, *core)


def entry(count: int, index: Any) -> Any:
    """The index into an axis of `count` entries, 0 where one entry serves all."""
    return index if count > 1 else 0


@dataclass_transform(frozen_default=True, field_specifiers=(static_field, array_field))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass a pytree.

    Unflattening skips `__init__`: JAX rebuilds trees with tracers, specs, None or bare objects as
    leaves, none of which would survive the checks that a user's own call deserves.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = tuple(f.name for f in fields if f.metadata.get("static"))
    dynamic = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten_with_keys(tree):
        children = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in dynamic]
        return children, tuple(getattr(tree, name) for name in static)

    def flatten(tree):
        children = [getattr(tree, name) for name in dynamic]
        return children, tuple(getattr(tree, name) for name in static)

    def unflatten(aux, children):
        tree = object.__new__(cls)
        for name, value in (*zip(dynamic, children, strict=True), *zip(static, aux, strict=True)):
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
