"""SeerAttention-R against its oracle, and the checks of its specification."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jsparse as js
import jsparse.nn
from jsparse.cache import paged
from jsparse.core.group_queries import mean, mean_projected, projected, separate
from jsparse.core.rotary import rotary
from jsparse.learned.seerattention_r import gate_loss, gate_targets
from tests.inputs import on_device, qkv
from tests.oracles import seerattention_r as oracle

CAUSAL = js.masks.causal()
SMALL = {"block_size": 8, "gate_dim": 6, "rope_base": 100.0}
OF_ORACLE = {"size": 8, "base": 100.0}


def params_of(method, heads=4, kv_heads=2, dim=16):
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "dim": dim, "features": heads * dim}
    params = jax.jit(lambda key: method.init(key, **sizes))(jax.random.key(0))
    rng = np.random.default_rng(3)
    # scales that change something
    return {
        name: on_device(rng.uniform(0.5, 2.0, x.shape), jnp.float32) if "norm" in name else x
        for name, x in params.items()
    }


@pytest.mark.parametrize(("q_len", "kv_len"), [(45, 45), (21, 45)])
def test_gate_targets_loss_and_lists_equal_the_oracle(q_len, kv_len):
    q, k, _ = qkv(q_len, kv_len)
    params = params_of(js.seerattention_r(**SMALL))
    assert params["q"].shape == (2, 2, 16, 6)
    assert params["k"].shape == (2, 48, 6)
    logits = oracle.gate(q, k, params, **OF_ORACLE)
    wanted = oracle.targets(q, k, 8)
    targets = gate_targets(q, k, block_size=8)
    np.testing.assert_allclose(targets, wanted, atol=2e-6)
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-6)
    settings = [{"token_budget": n} for n in (1, 8, 23, 24)]
    settings += [{"threshold": t} for t in (0.3, 0.15)]
    for setting in settings:
        plan, info = js.seerattention_r(**SMALL, **setting).plan(params, q, k, mask=CAUSAL)
        np.testing.assert_allclose(info.gate_logits, logits, atol=1e-5)
        assert (plan.block_q, plan.block_kv, plan.list_heads) == (1, 8, 2)
        expected = oracle.select(logits, size=8, **setting)
        np.testing.assert_array_equal(plan.to_dense(), expected)
        assert not expected.all()
    for skipped in (0.0, 0.5):
        got = gate_loss(info.gate_logits, targets, skipped=skipped)
        assert float(got) == pytest.approx(oracle.loss(logits, wanted, skipped), rel=1e-4)


@pytest.mark.parametrize("qk_norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize(
    ("made", "kind"),
    [(projected, "Qproj"), (mean_projected, "Qavgproj"), (mean, "Qavg"), (separate, "Qorig")],
    ids=["Qproj", "Qavgproj", "Qavg", "Qorig"],
)
def test_what_makes_the_query_of_a_group(made, kind, qk_norm):
    from jsparse.core.pooling import max_blocks, mean_blocks

    q, k, _ = qkv(11, 19, dim=8)
    method = js.seerattention_r(
        **{**SMALL, "gate_dim": 8},
        group_query=made(),
        qk_norm=qk_norm,
        k_pools=(mean_blocks, max_blocks),
    )
    params = params_of(method, dim=8)
    assert ("q_norm" in params) == qk_norm
    _, info = method.plan(params, q, k)
    expected = oracle.gate(q, k, params, **OF_ORACLE, kind=kind, pools=("mean", "max"))
    np.testing.assert_allclose(info.gate_logits, expected, atol=1e-5)


def test_worked_targets():
    probs = np.array([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.1, 0.5, 0.4, 0], [0.2, 0.1, 0.3, 0.4]])
    # a query picks its row of logarithms out of the keys; a second head looks at the first key
    q = jnp.stack([jnp.eye(4), jnp.zeros((4, 4))], axis=1)
    k = on_device(np.log(np.maximum(probs, 1e-30)).T, jnp.float32)[:, None]
    targets = gate_targets(q, k, block_size=2, scale=1.0)
    # that head has all keys alike: 1, 1/2, 1/3 and 1/4 each
    largest = np.array([[1, 0], [0.6, 0], [0.5, 0.4], [0.25, 0.4]])
    np.testing.assert_allclose(targets[0], largest / largest.sum(-1, keepdims=True), atol=1e-6)
    alone = gate_targets(q[:, :1], k, block_size=1, scale=1.0)
    np.testing.assert_allclose(alone[0], probs, atol=1e-6)


def test_a_budget_for_all_keys_is_dense_and_so_is_no_threshold():
    q, k, v = qkv(45)
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    for setting in ({"token_budget": 48}, {"threshold": 0.0}):
        method = js.seerattention_r(**SMALL, **setting)
        # causal without being told
        out = js.sparse_attention(q, k, v, method, params=params_of(method))
        np.testing.assert_allclose(out, dense, atol=4e-6)


def test_heads_of_a_group_attend_to_the_blocks_of_its_list():
    q, k, v = qkv(40)
    method = js.seerattention_r(**SMALL, token_budget=16)
    params = params_of(method)
    plan, _ = method.plan(params, q, k)
    tiles = np.asarray(plan.to_dense())
    assert (tiles[0] != tiles[1]).any()
    assert tiles.sum(-1).max() == 2
    places = np.arange(40)
    assert tiles[:, places, places // 8].all()
    seen = np.repeat(np.repeat(tiles, 8, axis=-1), 2, axis=0) & np.tri(40, dtype=bool)
    out = method.attend(params, q, k, v)[0]
    logits = np.einsum("qhd,khd->hqk", np.float64(q), np.repeat(np.float64(k), 2, axis=1)) / 4
    weights = np.where(seen, np.exp(logits), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hqk,khd->qhd", weights, np.repeat(np.float64(v), 2, axis=1))
    np.testing.assert_allclose(out, expected, atol=4e-6)


def test_a_mask_hides_blocks_of_what_no_head_of_a_group_sees():
    q, k, _ = qkv(40)
    method = js.seerattention_r(**SMALL, token_budget=2**20)
    params = params_of(method)
    # heads 2 and 3 share a kv head; what one of them sees is listed for both
    mask = js.masks.head_windows(num_sink=[0, 0, 0, 8], window=[8, 16, 8, 8])
    plan, info = method.plan(params, q, k, mask=mask)
    tiles = np.asarray(plan.to_dense())
    places, block = np.arange(40)[:, None], np.arange(5)
    own, first = places // 8, np.maximum(places - 15, 0) // 8
    np.testing.assert_array_equal(tiles[0], (block <= own) & (block >= first))
    first = np.maximum(places - 7, 0) // 8
    np.testing.assert_array_equal(tiles[1], (block <= own) & ((block >= first) | (block == 0)))
    np.testing.assert_array_equal(jnp.isneginf(info.gate_logits), ~tiles)
    with pytest.raises(ValueError, match="The mask has 3 heads"):
        method.plan(params, q, k, mask=js.masks.head_windows(num_sink=[0] * 3, window=[4] * 3))


def test_no_logit_knows_of_tokens_after_its_query():
    q, k, _ = qkv(40)
    method = js.seerattention_r(**SMALL)
    params = params_of(method)
    run = jax.jit(lambda k: method.plan(params, q, k)[1].gate_logits)
    logits = run(k)
    for place in (12, 15, 16):
        changed = run(k.at[place:].mul(-9.0))
        np.testing.assert_array_equal(changed[:, :place], logits[:, :place])
        assert (changed[:, place] != logits[:, place]).any()


def test_the_gate_sees_distances_only():
    """Whole blocks put in front move all positions, and no logit of the tokens that were there."""
    rng = np.random.default_rng(0)
    plain_q, plain_k, front = (
        on_device(rng.normal(size=(n, heads, 16)), jnp.float32)
        for n, heads in ((20, 4), (20, 2), (24, 2))
    )
    method = js.seerattention_r(**SMALL)
    params = params_of(method)

    def logits(k, first):
        q = rotary(plain_q, first + jnp.arange(20), base=100.0)
        k = rotary(k, jnp.arange(len(k)), base=100.0)
        return method.plan(params, q, k)[1].gate_logits

    alone, moved = logits(plain_k, 0), logits(jnp.concatenate([front, plain_k]), 24)
    np.testing.assert_allclose(moved[..., 3:], alone, atol=2e-5)


def in_a_cache(method, length=45, room=6):
    """A text of two sequences, what a plan for all of it says, and its keys with room for more."""
    q, k, v = qkv(length, batch=(2,))
    params = params_of(method)
    more = [(0, 0), (0, room), (0, 0), (0, 0)]
    return params, q, np.pad(k, more), np.pad(v, more, constant_values=7.0)


def test_keys_are_added_where_blocks_end_and_equal_those_of_all_tokens():
    method = js.seerattention_r(**SMALL, token_budget=16)
    params, q, k, _ = in_a_cache(method)
    whole, said = jax.jit(method.plan)(params, q, on_device(k[:, :45]))
    assert method.init_state(k, k).shape == said.state.shape[:1] + (7, 2, 6)

    @jax.jit
    def step(q, k, positions, state):
        mask = js.masks.causal(offset=positions[..., 0])
        return method.plan(params, q, k, positions=positions, mask=mask, state=state)

    def checked(n, at, tiles, logits, before, after):
        np.testing.assert_array_equal(tiles[..., :6], whole.to_dense()[n][:, at])
        np.testing.assert_allclose(logits[..., :6], said.gate_logits[n][:, at], atol=1e-5)
        assert jnp.isneginf(logits[..., 6:]).all()
        # nothing is written but what these tokens complete
        ends = at[(at + 1) % 8 == 0] // 8
        others = np.setdiff1d(np.arange(7), ends)
        np.testing.assert_array_equal(after[others], before[others])
        np.testing.assert_allclose(after[ends], said.state[n][ends], atol=1e-5)

    def known(k, last):
        """What comes later is not there yet."""
        past = np.arange(51) <= np.asarray(last)[..., None]
        return on_device(np.where(past[..., None, None], k, 0))

    # prompts of their own lengths, then steps together
    lengths, states = np.array([19, 12]), []
    for n, length in enumerate(lengths):
        at, nothing = np.arange(length), method.init_state(k[n], k[n])
        tiles, info = step(q[n, at], known(k[n], length - 1), on_device(at, jnp.int32), nothing)
        checked(n, at, tiles.to_dense(), info.gate_logits, np.asarray(nothing), info.state)
        states.append(info.state)
    state, rows = jnp.stack(states), np.arange(2)[:, None]
    for count in (10, *[1] * 16):
        at = lengths[:, None] + np.arange(count)
        tiles, info = step(q[rows, at], known(k, at[:, -1]), on_device(at, jnp.int32), state)
        for n in range(2):
            of_step = tiles.to_dense()[n], info.gate_logits[n]
            checked(n, at[n], *of_step, np.asarray(state[n]), info.state[n])
        state, lengths = info.state, lengths + count
    assert lengths.tolist() == [45, 38]


def test_a_layer_decodes_step_by_step_as_it_attends_to_the_whole():
    method = js.seerattention_r(**SMALL, token_budget=16)
    layer = js.nn.SparseAttention(
        32, num_heads=4, num_kv_heads=2, rope_base=100.0, method=method, rngs=nnx.Rngs(0)
    )
    x = on_device(np.random.default_rng(0).normal(size=(2, 33, 32)), jnp.float32)

    @nnx.jit
    def step(layer, x, cache):
        return layer(x, cache=cache)

    # causal without being told, and sparse
    whole = layer(x)
    dense, _ = step(layer, x, layer.init_cache((2,), 36))
    np.testing.assert_allclose(dense, whole, atol=5e-6)
    cache, parts, first = layer.init_cache((2,), 36), [], 0
    for count in (14, *[1] * 19):
        out, cache = step(layer, x[:, first : first + count], cache)
        parts.append(out)
        first += count
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=5e-6)
    layer.method = None
    assert jnp.abs(layer(x, mask=CAUSAL) - whole).max() > 1e-3


def test_a_step_costs_one_block_of_keys_besides_its_list():
    """No product with keys of all tokens, and no copy of them: by the compiler's own count."""
    method = js.seerattention_r(block_size=32, token_budget=64, gate_dim=8)
    params = params_of(method)

    def flops(room):
        q, k, _ = (
            jax.ShapeDtypeStruct((1, n, heads, 16), jnp.float32)
            for n, heads in ((1, 4), (room, 2), (room, 2))
        )
        state = jax.eval_shape(method.init_state, k, k)
        positions = jax.ShapeDtypeStruct((1, 1), jnp.int32)

        def step(q, k, positions, state):
            return method.plan(params, q, k, positions=positions, state=state)

        cost = jax.jit(step).lower(q, k, positions, state).compile().cost_analysis()
        return cost["flops"]

    short, long = flops(2**14), flops(2**15)
    # what grows is in proportion to blocks: some operations for each, and a product
    assert 0 < long - short < 512 * 2 * (8 * 4 + 100)


