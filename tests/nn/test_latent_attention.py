"""Latent attention is its formulas, in either form; it decodes, trains, and is restored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jsparse as js
import jsparse.nn
from jsparse.evaluation import density_of_layers
from jsparse.learned.hisa import index_loss
from jsparse.nn import KVCache, LatentCache, interleaved_rotary, rotary
from tests.inputs import on_device
from tests.oracles import hisa as indexer

CAUSAL = js.masks.causal()
SIZES = {
    **{"num_heads": 3, "head_dim": 8, "v_dim": 6, "rope_dim": 4},
    **{"q_lora_rank": 10, "kv_lora_rank": 12, "rope_base": 100.0},
}
INDEXER = {"index_heads": 2, "index_dim": 8, "rotary_dim": 4, "rope_base": 100.0}
TWO_STAGES = js.hisa(top_k=6, block_kv=4, block_top_k=3, **INDEXER)
ONE_STAGE = js.hisa(top_k=6, block_top_k=None, **INDEXER)
LENGTH, FEATURES = 24, 16


def layer(seed=0, **changes):
    """A layer, its parameters by NumPy: norms do something, positions and keys matter."""
    settings = {"implementation": "reference", **SIZES, **changes}
    abstract = nnx.eval_shape(lambda: js.nn.LatentAttention(FEATURES, rngs=nnx.Rngs(0), **settings))
    graph, state = nnx.split(abstract)

    def filled(path, leaf):
        rng = np.random.default_rng([seed, *str(path).encode()])
        size, mean = (2.0 * leaf.shape[0] ** -0.5, 0.0) if len(leaf.shape) > 1 else (0.2, 1.0)
        return leaf.replace(on_device(mean + size * rng.normal(size=leaf.shape), leaf.dtype))

    flat = nnx.to_flat_state(state)
    return nnx.merge(graph, nnx.from_flat_state([(p, filled(p, leaf)) for p, leaf in flat]))


def inputs(length=LENGTH, batch=(2,), features=FEATURES):
    rng = np.random.default_rng(1)
    return on_device(rng.normal(size=(*batch, length, features)), jnp.float32)


@nnx.jit
def applied(module, x, mask=None, cache=None):
    return module(x, mask=mask, cache=cache)


def on_latents(q, k, v, *, mask, x, positions):
    """Dense attention in the absorbed form, whatever the layer would choose."""
    return js.attend(q, k, v, mask=mask, implementation="reference")


def decoded(module, x, cache, lengths, mask=None):
    parts, start = [], 0
    for length in lengths:
        out, cache = applied(module, x[:, start : start + length], mask, cache)
        parts.append(np.asarray(out))
        start += length
    return np.concatenate(parts, 1), cache


# the formulas, in float64, one sequence, head by head and without absorbing anything


def weights(module, *path):
    found = functools.reduce(getattr, path, module)
    return np.float64(found[...])


def normalized(x, scale):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def turned(x, base):
    """Neighbours as complex numbers, turned by their token's place; not without a base."""
    if base is None:
        return x
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(pairs.shape[-1]) * 2 / x.shape[-1])
    pairs = pairs * np.exp(1j * angles)
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def oracle(module, x, *, chosen=None, scale=None, low_rank=True, base=100.0):
    """The output for one sequence; `chosen` lists the tokens of each query, else all before it."""
    x, length, scale = np.float64(x), len(x), scale or (8 + 4) ** -0.5
    q_latent = x
    if low_rank:
        q_latent = x @ weights(module, "q_a_proj", "kernel")
        q_latent = normalized(q_latent, weights(module, "q_a_norm", "scale"))
    q = (q_latent @ weights(module, "q_b_proj", "kernel")).reshape(length, 3, 12)
    projected = x @ weights(module, "kv_a_proj", "kernel")
    latents = normalized(projected[:, :12], weights(module, "kv_a_norm", "scale"))
    shared = turned(projected[:, 12:], base)
    both = (latents @ weights(module, "kv_b_proj", "kernel")).reshape(length, 3, 14)
    outputs = np.zeros((length, 3, 6))
    for head in range(3):
        of_place = turned(q[:, head, 8:], base)
        for t in range(length):
            tokens = list(range(t + 1)) if chosen is None else chosen[t]
            k, v = both[tokens, head, :8], both[tokens, head, 8:]
            logits = scale * (k @ q[t, head, :8] + shared[tokens] @ of_place[t])
            shares = np.exp(logits - logits.max())
            outputs[t, head] = shares @ v / shares.sum()
    return outputs.reshape(length, -1) @ weights(module, "out_proj", "kernel"), q_latent


