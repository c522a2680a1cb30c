"""Splits a rule on single logits into what depends on one token alone and what needs both.

A GPU kernel holds a tile of logits in registers, where it can do arithmetic but not look things up
in arrays. What a mask or a score_mod looks up, though, mostly belongs to a query or to a key (a
segment id, an interval's end, a slope per head). That part is computed before, a value per query
and a value per key; the arithmetic that is left goes into the kernel, and so does its derivative.
What an array says pair by pair (a dense mask, a full bias) may go along as it is, for kernels that
read it tile by tile.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jsparse import _compat

# what every supported version of Mosaic GPU computes on registers
ELEMENTWISE = frozenset(
    "abs add add_any and clamp convert_element_type cos div eq erf exp exp2 ge gt integer_pow le "
    "log logistic lt max min mul ne neg not one_minus_square or rem round rsqrt select_n sign sin "
    "square stop_gradient sub tanh xor".split()
)
# on scalars these change nothing; a derivative sums over no axis where devices have a mesh
_IDENTITIES = frozenset("broadcast_in_dim copy reduce_sum reshape squeeze".split())
_LOGIT, _QUERY, _KEY, _BATCH, _HEAD = _ARGUMENTS = ("logit", "q", "kv", "batch", "head")

LogitFunction = Callable[[Array, Array, Array, Array, Array], Array]
Reader = Callable[[], Array]


class Separated(NamedTuple):
    """A rule in two parts: values computed before, and element-by-element arithmetic.

    Values have axes for sequences, heads and tokens, each of length 1 where it makes no difference;
    those per pair have axes for queries and for keys.

    Values reach the arithmetic as functions without arguments, called where a value is used; they
    give arrays of the logits' shape, as the indices are.
    """

    row_values: tuple[Shaped[Array, "_ _ _"], ...]
    column_values: tuple[Shaped[Array, "_ _ _"], ...]
    inside: "_Inside"
    pair_values: tuple[Shaped[Array, "_ _ _ _"], ...] = ()

    @property
    def values(self) -> tuple[tuple[Array, ...], ...]:
        """All that is computed before: per query, per key, per pair."""
        return self.row_values, self.column_values, self.pair_values

    def rule(
        self,
        logits: Float[Array, "..."],
        q_index: Int[Array, "..."],
        kv_index: Int[Array, "..."],
        row_values: Sequence[Reader],
        column_values: Sequence[Reader],
        pair_values: Sequence[Reader] = (),
    ) -> Float[Array, "..."]:
        """The changed logits."""
        given = (logits, q_index, kv_index, *row_values, *column_values, *pair_values)
        return self.inside.forward(given, logits.shape)[0]

    def gradient(
        self,
        logits: Float[Array, "..."],
        q_index: Int[Array, "..."],
        kv_index: Int[Array, "..."],
        row_values: Sequence[Reader],
        column_values: Sequence[Reader],
        d_logits: Float[Array, "..."],
        pair_values: Sequence[Reader] = (),
    ) -> list[Float[Array, "..."]]:
        """What flows back: to the logits, then to each f32 value per query, per key, per pair."""
        given = (logits, q_index, kv_index, *row_values, *column_values, *pair_values, d_logits)
        return self.inside.backward(given, logits.shape)


class _Inside(NamedTuple):
    forward: Callable[..., list[Array]]
    backward: Callable[..., list[Array]]


def separate(
    function: LogitFunction,
    *,
    batches: int,
    heads: int,
    q_len: int,
    kv_len: int,
    operations: frozenset[str] = ELEMENTWISE,
    pairs: int | None = None,
) -> Separated | str:
    """Splits `function(logit, q_index, kv_index, batch, head) -> logit`, written for scalars.

    Args:
      function: May close over arrays, traced ones too.
      batches: Number of sequences.
      heads: Number of query heads.
      q_len: Number of queries that get a value.
      kv_len: Number of keys that get a value.
      operations: What the kernel computes on registers.
      pairs: How many pairs of tokens there are, for a kernel that reads values per pair: such
        values it gets where they are looked up in an array that is as large itself. Default: none.

    Returns:
      The parts, or a sentence that says what cannot be split.
    """
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    logit = jax.ShapeDtypeStruct((), jnp.float32)
    program = _compat.inline(jax.make_jaxpr(function)(logit, integer, integer, integer, integer))
    depends = dict.fromkeys(program.constants, frozenset())
    depends |= {v: frozenset([a]) for v, a in zip(program.inputs, _ARGUMENTS, strict=True)}
    for step in program.steps:
        used = frozenset().union(*(depends[v] for v in step.variables))
        depends |= dict.fromkeys(step.outputs, used)

    before = _steps_before(program, depends, operations, by_pair=pairs is not None)
    if isinstance(before, str):
        return before
    inside = _compat.needed([s for s in program.steps if s.index not in before], program.outputs)
    indices = program.inputs[:3]
    values = _frontier(inside, program.outputs, indices)
    for value in values:
        if value.aval.dtype not in (jnp.float32, jnp.int32, jnp.bool_):
            return f"it cannot hand {value.aval.dtype} values to a kernel; convert to f32 or int32."
    both = [value for value in values if {_QUERY, _KEY} <= depends[value]]
    for value in both:
        repeats = (batches if _BATCH in depends[value] else 1) * (
            heads if _HEAD in depends[value] else 1
        )
        if _largest_source(program, value) < repeats * (pairs or 0):
            return (
                "a mask, bias or score_mod looks up by query and by key what is no array of all "
                "pairs, which a kernel cannot do in registers."
            )
    rows = [value for value in values if _KEY not in depends[value]]
    columns = [v for v in values if _KEY in depends[v] and v not in both]
    inputs = (*indices, *rows, *columns, *both)
    part = program._replace(inputs=inputs, constants={}, steps=tuple(inside))
    backward = _derivative(part, operations)
    if isinstance(backward, str):
        return backward
    lengths = {_QUERY: q_len, _KEY: kv_len}

    def compute(value: Any) -> Array:
        tokens = [a for a in lengths if a in depends[value]] or [_QUERY]
        sizes = {_BATCH: batches, _HEAD: heads} | {a: lengths[a] for a in tokens}

        def at(*positions):
            given = dict(zip(sizes, positions, strict=True))
            inputs = [given.get(name, jnp.int32(0)) for name in _ARGUMENTS]
            return program.evaluate(inputs, value)

        for axis in reversed(range(len(sizes))):
            at = jax.vmap(at, in_axes=tuple(0 if n == axis else None for n in range(len(sizes))))
        used = (jnp.arange(size if name in depends[value] else 1) for name, size in sizes.items())
        result = at(*used)
        if value.aval.dtype != jnp.bool_:
            return result
        # pairs are many; not int8, for Pallas counts bytes, not elements, where it widens offsets
        return result.astype(jnp.int16 if len(tokens) == 2 else jnp.int32)

    return Separated(
        tuple(map(compute, rows)),
        tuple(map(compute, columns)),
        _Inside(_on_arrays(part), _on_arrays(backward)),
        tuple(map(compute, both)),
    )


def _largest_source(program: "_compat.Program", value: Any) -> int:
    """How many numbers the largest array has that a value follows from."""
    read = {v for step in _compat.needed(program.steps, [value]) for v in step.variables}
    return max((np.size(program.constants[v]) for v in read if v in program.constants), default=0)


def _steps_before(
    program: "_compat.Program", depends: dict, operations: frozenset[str], *, by_pair: bool
) -> set[int] | str:
    """The steps to take before the kernel, or a sentence about one that cannot be."""
    before: set[int] = set()
    pairwise: set[Any] = set()
    # a sequence or a head is one number in a kernel, so what follows from it alone is computed too
    computed = {*program.constants, *program.inputs[3:]}
    for step in program.steps:
        one_token = not {_QUERY, _KEY} <= depends[step.outputs[0]]
        one_token &= _LOGIT not in depends[step.outputs[0]]
        looks_up = not _in_registers(step, operations)
        if looks_up and not one_token:
            if not by_pair or _LOGIT in depends[step.outputs[0]]:
                return _refused(step)
            before.add(step.index)
            pairwise.update(step.outputs)
        # a conversion of a value per pair, say
        if len(step.variables) == 1 and step.variables[0] in pairwise:
            before.add(step.index)
            pairwise.update(step.outputs)
        # what follows from values that are computed before may as well be
        follows = bool(step.variables) and all(v in computed for v in step.variables)
        if one_token and (looks_up or follows):
            before.add(step.index)
            computed.update(step.outputs)
    return before


def _in_registers(step: "_compat.Step", operations: frozenset[str]) -> bool:
    scalars = not any(v.aval.shape for v in (*step.variables, *step.outputs))
    return scalars and step.name in operations | _IDENTITIES


def _refused(step: "_compat.Step") -> str:
    return (
        f"a mask, bias or score_mod does {step.name!r} with a query and a key, or with a logit, "
        "which a kernel cannot do in registers."
    )


def _frontier(inside: list, outputs: Sequence[Any], indices: Sequence[Any]) -> list[Any]:
    """What the steps inside read that they do not make: in the order of its first use."""
    made = {v for step in inside for v in step.outputs} | set(indices)
    read = [v for step in inside for v in step.variables]
    read += [v for v in outputs if _compat.is_variable(v)]
    return [v for v in dict.fromkeys(read) if v not in made]


def _derivative(part: "_compat.Program", operations: frozenset[str]) -> "_compat.Program | str":
    """The program of the gradient by the logit and by each f32 value, on scalars."""
    (output,) = part.outputs
    floats = [n for n, v in enumerate(part.inputs) if v.aval.dtype == jnp.float32]

    def gradient(*arguments):
        *given, d_output = arguments

        def forward(*changed):
            replaced = dict(zip(floats, changed, strict=True))
            inputs = [replaced.get(n, x) for n, x in enumerate(given)]
            if not _compat.is_variable(output):
                return jnp.full((), output.val, jnp.float32)
            return part.evaluate(inputs, output)

        _, pullback = jax.vjp(forward, *(given[n] for n in floats))
        return pullback(d_output)

    shapes = [jax.ShapeDtypeStruct((), v.aval.dtype) for v in part.inputs]
    traced = jax.make_jaxpr(gradient)(*shapes, jax.ShapeDtypeStruct((), jnp.float32))
    program = _compat.inline(traced)
    kept = _compat.needed(program.steps, program.outputs)
    for step in kept:
        if not _in_registers(step, operations):
            return _refused(step)
    return program._replace(steps=tuple(kept))


def _on_arrays(program: "_compat.Program") -> Callable[..., list[Array]]:
    """A program for scalars as a function of arrays, or of readers of arrays."""

    def run(inputs: Sequence[Array | Reader], shape: tuple[int, ...]) -> list[Array]:
        known: dict[Any, Any] = dict(zip(program.inputs, inputs, strict=True))
        for v, constant in program.constants.items():
            known[v] = jnp.full(shape, constant, v.aval.dtype)

        def read(operand: Any) -> Array:
            if not _compat.is_variable(operand):
                return jnp.full(shape, operand.val, operand.aval.dtype)
            if not callable(known[operand]):
                return known[operand]
            # what a reader gives is not kept: it would fill registers until its last use
            value: Any = known[operand]()
            return value != 0 if operand.aval.dtype == jnp.bool_ else value

        for step in program.steps:
            operands = [read(v) for v in step.operands]
            if step.name == "add_any":  # what sums cotangents; kernels know it as addition
                result = operands[0] + operands[1]
            else:
                result = operands[0] if step.name in _IDENTITIES else step.bind(*operands)
            known[step.outputs[0]] = result
        return [read(v) for v in program.outputs]

    return run
