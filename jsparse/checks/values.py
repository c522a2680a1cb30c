"""Checks of numbers and arrays, whatever they are for."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jsparse import _compat

_NUMBERS = (int, float, np.integer, np.floating)


def _is_integer_array(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.integer)


def positive(**values: int) -> None:
    """Each value is an int of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive int.")


def non_negative(**values: int) -> None:
    """Each value is an int of at least 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{name}={value!r} must be an int of at least 0.")


def multiple(*, of: int, **values: int) -> None:
    """Each value is a multiple of `of`."""
    for name, value in values.items():
        if value % of:
            raise ValueError(f"{name}={value} must be a multiple of {of}.")


def one_of(choices: tuple[str, ...], **values: str) -> None:
    """Each value is one of the choices."""
    for name, value in values.items():
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{name}={value!r} must be one of {listed}.")


def integers(**arrays: Any) -> None:
    """Each array holds integers."""
    for name, array in arrays.items():
        if not _is_integer_array(array):
            dtype = getattr(array, "dtype", type(array).__name__)
            raise ValueError(f"{name} holds {dtype}; it must hold integers, cast it to int32.")


def within_int32(remedy: str, **arrays: Any) -> None:
    """Concrete integers are such as int32 holds; traced ones are taken for it."""
    for name, array in arrays.items():
        # what int32 holds anyway is not read: that would wait for the device
        if _compat.is_traced(array) or np.can_cast(array.dtype, np.int32):
            continue
        found = np.asarray(array)
        outside = found[(found < np.iinfo(np.int32).min) | (found > np.iinfo(np.int32).max)]
        if outside.size:
            raise ValueError(f"{name} holds {outside[0]}, which int32 does not; {remedy}")


def broadcasts(name: str, shape: tuple[int, ...], to: tuple[int, ...]) -> None:
    """An operand broadcasts to the logits, axis by axis."""
    if len(shape) != len(to) or any(a not in (1, b) for a, b in zip(shape, to, strict=True)):
        raise ValueError(f"{name} has shape {shape}, which does not broadcast to {to}.")


def one_logit(avals: Any) -> None:
    """A score_mod returns one float."""
    found = [(aval.shape, str(aval.dtype)) for aval in avals]
    if len(avals) != 1 or avals[0].shape or not jnp.issubdtype(avals[0].dtype, jnp.floating):
        raise ValueError(
            f"score_mod must map one scalar logit to one scalar logit; it returned {found}. To "
            "hide pairs use mask=js.masks.predicate(function)."
        )


def same_number_of_axes(**sizes: Any) -> None:
    """Several tuples of sizes are of the same space."""
    if len({len(value) for value in sizes.values()}) != 1:
        listed = ", ".join(f"{name}={tuple(value)}" for name, value in sizes.items())
        raise ValueError(f"{listed}: give one size per axis in each.")


def scalar(name: str, value: Any) -> None:
    """An array with no axes."""
    if value.shape != ():
        raise ValueError(f"{name} has shape {value.shape}; it must be a scalar.")


def number(**values: Any) -> None:
    """Each value is a Python or NumPy number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, _NUMBERS):
            raise ValueError(f"{name}={value!r} must be a number.")


def finite(**values: Any) -> None:
    """Each value is a number, neither infinite nor NaN."""
    number(**values)
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be finite.")


def positive_number(**values: float) -> None:
    """Each value is a number above 0."""
    number(**values)
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0.")


def at_most(limit: int, **values: int) -> None:
    """Each value is at most `limit`."""
    for name, value in values.items():
        if value > limit:
            raise ValueError(f"{name}={value} must be at most {limit}.")


def one_bool(avals: Any) -> None:
    """A predicate returns one bool."""
    found = [(aval.shape, str(aval.dtype)) for aval in avals]
    if found != [((), "bool")]:
        raise ValueError(f"A predicate must return one bool scalar; this one returns {found}.")


def shares(**values: Any) -> None:
    """Each value is a number in [0, 1]."""
    number(**values)
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} must lie in [0, 1].")


def fractions(**values: Any) -> None:
    """Each value is a number in (0, 1], or a concrete array of such numbers."""
    _each("lie in (0, 1]", lambda found: (found > 0) & (found <= 1), values)


def decays(**values: Any) -> None:
    """Each value is a number in [0, 1)."""
    number(**values)
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must lie in [0, 1); at 1 nothing ever moves.")


def odd_or_zero(**values: int) -> None:
    """Each value is an odd count, or 0."""
    non_negative(**values)
    for name, value in values.items():
        if value and value % 2 == 0:
            raise ValueError(f"{name}={value} must be odd, or 0.")


def floating(**dtypes: Any) -> None:
    """Each dtype is one of floating point, with two zeros."""
    for name, dtype in dtypes.items():
        # where a negative zero is a nan, XLA makes nans of small negative numbers
        if not jnp.issubdtype(dtype, jnp.floating) or "fnuz" in jnp.dtype(dtype).name:
            raise ValueError(
                f"{name}={jnp.dtype(dtype).name} must be a dtype of floating point with two zeros, "
                "such as float8_e4m3fn."
            )


def same_shape(what: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    """Two things are of one shape."""
    if left != right:
        raise ValueError(f"The {what} differ in shape: {left} and {right}.")


def power_of_two(**values: int) -> None:
    """Numbers are powers of two."""
    for name, value in values.items():
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name}={value} must be a power of two.")


def some(**values: Any) -> None:
    """Each sequence has an element."""
    for name, value in values.items():
        if not len(value):
            raise ValueError(f"{name}={value!r} must hold at least one.")


def unit_interval(**values: Any) -> None:
    """Each value is a number in [0, 1], or a concrete array of such numbers."""
    _each("lie in [0, 1]", lambda found: (found >= 0) & (found <= 1), values)


def factors(**values: Any) -> None:
    """Each value is a finite number above 0, or a concrete array of such numbers; or None."""
    given = {name: value for name, value in values.items() if value is not None}
    _each("be finite and above 0", lambda found: (found > 0) & np.isfinite(found), given)


def _each(demand: str, holds: Callable[[Any], Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if not hasattr(value, "dtype"):
            number(**{name: value})
        if not _compat.is_traced(value):
            found = np.asarray(value)
            if not np.all(holds(found)):
                raise ValueError(f"{name}={found} must {demand}.")


def no_explicit_axes(**arrays: Any) -> None:
    """No array is split over mesh axes that belong to its type."""
    for name, x in arrays.items():
        axes = _compat.explicit_axes(x)
        if axes:
            raise ValueError(
                f"{name} is split over {', '.join(axes)}, an explicit axis of its mesh; make the "
                "mesh with axis_types=(jax.sharding.AxisType.Auto, ...), or call this inside "
                "jax.shard_map."
            )
