"""Parts merge to the whole, whatever they saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import on_device, qkv


def parts_of(q, k, v, splits):
    """Attention over disjoint ranges of keys, in float64."""
    found = []
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for part in np.split(np.arange(len(k)), splits):
        logits = np.einsum("qhd,khd->hqk", q, k[part])
        mass = np.exp(logits)
        total = mass.sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            out = np.nan_to_num(np.einsum("hqk,khd->qhd", mass / total[..., None], v[part]))
            found.append((on_device(out, jnp.float32), on_device(np.log(total), jnp.float32)))
    return found


@pytest.mark.parametrize("splits", [[], [10], [0, 7, 7, 30]], ids=str)
def test_parts_make_the_whole(splits):
    q, k, v = qkv(12, 40, heads=2, kv_heads=2, dim=4)
    (whole,) = parts_of(q, k, v, [])
    merged = jax.jit(js.merge)(parts_of(q, k, v, splits))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), merged, whole)


def test_far_apart_and_empty_parts_stay_finite():
    out = jnp.ones((2, 1, 3))
    far = js.merge([(out, jnp.full((1, 2), 3e4)), (2 * out, jnp.full((1, 2), -3e4))])
    np.testing.assert_array_equal(far[0], out)
    nothing = (jnp.zeros((2, 1, 3)), jnp.full((1, 2), -jnp.inf))
    jax.tree.map(np.testing.assert_array_equal, js.merge([nothing, nothing]), nothing)
    some = (out, on_device([[0.5, -jnp.inf]]))

    def loss(lses):
        merged, lse = js.merge([(out, lses[0]), (2 * out, lses[1])])
        return merged.sum() + jnp.where(jnp.isneginf(lse), 0.0, lse).sum()

    gradient = jax.grad(loss)(jnp.stack([some[1], nothing[1]]))
    assert jnp.isfinite(gradient).all()


def test_a_broken_row_shows_and_stays_alone():
    out, lse = jnp.ones((2, 1, 3)), jnp.zeros((1, 2))
    merged, _ = js.merge([(out, lse), (out, lse.at[0, 0].set(jnp.nan))])
    assert jnp.isnan(merged[0]).all()
    np.testing.assert_array_equal(merged[1], out[1])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no parts"),
        ([jnp.ones((2, 1, 3))], r"Part 0 of merge is \w+; pass \(out, lse\)"),
        (
            [(jnp.ones((2, 1, 3)), jnp.ones((1, 2))), (jnp.ones((4, 1, 3)), jnp.ones((1, 4)))],
            r"Part 1 of merge has out of shape \(4, 1, 3\)",
        ),
        ([(jnp.ones((2, 1, 3)), jnp.ones((2, 1)))], r"needs \(1, 2\)"),
    ],
)
def test_bad_input_is_named(parts, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        js.merge(parts)


def test_gradients_pass_through_out_and_lse():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5, 12)).astype(np.float32)  # batch heads q_len kv_len
    values = rng.normal(size=(2, 12, 3, 7)).astype(np.float32)

    def part(logits, values):
        lse = jax.nn.logsumexp(logits, axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, -1), values), lse

    def in_two(logits, values):
        return js.merge(
            [part(logits[..., s], values[:, s]) for s in (slice(None, 5), slice(5, None))]
        )

    def gradients(attention):
        def loss(logits, values):
            out, lse = attention(logits, values)
            return jnp.sin(out).sum() + jnp.cos(lse).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, values)

    # numbers of size 1, each a sum of a few dozen roundings
    atol = 64 * np.finfo(np.float32).eps
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol), gradients(in_two), gradients(part)
    )


def test_a_broken_lse_alone_shows():
    """A row whose lse is NaN has no share to give: its output is NaN, not zero."""
    out, lse = jnp.ones((2, 1, 3)), jnp.zeros((1, 2))
    merged, merged_lse = js.merge([(out, lse), (0 * out, lse.at[0, 0].set(jnp.nan))])
    assert jnp.isnan(merged[0]).all()
    assert jnp.isnan(merged_lse[0, 0])


def test_the_dtype_is_the_first_parts_and_sums_are_f32():
    rng = np.random.default_rng(0)
    low = [
        (on_device(rng.normal(size=(4, 2, 3)), jnp.bfloat16), on_device(x, jnp.float32))
        for x in rng.normal(size=(2, 2, 4))
    ]
    out, lse = js.merge(low)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    exact, _ = js.merge([(o.astype(jnp.float32), x) for o, x in low])
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