def oracle_tokens(module, x, q_latent, *, block_top_k):
    params = {name: value[...] for name, value in module.method_params.items()}
    found = indexer.index(x, params, 2, 8, 4, 100.0, q_latent=q_latent)
    return indexer.select(*found, top_k=6, block=4, block_top_k=block_top_k)


def test_neighbours_are_turned_as_halves_in_another_order():
    x = np.random.default_rng(0).normal(size=(5, 2, 6)).astype(np.float32)
    got = interleaved_rotary(on_device(x), jnp.arange(5), base=50.0)
    expected = np.stack([turned(np.float64(x[:, head]), 50.0) for head in range(2)], 1)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    order = np.array([0, 2, 4, 1, 3, 5])
    halves = rotary(on_device(x[..., order]), jnp.arange(5), base=50.0)
    np.testing.assert_array_equal(np.asarray(got)[..., order], halves)


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": 0}, {"scale": 0.45}, {"rope_base": None}],
    ids=["default", "queries at once", "scale", "no positions"],
)
def test_both_forms_are_the_formulas(changes):
    module, x = layer(**changes), inputs()
    given = {
        "low_rank": changes.get("q_lora_rank", 1) > 0,
        "scale": changes.get("scale"),
        "base": changes.get("rope_base", 100.0),
    }
    expected = [oracle(module, y, **given)[0] for y in x]
    of_heads = applied(module, x, CAUSAL)
    of_latents = applied(js.nn.with_attention(module, on_latents), x, CAUSAL)
    # outputs of some units, sums of some ten products in f32
    np.testing.assert_allclose(of_heads, expected, atol=2e-5)
    np.testing.assert_allclose(of_latents, expected, atol=2e-5)
    # two ways to one number: rounded differently
    assert float(jnp.abs(of_heads - of_latents).max()) > 0


@pytest.mark.parametrize(
    ("method", "block_top_k"), [(TWO_STAGES, 3), (ONE_STAGE, None)], ids=["two stages", "one stage"]
)
def test_the_indexer_sees_hidden_states_and_low_rank_queries(method, block_top_k):
    module, x = layer(method=method, implementation=None), inputs()
    assert module.method_params["q"].shape == (10, 16)
    assert module.method_params["k"].shape == (16, 8)
    out = applied(module, x, CAUSAL)
    for index, sequence in enumerate(x):
        _, q_latent = oracle(module, sequence)
        chosen = oracle_tokens(module, sequence, q_latent, block_top_k=block_top_k)
        np.testing.assert_allclose(
            out[index], oracle(module, sequence, chosen=chosen)[0], atol=2e-5
        )
    dense = applied(layer(), x, CAUSAL)
    assert float(jnp.abs(out - dense)[:, 6:].max(-1).min()) > 1e-3, "nothing was left out"
    np.testing.assert_allclose(out[:, :6], dense[:, :6], atol=2e-5)


