"""The mean-pooled baseline against its oracle."""

import jax
import numpy as np
import pytest

import jsparse as js
from jsparse.estimators.mean_pooled import mean_pooled_scores
from tests.inputs import on_device, qkv
from tests.oracles import mean_pooled as oracle


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(32, 32), (21, 43)])
def test_scores_and_tiles_equal_the_oracle(q_len, kv_len, causal):
    q, k, _ = qkv(q_len, kv_len)
    scores = mean_pooled_scores(q, k, block_size=8)
    expected = oracle.block_scores(q, k, block=8)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    for density in (0.1, 0.4, 0.75, 1.0):
        plan, _ = js.mean_pooled(block_size=8, density=density).plan(
            (), q, k, mask=js.masks.causal() if causal else None
        )
        sizes = {"q_len": q_len, "kv_len": kv_len, "block": 8}
        tiles = oracle.select(expected, density, causal=causal, **sizes)
        np.testing.assert_array_equal(plan.to_dense(), tiles)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_each_query_head_keeps_a_share_of_its_own(batch):
    q, k, _ = qkv(32, heads=4, kv_heads=2, batch=batch)
    # as many heads as rows of blocks: neither may be taken for the other
    densities, causal = np.float32([0.25, 0.5, 0.75, 1.0]), js.masks.causal()

    @jax.jit
    def tiles(density):
        method = js.mean_pooled(block_size=8, density=density)
        return method.plan((), q, k, mask=causal)[0].to_dense()

    found = tiles(on_device(densities))
    for head, density in enumerate(densities):
        np.testing.assert_array_equal(found[..., head, :, :], tiles(density)[..., head, :, :])


def test_the_last_block_is_averaged_over_its_own_tokens():
    q, k, _ = qkv(11, heads=1, kv_heads=1)
    scores = mean_pooled_scores(q, k, block_size=8)
    expected = q[8:, 0].mean(0) @ k[8:, 0].mean(0) / 4.0
    np.testing.assert_allclose(scores[0, 1, 1], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"density": 0.0}, "density=0.0"), ({"block_size": 0}, "block_size")]
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.mean_pooled(**arguments)
