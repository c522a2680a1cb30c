"""Checks of files and of what is in them."""

import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np

from jsparse.checks.attention import attention_inputs


def readable(path: Any, error: Any) -> None:
    """A tensor file could not be read."""
    raise ValueError(
        f"{path} is not a readable safetensors file ({error}); write one with "
        "jsparse.evaluation.save_captured."
    )


def captured_layer(path: Any, layer: int, names: Any, wanted: tuple[str, ...]) -> None:
    """A captured layer has all the tensors that are wanted."""
    missing = [n for n in wanted if f"layers.{layer}.{n}" not in names]
    if missing:
        gradient = ""
        if "d_out" in wanted:
            gradient = "; jsparse.evaluation.profile gives these and d_out, the output's gradient"
        raise ValueError(
            f"{path} lacks {', '.join(f'layers.{layer}.{n}' for n in missing)}; each layer needs "
            f"q [length, heads, dim], k and v [length, kv_heads, dim]{gradient}."
        )


def output_gradient(path: Any, layer: int, tensors: Any) -> None:
    """The gradient by an output has the output's shape."""
    expected = (*tensors.q.shape[:-1], tensors.v.shape[-1])
    if tensors.d_out.shape != expected:
        raise ValueError(
            f"{path}: layers.{layer}.d_out has shape {tensors.d_out.shape}; the output has "
            f"{expected}."
        )


def some_captured(path: Any, layers: int) -> None:
    """A file of captured tensors has a layer."""
    if not layers:
        raise ValueError(
            f"{path} holds no tensor named layers.0.q; name tensors layers.<n>.q, .k and .v."
        )


def longer_than_a_tile(length: int, tile: int) -> None:
    """There is something to leave out."""
    if length <= tile:
        raise ValueError(
            f"The text has {length} tokens, a tile {tile}: nothing could be left out. Use a longer "
            "text."
        )


def known_methods(names: Any, known: Any) -> None:
    """Method names stand in the registry."""
    for name in names:
        if name not in known:
            raise ValueError(
                f"There is no method {name!r} here; choose from {', '.join(sorted(known))}."
            )


def one_sequence(path: Any, layer: int, tensors: Any) -> None:
    """Captured tensors are floats of one sequence."""
    for name, x in tensors.items():
        tensor = f"{path}: layers.{layer}.{name}"
        if x.ndim < 3 or any(size != 1 for size in x.shape[:-3]):
            raise ValueError(
                f"{tensor} has shape {tuple(x.shape)}; expected [length, heads, dim] of one "
                "sequence: split a batch into files, add a heads axis of 1 if there is one head."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{tensor} holds {x.dtype}; it must hold floating-point numbers.")


def finite_layers(layers: Any) -> None:
    """Captured layers hold numbers, nothing infinite among them."""
    for index, layer in enumerate(layers):
        for name, x in layer._asdict().items():
            if not np.isfinite(np.asarray(x, np.float32)).all():
                raise ValueError(
                    f"Layer {index} has {name} with numbers that are not finite; find what made "
                    "them in the model, and capture it again."
                )


def same_layers(layers: Any) -> None:
    """Captured layers have the same shapes and dtype."""
    if not len(layers):
        raise ValueError("layers is empty; capture at least one.")
    first = [(x.shape, x.dtype) for x in layers[0]]
    for index, layer in enumerate(layers):
        if [(x.shape, x.dtype) for x in layer] != first:
            raise ValueError(
                f"Layer {index} has q {layer.q.shape}, k {layer.k.shape}, v {layer.v.shape} in "
                f"{layer.q.dtype}; layer 0 has q {layers[0].q.shape}, k {layers[0].k.shape}, v "
                f"{layers[0].v.shape} in {layers[0].q.dtype}. Compare layers of one shape at a "
                "time."
            )


def applicable_methods(names: Any, known: Any) -> None:
    """Methods named for a comparison can take part in it."""
    for name in names:
        if name not in known:
            raise ValueError(
                f"{name!r} is not causal, or has parameters of its own to be trained; choose from "
                f"{', '.join(sorted(known))}."
            )


def writable(path: Any, error: Any) -> None:
    """A file could not be written."""
    raise ValueError(f"{path} cannot be written ({error}); choose another place.")


def file_place(path: Any) -> None:
    """A path names a file to write, not a folder that is there."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it, such as {path / 'compare.html'}.")


def drawing_library() -> None:
    """What draws the report's figures is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NotImplementedError(
            "The report's figures need matplotlib, which is not installed; get it with "
            "pip install 'jsparse[report]'."
        )


def readable_text(path: Any, error: Any) -> None:
    """A text could not be read."""
    raise ValueError(f"{path} cannot be read ({error.strerror}); name a file of text.")


def captured_inputs(path: Any, layer: int, tensors: Any) -> None:
    """The tensors of a captured layer fit each other."""
    try:
        attention_inputs(*tensors)
    except ValueError as error:
        raise ValueError(f"{path}: in layer {layer}, {error}") from None


def tunable(what: str, reason: str | None) -> None:
    """Kernels for something can be timed here, for there is no reason why not."""
    if reason:
        raise NotImplementedError(f"{what} cannot be tuned: {reason}")


def tuned_file(path: Any, error: Any) -> None:
    """A file of tuned configurations could not be read."""
    raise ValueError(f"{path} holds no tuned configurations ({error}); name another file.")


def tuned_place(path: Any, variable: str) -> None:
    """There is a place to keep tuned configurations in."""
    if path is None:
        raise ValueError(f"{variable} is empty, which switches tuned files off; pass --output.")
