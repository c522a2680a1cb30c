"""Trains the example's language model with a sparse method in its layers, beside dense attention.

    python -m examples.train_sparse --method dense
    python -m examples.train_sparse --method nsa
    python -m examples.train_sparse --method flashmoba --dense-layers 0 3

Phases of growing context end at 4096 bytes; attention to short ones is dense. So the first phase is
trained once, densely, and every run goes on from there, on the same text at each step. Gates of
`seerattention` learn from the shipped checkpoint, which stays as it is. Writes the curve of a run,
with what the method computes of 4096 bytes, into a file of its own, and then a picture and a table
of all. The same command goes on where it was stopped.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jsparse as js
import jsparse.nn
from examples import curves
from examples.compare import CHECKPOINT
from examples.language_model import data
from examples.language_model.model import Config, LanguageModel, bits_per_byte, load
from examples.language_model.training import (
    Course,
    Loss,
    Phase,
    Training,
    held_out_bits,
    plain_loss,
    windows_of,
)
from jsparse import checks
from jsparse.cli import one_line_errors
from jsparse.core import clustering
from jsparse.evaluation import capture, density_of_layers
from jsparse.evaluation.metrics import list_overlap
from jsparse.learned.hisa import index_loss, select_tokens
from jsparse.learned.seerattention import gate_loss, gate_targets
from jsparse.routing.routing_transformer import RoutingTransformerInfo

CONTEXT = 4096
# how many blocks the first stage of `hisa` is tried with, of 64
BLOCKS = 4, 8, 12, 16, 24, 32
# held-out bytes that are read for each point of a curve, and for its end
POINT, END = 16_384, 131_072
SCRATCH = Course((Phase(256, 16, 0.5), Phase(1024, 4, 0.3), Phase(CONTEXT, 1, 0.2)), steps=400)
GATES = Course((Phase(1024, 4, 0.5), Phase(CONTEXT, 1, 0.5)), steps=100, rate=1e-3, save_every=10)
STATES = Path("build") / "train_sparse"
# the parameters that layers hold for their methods
OF_METHOD = nnx.All(nnx.Param, nnx.PathContains("method_params"))

# `learn(method, params, q, k, v, *, mask, x, implementation, sparse) -> (out, loss)`: attends, and
# says what is minimised besides; `sparse` is whether the input is long enough for the method
Learn = Callable[..., tuple[jax.Array, jax.Array]]


def learn_tokens(method, params, q, k, v, *, mask, x, implementation, sparse):
    """Attends to the indexer's tokens; it learns from the attention that it leads to.

    Where attention is dense, it learns from all of it.
    """
    tokens, info = method.plan(params, q, k, x=x, mask=mask)
    plan = tokens if sparse else None
    out = js.attend(q, k, v, plan, mask=mask, implementation=implementation)
    return out, index_loss(info.indexed, q, k, plan, mask=mask)


def learn_gates(method, params, q, k, v, *, mask, x, implementation, sparse):
    """Attends densely at any length; the gates learn the map of that."""
    tiles, info = method.plan(params, q, k, mask=mask)
    targets = gate_targets(q, k, block_size=tiles.block_q, mask=mask)
    out = js.attend(q, k, v, mask=mask, implementation=implementation)
    return out, gate_loss(info.gate_logits, targets, skipped=0.0)


def commitment(info: Any) -> jax.Array | float:
    """What keys pay for being far from their centroids, 1e-4 as published."""
    return 1e-4 * info.commitment if isinstance(info, RoutingTransformerInfo) else 0.0


def begin_at_keys(model: LanguageModel, tokens: jax.Array) -> None:
    """Puts each layer's centroids among the keys that it has for a text."""
    layers = js.nn.attention_layers(model)
    for index, (layer, seen) in enumerate(zip(layers, capture(model, tokens), strict=True)):
        # dense, or of a method that has none
        if not layer.method_params:
            continue
        means = layer.method_params["centroids"].means
        heads, clusters, _ = means.shape
        keys = clustering.layer_norm(seen.k[:, -heads:])
        means[...] = clustering.centroids_of_tokens(
            jax.random.key(index), keys, clusters, normalize=clustering.layer_norm
        )


