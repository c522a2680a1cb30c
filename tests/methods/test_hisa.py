"""HISA and the lightning indexer against their oracle, and the checks of their specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.low_precision import hadamard, rounded, stored
from jsparse.core.tile_scores import relu_weighted
from jsparse.evaluation.metrics import list_overlap
from jsparse.learned.hisa import HisaState, Indexed, index_loss, select_tokens
from tests.inputs import on_device, qkv
from tests.oracles import hisa as oracle

CAUSAL = js.masks.causal()
FEATURES = 12
INDEXER = {"index_heads": 3, "index_dim": 8, "rotary_dim": 4, "rope_base": 100.0}
WORKED = Indexed(
    jnp.zeros((8, 2, 2)).at[7].set(jnp.eye(2)),
    jnp.zeros((8, 2)).at[7].set(on_device([1.0, 0.5])),
    on_device([[1, 0], [0, 1], [3, -1], [-2, 1], [0, 2], [1, 1], [0.5, 0], [0, 0.5]]),
)


def hidden(length, batch=(), seed=3):
    rng = np.random.default_rng(seed)
    return on_device(rng.normal(size=(*batch, length, FEATURES)), jnp.float32)


def params_of(method):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "dim": 16, "features": FEATURES}
    params = method.init(jax.random.key(0), **sizes)
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + on_device(rng.normal(size=x.shape) * 0.1, x.dtype), params)


def lists(plan):
    rows = zip(plan.kv_indices[0].tolist(), plan.kv_num_blocks[0].tolist(), strict=True)
    return [row[:count] for row, count in rows]


@pytest.mark.parametrize("block_top_k", [3, None], ids=["two stages", "one stage"])
def test_tokens_output_and_loss_equal_the_oracle(block_top_k):
    length, sizes = 70, {"top_k": 12, "block_kv": 8}
    q, k, v = qkv(length, v_dim=8)
    x = hidden(length)
    method = js.hisa(**sizes, block_top_k=block_top_k, **INDEXER)
    params = params_of(method)
    run = jax.jit(lambda q, k, v, x: method.attend(params, q, k, v, x=x, mask=CAUSAL))
    out, info = run(q, k, v, x)
    plan, _ = jax.jit(method.plan)(params, q, k, x=x, mask=CAUSAL)
    indexed = oracle.index(x, params, 3, 8, 4, 100.0)
    for got, expected in zip(info.indexed, indexed, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    chosen = oracle.select(*indexed, top_k=12, block=8, block_top_k=block_top_k)
    assert lists(plan) == chosen
    expected = js.attend(q, k, v, plan, mask=CAUSAL, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=4e-6)
    got = index_loss(info.indexed, q, k, plan, mask=CAUSAL)
    assert float(got) == pytest.approx(oracle.loss(*indexed, q, k, chosen), rel=1e-4)
    everything = [list(range(t + 1)) for t in range(length)]
    got = index_loss(info.indexed, q, k, mask=CAUSAL)
    assert float(got) == pytest.approx(oracle.loss(*indexed, q, k, everything), rel=1e-4)


@pytest.mark.parametrize("block_top_k", [3, None], ids=["two stages", "one stage"])
def test_heads_that_see_different_keys_choose_together_and_attend_by_themselves(block_top_k):
    length, sinks, windows = 70, [0, 2, 0, 0], [3, 1, 70, 9]
    q, k, v = qkv(length)
    x = hidden(length)
    sizes = {"top_k": 12, "block_kv": 8, "block_top_k": block_top_k}
    method = js.hisa(**sizes, **INDEXER)
    params = params_of(method)
    # the third head sees all that comes before; no other does
    mask = CAUSAL & js.masks.head_windows(num_sink=sinks, window=windows)
    out, info = jax.jit(lambda *a: method.attend(params, *a, x=x, mask=mask))(q, k, v)
    choose = jax.jit(method.plan)
    plan, _ = choose(params, q, k, x=x, mask=mask)
    indexed = oracle.index(x, params, 3, 8, 4, 100.0)
    chosen = oracle.select(*indexed, top_k=12, block=8, block_top_k=block_top_k)
    assert lists(plan) == chosen
    expected = js.attend(q, k, v, plan, mask=mask, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=4e-6)

    def sees(head, row, token):
        return token < sinks[head] or row - token < windows[head]

    for tokens, given in ((chosen, plan), ([list(range(t + 1)) for t in range(length)], None)):
        got = index_loss(info.indexed, q, k, given, mask=mask)
        wanted = oracle.loss(*indexed, q, k, tokens, sees)
        assert float(got) == pytest.approx(wanted, rel=1e-4)
    # what no head sees, none chooses
    sinks, windows = np.array([0, 2, 0, 0]), np.array([3, 1, 20, 9])
    i, j = np.arange(length)[:, None], np.arange(length)
    near = (i - j < windows[:, None, None]) | (j < sinks[:, None, None])
    told = CAUSAL & js.masks.head_windows(num_sink=sinks.tolist(), window=windows.tolist())
    union = js.masks.dense(on_device((near & (j <= i)).any(0, keepdims=True)))
    plans = [choose(params, q, k, x=x, mask=m)[0] for m in (told, union)]
    assert lists(plans[0]) == lists(plans[1])
    # where all are chosen nothing is left out of any head
    every = js.hisa(top_k=length, block_kv=8, block_top_k=block_top_k and 9, **INDEXER)
    out = jax.jit(every.attend)(params, q, k, v, x=x, mask=mask)[0]
    dense = js.attend(q, k, v, mask=mask, implementation="reference")
    np.testing.assert_allclose(out, dense, atol=4e-6)


@pytest.mark.parametrize("block_top_k", [3, None], ids=["two stages", "one stage"])
def test_tokens_are_of_a_querys_own_document(block_top_k):
    """Whose first block is the first that it sees, wherever the document begins."""
    ids = np.repeat(np.arange(3), [23, 30, 17])
    rng = np.random.default_rng(2)
    numbers = rng.normal(size=(70, 3, 8)), rng.normal(size=(70, 3)), rng.normal(size=(70, 8))
    sizes = {"top_k": 6, "block_top_k": block_top_k}
    plan = select_tokens(
        Indexed(*(on_device(x, jnp.float32) for x in numbers)),
        mask=CAUSAL & js.masks.segments(on_device(ids, jnp.int32)),
        **{"block_kv": 4, **sizes},
    )
    starts = np.searchsorted(ids, ids)
    assert lists(plan) == oracle.select(*numbers, **sizes, block=4, starts=starts)


def test_worked_example():
    rows = WORKED.q[7:], WORKED.weights[7:]
    found = relu_weighted(*rows, WORKED.k)[0]
    np.testing.assert_allclose(found, [1, 0.5, 3, 0.5, 1, 1.5, 0.5, 0.25])
    blocks = relu_weighted(*rows, WORKED.k.reshape(4, 2, 2).mean(1))[0]
    np.testing.assert_allclose(blocks, [0.75, 0.5, 1.25, 0.375])
    sizes = {"top_k": 3, "block_kv": 2, "mask": CAUSAL}
    two, one = (select_tokens(WORKED, block_top_k=m, **sizes) for m in (3, None))
    assert lists(two)[7] == [0, 4, 5]
    assert lists(one)[7] == [0, 2, 5]
    assert float(list_overlap(two, one)[0, 7]) == 0.5


def test_all_blocks_are_one_stage_and_all_tokens_are_dense():
    q, k, v = qkv(90)
    x = hidden(90)
    one, two = (js.hisa(top_k=20, block_kv=16, block_top_k=m, **INDEXER) for m in (None, 6))
    params = params_of(one)
    plans = [jax.jit(method.plan)(params, q, k, x=x, mask=CAUSAL)[0] for method in (one, two)]
    assert lists(plans[0]) == lists(plans[1])
    np.testing.assert_array_equal(list_overlap(*plans), 1.0)
    every = js.hisa(top_k=90, **INDEXER)
    out = jax.jit(every.attend)(params, q, k, v, x=x, mask=CAUSAL)[0]
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    np.testing.assert_allclose(out, dense, atol=4e-6)


def test_latent_attention_absorbed_equals_unabsorbed():
    """One latent key and value per token, read by all heads, without up-projections."""
    rng = np.random.default_rng(0)
    length, heads, latent, rope, nope = 40, 4, 12, 4, 8
    content, turned = rng.normal(size=(length, latent)), rng.normal(size=(length, rope))
    up_k, up_v = rng.normal(size=(heads, latent, nope)), rng.normal(size=(heads, latent, nope))
    q_content, q_turned = (rng.normal(size=(length, heads, n)) for n in (nope, rope))
    x, scale = hidden(length), (nope + rope) ** -0.5
    method = js.hisa(top_k=9, block_kv=8, block_top_k=3, **INDEXER)
    params = params_of(method)
    arrays = (
        np.concatenate([np.einsum("thn,hln->thl", q_content, up_k), q_turned], -1),
        np.concatenate([content, turned], -1)[:, None],
        content[:, None],
    )
    q, k, v = (on_device(y, jnp.float32) for y in arrays)
    latents, info = method.attend(params, q, k, v, x=x, mask=CAUSAL, scale=scale)
    absorbed = np.einsum("thl,hln->thn", latents, up_v)
    full = (
        np.concatenate([q_content, q_turned], -1),
        np.concatenate(
            [np.einsum("tl,hln->thn", content, up_k), np.tile(turned[:, None], (1, heads, 1))], -1
        ),
        np.einsum("tl,hln->thn", content, up_v),
    )
    plan = select_tokens(info.indexed, top_k=9, block_kv=8, block_top_k=3, mask=CAUSAL)
    q, k, v = (on_device(y, jnp.float32) for y in full)
    plain = js.attend(q, k, v, plan, mask=CAUSAL, scale=scale, implementation="reference")
    np.testing.assert_allclose(absorbed, plain, atol=1e-4)


def test_the_first_stage_is_below_the_mean_of_the_second():
    """relu is convex: with weights that are not negative, a mean key scores at most the mean."""
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(6, 3, 8)), rng.normal(size=(32, 8))
    weights = np.abs(rng.normal(size=(6, 3)))
    q, weights, k = (on_device(x, jnp.float32) for x in (q, weights, k))

    def two_stages(k):
        fine = relu_weighted(q, weights, k).reshape(6, 4, 8).mean(-1)
        return relu_weighted(q, weights, k.reshape(4, 8, 8).mean(1)), fine

    coarse, fine = two_stages(k)
    assert (coarse < fine).all()
    np.testing.assert_allclose(*two_stages(jnp.repeat(k[:4], 8, axis=0)), atol=1e-5)


def test_what_leaves_the_selection_as_it_is():
    length = 60
    x = hidden(length)
    method = js.hisa(top_k=7, block_kv=8, block_top_k=3, **INDEXER)
    q, k, _ = qkv(length)
    indexed = method.plan(params_of(method), q, k, x=x, mask=CAUSAL)[1].indexed
    sizes = {"top_k": 7, "block_kv": 8, "block_top_k": 3, "mask": CAUSAL}
    plan = select_tokens(indexed, **sizes)
    longer = indexed._replace(weights=indexed.weights * jnp.arange(1, length + 1)[:, None])
    turned = indexed._replace(q=hadamard(indexed.q), k=hadamard(indexed.k))
    for changed in (longer, turned):
        np.testing.assert_array_equal(select_tokens(changed, **sizes).kv_indices, plan.kv_indices)
    scores = [relu_weighted(*given) for given in (indexed, turned)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    other = indexed._replace(weights=indexed.weights[:, ::-1])
    assert lists(select_tokens(other, **sizes)) != lists(plan)
    # as many tokens as there are, up to 7, the first and the last block among their blocks
    assert [len(row) for row in lists(plan)] == [min(t + 1, 7) for t in range(length)]
    # all of a block in the past, and nothing of what comes later, decides
    later = indexed._replace(k=indexed.k.at[45:].mul(-7.0))
    np.testing.assert_array_equal(
        select_tokens(later, **sizes).kv_indices[:, :45], plan.kv_indices[:, :45]
    )
    documents = CAUSAL & js.masks.segments(jnp.arange(length) // 25)
    for t, row in enumerate(lists(select_tokens(indexed, **{**sizes, "mask": documents}))):
        assert len(row) == min(t % 25 + 1, 7)
        assert all(t // 25 * 25 <= s <= t for s in row)


def test_without_a_mask_tokens_are_those_of_one_that_hides_nothing():
    """The first and the last block among those of every query, little as they score."""
    k = on_device([-1.0] * 2 + [5.0] * 4 + [-1.0] * 2)[:, None]
    sizes = {"top_k": 4, "block_kv": 2, "block_top_k": 2}
    one = Indexed(jnp.ones((1, 1, 2)), jnp.ones((1, 1)), jnp.tile(k, (1, 2)))
    for mask in (None, js.masks.full()):
        assert lists(select_tokens(one, mask=mask, **sizes)) == [[0, 1, 6, 7]]


@pytest.mark.parametrize("block_top_k", [3, None], ids=["two stages", "one stage"])
def test_keys_that_no_head_points_at_score_zero_and_tie(block_top_k):
    """Every product is negative, save with one key: of all others the first ones are taken."""
    k = -jnp.ones((24, 4))
    indexed = Indexed(jnp.ones((24, 2, 4)), on_device([[1.0, 0.5]] * 24), k)
    assert not relu_weighted(*indexed).any()
    sizes = {"top_k": 4, "block_kv": 4, "block_top_k": block_top_k, "mask": CAUSAL}
    for t, row in enumerate(lists(select_tokens(indexed, **sizes))):
        assert row == list(range(min(t + 1, 4)))
    one = indexed._replace(k=k.at[6].set(1.0))
    for t, row in enumerate(lists(select_tokens(one, **sizes))):
        assert row == ([0, 1, 2, 6] if t >= 6 else list(range(min(t + 1, 4))))


def test_the_loss_trains_the_indexer_alone_and_by_the_published_gradient():
    rows = on_device([[1.0, 0.0, 2.0]])
    target = np.array([0.2, 0.5, 0.3])
    # one head with weight 1 whose products are the scores; attention logits that give the target
    # (a query of one feature, keys of these numbers)
    indexed = Indexed(jnp.ones((1, 1, 1)), jnp.ones((1, 1)), rows[0][:, None] + 5)
    q = jnp.ones((1, 1, 1))
    k = jnp.log(on_device(target, jnp.float32))[:, None, None]
    gradient = jax.grad(lambda i: index_loss(i, q, k, scale=1.0))(indexed)
    expected = [0.044728, -0.409969, 0.365241]
    np.testing.assert_allclose(gradient.k[:, 0], expected, atol=1e-6)
    of_attention = jax.grad(lambda q, k: index_loss(indexed, q, k), argnums=(0, 1))
    d_q, d_k = jax.jit(of_attention)(q, k)
    assert not d_q.any()
    assert not d_k.any()
    length = 40
    q, k, v = qkv(length)
    x, method = hidden(length), js.hisa(top_k=8, block_kv=8, block_top_k=3, **INDEXER)
    params = params_of(method)

    def of_states(x):
        return index_loss(method.plan(params, q, k, x=x, mask=CAUSAL)[1].indexed, q, k)

    assert not jax.jit(jax.grad(of_states))(x).any()
    # through the output the indexer learns nothing; a few steps on the loss lower it
    of_output = jax.grad(lambda p: method.attend(p, q, k, v, x=x, mask=CAUSAL)[0].sum())
    through = jax.jit(of_output)(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(through))

    @jax.jit
    def step(params):
        def loss(params):
            plan, info = method.plan(params, q, k, x=x, mask=CAUSAL)
            return index_loss(info.indexed, q, k, plan, mask=CAUSAL)

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)

    losses = []
    for _ in range(8):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]


def test_the_loss_is_of_attention_with_capped_logits_and_sinks():
    length, sinks = 40, [-1.0, 0.5, 3.0, 1.0]
    q, k, _ = qkv(length)
    rng = np.random.default_rng(6)
    numbers = (
        rng.normal(size=(length, 3, 8)),
        rng.normal(size=(length, 3)),
        rng.normal(size=(40, 8)),
    )
    indexed = Indexed(*(on_device(x, jnp.float32) for x in numbers))
    plan = select_tokens(indexed, top_k=12, block_kv=8, block_top_k=3, mask=CAUSAL)
    every = [list(range(t + 1)) for t in range(length)]
    for given, chosen in ((plan, lists(plan)), (None, every)):
        for cap, of_heads in ((0.7, None), (None, sinks), (0.7, sinks)):
            logits = None if of_heads is None else on_device(of_heads)
            got = index_loss(indexed, q, k, given, mask=CAUSAL, softcap=cap, sinks=logits)
            wanted = oracle.loss(*numbers, q, k, chosen, cap=cap, sinks=of_heads)
            assert float(got) == pytest.approx(wanted, rel=1e-5)
    # a sink without end takes all of its head, of all heads everything
    endless = jnp.full(4, jnp.inf)
    one = endless.at[1].set(0.0)
    alone = index_loss(indexed, q[:, 1:2], k[:, :1], mask=CAUSAL, sinks=one[1:2])
    assert float(index_loss(indexed, q, k, mask=CAUSAL, sinks=one)) == pytest.approx(float(alone))
    value, gradient = jax.value_and_grad(index_loss)(indexed, q, k, mask=CAUSAL, sinks=endless)
    assert value == 0
    assert not any(x.any() for x in gradient)


def test_the_loss_over_all_tokens_makes_no_copy_of_the_keys_per_query():
    q, k, _ = qkv(1024, heads=8, kv_heads=8, dim=64)
    indexed = Indexed(jnp.ones((1024, 2, 8)), jnp.ones((1024, 2)), jnp.ones((1024, 8)))
    loss = jax.jit(lambda indexed, q, k: index_loss(indexed, q, k, mask=CAUSAL))
    memory = loss.lower(indexed, q, k).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * k.nbytes


@pytest.mark.parametrize("block_top_k", [4, None], ids=["two stages", "one stage"])
def test_neither_choice_nor_loss_holds_a_number_for_each_pair(block_top_k):
    """Nor is anything kept of the chunks, of which the loss computes its gradient once more."""
    length = 8192
    q, k, _ = (x.astype(jnp.bfloat16) for x in qkv(length, heads=2, kv_heads=1))
    indexed = Indexed(jnp.ones((length, 2, 8)), jnp.ones((length, 2)), jnp.ones((length, 8)))

    def choose(indexed):
        return select_tokens(indexed, top_k=32, block_kv=64, block_top_k=block_top_k, mask=CAUSAL)

    def loss(indexed, q, k):
        plan = None if block_top_k is None else choose(indexed)
        return index_loss(indexed, q, k, plan, mask=CAUSAL)

    for call, given in ((choose, (indexed,)), (jax.grad(loss), (indexed, q, k))):
        memory = jax.jit(call).lower(*given).compile().memory_analysis()
        assert memory.temp_size_in_bytes < length**2 / 4


def test_a_chunks_share_of_the_gradient_is_of_its_own_tokens():
    """Where it is one of all queries or keys, the gradient grows with the square of the length."""

    def work(length):
        """Operations, of which XLA counts those of a loop's step once."""
        indexed = Indexed(jnp.ones((length, 2, 8)), jnp.ones((length, 2)), jnp.ones((length, 8)))
        q, k, _ = qkv(length, heads=2, kv_heads=1)
        counts = jnp.full((1, length), 4, jnp.int32)
        tokens = jnp.broadcast_to(jnp.arange(4), (1, length, 4))
        plan = js.BlockMask(tokens, counts, jnp.zeros(1, bool), length, length, 1, 1)
        of_indexer = jax.jit(jax.grad(lambda *given: index_loss(*given, plan)))
        return of_indexer.lower(indexed, q, k).compile().cost_analysis()["flops"]

    assert work(2048) == work(1024)


