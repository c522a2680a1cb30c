"""The names of JAX that move between versions or are not public; nobody else imports those."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

# calls that stand for their body; the name of the parameter that holds it differs
_CALLS = frozenset(
    "jit pjit closed_call core_call remat checkpoint custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr custom_lin".split()
)
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# XLA of jax 0.10 takes five times as long for sums of products of more numbers each
LARGEST_SUM = {"cpu": 2**15 - 1} if jax.__version_info__ < (0, 11) else {}
# and it computes a batch of products on one core of a CPU, while a sum of products it spreads
SPREADS_BATCHES = jax.__version_info__ >= (0, 11)


def closed_jaxpr_call(closed, consts, *args):
    """Evaluates a traced function with other constants than it was traced with."""
    return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, list(consts)))(*args)


def is_traced(tree) -> bool:
    """Whether any leaf of a pytree is a tracer."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def at_once():
    """A context in which what is not traced is computed, also while something else is traced.

    `jax.ensure_compile_time_eval` does so by single operations, each a program of its own: it takes
    jitted functions apart.
    """
    return jax.core.eval_context()


def explicit_axes(x: Any) -> tuple[str, ...]:
    """The mesh axes that an array's type names: those of `AxisType.Explicit`."""
    return tuple(str(axis) for axis in jax.typeof(x).sharding.spec if axis is not None)


def _varying(x: Any) -> frozenset:
    """The axes of a `shard_map` over which an array differs from device to device."""
    return jax.typeof(x).manual_axis_type.varying if is_traced(x) else frozenset()


