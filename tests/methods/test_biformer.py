"""BiFormer against its oracle, and the checks of its specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jsparse as js
import jsparse.nn
from tests.inputs import on_device, qkv
from tests.oracles import biformer as oracle


def routed(q, k, v, grid, **options):
    settings = {
        name: options.pop(name) for name in ("regions", "top_k", "per_head") if name in options
    }
    return js.biformer(grid=grid, **settings).attend((), q, k, v, **options)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    ("height", "width"), [pytest.param(8, 12, marks=pytest.mark.slow), (7, 10), (3, 11)]
)
def test_regions_and_output_equal_the_oracle(height, width, per_head):
    q, k, v = qkv(height * width, v_dim=8)
    settings = {"regions": 4, "top_k": 3, "per_head": per_head}
    out, info = jax.jit(lambda *a: routed(*a, (height, width), scale=0.3, **settings))(q, k, v)
    ids, count = oracle.region_of(height, width, 4)
    scores = oracle.affinity(q, k, ids, count)
    if not per_head:
        scores = scores.sum(0, keepdims=True)
    np.testing.assert_allclose(info.affinity, scores, atol=1e-5)
    chosen = [oracle.select(rows, 3) for rows in scores]
    plan, _ = js.biformer(grid=(height, width), **settings).plan((), q, k)
    assert plan.kv_indices.tolist() == chosen
    chosen = chosen if per_head else chosen * 4
    np.testing.assert_allclose(out, oracle.attention(q, k, v, ids, chosen, 0.3), atol=4e-6)


def test_worked_example():
    def tokens(rows):
        return on_device(rows, jnp.float32).reshape(8, 1, 1)

    q, k = tokens([[1, 1, -1, -1], [2, 2, 0, 0]]), tokens([[1, 3, -2, -4], [0, 1, 5, 1]])
    v = tokens([[0, 1, 2, 3], [4, 5, 6, 7]])
    expected = {
        1: ([[3], [1], [3], [0]], [[6.018, 6.018, 2.8808, 2.8808], [6.0003, 6.0003, 0.5, 0.5]]),
        2: (
            [[0, 3], [1, 2], [0, 3], [0, 1]],
            [[5.3445, 5.3445, 2.9108, 2.9108], [5.9085, 5.9085, 1.5, 1.5]],
        ),
    }
    for top_k, (lists, values) in expected.items():
        out, info = routed(q, k, v, (2, 4), regions=2, top_k=top_k, scale=1.0)
        table = [[2, -3, 0.5, 3], [-2, 3, -0.5, -3], [4, -6, 1, 6], [0, 0, 0, 0]]
        np.testing.assert_allclose(info.affinity[0], table)
        plan, _ = js.biformer(grid=(2, 4), regions=2, top_k=top_k).plan((), q, k)
        assert plan.kv_indices[0].tolist() == lists
        np.testing.assert_allclose(out.reshape(2, 4), values, atol=6e-5)


def test_all_regions_or_a_single_one_are_dense():
    q, k, v = qkv(70)
    dense = js.attend(q, k, v, scale=64**-0.5, implementation="reference")
    several = {"regions": 4, "top_k": 16}, {"regions": 1, "top_k": 1}, {"regions": 4, "top_k": None}
    for settings in several:
        out, _ = routed(q, k, v, (7, 10), **settings)
        np.testing.assert_allclose(out, dense, atol=4e-6)


def test_what_order_does():
    q, k, v = qkv(96)
    settings = {"regions": 4, "top_k": 3}
    out, _ = routed(q, k, v, (8, 12), **settings)
    ids, _ = oracle.region_of(8, 12, 4)
    # tokens of a region change places: their rows do, and nothing else
    inside = np.arange(96)
    inside[ids == 5] = inside[ids == 5][::-1]
    moved, _ = routed(q[inside], k[inside], v[inside], (8, 12), **settings)
    np.testing.assert_allclose(moved, out[inside], atol=4e-6)
    # whole regions change places
    places = [np.flatnonzero(ids == n) for n in range(16)]
    turned = np.empty(96, int)
    for n in range(16):
        turned[places[n]] = places[(5 * n + 3) % 16]
    moved, _ = routed(q[turned], k[turned], v[turned], (8, 12), **settings)
    np.testing.assert_allclose(moved, out[turned], atol=4e-6)
    # constant values come out as they are
    ones, _ = routed(q, k, jnp.full_like(v, 2.5), (8, 12), **settings)
    np.testing.assert_allclose(ones, 2.5, rtol=1e-6)


def test_what_no_region_chose_has_no_gradient_and_a_needle_is_found():
    q, k, v = qkv(96)
    ids, _ = oracle.region_of(8, 12, 4)
    k = k.at[ids == 7].set(50 * q[ids == 2].mean(0).reshape(2, 2, 16).sum(1))
    plan, _ = js.biformer(grid=(8, 12), regions=4, top_k=1).plan((), q, k)
    assert plan.kv_indices[0, 2, 0] == 7
    gradient = jax.grad(lambda k: routed(q, k, v, (8, 12), regions=4, top_k=1)[0].sum())(k)
    unchosen = ~np.isin(ids, np.unique(plan.kv_indices))
    assert unchosen.any()
    assert not gradient[unchosen].any()
    assert gradient[ids == 7].any()
    # nothing passes through the means
    of_affinity = jax.grad(
        lambda q, k: routed(q, k, v, (8, 12), regions=4, top_k=1)[1].affinity.sum(), argnums=(0, 1)
    )
    assert not any(x.any() for x in of_affinity(q, k))


def test_masks_bias_and_score_mod_are_of_tokens_in_their_places():
    q, k, v = qkv(70)
    settings = {"regions": 4, "top_k": 16}
    bias = on_device(np.random.default_rng(1).normal(size=(4, 70, 70)), jnp.float32)
    slope = on_device([0.1, 0.2, 0.3, 0.4])
    options = {
        "mask": js.masks.causal(),
        "bias": bias,
        "score_mod": lambda logit, batch, head, q, kv: logit - slope[head] * (q - kv),
        "scale": 0.3,
        "return_lse": True,
    }
    (out, lse), _ = routed(q, k, v, (7, 10), **settings, **options)
    dense, dense_lse = js.attend(q, k, v, implementation="reference", **options)
    np.testing.assert_allclose(out, dense, atol=4e-6)
    np.testing.assert_allclose(lse, dense_lse, atol=4e-6)


def test_the_layer_is_attention_and_a_convolution():
    layer = js.nn.RegionAttention(16, num_heads=2, regions=3, top_k=2, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = on_device(rng.normal(size=(2, 7, 8, 16)), jnp.float32)
    kernel = on_device(rng.normal(size=(5, 5, 1, 16)) * 0.1, jnp.float32)
    layer.local.kernel[...] = kernel
    layer.local.bias[...] = jnp.arange(16) * 0.1
    layer.qkv.kernel[...] = layer.qkv.kernel[...] * 20
    got = layer(x)
    qkv_map = np.asarray(x @ layer.qkv.kernel[...] + layer.qkv.bias[...])
    ids, count = oracle.region_of(7, 8, 3)
    for n in range(2):
        q, k, v = np.moveaxis(qkv_map[n].reshape(56, 3, 2, 8), 1, 0)
        chosen = oracle.select(oracle.affinity(q, k, ids, count).sum(0), 2)
        out = oracle.attention(q, k, v, ids, [chosen] * 2, 16**-0.5).reshape(7, 8, 16)
        out += oracle.convolution(
            v.reshape(7, 8, 16), np.asarray(kernel)[:, :, 0], np.arange(16) / 10
        )
        expected = out @ np.asarray(layer.out.kernel[...]) + np.asarray(layer.out.bias[...])
        np.testing.assert_allclose(got[n], expected, atol=2e-6)


def random_block(**options):
    """A block of which every number is a random one, and its numbers by the parts' names."""
    block = js.nn.BiFormerBlock(16, num_heads=2, expansion=2, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(0)
    attention = block.attention
    parts = {"qkv": attention.qkv, "local": attention.local, "out": attention.out}
    for name in ("position", "attention_norm", "perceptron_norm", "expand", "contract"):
        parts[name] = getattr(block, name)
    weights = {}
    for name, part in parts.items():
        pair = part.scale if "norm" in name else part.kernel, part.bias
        for variable in pair:
            variable[...] = on_device(rng.normal(size=variable.shape) * 0.4, jnp.float32)
        kernel, bias = (np.asarray(variable[...]) for variable in pair)
        weights[name] = (kernel[:, :, 0] if name in ("local", "position") else kernel), bias
    return block, weights


apply = nnx.jit(lambda block, x: block(x))


@pytest.mark.parametrize(("qk_dim", "regions", "top_k"), [(None, 3, 2), (8, 3, 2), (None, 3, None)])
def test_the_block_is_its_oracle(qk_dim, regions, top_k):
    block, weights = random_block(qk_dim=qk_dim, regions=regions, top_k=top_k)
    x = np.random.default_rng(1).normal(size=(2, 7, 6, 16))
    options = {"heads": 2, "qk_dim": qk_dim or 16, "regions": regions, "top_k": top_k or 9}
    expected = np.stack([oracle.block(one, weights, **options) for one in x])
    # some hundred roundings of f32 of what is summed to these sizes
    got = apply(block, on_device(x, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_every_part_of_the_block_learns():
    block, _ = random_block(regions=3, top_k=2)
    x = on_device(np.random.default_rng(1).normal(size=(1, 7, 6, 16)), jnp.float32)
    gradient = nnx.jit(nnx.grad(lambda block: jnp.sin(block(x)).sum()))(block)
    for path, variable in nnx.to_flat_state(gradient):
        assert variable[...].any(), path


def test_the_default_scale_is_of_all_heads_together():
    q, k, v = qkv(96)
    settings = {"regions": 4, "top_k": 3}
    for grouped in (k, jnp.repeat(k, 2, axis=-2)):
        out, _ = routed(q, grouped, jnp.repeat(v, grouped.shape[-2] // 2, -2), (8, 12), **settings)
        expected, _ = routed(q, k, v, (8, 12), scale=64**-0.5, **settings)
        np.testing.assert_allclose(out, expected, atol=4e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"regions": 0}, "regions=0"), ({"top_k": 0}, "top_k=0"), ({"grid": (4, 0)}, "grid=0")],
)
def test_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        js.biformer(**options)


def test_bad_calls():
    q, k, v = qkv(20)
    with pytest.raises(ValueError, match=r"grid=\(4, 4\) has 16 tokens"):
        routed(q, k, v, (4, 4))
    with pytest.raises(ValueError, match="q has 12 tokens and k 20; regions .* all tokens"):
        routed(q[:12], k, v, None)
    for call in (js.biformer().attend, lambda p, q, k, v, **x: js.biformer().plan(p, q, k, **x)):
        call((), q, k, v, positions=jnp.arange(20))
        with pytest.raises(ValueError, match="must be 0 to 19: a grid's tokens are all there"):
            call((), q, k, v, positions=jnp.arange(3, 23))
    # a row too many would be the last one's, and nobody would notice
    with pytest.raises(ValueError, match=r"bias .*\(21, 20\)"):
        routed(q, k, v, (4, 5), regions=2, bias=jnp.ones((21, 20)))
    with pytest.raises(ValueError, match="kernel=4 must be odd"):
        js.nn.RegionAttention(16, num_heads=2, kernel=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="qk_dim=7 must be a multiple of 2"):
        js.nn.RegionAttention(16, num_heads=2, qk_dim=7, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="features=15 must be a multiple of 2"):
        js.nn.RegionAttention(15, num_heads=2, rngs=nnx.Rngs(0))