def test_whatever_multiplies_less_is_computed(monkeypatch):
    """A prompt with each head's keys and values, a step over what is kept, in DeepSeek's sizes."""
    seen = []

    def noting(q, k, v, **options):
        # one array, and no copy of a part of the cache
        assert (v is k) == (k.shape[-2] == 1)
        seen.append((q.shape, k.shape, v.shape))
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype)

    monkeypatch.setattr("jsparse.nn.layer.attend", noting)

    def shapes(q_len, room=None):
        seen.clear()

        def run(x):
            module = js.nn.LatentAttention(7168, num_heads=128, head_dim=128, rngs=nnx.Rngs(0))
            return module(x, cache=None if room is None else module.init_cache((), room))

        nnx.eval_shape(run, jax.ShapeDtypeStruct((q_len, 7168), jnp.bfloat16))
        return seen[0]

    heads = (4096, 128, 192), (4096, 128, 192), (4096, 128, 128)
    assert shapes(4096) == heads
    assert shapes(4096, 4096) == heads
    for q_len in (1, 64):
        expected = (q_len, 128, 576), (4096, 1, 576), (4096, 1, 576)
        assert shapes(q_len, 4096) == expected
    assert shapes(1024, 4096)[1] == (4096, 128, 192)


def test_the_defaults_are_deepseeks():
    def made():
        return js.nn.LatentAttention(
            7168, num_heads=128, head_dim=128, method=js.hisa(), rngs=nnx.Rngs(0)
        )

    module = nnx.eval_shape(made)
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert {".".join(map(str, path)): leaf.shape for path, leaf in state} == {
        "q_a_proj.kernel": (7168, 1536),
        "q_a_norm.scale": (1536,),
        "q_b_proj.kernel": (1536, 128 * 192),
        "kv_a_proj.kernel": (7168, 576),
        "kv_a_norm.scale": (512,),
        "kv_b_proj.kernel": (512, 128 * 256),
        "out_proj.kernel": (128 * 128, 7168),
        "method_params.q": (1536, 64 * 128),
        "method_params.k": (7168, 128),
        "method_params.k_scale": (128,),
        "method_params.k_bias": (128,),
        "method_params.weights": (7168, 64),
    }
    assert module.scale == 192**-0.5
    # of a small layer as well, within its width
    small = nnx.eval_shape(lambda: js.nn.LatentAttention(512, num_heads=8, rngs=nnx.Rngs(0)))
    found = small.head_dim, small.v_dim, small.rope_dim, small.q_lora_rank, small.kv_lora_rank
    assert found == (64, 64, 32, 256, 256)


@pytest.mark.parametrize(
    "method",
    [None, TWO_STAGES, pytest.param(ONE_STAGE, marks=pytest.mark.slow), js.streaming(window=5)],
    ids=["dense", "two stages", "one stage", "streaming"],
)
def test_decoding_equals_the_whole(method):
    module, x = layer(method=method), inputs()
    whole = applied(module, x, CAUSAL)
    cache = module.init_cache((2,), 32)
    out, cache = decoded(module, x, cache, (20, 1, 1, 1, 1))
    np.testing.assert_allclose(out, whole, atol=2e-5)
    np.testing.assert_array_equal(cache.length, [24, 24])
    # a latent of 12 and a key of 4 for each token, and what an indexer keeps of it and of a block
    indexed = bool(jax.tree.leaves(cache.state))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(cache) if leaf.ndim > 1)
    blocks = 32 // 4 if method is TWO_STAGES else 0
    assert numbers == 2 * (32 * (12 + 4 + 8 * indexed) + 8 * blocks)


# how a cache is written is the other layer's too, whose test is not slow
@pytest.mark.slow
@pytest.mark.parametrize("method", [None, TWO_STAGES], ids=["dense", "two stages"])
def test_sequences_of_one_batch_decode_at_their_own_positions(method):
    module, x, mask = layer(method=method), inputs(), js.masks.sliding_window(left=9)
    whole = applied(module, x, CAUSAL & mask)
    caches = [
        applied(module, x[n : n + 1, :length], mask, module.init_cache((1,), 24))[1]
        for n, length in enumerate((20, 11))
    ]
    cache = jax.tree.map(lambda *leaves: np.concatenate(leaves), *caches)
    out, _ = applied(module, np.stack([x[0, 20:21], x[1, 11:12]]), mask, cache)
    np.testing.assert_allclose(out[:, 0], np.stack([whole[0, 20], whole[1, 11]]), atol=2e-5)


