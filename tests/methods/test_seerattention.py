"""SeerAttention against its oracle, and the checks of its specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jsparse as js
from jsparse.core.rotary import rotary, unrotated
from jsparse.learned.seerattention import gate_loss, gate_targets
from tests.inputs import on_device, qkv
from tests.oracles import seerattention as oracle

CAUSAL = js.masks.causal()
SMALL = {"block_size": 8, "gate_dim": 6, "rope_base": 100.0}


def params_of(method, heads=4, kv_heads=2, dim=16):
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "dim": dim, "features": heads * dim}
    return method.init(jax.random.key(0), **sizes)


@pytest.mark.parametrize(
    ("q_len", "kv_len"), [pytest.param(70, 70, marks=pytest.mark.slow), (45, 61)]
)
def test_gate_targets_loss_and_tiles_equal_the_oracle(q_len, kv_len):
    q, k, _ = qkv(q_len, kv_len)
    params = params_of(js.seerattention(**SMALL))
    logits = oracle.gate(q, k, params["q"], params["k"], block=8, base=100.0)
    wanted = oracle.targets(q, k, 8)
    targets = gate_targets(q, k, block_size=8, mask=CAUSAL)
    np.testing.assert_allclose(targets, wanted, atol=2e-6)
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-6)
    settings = [{"threshold": t} for t in (0.3, 0.12, 0.05)]
    settings += [{"density": 0.5}, {"density": 0.3, "dense_rows": 0}]
    for setting in settings:
        choose = jax.jit(js.seerattention(**SMALL, **setting).plan)
        plan, info = choose(params, q, k, mask=CAUSAL)
        np.testing.assert_allclose(info.gate_logits, logits, atol=1e-5)
        np.testing.assert_array_equal(plan.to_dense(), oracle.select(logits, **setting))
    for skipped in (0.0, 0.25):
        got = gate_loss(info.gate_logits, targets, skipped=skipped)
        assert float(got) == pytest.approx(oracle.loss(logits, wanted, skipped), rel=1e-4)


def test_what_the_gate_does_not_see_is_infinitely_far():
    q, k, _ = qkv(64)
    method = js.seerattention(**SMALL)
    params = params_of(method)

    def loss(params, mask):
        _, info = method.plan(params, q, k, mask=CAUSAL)
        return gate_loss(info.gate_logits, gate_targets(q, k, block_size=8, mask=mask))

    assert float(loss(params, None)) == np.inf
    value, gradient = jax.value_and_grad(loss)(params, CAUSAL)
    assert 0 < float(value) < np.inf
    assert all(jnp.isfinite(x).all() and (x != 0).any() for x in jax.tree.leaves(gradient))


def test_other_pools():
    from jsparse.core.pooling import max_blocks, mean_blocks

    q, k, _ = qkv(40)
    method = js.seerattention(**SMALL, q_pools=(max_blocks, mean_blocks), k_pools=(mean_blocks,))
    params = params_of(method)
    assert params["q"].shape == (4, 32, 6)
    _, info = method.plan(params, q, k, mask=CAUSAL)
    pools = {"q_pools": ("max", "mean"), "k_pools": ("mean",)}
    expected = oracle.gate(q, k, params["q"], params["k"], block=8, base=100.0, **pools)
    np.testing.assert_allclose(info.gate_logits, expected, atol=1e-5)


def test_worked_targets_and_loss():
    probs = np.array([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.1, 0.5, 0.4, 0], [0.2, 0.1, 0.3, 0.4]])
    # a query picks its row of logarithms out of the keys
    q = jnp.eye(4)[:, None]
    k = on_device(np.log(np.maximum(probs, 1e-30)).T, jnp.float32)[:, None]
    targets = gate_targets(q, k, block_size=2, mask=CAUSAL, scale=1.0)
    np.testing.assert_allclose(targets[0], [[1, 0], [0.555556, 0.444444]], atol=1e-6)
    each = gate_targets(q, k, block_size=1, mask=CAUSAL, scale=1.0)
    np.testing.assert_allclose(each[0], probs, atol=1e-6)
    logits = on_device([[[0, -jnp.inf], [0.5, 1]]])
    per_row = gate_loss(logits, targets, skipped=0.0)
    assert float(per_row) == pytest.approx(0.032447, abs=1e-6)
    assert float(per_row) / 2 == pytest.approx(0.016223, abs=1e-6)
    # zero where the softmax is the target; the gradient is their difference, over the rows
    same = jnp.where(targets > 0, jnp.log(targets), -jnp.inf)
    assert float(gate_loss(same, targets, skipped=0.0)) == pytest.approx(0, abs=1e-6)
    gradient = jax.grad(lambda x: gate_loss(x, targets, skipped=0.0))(logits)
    shares = jax.nn.softmax(logits, axis=-1)
    np.testing.assert_allclose(gradient, (shares - targets) / 2, atol=1e-6)


def test_how_many_tiles_a_density_is():
    q, k, _ = qkv(512, heads=1, kv_heads=1, dim=4)
    for density, count, exact in ((0.1, 26, 0.0989), (0.2, 54, 0.1996), (0.5, 149, 0.4970)):
        sizes = {"block_size": 1, "gate_dim": 2, "dense_rows": 0}
        method = js.seerattention(density=density, **sizes)
        plan, _ = method.plan(params_of(method, 1, 1, 4), q, k, mask=CAUSAL)
        # the diagonal may come on top of those
        expected = np.minimum(count, np.arange(1, 513))
        counts = np.asarray(plan.kv_num_blocks[0])
        assert ((counts == expected) | (counts == expected + 1)).all()
        assert expected.sum() / (512 * 513 / 2) == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(
    "density",
    [pytest.param(0.4, marks=pytest.mark.slow), [0.2, 0.4, 0.6, 1.0]],
    ids=["one", "per head"],
)
def test_the_room_of_a_cache_changes_nothing(density):
    """Neither the gate nor the count of tiles, and each sequence has its own length."""
    density = on_device(density, jnp.float32) if isinstance(density, list) else density
    method = js.seerattention(**SMALL, density=density, dense_rows=0)
    params = params_of(method)
    q, k, _ = qkv(27, 64, batch=(3,))
    starts, lengths = [37, 0, 18], [64, 27, 45]
    positions = on_device(np.array(starts)[:, None] + np.arange(27), jnp.int32)
    mask = js.masks.causal(offset=positions[:, 0])
    alone, choose = [], jax.jit(method.plan)
    for n, length in enumerate(lengths):
        tiles, info = choose(params, q[n], k[n, :length], mask=CAUSAL)
        alone.append((np.asarray(tiles.to_dense()), np.asarray(info.gate_logits)))

    @jax.jit
    def run(params, k):
        return method.plan(params, q, k, mask=mask, positions=positions)

    for room in (64, 72, 128):
        past = np.arange(64)[:, None, None] < np.array(lengths)[:, None, None, None]
        keys = np.pad(np.where(past, k, 0), [(0, 0), (0, room - 64), (0, 0), (0, 0)])
        tiles, info = run(params, on_device(keys))
        for n, (kept, logits) in enumerate(alone):
            columns = logits.shape[-1]
            np.testing.assert_allclose(info.gate_logits[n, ..., :columns], logits, atol=1e-5)
            assert jnp.isneginf(info.gate_logits[n, ..., columns:]).all()
            np.testing.assert_array_equal(tiles.to_dense()[n, ..., :columns], kept)
            assert not tiles.to_dense()[n, ..., columns:].any()

    def loss(params):
        logits = run(params, on_device(keys))[1].gate_logits
        return jnp.where(jnp.isneginf(logits), 0, logits).sum()

    gradients = jax.jit(jax.grad(loss))(params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_keys_that_no_mask_hides_count_wherever_queries_stand():
    q, k, _ = qkv(16, 64)
    method = js.seerattention(**SMALL, density=0.4, dense_rows=0)
    params, positions = params_of(method), jnp.arange(24, 40)
    # keys that follow the queries are not the room of a cache where these see them
    all_ahead = js.masks.causal(offset=100)
    expected, info = method.plan(params, q, k, positions=positions)
    for mask in (js.masks.full(), all_ahead):
        tiles, found = method.plan(params, q, k, mask=mask, positions=positions)
        np.testing.assert_array_equal(found.gate_logits, info.gate_logits)
        np.testing.assert_array_equal(tiles.to_dense(), expected.to_dense())
    assert info.gate_logits[..., 5:].all()


def test_heads_have_densities_of_their_own():
    q, k, _ = qkv(96)
    settings = [0.1, 0.3, 0.6, 1.0]
    sizes = {**SMALL, "dense_rows": 0}
    together = js.seerattention(**sizes, density=on_device(settings, jnp.float32))
    params = params_of(together)
    for mask in (CAUSAL, None):
        tiles = together.plan(params, q, k, mask=mask)[0].to_dense()
        for head, density in enumerate(settings):
            choose = jax.jit(js.seerattention(**sizes, density=density).plan)
            alone = choose(params, q, k, mask=mask)[0]
            np.testing.assert_array_equal(tiles[head], alone.to_dense()[head])
    wrong = js.seerattention(**sizes, density=on_device(settings[:3], jnp.float32))
    with pytest.raises(ValueError, match=r"density has shape \(3,\)"):
        wrong.plan(params, q, k)


def test_the_last_tile_is_kept_without_a_mask_too():
    q, k, _ = qkv(96)
    method = js.seerattention(**SMALL, density=0.1, dense_rows=0)
    tiles = method.plan(params_of(method), q, k)[0].to_dense()
    assert tiles[..., -1].all()
    assert tiles.sum(-1).max() <= 2


def test_keeping_all_is_dense_by_either_setting():
    q, k, v = qkv(70)
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    for setting in ({"threshold": 0.0}, {"density": 1.0}):
        method = js.seerattention(**SMALL, **setting)
        out = js.sparse_attention(q, k, v, method, params=params_of(method), mask=CAUSAL)
        np.testing.assert_allclose(out, dense, atol=4e-6)


def test_the_gate_sees_distances_only():
    """Whole blocks put in front move all positions, and no logit of the tokens that were there."""
    rng = np.random.default_rng(0)
    plain_q, plain_k, front = (
        on_device(rng.normal(size=(n, heads, 16)), jnp.float32)
        for n, heads in ((40, 4), (40, 2), (24, 2))
    )
    method = js.seerattention(**SMALL)
    params = params_of(method)

    def logits(k, first):
        q = rotary(plain_q, first + jnp.arange(40), base=100.0)
        k = rotary(k, jnp.arange(len(k)), base=100.0)
        return method.plan(params, q, k, mask=CAUSAL)[1].gate_logits

    alone, moved = logits(plain_k, 0), logits(jnp.concatenate([front, plain_k]), 24)
    np.testing.assert_allclose(moved[..., 3:], alone, atol=2e-5)
    positions = jnp.arange(40)
    back = unrotated(rotary(plain_q, positions, base=100.0), positions, base=100.0)
    np.testing.assert_allclose(back, plain_q, atol=2e-6)


def test_the_gate_learns_by_its_loss_alone_until_it_is_the_map():
    length = 32
    q, k, v = qkv(length, heads=2, kv_heads=1, dim=8)
    # a block that all later queries look at
    q, k = q.at[..., 0].add(4.0), k.at[8:16, :, 0].add(6.0)
    method = js.seerattention(block_size=8, gate_dim=8, rope_base=None, threshold=0.3)
    params = params_of(method, heads=2, kv_heads=1, dim=8)
    targets = gate_targets(q, k, block_size=8, mask=CAUSAL)

    def loss(params, q, k):
        return gate_loss(
            method.plan(params, q, k, mask=CAUSAL)[1].gate_logits, targets, skipped=0.0
        )

    d_q, d_k = jax.jit(jax.grad(loss, argnums=(1, 2)))(params, q, k)
    assert not d_q.any()
    assert not d_k.any()
    of_output = jax.grad(lambda p: method.attend(p, q, k, v, mask=CAUSAL)[0].sum())
    through = jax.jit(of_output)(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(through))
    optimizer = optax.adam(3e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params, q, k)
        updates, state = optimizer.update(gradient, state)
        return value, optax.apply_updates(params, updates), state

    for _ in range(150):
        value, params, state = step(params, state)
    assert 0 <= float(value) < 1e-3
    logits = method.plan(params, q, k, mask=CAUSAL)[1].gate_logits
    assert (jnp.argmax(logits[:, 2:], axis=-1) == 1).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"gate_dim": 7}, "gate_dim=7 must be a multiple of 2"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"density": 0.0}, "density=0.0"),
        ({"dense_rows": -1}, "dense_rows=-1"),
        ({"k_pools": ()}, r"k_pools=\(\)"),
        ({"rope_base": 0.0}, "rope_base=0.0"),
    ],
)
def test_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        js.seerattention(**options)


def test_targets_never_hold_the_map():
    length = 8192
    q, k = (jax.ShapeDtypeStruct((length, heads, 16), jnp.float32) for heads in (2, 1))
    targets = jax.jit(functools.partial(gate_targets, block_size=64, mask=js.masks.causal()))
    memory = targets.lower(q, k).compile().memory_analysis()
    # of one head the map is 256 arrays of the size of q
    assert memory.temp_size_in_bytes < 24 * q.size * 4
