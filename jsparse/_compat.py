"""The names of JAX that move between versions or are not public; nobody else imports those."""

import jax
import jax.core
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


def closed_jaxpr_call(closed, consts, *args):
    """Evaluates a traced function with other constants than it was traced with."""
    return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, list(consts)))(*args)


def is_traced(tree) -> bool:
    """Whether any leaf of a pytree is a tracer."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
