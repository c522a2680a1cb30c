"""The layer equals the function; it decodes, trains, and is saved and restored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx

import jsparse as js
import jsparse.nn
from jsparse.masks.flashmask import causal_document_columns
from jsparse.nn import KVCache, rotary
from tests.inputs import on_device

CAUSAL = js.masks.causal()


def layer(**changes):
    settings = {"num_heads": 4, "num_kv_heads": 2, "rngs": nnx.Rngs(0), **changes}
    return js.nn.SparseAttention(32, **settings)


def inputs(length=40, batch=(2,), features=32):
    rng = np.random.default_rng(1)
    return on_device(rng.normal(size=(*batch, length, features)), jnp.float32)


# compiled, since a layer outside of jit is a hundred programs; layers alike share theirs
@nnx.jit
def applied(module, x, mask=None, cache=None):
    return module(x, mask=mask, cache=cache)


@nnx.jit
def with_pairs(module, x, pairs):
    return module(x, mask=pairs)


def decoded(module, x, cache, lengths, mask=None):
    """The output of parts of these lengths, one after the other, and the cache after them."""
    parts, start = [], 0
    for length in lengths:
        out, cache = applied(module, x[:, start : start + length], mask, cache)
        parts.append(np.asarray(out))
        start += length
    return np.concatenate(parts, 1), cache


def test_rotary_against_loops():
    x = np.random.default_rng(0).normal(size=(5, 2, 6)).astype(np.float32)
    positions = np.array([0, 3, 4, 100, 1000])
    expected = np.zeros_like(x)
    for t, h, i in np.ndindex(5, 2, 3):
        angle = float(positions[t]) * 10_000.0 ** (-i / 3)
        turned = (x[t, h, i] + 1j * x[t, h, i + 3]) * np.exp(1j * angle)
        expected[t, h, i], expected[t, h, i + 3] = turned.real, turned.imag
    got = rotary(on_device(x), on_device(positions))
    # an f32 angle of 1000 radians is off by about 1000 eps
    np.testing.assert_allclose(got, expected, atol=1e-3)
    np.testing.assert_allclose(got[:3], expected[:3], atol=1e-5)


@pytest.mark.parametrize("method", [None, js.mean_pooled(block_size=8, density=0.4)])
def test_the_layer_is_the_function(method):
    module, x = layer(method=method, sinks=True, softcap=20.0, rope_base=500.0), inputs()
    module.sinks[...] = on_device([0.5, -1.0, 0.0, 2.0])

    @nnx.jit
    def function(module):
        def project(linear, heads):
            return (x @ linear.kernel[...]).reshape(2, 40, heads, 8)

        positions = jnp.broadcast_to(jnp.arange(40), (2, 40))
        q = rotary(project(module.q_proj, 4), positions, base=500.0)
        k = rotary(project(module.k_proj, 2), positions, base=500.0)
        v = project(module.v_proj, 2)
        plan = None if method is None else method.plan((), q, k, mask=CAUSAL)[0]
        out = js.attend(
            q, k, v, plan, mask=CAUSAL, sinks=module.sinks[...], softcap=20.0,
            implementation="reference",
        )  # fmt: skip
        return out.reshape(2, 40, 32) @ module.out_proj.kernel[...]

    np.testing.assert_allclose(module(x, mask=CAUSAL), function(module), atol=5e-6)


@pytest.mark.parametrize("split", [(40,), (24, 8, 8), (37, 1, 1, 1)])
def test_decoding_equals_the_whole(split):
    module, x = layer(), inputs()
    out, cache = decoded(module, x, module.init_cache((2,), 48), split)
    np.testing.assert_allclose(out, applied(module, x, CAUSAL), atol=5e-6)
    np.testing.assert_array_equal(cache.length, [40, 40])


DOCUMENTS = causal_document_columns(on_device([10] * 10 + [30] * 20 + [40] * 10, jnp.int32))


@pytest.mark.numbers
@pytest.mark.parametrize(
    "method",
    [
        js.streaming(num_sink=2, window=6),
        js.flashmask(startend_row_indices=DOCUMENTS),
        js.powerattention(block_size=4, window_size=1),
        js.s2_attention(block_size=4, local_blocks=1, vert_stride=2),
        js.moa(
            rules=[js.ElasticRule(0, 0.3), js.ElasticRule(12, 0.0)] * 2,
            num_sink=4,
            min_span=8,
            block_size=4,
        ),
    ],
    ids=["streaming", "documents", "powerattention", "s2_attention", "moa"],
)
def test_a_mask_in_a_cache_stands_where_its_queries_stand_and_decodes(method):
    """A prompt, some more tokens and steps of one: rows of the whole."""
    # forms every pair, which is soon compiled; methods' own tests take steps by the others
    module, x = layer(method=method, implementation="reference"), inputs()

    whole = applied(module, x, CAUSAL)
    dense = applied(layer(implementation="reference"), x, CAUSAL)
    out, _ = decoded(module, x, module.init_cache((2,), 40), (16, 16, 1, 1, 1))
    np.testing.assert_allclose(out, whole[:, :35], atol=5e-6)
    # what is left out makes a difference in the rows of the steps
    assert float(jnp.abs(whole - dense)[:, 32:35].max(-1).min()) > 1e-3


@pytest.mark.newest
def test_a_method_that_skips_on_the_way_skips_in_steps():
    """Its threshold for decoding acts in a step of the layer."""
    method = js.blasst(threshold=0.0, decode_threshold=1.0, block_q=8, block_kv=8)
    module, dense = (layer(method=m, implementation="reference") for m in (method, None))
    x, told = 3.0 * inputs(), []
    _, cache = dense(x[:, :39], cache=dense.init_cache((2,), 48))
    module.observe = told.append
    out, _ = module(x[:, 39:], cache=cache)
    (info,) = told
    scored, kept = info.scored.kv_num_blocks, info.kept.kv_num_blocks
    # of 40 tokens, not of the room for 48
    np.testing.assert_array_equal(scored, 5)
    assert kept.shape == (2, 4, 1)
    assert int(kept.min()) >= 1
    assert int(kept.sum()) < 2 * 4 * 5
    whole, _ = dense(x[:, 39:], cache=cache)
    assert float(jnp.abs(out - whole).max()) > 1e-3


@pytest.mark.numbers
def test_a_method_with_a_state_decodes_by_itself(tmp_path):
    sizes = {"compression_size": 4, "stride": 2, "block_kv": 4, "top_k": 3, "window": 6}
    module, x = layer(method=js.nsa(**sizes)), inputs()
    out, _ = decoded(module, x, module.init_cache((2,), 48), (30, *[1] * 10))
    np.testing.assert_allclose(out, applied(module, x), atol=5e-6)
    # its parameters are the module's: they learn, and come back from a file
    losses = train(module, lambda m, x: m(x), steps=5)
    assert losses[-1] < losses[0]
    gates = nnx.state(module, nnx.Param)["method_params"]["gates"]
    assert float(
        jnp.abs(gates[...] - layer(method=module.method).method_params["gates"][...]).max()
    )
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", nnx.state(module))
        saver.wait_until_finished()
        again = layer(method=module.method, rngs=nnx.Rngs(7))
        nnx.update(again, saver.restore(tmp_path / "state", nnx.state(again)))
    np.testing.assert_array_equal(applied(again, x), applied(module, x))


@pytest.mark.numbers
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(js.flashmoba(block_kv=4, top_k=2), marks=pytest.mark.slow),
        js.flashmoba(block_kv=4, top_k=2, taps=3),
        # nsa by itself is above, and a state handed on from a length below
        pytest.param(
            js.from_length(js.nsa(compression_size=4, stride=2, block_kv=4, top_k=3), min_length=1),
            marks=pytest.mark.slow,
        ),
        js.from_length(js.hisa(top_k=4, index_heads=2, index_dim=8, rotary_dim=4), min_length=1),
        # its own test decodes so too, without a layer
        pytest.param(
            js.nsa(
                **{"compression_size": 4, "stride": 2, "block_kv": 4, "top_k": 3, "window": 6},
                **{"own_projections": True, "rope_base": 10_000.0},
            ),
            marks=pytest.mark.slow,
        ),
        js.seerattention_r(block_size=4, token_budget=8, gate_dim=4),
    ],
    ids=[
        *("flashmoba", "flashmoba with taps", "nsa from a length", "hisa from a length"),
        *("nsa with projections", "seerattention_r"),
    ],
)
def test_decoding_by_methods_that_change_keys_or_carry_a_state(method):
    module, x = layer(method=method), inputs(16)
    if "convolution" in (module.method_params or {}):
        module.method_params["convolution"][...] = jnp.full((3, 2, 8), 0.5)
    out, _ = decoded(module, x, module.init_cache((2,), 20), (13, 1, 2))
    np.testing.assert_allclose(out, applied(module, x, CAUSAL), atol=5e-6)


@pytest.mark.numbers
@pytest.mark.parametrize(
    "mask",
    [
        js.masks.sliding_window(left=4),
        pytest.param(js.masks.dilated(stride=2, window=3), marks=pytest.mark.slow),
        js.masks.global_tokens(3) | js.masks.sliding_window(left=2),
        pytest.param(~js.masks.sliding_window(left=3), marks=pytest.mark.slow),
        js.masks.lengths(kv_lengths=jnp.array([6, 9])) | js.masks.sliding_window(left=1),
    ],
    ids=["window", "dilated", "global", "not", "lengths"],
)
def test_decoding_with_a_mask_is_the_whole(mask):
    module, x = layer(method=js.mean_pooled(block_size=8, density=1.0)), inputs(16)
    # more room than tokens, and a prompt, a step, some more
    out, _ = decoded(module, x, module.init_cache((2,), 40), (11, 1, 4), mask)
    np.testing.assert_allclose(out, applied(module, x, CAUSAL & mask), atol=5e-6)


@pytest.mark.numbers
def test_sequences_with_a_mask_decode_at_their_own_positions():
    module, x, mask = layer(), inputs(16), js.masks.sliding_window(left=4)
    whole = applied(module, x, CAUSAL & mask)
    caches = [
        applied(module, x[n : n + 1, :length], mask, module.init_cache((1,), 24))[1]
        for n, length in enumerate((9, 4))
    ]
    cache = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *caches)
    out, _ = applied(module, jnp.stack([x[0, 9:10], x[1, 4:5]]), mask, cache)
    np.testing.assert_allclose(out[:, 0], jnp.stack([whole[0, 9], whole[1, 4]]), atol=5e-6)


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("own", "cached"),
    # the same rule, the other way round
    [("bfloat16", "float32"), pytest.param(None, "bfloat16", marks=pytest.mark.slow)],
)
def test_a_state_has_the_dtype_of_its_cache(own, cached):
    sizes = {"compression_size": 4, "stride": 2, "block_kv": 4, "top_k": 3, "window": 6}
    module, x = layer(method=js.nsa(**sizes), dtype=own), inputs(16)
    cache = module.init_cache((2,), 20, dtype=cached)
    for at in (slice(0, 15), slice(15, 16)):
        out, cache = applied(module, x[:, at], cache=cache)
        assert cache.state.k.dtype == cached
    # rounded to 16 bits on the way
    np.testing.assert_allclose(out, applied(module, x)[:, 15:], atol=0.05)
    with pytest.raises(ValueError, match="make it by `layer.init_cache`"):
        module(x[:, :2], cache=KVCache.empty((2,), 20, 2, 8))


@pytest.mark.numbers
def test_sequences_of_one_batch_decode_at_their_own_positions():
    module, x = layer(), inputs()
    caches = [applied(module, x[:1, :9], cache=module.init_cache((1,), 16))[1]]
    caches.append(applied(module, x[1:, :4], cache=module.init_cache((1,), 16))[1])
    cache = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *caches)
    step = jnp.stack([x[0, 9:10], x[1, 4:5]])
    out, _ = applied(module, step, cache=cache)
    np.testing.assert_allclose(out[0], applied(module, x[:1, :10], CAUSAL)[0, 9:], atol=5e-6)
    np.testing.assert_allclose(out[1], applied(module, x[1:, :5], CAUSAL)[0, 4:], atol=5e-6)


def test_bfloat16_and_jit():
    module = layer(dtype=jnp.bfloat16)
    out = applied(module, inputs().astype(jnp.bfloat16), CAUSAL)
    assert out.dtype == jnp.bfloat16
    single = applied(layer(), inputs(), CAUSAL)
    assert float(jnp.abs(out - single).max()) < 0.05 * float(jnp.abs(single).max())


def train(model, apply, steps=25):
    """Teaches a model to output its input shifted by one token, which only attention can do."""
    x = inputs(24, (4,))
    target = jnp.roll(x, 1, axis=1).at[:, 0].set(0.0)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda m: jnp.square(apply(m, x) - target).mean())(
            model
        )
        optimizer.update(model, gradient)
        return loss

    return [float(step(model, optimizer)) for _ in range(steps)]


@pytest.mark.parametrize("method", [None, js.mean_pooled(block_size=8, density=0.5)])
def test_training_lowers_the_loss_and_a_checkpoint_restores_it(method, tmp_path):
    model = layer(method=method)
    losses = train(model, lambda m, x: m(x, mask=CAUSAL))
    assert losses[-1] < 0.7 * losses[0]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        fresh = layer(method=method, rngs=nnx.Rngs(7))
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(fresh))
        nnx.update(fresh, checkpointer.restore(tmp_path / "state", target))
    x = inputs()
    np.testing.assert_array_equal(applied(fresh, x, CAUSAL), applied(model, x, CAUSAL))


def nnx_attention(attention_fn, rngs=0):
    return nnx.MultiHeadAttention(
        4, 32, decode=False, rngs=nnx.Rngs(rngs), attention_fn=attention_fn
    )


@pytest.mark.newest
def test_inside_nnx_attention_keeping_all_is_dense_and_trains():
    method = js.mean_pooled(block_size=8, density=1.0)
    ours = nnx_attention(js.nn.attention_fn(method))
    theirs = nnx_attention(nnx.dot_product_attention)
    x = inputs(24)
    pairs = nnx.make_causal_mask(jnp.ones((2, 24)))
    expected = with_pairs(theirs, x, pairs)
    np.testing.assert_allclose(with_pairs(ours, x, pairs), expected, atol=5e-6)
    in_order = nnx.jit(lambda module, x: module(x, is_causal=True))
    np.testing.assert_allclose(in_order(ours, x), expected, atol=5e-6)
    sparse = nnx_attention(js.nn.attention_fn(js.mean_pooled(block_size=8, density=0.5)))
    losses = train(sparse, lambda m, x: m(x, is_causal=True))
    assert losses[-1] < 0.7 * losses[0]


def test_inside_linen_attention_the_mask_arrives():
    x = inputs(24)
    pairs = linen.make_causal_mask(jnp.ones((2, 24)))

    def build(attention_fn):
        return linen.MultiHeadDotProductAttention(4, attention_fn=attention_fn)

    theirs = build(linen.dot_product_attention)
    params = jax.jit(theirs.init)(jax.random.key(0), x)
    expected = jax.jit(theirs.apply)(params, x, mask=pairs)
    ours = jax.jit(build(js.nn.attention_fn(js.mean_pooled(block_size=8, density=1.0))).apply)
    np.testing.assert_allclose(ours(params, x, mask=pairs), expected, atol=5e-6)
    unmasked = ours(params, x)
    assert float(jnp.abs(unmasked - expected).max()) > 1e-2, "the mask made no difference"


@pytest.mark.newest
def test_linen_attention_trains_and_is_restored(tmp_path):
    module = linen.MultiHeadDotProductAttention(
        4, attention_fn=js.nn.attention_fn(js.mean_pooled(block_size=8, density=0.5))
    )
    x = inputs(24)
    target = jnp.roll(x, 1, axis=1).at[:, 0].set(0.0)
    pairs = linen.make_causal_mask(jnp.ones((2, 24)))
    params = jax.jit(module.init)(jax.random.key(0), x)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.square(module.apply(params, x, mask=pairs) - target).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(25):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
        restored = checkpointer.restore(tmp_path / "params", target)
    apply = jax.jit(module.apply)
    np.testing.assert_array_equal(apply(restored, x, mask=pairs), apply(params, x, mask=pairs))


def test_swapping_the_attention_leaves_the_model_as_it_was():
    model, x = layer(), inputs()
    before = model(x, mask=CAUSAL)
    tensors = []
    probe = js.nn.with_attention(model, js.nn.recording(model._method, tensors))
    np.testing.assert_array_equal(probe(x, mask=CAUSAL), before)
    assert [t.shape for t in tensors[0]] == [(2, 40, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8)]
    assert model.attention is None


@pytest.mark.newest
def test_what_the_method_says_of_a_call_can_be_added_to_a_loss():
    method = js.from_length(js.routing_transformer(clusters=4), min_length=20)
    model, x = layer(method=method), inputs()
    expected = applied(model, x, CAUSAL)

    def observed(model, x, **given):
        told = []
        model.observe = told.append
        out = model(x, **given)
        model.observe = None
        (info,) = told
        return info, out

    def loss(model):
        info, out = observed(model, x, mask=CAUSAL)
        return info.commitment, out

    (distance, out), gradient = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model)
    np.testing.assert_allclose(out, expected, atol=5e-6)
    assert float(distance) > 0
    # of keys alone: queries are where their keys are
    moved = {name for name in ("q_proj", "k_proj", "v_proj") if gradient[name]["kernel"][...].any()}
    assert moved == {"k_proj"}
    info, _ = nnx.eval_shape(lambda model: observed(model, x[:, :10], mask=CAUSAL), model)
    assert not hasattr(info, "commitment")
    step = nnx.jit(lambda model, x, cache: observed(model, x, cache=cache))
    info, (_, cache) = step(model, x[:, :30], model.init_cache((2,), 40))
    assert info.memberships.shape[-1] == 30
    assert step(model, x[:, 30:31], cache)[0].memberships.shape[-1] == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer(num_heads=3), ValueError, "num_heads=3 must be a multiple of 2"),
        (lambda: layer(head_dim=5), ValueError, "head_dim=5 must be a multiple of 2"),
        (lambda: layer()(inputs(features=16)), ValueError, "x has 16 features"),
        (lambda: KVCache.empty((), 0, 2, 8), ValueError, "max_len=0"),
        (
            lambda: layer()(inputs(), cache=layer().init_cache((2,), 8)),
            ValueError,
            "40 tokens do not fit",
        ),
        (
            lambda: nnx_attention(
                lambda *a, **k: js.nn.attention_fn()(
                    *a, **{**k, "dropout_rate": 0.5, "deterministic": False}
                )
            )(inputs()),
            NotImplementedError,
            "dropout_rate=0.5",
        ),
        (
            lambda: js.nn.attention_fn()(*[inputs()[..., None]] * 3, precision="highest"),
            NotImplementedError,
            "precision='highest'",
        ),
        (lambda: layer(method=js.pbs_attn), ValueError, r"method is function; .*js\.pbs_attn\(\)"),
        (
            lambda: layer(method=js.pbs_attn())(inputs(), mask=jnp.ones((40, 40), bool)),
            ValueError,
            r"mask is .*Array.*; .*js\.masks\.dense",
        ),
        (lambda: js.nn.attention_fn(js.pbs_attn), ValueError, "method is function"),
        (lambda: js.nn.attention_fn(mask=jnp.ones(1, bool)), ValueError, "mask is .*Array"),
        (lambda: js.nn.with_methods(layer(), [js.pbs_attn]), ValueError, "method is function"),
        (
            lambda: layer(rope_base=500.0, method=js.seerattention(block_size=8, density=0.5)),
            ValueError,
            r"positions of rope_base=10000\.0, .* SparseAttention have those of rope_base=500\.0: ",
        ),
        (
            lambda: js.nn.with_methods(layer(), [js.nsa(rope_base=2.0)], rngs=nnx.Rngs(0)),
            ValueError,
            r"turns back rotary positions of rope_base=2\.0, .* method with rope_base=10000\.0\.",
        ),
        (
            lambda: nnx_attention(js.nn.attention_fn(js.flashmoba(taps=3)))(inputs()),
            ValueError,
            "this method has parameters: make them by method.init",
        ),
        (
            lambda: js.nn.with_methods(layer(), [js.nsa()]),
            ValueError,
            r"methods\[0\] has parameters, .*js\.nn\.SparseAttention\(method=",
        ),
    ],
)
def test_bad_input_is_named(call, error, message, without_shape_checks):
    with pytest.raises(error, match=message):
        call()
