"""js.dot_product_attention is jax.nn.dot_product_attention, and sparse where it is told how."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import on_device, qkv

PAIRS = np.random.default_rng(0).random((2, 1, 24, 40)) < 0.4
PAIRS[0, 0, 5] = False  # a row that sees nothing
BIAS = on_device(np.random.default_rng(1).normal(size=(1, 4, 24, 40)), jnp.float32)
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bias": {"bias": BIAS},
    "mask": {"mask": on_device(PAIRS)},
    "mask_broadcast": {"mask": on_device(PAIRS[:1, :, :1])},
    "lengths": {
        "query_seq_lengths": on_device([24, 7]),
        "key_value_seq_lengths": on_device([40, 9]),
    },
    "window": {"local_window_size": 3},
    "window_pair": {"local_window_size": (5, 1)},
    "all": {
        "bias": BIAS,
        "mask": on_device(PAIRS),
        "is_causal": True,
        "query_seq_lengths": on_device([24, 7]),
        "key_value_seq_lengths": on_device([40, 9]),
        "local_window_size": (9, 4),
        "scale": 0.2,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_equals_jax_nn(name):
    q, k, v = qkv(24, 40, batch=(2,))

    def run(function):
        def loss(q, k, v):
            out, lse = function(q, k, v, return_residual=True, **CASES[name])
            # in jax.nn the residual has no gradient
            return jnp.sin(out).sum() + jnp.cos(lse).sum(), (out, lse)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    got, expected = run(js.dot_product_attention), run(jax.nn.dot_product_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_low_precision_equals_jax_nn(name, dtype):
    q, k, v = qkv(24, 40, batch=(2,), dtype=dtype)
    got = js.dot_product_attention(q, k, v, return_residual=True, **CASES[name])
    expected = jax.nn.dot_product_attention(q, k, v, return_residual=True, **CASES[name])
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        lowest = ~np.isfinite(theirs) | (theirs < -1e30)
        np.testing.assert_array_equal(mine[lowest], theirs[lowest])
        # each side rounds its probabilities and its output
        size = np.abs(theirs[~lowest]).max()
        np.testing.assert_allclose(
            mine[~lowest], theirs[~lowest], rtol=0, atol=2 * float(jnp.finfo(dtype).eps) * size
        )


def test_values_may_have_their_own_dim():
    q, k, v = qkv(24, v_dim=40, batch=(2,))
    out = js.dot_product_attention(q, k, v, is_causal=True)
    assert out.shape == (2, 24, 4, 40)
    np.testing.assert_allclose(
        out[..., :16], jax.nn.dot_product_attention(q, k, v[..., :16], is_causal=True), atol=2e-6
    )


def test_without_a_batch_axis():
    q, k, v = qkv(24)
    got = js.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(
        got, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=2e-6
    )


def test_the_signature_is_that_of_jax_nn_and_two_more():
    ours = inspect.signature(js.dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert [*ours] == [*theirs, "plan", "method"]
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default


def test_a_plan_and_a_method_decide():
    q, k, v = qkv(64, batch=(1,))
    plan = js.BlockMask.from_dense(
        on_device(np.eye(4, dtype=bool))[None], q_len=64, kv_len=64, block_q=16, block_kv=16
    )
    out = js.dot_product_attention(q, k, v, plan=plan, is_causal=True)
    expected = js.attend(q, k, v, plan, mask=js.masks.causal(), implementation="reference")
    np.testing.assert_allclose(out, expected, atol=2e-6)
    method = js.mean_pooled(block_size=16, density=0.5)
    out = js.dot_product_attention(q, k, v, method=method, is_causal=True)
    expected = js.sparse_attention(q, k, v, method, mask=js.masks.causal(offset=0))
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.newest
def test_a_method_of_several_softmaxes_is_asked_for_no_residual():
    q, k, v = qkv(40, batch=(1,))
    nsa = js.nsa(**{"compression_size": 8, "stride": 4, "block_kv": 8, "top_k": 3, "window": 6})
    params = nsa.init(jax.random.key(0), num_heads=4, num_kv_heads=2, dim=16, features=8)
    given = {"x": jnp.ones((1, 40, 8)), "mask": js.masks.causal(offset=0)}

    def attend(_, q, k, v, *, mask, **options):
        return nsa.attend(params, q, k, v, **given, **options)

    method = nsa._replace(init=lambda key, **sizes: (), attend=attend)
    out = js.dot_product_attention(q, k, v, method=method, is_causal=True)
    expected = js.sparse_attention(q, k, v, nsa, params=params, **given)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    with pytest.raises(ValueError, match="no log-sum-exp together"):
        js.dot_product_attention(q, k, v, method=method, return_residual=True)


def test_the_residual_of_a_method_is_its_log_sum_exp():
    q, k, v = qkv(64, batch=(1,))
    method = js.mean_pooled(block_size=16, density=0.5)
    _, residual = js.dot_product_attention(q, k, v, method=method, return_residual=True)
    _, lse = js.sparse_attention(q, k, v, method, return_lse=True)
    np.testing.assert_allclose(residual, jnp.swapaxes(lse, -1, -2), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": js.seerattention()}, "this method has parameters: make them by method.init"),
        ({"mask": jnp.zeros((1, 1, 24, 40))}, "must hold bools"),
        ({"mask": jnp.zeros((1, 1, 24, 39), bool)}, "does not broadcast"),
        ({"bias": jnp.zeros((3, 24, 40))}, "bias has shape"),
        ({"query_seq_lengths": on_device([3.0, 4.0])}, "query_seq_lengths holds float32"),
        (
            {"key_value_seq_lengths": on_device([3, 4, 5])},
            r"key_value_seq_lengths has shape \(3,\)",
        ),
        (
            {"plan": js.block_mask(js.masks.causal(), 24, 40), "method": js.xattention()},
            "plan and method are both given",
        ),
        ({"implementation": "fast"}, "implementation='fast' must be one of"),
        ({"implementation": "cudnn", "method": js.xattention()}, "takes neither plan nor method"),
    ],
)
def test_bad_input_is_named(options, message, without_shape_checks):
    q, k, v = qkv(24, 40, batch=(2,))
    with pytest.raises(ValueError, match=message):
        js.dot_product_attention(q, k, v, **options)
