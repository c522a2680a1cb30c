"""SeerAttention-R against its oracle, and the checks of its specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jsparse as js
from jsparse.attention.map_scores import map_maxima
from jsparse.cache import paged
from jsparse.core.distillation import shares_of_rows
from jsparse.core.group_queries import mean, mean_projected, projected, separate
from jsparse.core.pooling import max_blocks, mean_blocks
from jsparse.core.rotary import rotary
from jsparse.learned.seerattention_r import gate_loss, gate_targets
from tests.inputs import on_device, qkv
from tests.oracles import seerattention_r as oracle

CAUSAL = js.masks.causal()
SMALL = {"block_size": 8, "gate_dim": 6, "rope_base": 100.0}
OF_ORACLE = {"size": 8, "base": 100.0}


def params_of(method, heads=4, kv_heads=2, dim=16, seed=3):
    """Parameters as `init` shapes them, scales that change something among them."""
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "dim": dim, "features": heads * dim}
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), **sizes))
    rng = np.random.default_rng(seed)
    return {
        name: on_device(rng.uniform(0.5, 2.0, x.shape), jnp.float32)
        if "norm" in name
        else jax.tree.map(lambda x: on_device(0.2 * rng.normal(size=x.shape), jnp.float32), x)
        for name, x in shapes.items()
    }


def test_gate_targets_loss_and_lists_equal_the_oracle():
    q, k, _ = qkv(45)
    params = params_of(js.seerattention_r(**SMALL))
    assert params["q"].shape == (2, 2, 16, 6)
    assert params["k"].shape == (2, 48, 6)
    logits = oracle.gate(q, k, params, **OF_ORACLE)
    wanted = oracle.targets(q, k, 8)
    targets = gate_targets(q, k, block_size=8)
    np.testing.assert_allclose(targets, wanted, atol=2e-6)
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-6)
    for setting in ({"token_budget": 1}, {"token_budget": 23}, {"threshold": 0.2}):
        plan, info = js.seerattention_r(**SMALL, **setting).plan(params, q, k, mask=CAUSAL)
        np.testing.assert_allclose(info.gate_logits, logits, atol=1e-5)
        assert (plan.block_q, plan.block_kv, plan.list_heads) == (1, 8, 2)
        expected = oracle.select(logits, size=8, **setting)
        np.testing.assert_array_equal(plan.to_dense(), expected)
    got = gate_loss(info.gate_logits, targets, skipped=0.5)
    assert float(got) == pytest.approx(oracle.loss(logits, wanted, 0.5), rel=1e-4)


@pytest.mark.parametrize(
    ("made", "kind", "qk_norm"),
    [
        (projected, "Qproj", False),
        (mean_projected, "Qavgproj", True),
        (mean, "Qavg", False),
        # without a norm the mean of scores is the score of the mean
        (separate, "Qorig", True),
    ],
    ids=["Qproj", "Qavgproj", "Qavg", "Qorig"],
)
def test_what_makes_the_query_of_a_group(made, kind, qk_norm):
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
    # queries are the last tokens; of blocks of one key the targets are the map
    alone = gate_targets(q[2:, :1], k, block_size=1, scale=1.0)
    np.testing.assert_allclose(alone[0], probs[2:], atol=1e-6)


def test_heads_have_thresholds_of_their_own():
    q, k, _ = qkv(45)
    method = js.seerattention_r(**SMALL, threshold=on_device([0.0, 1.0], jnp.float32))
    # causal without being told
    tiles = np.asarray(method.plan(params_of(method), q, k)[0].to_dense())
    own, block = np.arange(45)[:, None] // 8, np.arange(6)
    np.testing.assert_array_equal(tiles, [block <= own, block == own])
    with pytest.raises(ValueError, match=r"threshold has shape \(2,\); .* one per kv head, \(1,\)"):
        method.plan((), q, k[:, :1])


def test_heads_of_a_group_attend_to_the_blocks_of_its_list():
    q, k, v = qkv(45)
    method = js.seerattention_r(**SMALL, token_budget=23)
    params = params_of(method)
    plan, _ = method.plan(params, q, k)
    tiles = np.asarray(plan.to_dense())
    assert (tiles[0] != tiles[1]).any()
    assert tiles.sum(-1).max() == 2
    places = np.arange(45)
    assert tiles[:, places, places // 8].all()
    seen = np.repeat(np.repeat(tiles, 8, axis=-1), 2, axis=0)[..., :45] & np.tri(45, dtype=bool)
    out = method.attend(params, q, k, v)[0]
    logits = np.einsum("qhd,khd->hqk", np.float64(q), np.repeat(np.float64(k), 2, axis=1)) / 4
    weights = np.where(seen, np.exp(logits), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hqk,khd->qhd", weights, np.repeat(np.float64(v), 2, axis=1))
    np.testing.assert_allclose(out, expected, atol=4e-6)


def test_a_mask_hides_blocks_of_what_no_head_of_a_group_sees():
    q, k, _ = qkv(45)
    method = js.seerattention_r(**SMALL, token_budget=2**20)
    params = params_of(method)
    # heads 2 and 3 share a kv head; what one of them sees is listed for both
    mask = js.masks.head_windows(num_sink=[0, 0, 0, 8], window=[8, 16, 8, 8])
    plan, info = method.plan(params, q, k, mask=mask)
    tiles = np.asarray(plan.to_dense())
    places, block = np.arange(45)[:, None], np.arange(6)
    own, first = places // 8, np.maximum(places - 15, 0) // 8
    np.testing.assert_array_equal(tiles[0], (block <= own) & (block >= first))
    first = np.maximum(places - 7, 0) // 8
    np.testing.assert_array_equal(tiles[1], (block <= own) & ((block >= first) | (block == 0)))
    # so it is with targets, where the mask tells heads apart as where it does not
    targets = np.asarray(gate_targets(q, k, block_size=8, mask=mask))
    assert not targets[~tiles].any()
    alone = [
        map_maxima(
            *(q[:, head : head + 1], k[:, :1]),
            **{"block_q": 1, "block_kv": 8},
            mask=CAUSAL & js.masks.sliding_window(left=window - 1),
        )
        for head, window in ((0, 8), (1, 16))
    ]
    np.testing.assert_allclose(targets[:1], shares_of_rows(jnp.maximum(*alone)), atol=2e-6)
    np.testing.assert_array_equal(jnp.isneginf(info.gate_logits), ~tiles)
    with pytest.raises(ValueError, match="The mask has 3 heads"):
        method.plan(params, q, k, mask=js.masks.head_windows(num_sink=[0] * 3, window=[4] * 3))


def test_no_logit_knows_of_tokens_after_its_query():
    q, k, _ = qkv(45)
    method = js.seerattention_r(**SMALL, token_budget=23)
    params = params_of(method)

    def run(k):
        return np.asarray(method.plan(params, q, k)[1].gate_logits)

    logits = run(k)
    for place in (12, 15, 16):
        later = np.where(np.arange(45)[:, None, None] < place, k, -9.0 * np.asarray(k))
        changed = run(on_device(later))
        np.testing.assert_array_equal(changed[:, :place], logits[:, :place])
        assert (changed[:, place] != logits[:, place]).any()


def test_the_gate_sees_distances_only():
    """Whole blocks put in front move all positions, and no logit of the tokens that were there."""
    rng = np.random.default_rng(0)
    plain_q, plain_k, front = (
        on_device(rng.normal(size=(n, heads, 16)), jnp.float32)
        for n, heads in ((21, 4), (21, 2), (24, 2))
    )
    method = js.seerattention_r(**SMALL)
    params = params_of(method)

    @functools.partial(jax.jit, static_argnums=1)
    def logits(k, first):
        q = rotary(plain_q, first + jnp.arange(21), base=100.0)
        k = rotary(k, jnp.arange(len(k)), base=100.0)
        return method.plan(params, q, k)[1].gate_logits

    alone, moved = logits(plain_k, 0), logits(jnp.concatenate([front, plain_k]), 24)
    np.testing.assert_allclose(moved[..., 3:], alone, atol=2e-5)


@functools.cache
def decoding():
    """A text of two sequences in a cache that has room for more, and a step over it."""
    method = js.seerattention_r(**SMALL, token_budget=23)
    params = params_of(method)
    q, k, v = qkv(45, batch=(2,))
    more = [(0, 0), (0, 11), (0, 0), (0, 0)]
    k, v = np.pad(k, more), np.pad(v, more)

    @jax.jit
    def step(q, k, positions, state):
        mask = js.masks.causal(offset=positions[:, 0])
        return method.plan(params, q, k, positions=positions, mask=mask, state=state)

    whole = [method.plan(params, q[n], on_device(k[n, :45])) for n in range(2)]
    return q, k, v, step, method.init_state(k, v), whole


def state_of(empty, whole, lengths):
    """The keys of the blocks that are whole."""
    state = np.array(empty)
    for n, length in enumerate(lengths):
        state[n, : length // 8] = whole[n][1].state[: length // 8]
    return on_device(state)


def test_keys_are_added_where_blocks_end_and_equal_those_of_all_tokens():
    q, k, _, step, empty, whole = decoding()
    assert empty.shape == (2, 7, 2, 6)
    tiles_of_all = [np.asarray(plan.to_dense()) for plan, _ in whole]

    def checked(n, at, tiles, logits, before, after):
        np.testing.assert_array_equal(tiles[..., :6], tiles_of_all[n][:, at])
        said = whole[n][1]
        np.testing.assert_allclose(logits[..., :6], said.gate_logits[:, at], atol=1e-5)
        assert jnp.isneginf(logits[..., 6:]).all()
        # nothing is written but what these tokens complete
        ends = at[(at + 1) % 8 == 0] // 8
        others = np.setdiff1d(np.arange(7), ends)
        np.testing.assert_array_equal(after[others], before[others])
        np.testing.assert_allclose(after[ends], said.state[ends], atol=1e-5)

    def known(k, last):
        """What comes later is not there yet."""
        past = np.arange(56) <= np.asarray(last)[..., None]
        return on_device(np.where(past[..., None, None], k, 0))

    # two sequences of their own lengths
    lengths, rows = np.array([0, 16]), np.arange(2)[:, None]
    state = state_of(empty, whole, lengths)
    for count in (11, *[1] * 18):
        at = lengths[:, None] + np.arange(count)
        tiles, info = step(q[rows, at], known(k, at[:, -1]), on_device(at, jnp.int32), state)
        said = [np.asarray(x) for x in (tiles.to_dense(), info.gate_logits, state, info.state)]
        for n in range(2):
            checked(n, at[n], *(x[n] for x in said))
        state, lengths = info.state, lengths + count
    assert lengths.tolist() == [29, 45]


def test_a_step_costs_one_block_of_keys_besides_its_list():
    """Nothing is computed of the keys of all tokens, by the compiler's own count."""
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
    # what grows is in proportion to blocks: some operations for each, and a product; the last that
    # is chosen is found by 32 comparisons and sums, and those up to each are counted by sums of 32
    assert 0 < long - short < 512 * 2 * (8 * 4 + 100 + 32 * 3 + 32 * 2)


