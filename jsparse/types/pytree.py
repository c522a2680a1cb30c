"""Dataclasses that JAX may rebuild with anything in their fields."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static_field(**kwargs: Any) -> Any:
    """Marks a field as part of the tree's structure: hashable, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def array_field(*, core_ndim: int, **kwargs: Any) -> Any:
    """Marks an array field whose last `core_ndim` axes are its own; axes before them are batch."""
    return dataclasses.field(metadata={"core_ndim": core_ndim}, **kwargs)


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