@pytest.mark.parametrize(
    ("dtype", "power_of_two"),
    [
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, False, marks=pytest.mark.slow),
        pytest.param(jnp.float8_e4m3fn, False, marks=pytest.mark.slow),
        (jnp.float8_e4m3fn, True),
    ],
)
def test_steps_of_decoding_equal_the_whole(dtype, power_of_two):
    length, max_len = 40, 48
    q, k, v = qkv(length, batch=(2,))
    x = hidden(length, (2,))
    types = {"index_dtype": dtype, "power_of_two_scales": power_of_two}
    method = js.hisa(top_k=8, block_kv=8, block_top_k=3, **types, **INDEXER)
    params = params_of(method)
    whole, known = jax.jit(method.attend)(params, q, k, v, x=x, mask=CAUSAL)
    room = [(0, 0), (0, max_len - length), (0, 0), (0, 0)]
    k, v = jnp.pad(k, room, constant_values=9.0), jnp.pad(v, room, constant_values=7.0)

    @jax.jit
    def step(q, x, positions, state):
        mask = js.masks.causal(offset=positions[:, 0])
        inputs = {"x": x, "positions": positions, "mask": mask, "state": state}
        return method.attend(params, q, k, v, **inputs)

    # the keys that are stored have no more bits than those that are scored
    state, first = method.init_state(k, v), 0
    assert state.keys.numbers.dtype == (dtype or jnp.float32)
    for count in (27, 1, 1, 4, 1, 6):
        at = slice(first, first + count)
        positions = jnp.broadcast_to(jnp.arange(max_len)[at], (2, count))
        out, info = step(q[:, at], x[:, at], positions, state)
        np.testing.assert_allclose(out, whole[:, at], atol=5e-6)
        assert jax.tree.map(jnp.shape, info.state) == jax.tree.map(jnp.shape, state)
        state, first = info.state, first + count
        assert state.keys.numbers.dtype == (dtype or jnp.float32)
        np.testing.assert_array_equal(info.indexed.k[:, :first], state.keys.read()[:, :first])
        np.testing.assert_array_equal(state.keys.read()[:, :first], known.indexed.k[:, :first])
    assert first == length
    if power_of_two:
        assert (jnp.frexp(state.keys.scale[:, :length])[0] == 0.5).all()
        for once in (known.indexed.q, known.indexed.k):
            np.testing.assert_array_equal(once, rounded(once, dtype, power_of_two=True))


