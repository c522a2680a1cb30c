"""Captured tensors are what attention was given, and survive a file; bad files say why."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jsparse as js
import jsparse.nn
from jsparse.evaluation import (
    Captured,
    Profiled,
    capture,
    density_of_layers,
    load_captured,
    load_profiled,
    profile,
    save_captured,
)
from tests.inputs import on_device, qkv


class Stacked(nnx.Module):
    """A stand-in for a model: layers of attention, each on what came before."""

    def __init__(self, layers=12, **options):
        def layer(seed):
            rngs = nnx.Rngs(seed)
            return js.nn.SparseAttention(16, num_heads=4, num_kv_heads=2, rngs=rngs, **options)

        self.blocks = nnx.List([layer(seed) for seed in range(layers)])

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(normalize(x), mask=js.masks.causal())
        return x


def normalize(x):
    # else logits grow with each layer to thousands, and rounding errors of the softmax with them
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))


def test_capture_gives_what_each_layer_attends_to():
    model, x = Stacked(), jax.random.normal(jax.random.key(0), (1, 20, 16))
    layers = capture(model, x)
    # more than ten layers: their order is that of numbers, not of letters
    assert len(layers) == 12
    for block, layer in zip(model.blocks, layers, strict=True):
        out = js.attend(*(y[None] for y in layer), mask=js.masks.causal())
        expected = block.out_proj(out.reshape(1, 20, 16))
        # sums of 16 products, taken in another order
        atol = 16 * np.finfo(np.float32).eps * float(jnp.abs(expected).max())
        given = block(normalize(x), mask=js.masks.causal())
        np.testing.assert_allclose(given, expected, atol=atol)
        x = x + expected


def test_a_profile_has_the_gradient_of_the_loss_by_each_output(tmp_path):
    model = Stacked(2, implementation="reference")
    x = jax.random.normal(jax.random.key(0), (1, 20, 16))
    weights = jax.random.normal(jax.random.key(1), (20, 16))

    def loss(model, x):
        return (weights * model(x)[0]).sum()

    layers = profile(model, loss, x)
    assert all(block.attention is None for block in model.blocks)
    for captured, layer in zip(capture(model, x), layers, strict=True):
        for x_of, y_of in zip(captured, layer[:3], strict=True):
            np.testing.assert_allclose(x_of, y_of, atol=1e-6)
    # what the last layer gives is projected and added
    last = (weights @ model.blocks[1].out_proj.kernel[...].T).reshape(20, 4, 4)
    np.testing.assert_allclose(layers[1].d_out, last, atol=1e-5)
    # the first one's goes through the second: a step along some direction
    step = jax.random.normal(jax.random.key(2), (1, 20, 4, 4))

    def moved(size):
        changed = nnx.merge(*nnx.split(model))
        run = changed.blocks[0]._method
        changed.blocks[0].attention = lambda *a, **k: run(*a, **k) + size * step
        return loss(changed, x)

    slope = jax.jit(jax.grad(moved))(0.0)
    np.testing.assert_allclose((layers[0].d_out * step[0]).sum(), slope, rtol=1e-4)
    save_captured(layers, tmp_path / "profile.safetensors")
    for layer, again in zip(layers, load_profiled(tmp_path / "profile.safetensors"), strict=True):
        for x_of, y_of in zip(layer, again, strict=True):
            np.testing.assert_array_equal(x_of, y_of)
    assert load_captured(tmp_path / "profile.safetensors")[1].q.shape == (20, 4, 4)


class Named(nnx.Module):
    """Layers in attributes, each with a width of its own, which run in an order of their own."""

    def __init__(self, runs, names):
        for name in names:
            width = 2 * (1 + names.index(name))
            # of as few operations as can be: each width is compiled by itself
            options = {"num_heads": 1, "rope_base": None, "implementation": "reference"}
            layer = js.nn.SparseAttention(8, head_dim=width, rngs=nnx.Rngs(0), **options)
            setattr(self, name, layer)
        self.runs = tuple(runs)

    @classmethod
    def of_ones(cls, runs, names):
        """Without drawing parameters, which compiles programs for each width."""
        graph, state = nnx.split(nnx.eval_shape(lambda: cls(runs, names)))
        ones = jax.tree.map(lambda x: on_device(np.ones(x.shape), x.dtype), state)
        return nnx.merge(graph, ones)

    def __call__(self, x):
        for name in self.runs:
            x = x + getattr(self, name)(x)
        return x


@pytest.mark.parametrize(
    ("names", "runs"),
    [
        pytest.param(
            *([f"layer{n}" for n in range(11)],) * 2,
            marks=pytest.mark.slow,
        ),
        (["decoder", "encoder"], ["encoder", "decoder"]),
    ],
    ids=["numbered", "not in order"],
)
def test_whatever_lists_layers_lists_them_in_one_order(names, runs):
    model, x = Named.of_ones(runs, names), jnp.ones((1, 4, 8))
    widths = [2 * n for n in range(1, len(names) + 1)]
    assert [layer.head_dim for layer in js.nn.attention_layers(model)] == widths
    assert [layer.q.shape[-1] for layer in capture(model, x)] == widths
    profiled = profile(model, lambda model, x: model(x).sum(), x)
    assert [layer.d_out.shape[-1] for layer in profiled] == widths
    methods = [js.streaming(num_sink=0, window=n + 1) for n in range(len(names))]
    changed = js.nn.with_methods(model, methods)
    for name, method in zip(names, methods, strict=True):
        assert getattr(changed, name).method is method
    # the first layer's queries see themselves alone, the next one's the key before too
    reports = nnx.jit(lambda model, x: density_of_layers(model, x)[:2])(changed, x)
    pairs = [float(report.pairs.mean()) for report in reports]
    np.testing.assert_allclose(pairs[:2], [4 / 16, 7 / 16], rtol=1e-5)


@pytest.mark.parametrize(("runs", "times"), [("aab", 2), ("b", 0)])
def test_a_layer_that_does_not_run_once_has_no_entry_of_its_own(runs, times):
    model, x = Named.of_ones(runs, ["a", "b"]), jnp.ones((1, 4, 8))
    calls = {
        "capture": lambda: capture(model, x),
        "profile": lambda: profile(model, lambda model, x: model(x).sum(), x),
        "density": lambda: density_of_layers(model, x),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=f"Layer 0 of .* ran {times} times; .* run once"):
            call()


def test_a_profile_without_gradients_or_with_others_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_captured([Captured(*qkv(20))], path)
    with pytest.raises(ValueError, match=r"lacks layers\.0\.d_out; .*evaluation\.profile gives"):
        load_profiled(path)
    q, k, v = qkv(20)
    save_captured([Profiled(q, k, v, q[:, :2])], path)
    with pytest.raises(ValueError, match=r"d_out has shape \(20, 2, 16\); the output has"):
        load_profiled(path)


def test_capture_leaves_the_model_as_it_was():
    model, x = Stacked(), jnp.ones((1, 8, 16))
    before = model(x)
    capture(model, x)
    assert all(block.attention is None for block in model.blocks)
    np.testing.assert_array_equal(model(x), before)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="SparseAttention"):
        capture(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jnp.ones((1, 4)))


def test_a_file_gives_back_the_same_bits(tmp_path):
    layers = [Captured(*qkv(20, 30, seed=seed)) for seed in range(11)]
    save_captured(layers, tmp_path / "all.safetensors")
    back = load_captured(tmp_path / "all.safetensors")
    assert len(back) == 11
    for layer, again in zip(layers, back, strict=True):
        for x, y in zip(layer, again, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_batch_axis_of_one_is_dropped_and_half_precision_kept(tmp_path):
    q, k, v = (np.asarray(x, np.float16)[None] for x in qkv(8))
    path = tmp_path / "half.safetensors"
    safetensors.numpy.save_file({"layers.0.q": q, "layers.0.k": k, "layers.0.v": v}, str(path))
    (layer,) = load_captured(path)
    assert layer.q.shape == (8, 4, 16)
    assert layer.q.dtype == jnp.float16


def test_bfloat16_is_read(tmp_path):
    names = dict(zip("qkv", qkv(8), strict=True))
    path = tmp_path / "bf16.safetensors"
    tensors = {f"layers.0.{n}": np.asarray(x, ml_dtypes.bfloat16) for n, x in names.items()}
    safetensors.numpy.save_file(tensors, str(path))
    (layer,) = load_captured(path)
    assert layer.k.dtype == jnp.bfloat16


def write(path, **changes):
    """A good file of two layers with some tensors replaced, or left out where None."""
    q, k, v = (np.asarray(x) for x in qkv(8))
    tensors = {f"layers.{i}.{n}": x for i in (0, 1) for n, x in zip("qkv", (q, k, v), strict=True)}
    tensors |= {name.replace("_", "."): x for name, x in changes.items()}
    safetensors.numpy.save_file({n: x for n, x in tensors.items() if x is not None}, str(path))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers_1_k": None}, r"lacks layers\.1\.k"),
        ({f"layers_0_{n}": None for n in "qkv"}, r"lacks layers\.0\.q, layers\.0\.k"),
        ({f"layers_{i}_{n}": None for i in (0, 1) for n in "qkv"} | {"w": zeros(1)}, "holds no"),
        ({"layers_0_q": zeros(8, 16)}, r"layers\.0\.q has shape \(8, 16\)"),
        ({"layers_0_q": zeros(2, 8, 4, 16)}, r"layers\.0\.q has shape \(2, 8, 4, 16\)"),
        ({"layers_0_v": zeros(8, 2, 16, dtype=np.int32)}, r"layers\.0\.v holds int32"),
        ({"layers_0_k": zeros(8, 3, 16)}, "heads"),
        ({"layers_0_k": zeros(8, 2, 8)}, "dim"),
        ({"layers_0_v": zeros(9, 2, 16)}, "tokens"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, changes, sentence):
    path = tmp_path / "bad.safetensors"
    write(path, **changes)
    with pytest.raises(ValueError, match=sentence):
        load_captured(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_captured(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_captured(path)