def test_pages_are_attended_to_by_the_same_lists():
    """A page is a block: the plan of a step over a cache is one over the pages of its tables."""
    method = js.seerattention_r(**SMALL, token_budget=16)
    params, q, k, v = in_a_cache(method, 29, 11)
    cache = paged.empty(2, pages=10, page_size=8, max_len=40, kv_heads=2, dim=16, v_dim=16)
    lengths = np.array([29, 21])
    new = on_device(k[:, :29]), on_device(v[:, :29]), on_device(lengths, jnp.int32)
    cache = jax.jit(paged.append)(cache, *new)
    places = on_device(lengths[:, None] - 1, jnp.int32)
    mask, rows = js.masks.causal(offset=places[:, 0]), np.arange(2)[:, None]
    step = q[rows, lengths[:, None] - 1]
    plan, _ = method.plan(params, step, on_device(k), positions=places, mask=mask)
    assert plan.kv_num_blocks.tolist() == [[[2], [2]], [[2], [2]]]
    expected = js.attend(step, on_device(k), on_device(v), plan, mask=mask)
    np.testing.assert_allclose(js.attend_paged(step, cache, plan), expected, atol=4e-6)
    assert jnp.abs(js.attend_paged(step, cache) - expected).max() > 1e-3


def test_only_the_gate_learns_and_by_its_loss_alone():
    q, k, v = qkv(24, heads=2, kv_heads=1, dim=8)
    method = js.seerattention_r(block_size=8, gate_dim=8, token_budget=16, rope_base=100.0)
    params = params_of(method, heads=2, kv_heads=1, dim=8)

    def loss(params, q, k):
        logits = method.plan(params, q, k)[1].gate_logits
        return gate_loss(logits, gate_targets(q, k, block_size=8), skipped=0.5)

    of_gate, d_q, d_k = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, q, k)
    assert not d_q.any()
    assert not d_k.any()
    assert all(leaf.any() and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(of_gate))
    through = jax.jit(jax.grad(lambda p: method.attend(p, q, k, v)[0].sum()))(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(through))


