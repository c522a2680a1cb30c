"""Models whose layers have different methods: each its own, with parameters where it has some."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jsparse as js
import jsparse.nn
from examples.language_model.model import Config, LanguageModel, bits_per_byte, load, save
from jsparse.evaluation import density_of_layers
from tests.inputs import on_device
from tests.oracles import streaming as window_oracle

SMALL = Config(width=16, layers=3, heads=2, kv_heads=1, hidden=16)
WINDOW, BLOCKS = js.streaming(num_sink=2, window=5), js.flashmoba(block_kv=4, top_k=2, taps=3)
HYBRID = [WINDOW, BLOCKS, WINDOW]
LENGTH = 16
TEXT = on_device(np.random.default_rng(0).integers(0, 256, (2, LENGTH)), jnp.int32)


run = nnx.jit(lambda model, tokens: model(tokens))


def by_reference(model):
    """So small a model, compiled in less time."""
    for layer in js.nn.attention_layers(model):
        layer.implementation = "reference"
    return model


def hybrid(methods=HYBRID):
    return by_reference(LanguageModel(SMALL, method=methods, rngs=nnx.Rngs(0)))


def convolution(model):
    return model.blocks[1].attention.method_params["convolution"]


@functools.cache
def trained():
    """After a few steps, and the costs of them."""
    model = hybrid()
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        cost, gradient = nnx.value_and_grad(bits_per_byte)(model, TEXT)
        optimizer.update(model, gradient)
        return cost

    return model, [float(step(model, optimizer)) for _ in range(4)]


@pytest.mark.newest
def test_each_layer_learns_with_its_own_method():
    model, costs = trained()
    assert costs[-1] < costs[0] - 0.5
    assert convolution(model)[...].any()  # zeros before the first step
    layers = js.nn.attention_layers(model)
    assert [layer.method for layer in layers] == HYBRID
    assert [bool(layer.params()) for layer in layers] == [False, True, False]


@pytest.mark.newest
def test_reports_of_layers_are_of_their_own_methods():
    model = hybrid([WINDOW, BLOCKS, None])
    reports = nnx.jit(density_of_layers)(model, TEXT)
    visible = LENGTH * (LENGTH + 1) / 2
    near = window_oracle.pairs(LENGTH, LENGTH, num_sink=2, window=5).sum()
    # the own block up to the query, and one whole block before it
    routed = sum(i % 4 + 1 + 4 * min(1, i // 4) for i in range(LENGTH))
    found = [float(report.pairs.mean()) for report in reports]
    np.testing.assert_allclose(found, np.array([near, routed, visible]) / visible, rtol=1e-5)


def test_a_file_restores_what_each_layer_has_learnt(tmp_path):
    model, _ = trained()
    save(model, tmp_path / "model.safetensors")
    restored = by_reference(load(tmp_path / "model.safetensors", method=HYBRID))
    halves = jax.tree.map(lambda x: x.astype(jnp.float16), nnx.state(model, nnx.Param))
    for expected, found in zip(
        jax.tree.leaves(halves), jax.tree.leaves(nnx.state(restored, nnx.Param)), strict=True
    ):
        np.testing.assert_array_equal(found, expected.astype(jnp.float32))
    assert convolution(restored)[...].any()
    # what rounding to 16 bits does to logits of a few units
    np.testing.assert_allclose(run(restored, TEXT), run(model, TEXT), atol=0.05)


@pytest.mark.newest
def test_layers_decode_each_in_its_way():
    model, _ = trained()
    step = nnx.jit(lambda model, tokens, caches: model(tokens, caches))

    caches, parts = [layer.init_cache((2,), 20) for layer in js.nn.attention_layers(model)], []
    for start in range(0, LENGTH, 5):
        out, caches = step(model, TEXT[:, start : start + 5], caches)
        parts.append(out)
    # logits of some units, after three layers in f32
    np.testing.assert_allclose(jnp.concatenate(parts, 1), run(model, TEXT), atol=1e-4)


def test_a_built_model_takes_methods_with_parameters():
    dense = LanguageModel(SMALL, rngs=nnx.Rngs(0))
    sizes = {"compression_size": 4, "stride": 2, "block_kv": 4, "top_k": 3, "window": 4}
    nsa = js.nsa(**sizes)
    model = js.nn.with_methods(dense, [WINDOW, BLOCKS, nsa], rngs=nnx.Rngs(3))
    assert all(layer.method is None for layer in js.nn.attention_layers(dense))
    layers = js.nn.attention_layers(model)
    rngs = nnx.Rngs(3)
    rngs.params(), rngs.params()  # the two layers before it
    expected = nsa.init(rngs.params(), **layers[2].sizes())
    jax.tree.map(np.testing.assert_array_equal, layers[2].params(), expected)
    # all else is the dense model's
    own, shared = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (model, dense))
    assert {path[-1] for path in set(own) - set(shared)} >= {"convolution"}
    assert all("method_params" in path for path in set(own) - set(shared))
    for path, variable in shared.items():
        np.testing.assert_array_equal(own[path][...], variable[...])
    # a layer that keeps its method keeps what it has learnt, another does not
    convolution(model)[...] = jnp.ones((3, 1, 8))
    kept = js.nn.with_methods(model, [BLOCKS, BLOCKS, nsa], rngs=nnx.Rngs(4))
    assert convolution(kept)[...].all()
    assert not kept.blocks[0].attention.params()["convolution"].any()
    jax.tree.map(
        np.testing.assert_array_equal, kept.blocks[2].attention.params(), layers[2].params()
    )
    # and needs no keys for them
    kept = js.nn.with_methods(model, [None, BLOCKS, None])
    assert convolution(kept)[...].all()
    assert not jax.tree.leaves(kept.blocks[2].attention.params())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: js.nn.with_methods(hybrid(), [None, None, BLOCKS]),
            r"methods\[2\] has parameters, .* pass rngs=",
        ),
        (
            lambda: js.nn.with_methods(hybrid(), [None, js.nsa], rngs=nnx.Rngs(0)),
            "There are 2 methods for 3 attention layers",
        ),
        (
            lambda: js.nn.with_methods(hybrid(), [js.nsa] * 3, rngs=nnx.Rngs(0)),
            r"method is function; .*js\.nsa\(\)",
        ),
        (
            lambda: LanguageModel(SMALL, method=[WINDOW], rngs=nnx.Rngs(0)),
            "There are 1 methods for 3 attention layers",
        ),
    ],
)
def test_bad_input_is_named(call, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        call()