@pytest.mark.parametrize("dtype", [None, jnp.float8_e4m3fn])
def test_a_step_makes_the_newest_means_alone_and_chooses_by_those_it_is_given(dtype):
    """Of two sequences at places of their own; where no token is yet, nothing is read."""
    block, count, room, first = 8, 3, 53, np.array([22, 42])
    method = js.hisa(top_k=12, block_kv=block, block_top_k=3, index_dtype=dtype, **INDEXER)
    rng = np.random.default_rng(8)
    keys, means = rng.normal(size=(2, room, 8)), on_device(rng.normal(size=(2, 7, 8)), jnp.float32)
    later = np.arange(room) >= first[:, None]
    kept = stored(on_device(keys, jnp.float32), dtype)
    kept = jax.tree.map(
        lambda x: jnp.where(later.reshape(2, room, *[1] * (x.ndim - 2)), jnp.nan, x), kept
    )
    new = on_device(first[:, None] + np.arange(count), jnp.int32)

    @jax.jit
    def step(q, k, x, positions, state):
        mask = js.masks.causal(offset=positions[:, 0])
        given = {"x": x, "positions": positions, "mask": mask, "state": state}
        return method.plan(params_of(method), q, k, **given)

    q, k, _ = qkv(room, batch=(2,))
    plan, info = step(q[:, :count], k, hidden(count, (2,)), new, HisaState(kept, means))
    found, ends = np.float64(info.state.keys.read()), first + count
    assert np.isfinite(info.state.means).all()
    for n, (start, end) in enumerate(zip(first, ends, strict=True)):
        own, last = start // block, -(-end // block)
        np.testing.assert_array_equal(info.state.means[n, :own], means[n, :own])
        of_newest = [found[n, j * block : min(end, (j + 1) * block)] for j in range(own, last)]
        expected = np.stack([x.mean(0) for x in of_newest])
        np.testing.assert_allclose(info.state.means[n, own:last], expected, atol=1e-6)
        chosen = oracle.select(
            *(np.float64(x[n]) for x in info.indexed[:2]),
            found[n, :end],
            **{"top_k": 12, "block": block, "block_top_k": 3},
            means=np.float64(info.state.means[n, :last]),
        )
        assert lists(jax.tree.map(lambda x, n=n: x[n], plan)) == chosen


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_step_in_two_stages_makes_no_copy_of_the_keys(dtype):
    room = 2**14
    method = js.hisa(top_k=16, block_kv=64, block_top_k=2, index_dtype=dtype, **INDEXER)
    params, keys = params_of(method), jnp.zeros((room, 2, 16), jnp.bfloat16)

    def step(q, k, x, positions, state):
        given = {"x": x, "positions": positions, "state": state}
        plan, info = method.plan(params, q, k, mask=js.masks.causal(offset=positions[0]), **given)
        return plan, info.state

    state = method.init_state(keys, keys)
    given = jnp.zeros((1, 4, 16)), keys, hidden(1), jnp.array([9]), state
    memory = jax.jit(step, donate_argnums=4).lower(*given).compile().memory_analysis()
    assert memory.temp_size_in_bytes < state.keys.numbers.nbytes / 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_rounding_is_not_left_out_before_a_reduction(dtype):
    """As a compiler does with a conversion there and back, where loops are long enough."""
    x = on_device(np.random.default_rng(0).normal(size=(96, 96)), jnp.float32)

    def largest(x):
        return rounded(x, dtype).reshape(12, 8, 12, 8).max((1, 3))

    expected = np.asarray(rounded(x, dtype)).reshape(12, 8, 12, 8).max((1, 3))
    np.testing.assert_array_equal(jax.jit(largest)(x), expected)


