"""Reaching into a built model: its attention layers, and the same model with another attention."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flax import nnx
from jaxtyping import Array

from jsparse import checks
from jsparse.attention.planned import has_parameters
from jsparse.nn.layer import AttentionFn, AttentionLayer
from jsparse.types import Method

M = TypeVar("M", bound=nnx.Module)


def attention_layers(model: nnx.Module) -> list[AttentionLayer]:
    """The model's `SparseAttention` and `LatentAttention` layers, in the order of their paths.

    Numbers in a path count as numbers: `layer2` comes before `layer10`. Whatever lists something by
    layer, such as a table of `jsparse plan`, has this order, not that in which the layers run.

    Raises:
      ValueError: if there are none.
    """
    found = [(path, m) for path, m in nnx.iter_modules(model) if isinstance(m, AttentionLayer)]
    checks.some_layers(found)
    return [module for _, module in sorted(found, key=lambda item: _in_order(item[0]))]


def _in_order(path: tuple[Any, ...]) -> list[list[str | int]]:
    """What a path is sorted by: in every part, text and numbers by turns."""
    parts = (re.split(r"(\d+)", str(part)) for part in path)
    return [[int(x) if n % 2 else x for n, x in enumerate(part)] for part in parts]


def with_attention(model: M, attention: AttentionFn | None) -> M:
    """The same model, parameters shared, with another attention in every layer.

    Args:
      model: A model that has `SparseAttention` layers; it is left as it was.
      attention: `attention(q, k, v, *, mask, x, positions) -> out`; None for the layers' own
        methods.
    """
    copy = nnx.merge(*nnx.split(model))
    for layer in attention_layers(copy):
        layer.attention = attention
    return copy


def with_methods(model: M, methods: Sequence[Method | None], *, rngs: nnx.Rngs | None = None) -> M:
    """The same model, parameters shared, each layer with a method of its own.

    Args:
      model: A model that has `SparseAttention` layers; it is left as it was.
      methods: One per layer in the order of `attention_layers`, such as
        `jsparse.planning.methods_of` makes from a table; None for dense attention. A layer that is
        given the method that it has keeps its parameters.
      rngs: Where parameters of new methods come from. Without, those are without parameters.

    Raises:
      ValueError: if there are not as many methods as layers, one has parameters and there are no
        `rngs`, or one turns back positions of another base than its layer's.
    """
    copy = nnx.merge(*nnx.split(model))
    layers = attention_layers(copy)
    checks.layer_methods(len(methods), len(layers))
    for number, (layer, method) in enumerate(zip(layers, methods, strict=True)):
        if method is layer.method:
            continue
        layer.check(method)
        if method is not None:
            needed = rngs is None and has_parameters(method, **layer.sizes(method))
            checks.nothing_to_learn(number, needed)
        layer.method = method
        layer.method_params = None if rngs is None else nnx.data(layer.new_params(method, rngs))
    return copy


def probing(
    run: Callable[..., Array], tensors: list[tuple[Array, Array, Array]], probes: Sequence[Array]
) -> AttentionFn:
    """An attention that notes down its q, k, v and adds the probe of its turn to its output.

    The gradient of a loss by a probe of zeros is the one by that output. Without probes it is
    `recording`.
    """

    def attention(q, k, v, *, mask, x, positions):
        tensors.append((q, k, v))
        out = run(q, k, v, mask=mask, x=x, positions=positions)
        return out + probes[len(tensors) - 1]

    return recording(run, tensors) if not probes else attention


def recording(run: Callable[..., Array], tensors: list[tuple[Array, Array, Array]]) -> AttentionFn:
    """An attention that notes down its q, k, v and then does what `run` does."""

    def attention(q, k, v, *, mask, x, positions):
        tensors.append((q, k, v))
        return run(q, k, v, mask=mask, x=x, positions=positions)

    return attention