def train(model, losses_of, steps):
    """The losses before each step, and the first gradient of their sum."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def total(model):
        losses = losses_of(model)
        return sum(losses), losses

    @nnx.jit
    def step(model, optimizer):
        gradient, losses = nnx.grad(total, has_aux=True)(model)
        optimizer.update(model, gradient)
        return losses, gradient

    steps = [step(model, optimizer) for _ in range(steps)]
    return np.array([losses for losses, _ in steps]), steps[0][1]


@pytest.mark.newest
def test_training_lowers_both_losses_and_a_checkpoint_restores_what_is_learnt(tmp_path):
    """The indexer learns from the attention it leads to, all else from the output."""
    model, x = layer(method=TWO_STAGES), inputs()
    target = jnp.roll(x, 1, axis=1).at[:, 0].set(0.0)

    def both(model):
        found = []

        def learning(q, k, v, *, mask, x, positions):
            plan, info = TWO_STAGES.plan(model.params(), q, k, x=x, mask=mask)
            found.append(index_loss(info.indexed, q, k, plan, mask=mask))
            return js.attend(q, k, v, plan, mask=mask, implementation="reference")

        model.attention = learning
        out = model(x, mask=CAUSAL)
        model.attention = None
        return jnp.square(out - target).mean(), found[0]

    losses, gradient = train(model, both, 16)
    assert all(leaf[...].any() for _, leaf in nnx.to_flat_state(gradient))
    assert (losses[-1] < 0.8 * losses[0]).all(), losses
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", nnx.state(model))
        saver.wait_until_finished()
        again = layer(7, method=TWO_STAGES)
        nnx.update(again, saver.restore(tmp_path / "state", nnx.state(again)))
    np.testing.assert_array_equal(applied(again, x, CAUSAL), applied(model, x, CAUSAL))


def test_the_index_loss_is_of_the_layers_own_attention_and_moves_the_indexer_alone():
    """Its default scale is that of the queries it is given, whatever the layer's."""
    module, x = layer(method=ONE_STAGE, scale=0.45), inputs(batch=())

    @nnx.jit
    @nnx.value_and_grad
    def loss(module, x):
        found = []

        def learning(q, k, v, *, mask, x, positions):
            _, info = ONE_STAGE.plan(module.params(), q, k, x=x, mask=mask)
            found.append(index_loss(info.indexed, q, k, mask=mask))
            return jnp.zeros(q.shape)

        module.attention = learning
        module(x, mask=CAUSAL)
        module.attention = None
        return found[0]

    q, k, q_latent = heads_of(module, x)
    params = {name: value[...] for name, value in module.method_params.items()}
    indexed = indexer.index(x, params, 2, 8, 4, 100.0, q_latent=q_latent)
    everything = [list(range(t + 1)) for t in range(LENGTH)]
    expected = indexer.loss(*indexed, q * 0.45 * 12**0.5, k, everything)
    value, gradient = loss(module, x)
    assert float(value) == pytest.approx(expected, rel=1e-4)
    moved = {path[0] for path, leaf in nnx.to_flat_state(gradient) if leaf[...].any()}
    assert moved == {"method_params"}


def heads_of(module, x):
    """Queries and keys of each head, by the formulas, and what the queries are made of."""
    x = np.float64(x)
    _, q_latent = oracle(module, x)
    q = (q_latent @ weights(module, "q_b_proj", "kernel")).reshape(len(x), 3, 12)
    projected = x @ weights(module, "kv_a_proj", "kernel")
    latents = normalized(projected[:, :12], weights(module, "kv_a_norm", "scale"))
    both = (latents @ weights(module, "kv_b_proj", "kernel")).reshape(len(x), 3, 14)
    shared = turned(projected[:, 12:], 100.0)
    q = [np.concatenate([q[:, h, :8], turned(q[:, h, 8:], 100.0)], -1) for h in range(3)]
    k = [np.concatenate([both[:, h, :8], shared], -1) for h in range(3)]
    return np.stack(q, 1), np.stack(k, 1), q_latent


