"""Taking q, k, v out of a model, and keeping them in a file."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from jsparse import checks

_NAME = re.compile(r"layers\.(\d+)\.[qkv]")


class Captured(NamedTuple):
    """What one layer's attention was given: positions applied, one sequence, no batch axis."""

    q: Float[Array, "q_len heads dim"]
    k: Float[Array, "kv_len kv_heads dim"]
    v: Float[Array, "kv_len kv_heads v_dim"]


class Profiled(NamedTuple):
    """What one layer's attention was given, and the gradient of a loss by what it gave."""

    q: Float[Array, "q_len heads dim"]
    k: Float[Array, "kv_len kv_heads dim"]
    v: Float[Array, "kv_len kv_heads v_dim"]
    d_out: Float[Array, "q_len heads v_dim"]


def capture(model: Any, *inputs: Any) -> list[Captured]:
    """Runs a model on one sequence and collects q, k, v of every attention layer.

    In the order of `js.nn.attention_layers`, whatever the order in which they run.

    Args:
      model: A Flax NNX model with `js.nn.SparseAttention` layers.
      *inputs: What it is called with; the batch axis, if any, is 1.

    Raises:
      ValueError: if the model has no such layer, or one does not run exactly once.
    """
    from flax import nnx

    from jsparse.nn import attention_layers, recording

    graph, state = nnx.split(model)

    @jax.jit
    def run(state, *inputs):
        copy = nnx.merge(graph, state)
        layers = attention_layers(copy)
        tensors: list[list[tuple[Array, Array, Array]]] = [[] for _ in layers]
        for layer, own in zip(layers, tensors, strict=True):
            layer.attention = recording(layer.attention or layer._method, own)
        copy(*inputs)
        checks.each_runs_once(tensors)
        return tensors

    return [Captured(*map(_unbatched, of_layer)) for (of_layer,) in run(state, *inputs)]


def profile(model: Any, loss: Callable[..., Array], *inputs: Any) -> list[Profiled]:
    """Collects q, k, v of every attention layer and how a loss depends on each layer's output.

    One forward and one backward pass; gradients by the model's parameters are not computed. Layers
    are in the order of `js.nn.attention_layers`.

    Args:
      model: A Flax NNX model with `js.nn.SparseAttention` layers.
      loss: `loss(model, *inputs) -> scalar`, which calls the model once on one sequence.
      *inputs: What it is given; the batch axis, if any, is 1.

    Raises:
      ValueError: if the model has no such layer, or one does not run exactly once.
    """
    from flax import nnx

    from jsparse.nn import attention_layers, probing

    graph, state = nnx.split(model)

    def run(probes, state, *inputs):
        copy = nnx.merge(graph, state)
        layers = attention_layers(copy)
        tensors: list[list[tuple[Array, Array, Array]]] = [[] for _ in layers]
        for number, (layer, own) in enumerate(zip(layers, tensors, strict=True)):
            own_probes = probes[number : number + 1]
            layer.attention = probing(layer.attention or layer._method, own, own_probes)
        value = loss(copy, *inputs)
        checks.each_runs_once(tensors)
        return value, [of_layer for (of_layer,) in tensors]

    _, tensors = jax.eval_shape(run, (), state, *inputs)
    probes = [jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype) for q, _, v in tensors]
    gradients, tensors = jax.jit(jax.grad(run, has_aux=True))(probes, state, *inputs)
    return [
        Profiled(*map(_unbatched, (*of_layer, d_out)))
        for of_layer, d_out in zip(tensors, gradients, strict=True)
    ]


def _unbatched(x: Array) -> Array:
    return x.reshape(x.shape[-3:])


def save_captured(layers: Sequence[Captured | Profiled], path: str | Path) -> None:
    """Writes tensors `layers.<n>.q`, `.k` and `.v`, as float32; folders are made.

    Of what `profile` gave also `layers.<n>.d_out`.

    Raises:
      ValueError: if the file cannot be written.
    """
    tensors = {
        f"layers.{index}.{name}": np.asarray(value, np.float32)
        for index, layer in enumerate(layers)
        for name, value in layer._asdict().items()
    }
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, str(path))
    except (OSError, safetensors.SafetensorError) as error:
        checks.writable(path, error)


def load_captured(path: str | Path) -> list[Captured]:
    """Reads what `save_captured` wrote, or any safetensors file with tensors of those names.

    Raises:
      ValueError: if the file cannot be read or was cut off, a tensor is missing, or shapes do not
        fit each other.
    """
    return [Captured(*layer) for layer in _load(path, Captured._fields)]


def load_profiled(path: str | Path) -> list[Profiled]:
    """Reads what `save_captured` wrote of `profile`, or any file with tensors of those names.

    Raises:
      ValueError: as of `load_captured`, or if a layer lacks `d_out` or it has another shape.
    """
    layers = []
    for index, tensors in enumerate(_load(path, Profiled._fields)):
        layer = Profiled(*tensors)
        checks.output_gradient(path, index, layer)
        layers.append(layer)
    return layers


def _load(path: str | Path, names: tuple[str, ...]) -> list[list[Array]]:
    """Tensors of those names of each layer, of one sequence each."""
    tensors: dict[str, np.ndarray] = {}
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        checks.readable(path, error)
    found = {match[1] for name in tensors if (match := _NAME.fullmatch(name))}
    checks.some_captured(path, len(found))
    layers = []
    for index in range(1 + max(map(int, found))):
        checks.captured_layer(path, index, tensors, names)
        tensors_of = {name: tensors[f"layers.{index}.{name}"] for name in names}
        checks.one_sequence(path, index, tensors_of)
        layer = [jnp.asarray(x.reshape(x.shape[-3:])) for x in tensors_of.values()]
        checks.captured_inputs(path, index, layer[:3])
        layers.append(layer)
    return layers
