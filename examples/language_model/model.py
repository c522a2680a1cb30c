"""A decoder over bytes: RoPE, grouped-query attention, RMSNorm, SwiGLU."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import safetensors
import safetensors.numpy
from flax import nnx

import jsparse as js
import jsparse.nn
from jsparse import checks

VOCABULARY = 256
# what training moves
KEPT = nnx.Any(nnx.Param, js.nn.Statistic)
# of all layers, or of each; None attends to all
Methods = js.Method | None | Sequence[js.Method | None]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults are those of the shipped checkpoint."""

    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 768
    rope_base: float = 100_000.0


class Block(nnx.Module):
    """Attention, then a gated feed-forward layer, each on normalised input and added."""

    def __init__(self, config: Config, *, method: js.Method | None, rngs: nnx.Rngs):
        width, hidden = config.width, config.hidden
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = js.nn.SparseAttention(
            width,
            num_heads=config.heads,
            num_kv_heads=config.kv_heads,
            method=method,
            rope_base=config.rope_base,
            rngs=rngs,
        )
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.gate = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x, cache=None):
        attended = self.attention(self.attention_norm(x), mask=js.masks.causal(), cache=cache)
        if cache is not None:
            attended, cache = attended
        x = x + attended
        normed = self.mlp_norm(x)
        x = x + self.down(nnx.silu(self.gate(normed)) * self.up(normed))
        return x if cache is None else (x, cache)


class LanguageModel(nnx.Module):
    """Maps bytes to logits over the next byte; input and output embeddings are tied."""

    def __init__(self, config: Config | None = None, *, method: Methods = None, rngs: nnx.Rngs):
        self.config = config = config or Config()
        self.embedding = nnx.Embed(
            VOCABULARY,
            config.width,
            embedding_init=nnx.initializers.normal(config.width**-0.5),
            rngs=rngs,
        )
        methods = _per_layer(method, config.layers)
        self.blocks = nnx.List([Block(config, method=own, rngs=rngs) for own in methods])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)

    def __call__(self, tokens, caches=None):
        """Logits [*batch, length, 256]; with caches (one per block) also the new caches."""
        x = self.embedding(tokens) * self.config.width**0.5
        new_caches = []
        for index, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[index])
            if caches is not None:
                x, cache = x
                new_caches.append(cache)
        logits = self.embedding.attend(self.norm(x))
        return logits if caches is None else (logits, new_caches)


def _per_layer(method: Methods, layers: int) -> list[js.Method | None]:
    # a method is a tuple itself
    if method is None or isinstance(method, js.Method):
        return [method] * layers
    checks.layer_methods(len(method), layers)
    return list(method)


def bits_per_byte(model: LanguageModel, tokens) -> jax.Array:
    """The mean cost of predicting each byte from those before it; `tokens` is [*batch, length]."""
    return _cost(model(tokens), tokens)


def bits_per_byte_with(model: LanguageModel, tokens, attention) -> float:
    """`bits_per_byte` of the model with `attention` in every layer.

    The layers are not compiled: what `attention` may have compiled for itself is used as it is.

    Args:
      model: The model, left as it is.
      tokens: [*batch, length].
      attention: `attention(q, k, v, *, mask, x, positions) -> out`; None for each layer's own.
    """
    return float(_cost(js.nn.with_attention(model, attention)(tokens), tokens))


@jax.jit
def _cost(logits, tokens):
    logp = jax.nn.log_softmax(logits[..., :-1, :].astype(jnp.float32))
    taken = jnp.take_along_axis(logp, tokens[..., 1:, None].astype(jnp.int32), axis=-1)
    return -taken.mean() / jnp.log(2.0)


def save(model: LanguageModel, path: str | Path) -> None:
    """Writes weights as float16 safetensors, statistics as float32; sizes are in the metadata."""
    tensors = {}
    for key, variable in nnx.to_flat_state(nnx.state(model, KEPT)):
        # counts of tokens outgrow 16 bits
        dtype = jnp.float32 if isinstance(variable, js.nn.Statistic) else jnp.float16
        tensors[".".join(map(str, key))] = jnp.asarray(variable[...], dtype)
    tensors = {name: jax.device_get(x) for name, x in tensors.items()}
    metadata = {"config": json.dumps(dataclasses.asdict(model.config))}
    safetensors.numpy.save_file(tensors, str(path), metadata=metadata)


def load(path: str | Path, *, method: Methods = None) -> LanguageModel:
    """Reads what `save` wrote; parameters of a method that the file lacks stay as they are made.

    Raises:
      ValueError: if the file cannot be read, was cut off, or holds a model of other shapes.
    """
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            config = Config(**json.loads(file.metadata()["config"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}); train one with "
            "`python -m examples.language_model.train`."
        ) from error
    model = LanguageModel(config, method=method, rngs=nnx.Rngs(0))
    state = nnx.state(model, KEPT)
    for key, param in nnx.to_flat_state(state):
        name = ".".join(map(str, key))
        if name not in tensors and "method_params" in key:
            continue
        shape = tensors[name].shape if name in tensors else None
        if shape != param.shape:
            raise ValueError(f"{path}: {name} has shape {shape}; the model needs {param.shape}.")
        param[...] = jnp.asarray(tensors[name], param.dtype)
    nnx.update(model, state)
    return model
