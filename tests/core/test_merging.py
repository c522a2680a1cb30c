"""Parts merge to the whole, whatever they saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import qkv


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
            found.append((jnp.asarray(out, jnp.float32), jnp.asarray(np.log(total), jnp.float32)))
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
    some = (out, jnp.asarray([[0.5, -jnp.inf]]))

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