def test_a_model_reaches_its_latent_layers():
    model = layer()
    (found,) = js.nn.attention_layers(model)
    assert found is model
    for method in (TWO_STAGES, js.from_length(TWO_STAGES, min_length=LENGTH)):

        def sparse(model, method=method):
            return js.nn.with_methods(model, [method], rngs=nnx.Rngs(3))

        assert nnx.eval_shape(sparse, model).method_params["q"].shape == (10, 16)


@pytest.mark.slow
def test_reports_of_latent_layers_count_what_the_indexer_keeps():
    x = inputs()
    (report,) = nnx.jit(density_of_layers)(layer(method=TWO_STAGES), x, mask=CAUSAL)
    pairs = sum(min(t + 1, 6) for t in range(LENGTH)) / (LENGTH * (LENGTH + 1) / 2)
    np.testing.assert_allclose(report.pairs, pairs, rtol=1e-5)


def by_formulas(module, x, dtype):
    """What the layer computes, written plainly and rounded where a plain version rounds."""

    def linear(x, kernel):
        return x @ kernel[...].astype(dtype)

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
        return (wide * scale[...]).astype(dtype)

    x = x.astype(dtype)
    places = jnp.broadcast_to(jnp.arange(x.shape[-2]), x.shape[:-1])
    q_latent = norm(linear(x, module.q_a_proj.kernel), module.q_a_norm.scale)
    q = linear(q_latent, module.q_b_proj.kernel).reshape(*x.shape[:-1], 3, 12)
    projected = linear(x, module.kv_a_proj.kernel)
    latents = norm(projected[..., :12], module.kv_a_norm.scale)
    shared = interleaved_rotary(projected[..., None, 12:], places, base=100.0)
    both = linear(latents, module.kv_b_proj.kernel).reshape(*x.shape[:-1], 3, 14)
    of_place = interleaved_rotary(q[..., 8:], places, base=100.0)
    logits = jnp.einsum("bthd,bshd->bhts", q[..., :8], both[..., :8])
    logits = (logits + jnp.einsum("bthd,bsd->bhts", of_place, shared[..., 0, :])) * 12**-0.5
    seen = jnp.tril(jnp.ones((x.shape[-2],) * 2, bool))
    shares = jax.nn.softmax(jnp.where(seen, logits.astype(jnp.float32), -jnp.inf)).astype(dtype)
    out = jnp.einsum("bhts,bshv->bthv", shares, both[..., 8:]).reshape(*x.shape[:-1], -1)
    return linear(out, module.out_proj.kernel)


def on_lists(q, k, v, *, mask, x, positions):
    """The same by lists of tokens, as `hisa` has them."""
    lists = js.block_mask(mask, LENGTH, LENGTH, block_q=1, block_kv=1)
    return js.attend(q, k, v, lists, mask=mask, implementation="xla")


def output_and_gradients(run, module):
    x = inputs(batch=(4,)).astype(jnp.bfloat16).astype(jnp.float32)
    weight = on_device(np.random.default_rng(2).normal(size=x.shape), jnp.float32)

    @nnx.jit
    def compute(module, x):
        def loss(module, x):
            out = run(module, x)
            return (out.astype(jnp.float32) * weight).sum(), out

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(module, x)

    return [np.float64(leaf) for leaf in jax.tree.leaves(compute(module, x))]


@functools.cache
def written_plainly(dtype):
    return output_and_gradients(lambda module, x: by_formulas(module, x, dtype), layer())