def compare_selections(
    model: LanguageModel,
    tokens: jax.Array,
    *,
    top_k: int,
    block_kv: int,
    block_top_k: int,
    **_: Any,
) -> dict[str, list[float]]:
    """What the first stage of `hisa` costs: its tokens beside those that one stage chooses.

    For each layer: entries of both lists over those of either, means over queries; and which share
    of dense attention lies on the tokens of each, means over queries and heads.
    """
    found: dict[str, list[float]] = {"overlap": [], "mass_two_stages": [], "mass_one_stage": []}
    copy = nnx.merge(*nnx.split(model))

    def looking(layer):
        method = layer.method

        def attention(q, k, v, *, mask, x, positions):
            out, info = method.attend(layer.params(), q, k, v, x=x, mask=mask)
            sizes = {"top_k": top_k, "block_kv": block_kv, "mask": mask}
            two, one = (
                select_tokens(info.indexed, block_top_k=blocks, **sizes)
                for blocks in (block_top_k, None)
            )
            found["overlap"].append(list_overlap(two, one).mean())
            _, dense = js.attend(q, k, v, mask=mask, return_lse=True)
            for name, plan in (("mass_two_stages", two), ("mass_one_stage", one)):
                _, lse = js.attend(q, k, v, plan, mask=mask, return_lse=True)
                found[name].append(jnp.exp(lse - dense).mean())
            return out

        return attention

    for layer in js.nn.attention_layers(copy):
        layer.attention = looking(layer)
    copy(tokens)
    return {name: [round(float(x), 4) for x in shares] for name, shares in found.items()}


def compare_stages(
    model: LanguageModel, tokens: jax.Array, *, block_top_k: int, **arguments: Any
) -> dict[str, dict[str, list[float]]]:
    """The same by how many blocks the first stage leaves to the second."""
    return {
        str(blocks): compare_selections(model, tokens, block_top_k=blocks, **arguments)
        for blocks in sorted({block_top_k, *BLOCKS})
    }


class Below(NamedTuple):
    """What the first layers attend by where a method is for those above alone.

    Attributes:
      layers: How many.
      factory: Makes their method, which has no parameters.
      arguments: What it is made with.
    """

    layers: int
    factory: Callable[..., js.Method]
    arguments: dict[str, Any]

    def said(self) -> dict[str, Any]:
        """What the record of a run says of it."""
        return {
            **{"layers": self.layers, "method": self.factory.__name__},
            "arguments": self.arguments,
        }


class Setting(NamedTuple):
    """How a method is trained.

    Attributes:
      factory: Makes the method; None attends to all.
      arguments: What it is made with.
      learn: What attends in its place while it is trained, where it learns by a loss of its own.
      beside: What is minimised besides, of what the method says of a call.
      begin: What is done to a model, of a text of 4096 bytes, before the method's first step.
      measure: What is looked at in the end, `measure(model, tokens, **arguments)`, of 4096 bytes.
      sparse_from: The shortest input that the method is for; attention to others is dense.
      below: What the first layers have in place of the method; None where all layers have it.
      distilled: Whether a trained model stays as it is and only the method's parameters learn.
      course: What it is trained on.
    """

    factory: Callable[..., js.Method] | None = None
    arguments: dict[str, Any] = {}
    learn: Learn | None = None
    beside: Callable[[Any], jax.Array | float] | None = None
    begin: Callable[[LanguageModel, jax.Array], None] | None = None
    measure: Callable[..., dict[str, Any]] | None = None
    sparse_from: int = 512
    below: Below | None = None
    distilled: bool = False
    course: Course = SCRATCH

    def methods(self, dense_layers: Sequence[int] = ()) -> list[js.Method | None]:
        """What each layer attends by."""
        own, first = [self.method()] * Config().layers, []
        if self.below is not None:
            method = self.below.factory(**self.below.arguments)
            first = [js.from_length(method, min_length=self.sparse_from)] * self.below.layers
        methods = first + own[len(first) :]
        return [None if n in dense_layers else method for n, method in enumerate(methods)]

    def method(self) -> js.Method | None:
        """The method as layers have it, dense for short inputs."""
        if self.factory is None:
            return None
        return js.from_length(self.factory(**self.arguments), min_length=self.sparse_from)

    def loss(self) -> Loss:
        """What is minimised."""
        if self.beside is not None:
            return loss_beside(self.beside)
        if self.factory is None or self.learn is None:
            return plain_loss
        return loss_with(self.factory(**self.arguments), self.learn, self.sparse_from)


