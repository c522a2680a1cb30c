"""Both portable implementations against float64, feature by feature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.testing import AttentionSuite
from tests.inputs import on_device, qkv


class TestReference(AttentionSuite):
    attention = staticmethod(functools.partial(js.attend, implementation="reference"))


class TestXla(AttentionSuite):
    attention = staticmethod(functools.partial(js.attend, implementation="xla"))


def test_xla_forms_nothing_of_all_pairs():
    """Temporary memory grows with the length, not with its square."""

    def temporary(length):
        plan = js.block_mask(js.masks.sliding_window(left=255), length, length)

        def loss(q, k, v):
            out = js.attend(
                q, k, v, plan, mask=js.masks.sliding_window(left=255), implementation="xla"
            )
            return out.sum()

        shapes = [jax.ShapeDtypeStruct((length, 2, 16), jnp.float32)] * 3
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(4096), temporary(16384)
    assert large < 4.5 * small
    assert large < 16384 * 16384


def test_disjoint_parts_merge_to_the_whole():
    q, k, v = qkv(64, dim=8)
    tiles = np.random.default_rng(0).random((1, 4, 4)) < 0.7
    tiles[..., 0] = True
    half = np.arange(4) < 2
    sizes = {"q_len": 64, "kv_len": 64, "block_q": 16, "block_kv": 16}
    whole = js.BlockMask.from_dense(on_device(tiles), **sizes)
    parts = tuple(
        js.BlockMask.from_dense(on_device(tiles & side), **sizes) for side in (half, ~half)
    )
    options = {
        "mask": js.masks.causal(),
        "sinks": on_device([0.3, -1.0, 0.0, 2.0]),
        "bias": jnp.linspace(-1, 1, 64)[None],
        "softcap": 4.0,
        "return_lse": True,
    }

    def value(plan):
        def loss(q, k, v):
            out, lse = js.attend(q, k, v, plan, **options)
            return jnp.sin(out).sum() + jnp.cos(lse).sum(), (out, lse)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), value(parts), value(whole)
    )


def test_token_groups_in_the_reference():
    q, k, v = qkv(24, dim=8)
    ids = np.random.default_rng(0).integers(-1, 3, (1, 24))
    groups = js.TokenGroups.from_ids(on_device(ids), on_device(ids), groups=3)
    out = jax.jit(lambda *a: js.attend(*a, implementation="reference"))(q, k, v, groups)
    pairs = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0)
    dense = js.masks.dense(on_device(pairs))
    np.testing.assert_allclose(
        out, js.attend(q, k, v, mask=dense, implementation="reference"), atol=1e-6
    )


def test_pooled_columns_in_the_reference():
    """Keys that are equal inside each block: what stands for a block is exact."""
    q, _, _ = qkv(16, dim=8)
    _, k, v = qkv(4, dim=8)
    k = on_device(np.repeat(k, 4, axis=0))
    v = on_device(np.concatenate([v, -v, 2 * v, v + 1]))
    tiles = on_device(np.eye(4, dtype=bool))[None]
    lists = js.BlockMask.from_dense(tiles, q_len=16, kv_len=16, block_q=4, block_kv=4)
    pyramid = js.BlockPyramid.from_pooled(
        lists,
        on_device(np.reshape(k, (4, 4, 2, 8)).mean(1)),
        on_device(np.reshape(v, (4, 4, 2, 8)).mean(1)),
        jnp.full((4, 2), jnp.log(4.0)),
    )

    def attend(*arguments):
        return jax.jit(lambda *a: js.attend(*a, implementation="reference"))(*arguments)

    np.testing.assert_allclose(attend(q, k, v, pyramid), attend(q, k, v), atol=2e-6)


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_an_implementation_that_cannot_run_here_says_why(name):
    q, k, v = qkv(16)
    with pytest.raises(NotImplementedError, match=r"\w+"):
        js.attend(q, k, v, implementation=name)


@pytest.mark.newest
def test_a_score_mod_may_capture_integers_and_nothing():
    q, k, v = qkv(32)
    offsets = jnp.arange(4)
    plain = js.attend(q, k, v, score_mod=lambda s, b, h, i, j: s, implementation="xla")
    np.testing.assert_allclose(plain, js.attend(q, k, v, implementation="reference"), atol=2e-6)

    def run(offsets, implementation):
        return js.attend(
            q,
            k,
            v,
            score_mod=lambda s, b, h, i, j: s + 0.1 * (offsets[h] * j % 7).astype(jnp.float32),
            implementation=implementation,
        )

    got = jax.jit(jax.vmap(lambda o: run(o, "xla")))(jnp.stack([offsets, 2 * offsets]))
    expected = jnp.stack([run(offsets, "reference"), run(2 * offsets, "reference")])
    np.testing.assert_allclose(got, expected, atol=2e-6)
    gradient = jax.jit(
        jax.grad(
            lambda q: js.attend(
                q, k, v, score_mod=lambda s, b, h, i, j: s * offsets[h], implementation="xla"
            ).sum()
        )
    )(q)
    assert jnp.isfinite(gradient).all()