@pytest.mark.parametrize("attention", [None, on_latents], ids=["heads", "latents"])
def test_both_forms_have_the_gradients_of_the_formulas(attention):
    module = js.nn.with_attention(layer(), attention)
    found = output_and_gradients(lambda module, x: module(x, mask=CAUSAL), module)
    for got, expected in zip(found, written_plainly(jnp.float32), strict=True):
        assert expected.any()
        # sums of some hundred products in f32, of numbers as large as the largest
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "attention",
    [None, on_latents, pytest.param(on_lists, marks=pytest.mark.slow)],
    ids=["heads", "latents", "lists of tokens"],
)
def test_sixteen_bits_err_no_more_than_a_plain_version(attention):
    """Outputs and gradients, in both forms."""
    module = js.nn.with_attention(layer(dtype=jnp.bfloat16), attention)
    found = output_and_gradients(lambda module, x: module(x, mask=CAUSAL), module)
    every = found, written_plainly(jnp.bfloat16), written_plainly(jnp.float32)
    for got, plain, expected in zip(*every, strict=True):
        assert np.linalg.norm(got - expected) < 2 * np.linalg.norm(plain - expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer(head_dim=None), "in_features=16 must be a multiple of 3"),
        (lambda: layer(rope_dim=3), "rope_dim=3 must be a multiple of 2"),
        (lambda: layer(kv_lora_rank=0), "kv_lora_rank=0"),
        (lambda: layer(q_lora_rank=-1), "q_lora_rank=-1"),
        (lambda: layer(v_dim=0), "v_dim=0"),
        (lambda: layer(rope_base=0.0), "rope_base=0.0"),
        (lambda: layer(scale=float("nan")), "scale=nan"),
        (lambda: layer(method=js.hisa), r"method is function; .*js\.hisa\(\)"),
        (lambda: layer()(inputs(features=8)), "x has 8 features"),
        (
            lambda: layer()(inputs(), mask=jnp.ones((24, 24), bool)),
            r"mask is .*Array.*; .*js\.masks\.dense",
        ),
        (lambda: LatentCache.empty((), 0, 16), "max_len=0"),
        (
            lambda: LatentCache.empty((2,), 8, 16).append(jnp.zeros((2, 24, 1, 16))),
            "24 tokens do not fit",
        ),
        (
            lambda: layer()(inputs(), cache=KVCache.empty((2,), 32, 1, 16)),
            "The cache is KVCache; this layer keeps one vector of 16",
        ),
        (
            lambda: layer()(inputs(), cache=LatentCache.empty((2,), 32, 20)),
            r"LatentCache of latents \(2, 32, 1, 20\); .* by `layer.init_cache`",
        ),
        (
            lambda: nnx.eval_shape(
                layer(method=TWO_STAGES), inputs(), cache=LatentCache.empty((2,), 32, 16)
            ),
            "The cache has no state for the layer's method",
        ),
        (
            lambda: js.nn.with_methods(layer(), [TWO_STAGES]),
            r"methods\[0\] has parameters, .* pass rngs=",
        ),
        (
            lambda: layer(method=js.seerattention(block_size=8, density=0.5)),
            "rope_base=10000.0, and .* LatentAttention do not all have any: .* rope_base=None",
        ),
    ],
)
def test_bad_input_is_named(call, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        call()


def test_states_that_do_not_fit_the_method_are_named():
    params = layer(method=TWO_STAGES).params()
    q, k = jnp.zeros((24, 3, 16)), jnp.zeros((24, 1, 16))
    x = inputs(batch=())
    with pytest.raises(ValueError, match=r"q_latent \(24, 16\) must be \(24, 10\)"):
        js.sparse_attention(q, k, k, TWO_STAGES, params=params, x=x)
    given = {"x": js.LatentStates(x, x), "mask": CAUSAL}
    says = "this method has parameters: make them by method.init"
    for method in (TWO_STAGES, js.nsa()):
        with pytest.raises(ValueError, match=says):
            js.sparse_attention(q, k, k, method, **given)
    with pytest.raises(ValueError, match="x is LatentStates; this method looks at hidden states"):
        js.sparse_attention(q, k, k, js.nsa(), params={"gates": jnp.zeros((16, 9))}, **given)