CLUSTERS = {
    **{"clusters": 8, "balanced": False, "shared": False, "normalize_logits": False},
    **{"num_local_heads": 1, "local_block": 256},
}
# of 4096 keys each computes a quarter or less, by the report's count of pairs
SETTINGS = {
    "dense": Setting(),
    "streaming": Setting(js.streaming, {"num_sink": 16, "window": 512}),
    "nsa": Setting(
        js.nsa, {"block_kv": 32, "top_k": 8, "num_init": 1, "num_local": 1, "window": 128}
    ),
    "flashmoba": Setting(js.flashmoba, {"block_kv": 64, "top_k": 8, "taps": 3}),
    "hisa": Setting(
        js.hisa,
        {
            **{"top_k": 256, "block_kv": 64, "block_top_k": 12},
            **{"index_heads": 4, "index_dim": 32, "rotary_dim": 16},
        },
        learn=learn_tokens,
        measure=compare_stages,
        # as it is published: the indexer learns beside dense attention first
        sparse_from=2048,
    ),
    "routing-transformer": Setting(
        js.routing_transformer, CLUSTERS, beside=commitment, begin=begin_at_keys
    ),
    # as the paper's model of PG-19 has it: neighbours in all layers but the last
    "routing-transformer-last": Setting(
        js.routing_transformer,
        CLUSTERS,
        beside=commitment,
        begin=begin_at_keys,
        below=Below(5, js.streaming, {"num_sink": 0, "window": 256}),
    ),
    "seerattention": Setting(
        js.seerattention,
        {
            **{"block_size": 64, "density": 0.22, "dense_rows": 0, "gate_dim": 32},
            "rope_base": Config().rope_base,
        },
        learn=learn_gates,
        distilled=True,
        course=GATES,
    ),
}


def loss_with(method: js.Method, learn: Learn, sparse_from: int) -> Loss:
    """Bits per byte, plus what `learn` says of each layer that has a method."""

    def loss(model, tokens):
        found = []

        def learning(layer):
            def attention(q, k, v, *, mask, x, positions):
                options = {"mask": mask, "x": x, "implementation": layer.implementation}
                sparse = k.shape[-3] >= sparse_from
                out, more = learn(method, layer.params(), q, k, v, **options, sparse=sparse)
                found.append(more)
                return out

            return attention

        copy = nnx.merge(*nnx.split(model))
        for layer in js.nn.attention_layers(copy):
            if layer.method is not None:
                layer.attention = learning(layer)
        bits = bits_per_byte(copy, tokens)
        return bits + sum(found), bits

    return loss


def loss_beside(beside: Callable[[Any], jax.Array | float]) -> Loss:
    """Bits per byte, plus what `beside` makes of what each layer's method says."""

    def loss(model, tokens):
        found, layers = [], js.nn.attention_layers(model)
        for layer in layers:
            layer.observe = lambda info: found.append(beside(info))
        bits = bits_per_byte(model, tokens)
        for layer in layers:
            layer.observe = None
        return bits + sum(found), bits

    return loss


def to_all(q, k, v, *, mask, x, positions):
    """Attention as the distilled model was trained with."""
    return js.attend(q, k, v, mask=mask)


def density(model: LanguageModel, tokens: jax.Array) -> dict[str, float]:
    """What layers compute of the visible tiles and pairs, means over all heads."""
    reports = nnx.jit(density_of_layers)(model, tokens)
    found = {"tiles": [r.tiles for r in reports], "pairs": [r.pairs for r in reports]}
    return {name: round(float(jnp.stack(shares).mean()), 4) for name, shares in found.items()}


def said_of(course: Course, seed: int) -> dict[str, Any]:
    """What the record of a run says of its training."""
    return {
        "phases": [phase._asdict() for phase in course.phases],
        "steps": course.steps,
        "rate": course.rate,
        "seed": seed,
        "jax": jax.__version__,
    }


class Recorder:
    """Adds points to the curve of a run, and writes its record after each."""

    def __init__(self, training: Training, record: dict[str, Any], path: Path, held_out: Any):
        self._training, self._record, self._path = training, record, path
        self._held_out = held_out
        curve = record["curve"]
        self._before = curve[-1]["seconds"] if curve else 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """What the run took so far, earlier starts included."""
        return round(self._before + time.perf_counter() - self._started, 1)

    def keep(self, phase: Phase, bits: float) -> None:
        """Adds a point."""
        held_out = held_out_bits(self._training.model, self._held_out, CONTEXT, POINT)
        point = {
            "step": self._training.done,
            "context": phase.context,
            "train_bits_per_byte": round(bits, 4),
            "held_out_bits_per_byte": round(held_out, 4),
            "seconds": self.seconds,
        }
        self._record["curve"].append(point)
        curves.write(self._path, self._record)


