"""Taking q, k, v out of a model, and keeping them in a file."""

import re
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


def capture(model: Any, *inputs: Any) -> list[Captured]:
    """Runs a model on one sequence and collects q, k, v of every attention layer.

    Args:
      model: A Flax NNX model with `js.nn.SparseAttention` layers.
      *inputs: What it is called with; the batch axis, if any, is 1.

    Raises:
      ValueError: if the model has no such layer.
    """
    from flax import nnx

    from jsparse.nn import attention_layers, recording

    graph, state = nnx.split(model)

    @jax.jit
    def run(state, *inputs):
        tensors: list[tuple[Array, Array, Array]] = []
        copy = nnx.merge(graph, state)
        for layer in attention_layers(copy):
            layer.attention = recording(layer.attention or layer._method, tensors)
        copy(*inputs)
        return tensors

    def unbatched(x):
        return x.reshape(x.shape[-3:])

    return [Captured(*map(unbatched, tensors)) for tensors in run(state, *inputs)]


def save_captured(layers: list[Captured], path: str | Path) -> None:
    """Writes tensors `layers.<n>.q`, `.k` and `.v`, as float32; folders are made.

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
        checks.captured_layer(path, index, tensors)
        tensors_of = {name: tensors[f"layers.{index}.{name}"] for name in "qkv"}
        checks.one_sequence(path, index, tensors_of)
        q, k, v = (jnp.asarray(x.reshape(x.shape[-3:])) for x in tensors_of.values())
        checks.captured_inputs(path, index, (q, k, v))
        layers.append(Captured(q, k, v))
    return layers