def test_a_planted_gate_is_recovered():
    """What some gate says of a text, another learns: their softmax, and the blocks they choose."""
    q, k, _ = qkv(48, heads=2, kv_heads=1, dim=8)
    sizes = {"block_size": 8, "gate_dim": 8, "token_budget": 24, "rope_base": 100.0}
    method = js.seerattention_r(**sizes)
    planted, params = (
        jax.jit(lambda key: method.init(key, num_heads=2, num_kv_heads=1, dim=8, features=16))(
            jax.random.key(seed)
        )
        for seed in (0, 1)
    )
    # a gate that prefers some blocks
    planted = {**planted, "q_norm": jnp.full(8, 2.0)}
    wanted, said = method.plan(planted, q, k)
    targets = jax.nn.softmax(said.gate_logits, axis=-1)

    def loss(params):
        return gate_loss(method.plan(params, q, k)[1].gate_logits, targets, skipped=0.0)

    optimizer = optax.adam(3e-2)

    @jax.jit
    def learn(params):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=400)
        return params, values

    found, values = learn(params)
    assert float(values[0]) > 0.1
    assert 0 <= float(values[-1]) < 1e-3
    tiles, expected = (x.to_dense() for x in (method.plan(found, q, k)[0], wanted))
    first = method.plan(params, q, k)[0].to_dense()
    assert float((tiles == expected).mean()) > 0.97 > float((first == expected).mean())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"token_budget": 0}, "token_budget=0"),
        ({"gate_dim": 7}, "gate_dim=7 must be a multiple of 2"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"k_pools": ()}, r"k_pools=\(\)"),
        ({"rope_base": 0.0}, "rope_base=0.0"),
    ],
)
def test_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        js.seerattention_r(**options)


def test_a_query_that_is_not_projected_has_the_gate_s_width():
    for made in (mean, separate):
        method = js.seerattention_r(**SMALL, group_query=made())
        with pytest.raises(ValueError, match="gate_dim=6 must be 16, the width of a query"):
            params_of(method)


def test_a_narrow_list_says_so():
    q, k, _ = qkv(40)
    for width in (0, 1):
        method = js.seerattention_r(**SMALL, token_budget=16, width=width)
        if width:
            assert method.plan(params_of(method), q, k)[0].overflowed.all()
        else:
            with pytest.raises(ValueError, match="width=0"):
                method.plan(params_of(method), q, k)