def test_eight_bits():
    x = hidden(50) * on_device([1e-6, 1.0, 300.0] * 4)
    eight = rounded(x, jnp.float8_e4m3fn)
    # three bits behind the point: half a unit of the last is 1/16, of the largest at least
    largest = jnp.abs(x).max(-1, keepdims=True)
    assert (jnp.abs(eight - x) <= jnp.maximum(jnp.abs(x) / 16, largest * 2.0**-9 / 448)).all()
    by_two = rounded(x, jnp.float8_e4m3fn, power_of_two=True)
    assert (jnp.abs(by_two - x) <= jnp.maximum(jnp.abs(x) / 16, largest * 2.0**-8 / 448)).all()
    assert (jnp.abs(by_two - eight) > 0).any()
    np.testing.assert_array_equal(rounded(x, None), x)
    wider = rounded(x, jnp.float8_e5m2)
    assert (jnp.abs(wider - x) <= jnp.maximum(jnp.abs(x) / 8, largest * 2.0**-17 / 57344)).all()
    np.testing.assert_array_equal(rounded(x, jnp.bfloat16), x.astype(jnp.bfloat16))
    # most of the tokens are the same
    q, k, _ = qkv(90)
    exact, coarse = (
        js.hisa(top_k=20, block_kv=16, block_top_k=4, index_dtype=dtype, **INDEXER)
        for dtype in (None, jnp.float8_e4m3fn)
    )
    params = params_of(exact)
    plans = [
        jax.jit(method.plan)(params, q, k, x=hidden(90), mask=CAUSAL)[0]
        for method in (exact, coarse)
    ]
    overlap = float(list_overlap(*plans).mean())
    assert 0.8 < overlap < 1


