"""Splits a rule on single logits into what depends on one token alone and what needs both.

A GPU kernel holds a tile of logits in registers, where it can do arithmetic but not look things up
in arrays. What a mask or a score_mod looks up, though, mostly belongs to a query or to a key (a
segment id, an interval's end, a slope per head). That part is computed before, a value per query
and a value per key; the arithmetic that is left goes into the kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jsparse import _compat

# what every supported version of Mosaic GPU computes on registers
ELEMENTWISE = frozenset(
    "abs add and clamp convert_element_type cos div eq erf exp exp2 ge gt integer_pow le log "
    "logistic lt max min mul ne neg not or rem round rsqrt select_n sign sin square stop_gradient "
    "sub tanh xor".split()
)
# on scalars these change nothing
_IDENTITIES = frozenset("broadcast_in_dim copy reshape squeeze".split())
_LOGIT, _QUERY, _KEY, _BATCH, _HEAD = _ARGUMENTS = ("logit", "q", "kv", "batch", "head")

LogitFunction = Callable[[Array, Array, Array, Array, Array], Array]


class Separated(NamedTuple):
    """A rule in two parts.

    `rule(logits, q_index, kv_index, row_values, column_values)` is element by element. The values
    come as functions without arguments, called where a value is used; they give arrays of the
    logits' shape, as the indices are.
    """

    row_values: tuple[Shaped[Array, "_ _ q_len"], ...]
    column_values: tuple[Shaped[Array, "_ _ kv_len"], ...]
    rule: Callable[..., Float[Array, "..."]]


class _Value(NamedTuple):
    """Something computed before the kernel, and how the kernel gets it back."""

    variable: Any
    depends: frozenset[str]
    dtype: Any


def separate(
    function: LogitFunction, *, batches: int, heads: int, q_len: int, kv_len: int
) -> Separated | str:
    """Splits `function(logit, q_index, kv_index, batch, head) -> logit`, written for scalars.

    Args:
      function: May close over arrays, traced ones too.
      batches: Number of sequences.
      heads: Number of query heads.
      q_len: Number of queries that get a value.
      kv_len: Number of keys that get a value.

    Returns:
      The parts, or a sentence that says what cannot be split.
    """
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    logit = jax.ShapeDtypeStruct((), jnp.float32)
    traced = jax.make_jaxpr(function)(logit, integer, integer, integer, integer)
    program = _compat.inline(traced)
    depends = dict.fromkeys(program.constants, frozenset())
    depends |= {v: frozenset([a]) for v, a in zip(program.inputs, _ARGUMENTS, strict=True)}
    for step in program.steps:
        used = frozenset().union(*(depends[v] for v in step.variables))
        depends |= dict.fromkeys(step.outputs, used)

    before = _steps_before(program, depends)
    if isinstance(before, str):
        return before
    inside = _needed([s for s in program.steps if s.index not in before], program.output)
    made_inside = {v for step in inside for v in step.outputs}
    indices = set(program.inputs[:3])
    frontier = {v: None for step in inside for v in step.variables}
    if _compat.is_variable(program.output):
        frontier[program.output] = None
    values = [
        _Value(v, depends[v], v.aval.dtype)
        for v in frontier
        if v not in made_inside and v not in indices
    ]
    for value in values:
        if value.dtype not in (jnp.float32, jnp.int32, jnp.bool_):
            return f"it cannot hand {value.dtype} values to a kernel; convert to f32 or int32."

    rows = [value for value in values if _KEY not in value.depends]
    columns = [value for value in values if _KEY in value.depends]

    def compute(value: _Value, length: int) -> Array:
        argument = _KEY if _KEY in value.depends else _QUERY
        sizes = {_BATCH: batches, _HEAD: heads, argument: length}

        def at(*positions):
            given = dict(zip(sizes, positions, strict=True))
            inputs = [given.get(name, jnp.int32(0)) for name in _ARGUMENTS]
            return program.evaluate(inputs, value.variable)

        for axis in reversed(range(len(sizes))):
            at = jax.vmap(at, in_axes=tuple(0 if n == axis else None for n in range(len(sizes))))
        used = (
            jnp.arange(size if name in value.depends or name == argument else 1)
            for name, size in sizes.items()
        )
        result = at(*used)
        return result.astype(jnp.int32) if value.dtype == jnp.bool_ else result

    def rule(
        logits: Float[Array, "..."],
        q_index: Int[Array, "..."],
        kv_index: Int[Array, "..."],
        row_values: tuple[Callable[[], Array], ...],
        column_values: tuple[Callable[[], Array], ...],
    ) -> Float[Array, "..."]:
        known = dict(zip(program.inputs[:3], (logits, q_index, kv_index), strict=True))
        readers = dict(zip([*rows, *columns], [*row_values, *column_values], strict=True))
        readers = {value.variable: (value, reader) for value, reader in readers.items()}

        def read(operand: Any) -> Array:
            if not _compat.is_variable(operand):
                return jnp.full(logits.shape, operand.val, operand.aval.dtype)
            if operand in known:
                return known[operand]
            value, reader = readers[operand]
            return reader() != 0 if value.dtype == jnp.bool_ else reader()

        for step in inside:
            if step.name in _IDENTITIES:
                known[step.outputs[0]] = read(step.operands[0])
            else:
                known[step.outputs[0]] = step.bind(*map(read, step.operands))
        return read(program.output)

    return Separated(
        tuple(compute(value, q_len) for value in rows),
        tuple(compute(value, kv_len) for value in columns),
        rule,
    )


def _steps_before(program: "_compat.Program", depends: dict) -> set[int] | str:
    """The steps to take before the kernel, or a sentence about one that cannot be."""
    before: set[int] = set()
    # a sequence or a head is one number in a kernel, so what follows from it alone is computed too
    computed = {*program.constants, *program.inputs[3:]}
    for step in program.steps:
        one_token = not {_QUERY, _KEY} <= depends[step.outputs[0]]
        one_token &= _LOGIT not in depends[step.outputs[0]]
        looks_up = step.name not in ELEMENTWISE | _IDENTITIES or any(
            v.aval.shape for v in (*step.variables, *step.outputs)
        )
        if looks_up and not one_token:
            return (
                f"a mask, bias or score_mod does {step.name!r} with a query and a key, or with a "
                "logit, which a kernel cannot do in registers."
            )
        # what follows from values that are computed before may as well be
        follows = bool(step.variables) and all(v in computed for v in step.variables)
        if one_token and (looks_up or follows):
            before.add(step.index)
            computed.update(step.outputs)
    return before


def _needed(steps: list, output: Any) -> list:
    """Those of the steps that the output follows from, in order."""
    wanted, kept = {output} if _compat.is_variable(output) else set(), []
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            kept.append(step)
            wanted.update(step.variables)
    return kept[::-1]