def test_pages_are_attended_to_by_the_same_lists():
    """A page is a block: the plan of a step over a cache is one over the pages of its tables."""
    q, k, v, step, empty, whole = decoding()
    lengths, rows = np.array([45, 36]), np.arange(2)[:, None]
    at = lengths[:, None] - 1
    places, q = on_device(at, jnp.int32), q[rows, at]
    plan, _ = step(q, on_device(k), places, state_of(empty, whole, at[:, 0]))
    # of six pages and of five
    assert plan.kv_num_blocks.tolist() == [[[2], [2]], [[2], [2]]]
    cache = paged.empty(2, pages=12, page_size=8, max_len=56, kv_heads=2, dim=16, v_dim=16)
    new = on_device(k[:, :45]), on_device(v[:, :45]), on_device(lengths, jnp.int32)
    cache = jax.jit(paged.append)(cache, *new)
    mask = js.masks.causal(offset=places[:, 0])
    expected = js.attend(q, on_device(k), on_device(v), plan, mask=mask)
    np.testing.assert_allclose(js.attend_paged(q, cache, plan), expected, atol=4e-6)


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
    planted, params = (params_of(method, 2, 1, 8, seed) for seed in (0, 1))
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
    assert (tiles == expected).mean() > 0.97 > (first == expected).mean()


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


@pytest.mark.parametrize("group", [2, 16])
def test_targets_never_hold_the_map(group):
    length = 8192
    q, k = (jax.ShapeDtypeStruct((length, heads, 16), jnp.float32) for heads in (group, 1))
    targets = jax.jit(functools.partial(gate_targets, block_size=64))
    memory = targets.lower(q, k).compile().memory_analysis()
    # of one head the map is 64 such arrays; nor are there the scores of all heads of a group
    scores = length * length // 64 * 4
    assert memory.temp_size_in_bytes < 3 * scores + q.size * 4
