"""Sums of a softmax per block against loops, over more rows than are scored at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.core.scores import softmax_block_sums

EPS = np.finfo(np.float32).eps


def sums_by_loops(q, k, *, scale, per_q, per_kv, visible):
    batches, q_count, heads, _ = q.shape
    kv_count, group = k.shape[1], heads // k.shape[2]
    sums = np.zeros((batches, heads, -(-q_count // per_q), -(-kv_count // per_kv)))
    for b, h, i in np.ndindex(batches, heads, q_count):
        seen = visible(b, h, i)
        logits = np.where(seen, k[b, :, h // group] @ q[b, i, h] * scale, -np.inf)
        if not seen.any():
            continue
        mass = np.exp(logits - logits.max())
        for j in range(kv_count):
            sums[b, h, i // per_q, j // per_kv] += mass[j] / mass.sum()
    return sums


# 128 cells are scored at once: fewer, exactly, several chunks with a ragged last, blocks of more
@pytest.mark.parametrize(
    ("q_count", "per_q", "per_kv"), [(9, 2, 3), (128, 4, 5), (300, 8, 4), (300, 150, 7)]
)
def test_sums_equal_loops(q_count, per_q, per_kv):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, q_count, 4, 5)), rng.normal(size=(2, 23, 2, 5))
    limit = rng.integers(0, 24, (2, 4, q_count))  # 0 sees nothing

    def seen(b, h, i):
        return np.arange(23) < limit[b, h, i]

    table = jnp.asarray(limit)

    def rule(batch, head, q_cell):
        # cells past the last one are asked about too; what is said of them may not count
        return jnp.arange(23) < table.at[batch, head, q_cell].get(mode="fill", fill_value=23)

    got = jax.jit(
        lambda q, k: softmax_block_sums(
            q, k, scale=0.5, cells_per_block=(per_q, per_kv), visible=rule
        )
    )(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32))
    expected = sums_by_loops(q, k, scale=0.5, per_q=per_q, per_kv=per_kv, visible=seen)
    np.testing.assert_allclose(got, expected, atol=16 * EPS * per_q)