def test_numbers_of_eight_bits_are_spread_over_all_features_first():
    """So that one that stands out does not take the bits of the others."""
    q, k, _ = qkv(9)
    exact, eight = (
        js.hisa(top_k=4, block_kv=4, block_top_k=2, index_dtype=dtype, **INDEXER)
        for dtype in (None, jnp.float8_e4m3fn)
    )
    params = params_of(exact)
    one, other = (
        jax.jit(method.plan)(params, q, k, x=hidden(9), mask=CAUSAL)[1].indexed
        for method in (exact, eight)
    )
    for whole, found in ((one.q, other.q), (one.k, other.k)):
        spread = np.float64(hadamard(whole))
        largest = np.abs(spread).max(-1, keepdims=True)
        # the numbers differ in their last bits, and may be rounded either way
        bound = np.maximum(np.abs(spread) / 16, largest * 2.0**-9 / 448) * (1 + 1e-4)
        assert (np.abs(np.float64(found) - spread) <= bound).all()
        assert (np.abs(np.float64(found) - np.float64(whole)) > largest / 4).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_gradients_pass_rounding_as_they_come(dtype):
    x = hidden(6, (2,))
    # less than the least number of eight bits, as the gradient of a mean over many tokens is
    weights = hidden(6, (2,), seed=4) * 1e-4

    def loss(x):
        return (rounded(x, dtype) * weights).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), weights)
    by_sequence = jax.vmap(jax.grad(lambda x, w: (rounded(x, dtype) * w).sum()))(x, weights)
    np.testing.assert_array_equal(by_sequence, weights)
    # and it reaches the indexer, of which only the numbers are rounded
    q, k, _ = qkv(40)

    def gradient(dtype):
        sizes = {"top_k": 40, "block_kv": 8, "block_top_k": 5}
        method = js.hisa(**sizes, index_dtype=dtype, **INDEXER)

        def of_indexer(params):
            _, info = method.plan(params, q, k, x=hidden(40), mask=CAUSAL)
            return index_loss(info.indexed, q, k, mask=CAUSAL)

        return jax.jit(jax.grad(of_indexer))(params_of(method))

    exact, coarse = gradient(None), gradient(dtype)
    for name, expected in exact.items():
        error = jnp.linalg.norm(coarse[name] - expected) / jnp.linalg.norm(expected)
        # two bits behind the point are off by an eighth at most, of q and of k
        assert error < 1 / 4, name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"block_kv": 0}, "block_kv=0"),
        ({"block_top_k": 1}, "block_top_k=1 must be at least 2"),
        ({"top_k": 25, "block_kv": 8, "block_top_k": 3}, "top_k=25 tokens are more .* hold, 24"),
        ({"index_dtype": "int8"}, "index_dtype=int8"),
        ({"index_dtype": "float8_e4m3fnuz"}, "with two zeros"),
        ({"rotary_dim": 3}, "rotary_dim=3 must be a multiple of 2"),
        ({"rotary_dim": 256}, "rotary_dim=256"),
        ({"rope_base": 0.0}, "rope_base=0.0"),
        ({"index_dtype": "bfloat16", "power_of_two_scales": True}, "power_of_two_scales=True"),
        ({"index_dim": 96, "index_dtype": "float8_e4m3fn"}, "index_dim=96 must be a power of two"),
    ],
)
def test_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        js.hisa(**options)