def trunk_of(
    course: Course, seed: int, text: Any, held_out: Any
) -> tuple[Training, list[dict[str, Any]]]:
    """The dense model after the first phase, and its curve: where every run goes on from."""
    name = f"trunk-{course.steps}-{course.rate:g}-{seed}"
    model = LanguageModel(rngs=nnx.Rngs(seed))
    training = Training(model, course, states=STATES / name)
    record = {**said_of(course, seed), "curve": []}
    path = STATES / f"{name}.json"
    if training.done:
        record["curve"] = curves.earlier(path, record, training.done)
    recorder = Recorder(training, record, path, held_out)
    training.run(windows_of(text), recorder.keep, until=course.first_long)
    return training, record["curve"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="train_sparse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", choices=SETTINGS, default="nsa", help="default: %(default)s")
    parser.add_argument(
        "--dense-layers",
        **{"type": int, "nargs": "+", "choices": range(Config().layers)},
        **{"default": [], "metavar": "N", "help": "which stay dense"},
    )
    parser.add_argument("--steps", type=int, help="updates of 4096 bytes; default: the setting's")
    parser.add_argument("--rate", type=float, help="peak learning rate; default: the setting's")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="between saved states")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="FILE")
    parser.add_argument(
        "--output", type=Path, default=curves.FOLDER, metavar="FOLDER", help="of curves"
    )
    parser.add_argument("--fresh", action="store_true", help="forget any saved state")
    with one_line_errors("train_sparse"):
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    checks.drawing_library()
    setting = SETTINGS[arguments.method]
    given = {name: getattr(arguments, name) for name in ("steps", "rate", "save_every")}
    given = {name: value for name, value in given.items() if value is not None}
    checks.positive(**{name: value for name, value in given.items() if name != "rate"})
    course = setting.course._replace(**given)
    name = "-".join([arguments.method, *(f"dense{n}" for n in arguments.dense_layers)])
    path = arguments.output / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    methods = setting.methods(arguments.dense_layers)
    if setting.distilled:
        model = load(arguments.checkpoint, method=methods)
    else:
        model = LanguageModel(method=methods, rngs=nnx.Rngs(arguments.seed))
    training = Training(
        model,
        course,
        states=STATES / f"{name}-{arguments.seed}",
        fresh=arguments.fresh,
        loss=setting.loss(),
        trained=OF_METHOD if setting.distilled else nnx.Param,
    )
    record = {
        "method": arguments.method,
        "arguments": setting.arguments,
        "dense_layers": arguments.dense_layers,
        "distilled": setting.distilled,
        "sparse_from": setting.sparse_from,
        "below": setting.below and setting.below.said(),
        **said_of(course, arguments.seed),
        "curve": [],
    }
    if setting.distilled:
        record["checkpoint"] = hashlib.sha256(arguments.checkpoint.read_bytes()).hexdigest()
    text, held_out = data.split()
    if training.done:
        record["curve"] = curves.earlier(path, record, training.done)
    elif not setting.distilled:
        trunk, record["curve"] = trunk_of(course, arguments.seed, text, held_out)
        training.branch(trunk)
        if setting.begin is not None:
            setting.begin(model, jnp.asarray(data.windows(text, CONTEXT, 1, seed=3), jnp.int32))
    recorder = Recorder(training, record, path, held_out)
    training.run(windows_of(text), recorder.keep)
    tokens = jnp.asarray(data.windows(held_out, CONTEXT, 1, seed=2), jnp.int32)
    record["density"] = density(model, tokens)
    if setting.measure is not None:
        record["measured"] = setting.measure(model, tokens, **setting.arguments)
    record["held_out_bits_per_byte"] = {
        str(context): round(held_out_bits(model, held_out, context, END), 4)
        for context in (512, CONTEXT)
    }
    if setting.distilled:
        dense = js.nn.with_attention(model, to_all)
        bits = held_out_bits(dense, held_out, CONTEXT, END)
        record["held_out_bits_per_byte_dense"] = round(bits, 4)
        # of the text of the curve's points, which is a part of that
        record["curve_dense"] = round(held_out_bits(dense, held_out, CONTEXT, POINT), 4)
    record["seconds"] = recorder.seconds
    curves.write(path, record)
    curves.draw(arguments.output)
    print(f"{path}: {json.dumps({k: record[k] for k in ('density', 'held_out_bits_per_byte')})}")


if __name__ == "__main__":
    main()