def _varying_as(x: Any, like: Any) -> Any:
    """An array that counts as different wherever another one, or what is said of it, does."""
    found = getattr(like, "manual_axis_type", None)
    wanted = _varying(like) if found is None else found.varying
    missing = tuple(sorted(wanted - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _inside_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _carried(step: Callable[[Any], Any], carry: Any) -> Any:
    """What a loop starts with, as its steps give it back: inside `shard_map` JAX asks for it.

    Zeros are the same on all devices, sums over what each of them has are not.
    """
    if not _inside_shard_map():
        return carry
    while True:
        after = jax.tree.map(_varying_as, carry, jax.eval_shape(step, carry))
        same = map(lambda old, new: old is new, jax.tree.leaves(carry), jax.tree.leaves(after))
        if all(same):
            return after
        carry = after


def scan(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, also over what differs from device to device in a `shard_map`."""
    first = jax.tree.map(lambda x: x[0], inputs) if _inside_shard_map() else None
    return jax.lax.scan(step, _carried(lambda c: step(c, first)[0], carry), inputs)


def fori_loop(first: Any, last: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`jax.lax.fori_loop`, also over what differs from device to device in a `shard_map`."""
    return jax.lax.fori_loop(first, last, step, _carried(lambda c: step(first, c), carry))


def cond(chosen: Any, here: Callable[..., Any], there: Callable[..., Any], *operands: Any) -> Any:
    """`jax.lax.cond`, also of branches of which one gives what differs between devices."""
    if not _inside_shard_map():
        return jax.lax.cond(chosen, here, there, *operands)
    shapes = [jax.eval_shape(branch, *operands) for branch in (here, there)]

    def alike(branch):
        def run(*operands):
            result = branch(*operands)
            for shape in shapes:
                result = jax.tree.map(_varying_as, result, shape)
            return result

        return run

    return jax.lax.cond(chosen, alike(here), alike(there), *operands)


def varying_alike(tree: Any) -> Any:
    """Arrays that all count as different from device to device where one of them does.

    A derivative by what all devices have alike would be summed over them as it is taken.
    """
    if not _inside_shard_map():
        return tree
    for like in jax.tree.leaves(tree):
        tree = jax.tree.map(lambda x, like=like: _varying_as(x, like), tree)
    return tree


def summed_like(gradients: Any, operands: Any) -> Any:
    """Gradients of operands, those that all devices have alike summed over the devices.

    That is what JAX asks of a rule of one's own inside `shard_map`.
    """
    if not _inside_shard_map():
        return gradients

    def summed(gradient: Any, operand: Any) -> Any:
        if gradient.dtype == jax.dtypes.float0:
            return gradient
        axes = tuple(sorted(_varying(gradient) - _varying(operand)))
        gradient = jax.lax.psum(gradient, axes) if axes else gradient
        return _varying_as(gradient, operand)

    return jax.tree.map(summed, gradients, operands)


def is_variable(operand: Any) -> bool:
    """Whether an operand of a traced step is a variable, not a number written into it."""
    return not isinstance(operand, Literal)


class Step(NamedTuple):
    """One operation of a traced function, its operands resolved through all calls."""

    index: int
    name: str
    operands: tuple[Any, ...]
    outputs: tuple[Any, ...]
    equation: Any

    @property
    def variables(self) -> tuple[Any, ...]:
        """The operands that are variables."""
        return tuple(v for v in self.operands if is_variable(v))

    def bind(self, *values: Any) -> Any:
        """Applies the operation to other values than it was traced with."""
        primitive = self.equation.primitive
        return primitive.bind(*values, **primitive.get_bind_params(self.equation.params))


class Program(NamedTuple):
    """A traced function as a flat list of operations."""

    inputs: tuple[Any, ...]
    constants: dict[Any, Any]
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]

    def evaluate(self, inputs: Sequence[Any], wanted: Any) -> Any:
        """Computes one variable, taking only the steps that it follows from."""
        known = {**self.constants, **dict(zip(self.inputs, inputs, strict=True))}
        for step in needed(self.steps, [wanted]):
            operands = [known[v] if is_variable(v) else v.val for v in step.operands]
            results = step.bind(*operands)
            results = results if step.equation.primitive.multiple_results else [results]
            known.update(zip(step.outputs, results, strict=True))
        return known[wanted]


def needed(steps: Sequence[Step], outputs: Sequence[Any]) -> list[Step]:
    """Those of the steps that some outputs follow from, in order."""
    wanted = {v for v in outputs if is_variable(v)}
    kept = []
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            kept.append(step)
            wanted.update(step.variables)
    return kept[::-1]


def inline(closed: ClosedJaxpr) -> Program:
    """Flattens a traced function; calls disappear into the steps they make."""
    constants: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    steps: list[Step] = []

    def walk(jaxpr: Any, names: dict[Any, Any]) -> list[Any]:
        def resolve(v: Any) -> Any:
            return names.get(v, v) if is_variable(v) else v

        for equation in jaxpr.eqns:
            operands = tuple(resolve(v) for v in equation.invars)
            body = next((equation.params[b] for b in _BODIES if b in equation.params), None)
            if equation.primitive.name in _CALLS and body is not None:
                inner = body.jaxpr if isinstance(body, ClosedJaxpr) else body
                fresh = _renamed(inner)
                names_inside = dict(zip(inner.invars, operands, strict=True)) | fresh
                if isinstance(body, ClosedJaxpr):
                    for v, constant in zip(inner.constvars, body.consts, strict=True):
                        constants[names_inside[v]] = constant
                results = walk(inner, names_inside)
                names.update(zip(equation.outvars, results, strict=True))
            else:
                outputs = tuple(names.get(v, v) for v in equation.outvars)
                name = equation.primitive.name
                steps.append(Step(len(steps), name, operands, outputs, equation))
        return [resolve(v) for v in jaxpr.outvars]

    outputs = tuple(walk(closed.jaxpr, {}))
    return Program(tuple(closed.jaxpr.invars), constants, tuple(steps), outputs)


class _Fresh:
    """A variable of one call of a body that may be called more than once."""

    def __init__(self, aval: Any):
        self.aval = aval


def _renamed(jaxpr: Any) -> dict[Any, Any]:
    own = [*jaxpr.constvars, *(v for equation in jaxpr.eqns for v in equation.outvars)]
    return {v: _Fresh(v.aval) for v in own}


def inner_jaxprs(params) -> list:
    """The programs inside an equation: bodies of loops, branches, called functions."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