def test_bad_numbers_of_tokens():
    for top_k, block_top_k, says in ((0, 3, "top_k=0"), (0, None, "top_k=0"), (5, 2, "hold, 4")):
        with pytest.raises(ValueError, match=says):
            select_tokens(WORKED, top_k=top_k, block_kv=2, block_top_k=block_top_k)
    # a number that no query has tokens for is all of them
    every = select_tokens(WORKED, top_k=100, block_kv=2, block_top_k=4, mask=CAUSAL)
    assert lists(every) == [list(range(t + 1)) for t in range(8)]
    assert js.hisa(top_k=24, block_kv=8, block_top_k=3)
    assert js.hisa(top_k=2**20, block_kv=8, block_top_k=None)


def test_bad_calls():
    q, k, v = qkv(20, 24)
    method = js.hisa(top_k=4, **INDEXER)
    params = params_of(method)
    with pytest.raises(ValueError, match=r"pass x \(20, 12\)"):
        method.attend(params, q, k, v)
    with pytest.raises(ValueError, match="20 queries, and 24 keys"):
        method.attend(params, q, k, v, x=hidden(20))
    tiles = js.block_mask(CAUSAL, 20, 24, block_q=4, block_kv=4)
    with pytest.raises(ValueError, match=r"tiles of 4 x 4"):
        index_loss(WORKED, q, k, tiles)
    q, k, _ = qkv(8)
    with pytest.raises(ValueError, match=r"softcap=0"):
        index_loss(WORKED, q, k, softcap=0.0)
    for heads in (2, 3):
        mask = js.masks.head_windows(num_sink=[0] * heads, window=[4] * heads)
        with pytest.raises(ValueError, match=f"The mask has {heads} heads; expected 1 or heads=4"):
            index_loss(WORKED, q, k, mask=mask)


def test_the_loss_refuses_an_indexer_or_lists_of_other_tokens():
    q, k, _ = qkv(8, batch=(2,))
    indexed = jax.tree.map(lambda x: jnp.stack([x, x]), WORKED)
    sizes = {"top_k": 3, "block_kv": 2, "block_top_k": 3}
    assert index_loss(indexed, q, k, select_tokens(indexed, **sizes)) > 0
    short = indexed._replace(q=indexed.q[:, :5], weights=indexed.weights[:, :5])
    others = {
        r"\(2, 5\), \(2, 5\) and \(2, 8\); q and k have \(2, 8\)": short,
        r"\(2, 8\), \(2, 5\)": indexed._replace(weights=short.weights),
        r"and \(2, 7\); q": indexed._replace(k=indexed.k[:, 1:]),
        r"tokens \(8,\)": WORKED,
    }
    for says, other in others.items():
        with pytest.raises(ValueError, match=says):
            index_loss(other, q, k)
    for other in (short, indexed._replace(k=jnp.tile(indexed.k, (1, 2, 1)))):
        with pytest.raises(ValueError, match="The plan was made for"):
            index_loss(indexed, q, k, select_tokens(other, **sizes))
