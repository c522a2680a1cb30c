"""NSA against its oracle, and the checks of its specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.rotary import rotary
from jsparse.core.tile_scores import block_importance
from jsparse.core.windows import Windows
from jsparse.hierarchical.nsa import Tokens
from tests.inputs import on_device, qkv
from tests.oracles import nsa as oracle

CAUSAL = js.masks.causal()
SIZES = {"top_k": 4, "num_init": 1, "num_local": 2, "window": 24}
SMALL = {"compression_size": 8, "stride": 4, "block_kv": 16, **SIZES}
IN_LOOPS = {"size": 8, "stride": 4, "block": 16, **SIZES}
FEATURES = 12


# a method outside of jit is hundreds of programs; what tests do not change is compiled once
METHOD = js.nsa(**SMALL)
attended = jax.jit(METHOD.attend)


def hidden(length, batch=(), seed=3):
    rng = np.random.default_rng(seed)
    return on_device(rng.normal(size=(*batch, length, FEATURES)), jnp.float32)


def params_of(method, heads=4, dim=16):
    sizes = {"num_heads": heads, "num_kv_heads": 2, "dim": dim, "features": FEATURES}
    return unlike_at_first(method.init(jax.random.key(0), **sizes))


def unlike_at_first(params):
    """Weights are equal at first, positions zero and gates near a half: values that say more."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + on_device(rng.normal(size=x.shape) * 0.1, x.dtype), params)


def of_branches(*lengths, **sizes):
    """Queries, keys and values of three branches that have nothing in common."""
    return tuple(Tokens(*qkv(*lengths, **sizes, seed=seed)) for seed in (0, 1, 2))


def assert_lists(plan, chosen):
    for (row, head), blocks in chosen.items():
        count = int(plan.kv_num_blocks[head, row])
        assert plan.kv_indices[head, row, :count].tolist() == blocks


def phi(name, params):
    """A compression in float64, from its parameters."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def placed(window, head):
        return window + p["positions"][:, head]

    return {
        "mean": lambda window, head: window.mean(0),
        "weighted": lambda window, head: p["weights"][:, head] @ placed(window, head),
        "linear": lambda window, head: sum(
            token @ p["kernel"][s, head] for s, token in enumerate(placed(window, head))
        ),
        "mlp": lambda window, head: (
            np.maximum(np.einsum("sd,sde->e", placed(window, head), p["hidden"]) + p["bias"], 0)
            @ p["kernel"]
        ),
    }[name]


@pytest.mark.parametrize("name", ["mean", "weighted", "linear", "mlp"])
def test_branches_blocks_and_gates_equal_the_oracle(name):
    q_len, kv_len = 70, 90
    q, k, v = qkv(q_len, kv_len, v_dim=8, heads=4, kv_heads=2)
    compression = getattr(js.windows, name)()
    method = js.nsa(compression=compression, **SMALL)
    # values may be of another width than keys
    of_v = unlike_at_first(compression.init(jax.random.key(1), size=8, heads=2, dim=8))
    params = {**params_of(method), "v": of_v}
    x = hidden(q_len)
    run = jax.jit(lambda params, q, k, v, x: method.attend(params, q, k, v, x=x, mask=CAUSAL))
    out, info = run(params, q, k, v, x)
    plan, _ = jax.jit(method.plan)(params, q, k, v=v, mask=CAUSAL)
    outputs, chosen = oracle.branches(
        q, k, v, phi_k=phi(name, params["k"]), phi_v=phi(name, params["v"]), **IN_LOOPS
    )
    assert_lists(plan, chosen)
    assert {len(blocks) for blocks in chosen.values()} == {2, 3, 4}
    np.testing.assert_allclose(out, oracle.mix(outputs, x, params["gates"]), atol=5e-6)
    assert info.state.k.shape == (Windows(8, 4).count(kv_len), 2, 16)


@pytest.mark.parametrize("group", [1, pytest.param(3, marks=pytest.mark.slow), 16])
def test_branches_with_keys_and_values_of_their_own_equal_the_oracle(group):
    """As in the paper, for groups of one head, of its 16, and of a number that no tile has."""
    q_len, kv_len, heads = 50, 66, 2 * group
    first, (q, k, v), last = of_branches(q_len, kv_len, heads=heads, kv_heads=2, dim=8)
    method = js.nsa(**SMALL)
    params, x = params_of(method, heads, 8), hidden(q_len)
    given = {"compressed": first, "local": last, "x": x}

    run = jax.jit(lambda params, q, k, v, given: method.attend(params, q, k, v, **given))
    out, info = run(params, q, k, v, given)
    of_windows = {"phi_k": phi("mlp", params["k"]), "phi_v": phi("mlp", params["v"])}
    outputs, chosen = oracle.branches(
        q, k, v, **of_windows, **IN_LOOPS, compressed=first, local=last
    )
    assert_lists(info.branches[1].plan, chosen)
    np.testing.assert_allclose(out, oracle.mix(outputs, x, params["gates"]), atol=5e-6)


@pytest.mark.parametrize(
    ("convention", "given"),
    [
        ("with positions", False),
        ("placed windows", False),
        ("placed windows", True),
        ("no positions", False),
    ],
)
def test_rotary_positions_of_the_compressed_branch(convention, given):
    """What fla-org, XunhaoLai and lucidrains do: from a layer's q and k, and from one's own."""
    q_len, kv_len, base = 50, 66, 20.0
    q, k, v = qkv(q_len, kv_len)
    at_q, at_k = np.arange(16, 66), np.arange(66)
    turned = oracle.rotated(q, at_q, base), oracle.rotated(k, at_k, base)
    sees = {
        "with positions": (*turned, v),
        "placed windows": (turned[0], k, v),
        "no positions": (q, k, v),
    }[convention]
    places = convention == "placed windows"
    options = {
        "with positions": {},
        "placed windows": {"rope_base": base},
        "no positions": {"rope_base": base, "turn_windows": False},
    }[convention]
    method = js.nsa(**SMALL, **options)
    params, x = params_of(method), hidden(q_len)
    tokens = tuple(on_device(y, jnp.float32) for y in sees) if given else None
    run = jax.jit(lambda q, k, v, x, tokens: method.attend(params, q, k, v, x=x, compressed=tokens))
    out, _ = run(*(on_device(y, jnp.float32) for y in turned), v, x, tokens)
    of_windows = {"phi_k": phi("mlp", params["k"]), "phi_v": phi("mlp", params["v"])}
    outputs, _ = oracle.branches(
        *turned, v, **of_windows, **IN_LOOPS, compressed=sees,
        place=lambda keys: oracle.rotated(keys, 4 * np.arange(len(keys)), base) if places else keys,
    )  # fmt: skip
    np.testing.assert_allclose(out, oracle.mix(outputs, x, params["gates"]), atol=5e-6)


def test_what_one_branch_is_given_no_other_sees():
    first, own, last = of_branches(90)
    method = js.nsa(**SMALL)
    params = params_of(method)
    x = jnp.ones((90, FEATURES))

    @jax.jit
    def gated(gates, first, own, last):
        given = {"x": x, "compressed": first, "local": last}
        return method.attend({**params, "gates": gates}, *own, **given)[0]

    # of 1 for one branch, of 0 for the others
    gates = np.full((3, FEATURES, 4, 3), -1e3, np.float32)
    gates[range(3), ..., range(3)] = 1e3

    def each(*tokens):
        return np.stack([gated(one, *tokens) for one in gates])

    before = each(first, own, last)

    def changed(*tokens):
        return (each(*tokens) != before).any((1, 2, 3)).tolist()

    def later(x):
        # unlike before, and in another order
        return 2 * jnp.flip(x, 0)

    assert changed(first, own, last._replace(v=later(last.v))) == [False, False, True]
    assert changed(first, own, last._replace(k=later(last.k))) == [False, False, True]
    assert changed(first, own._replace(v=later(own.v)), last) == [False, True, False]
    assert changed(first, own._replace(k=later(own.k)), last) == [False, True, False]
    assert changed(first._replace(v=later(first.v)), own, last) == [True, False, False]
    # what the compressed branch finds is what is selected
    assert changed(first._replace(k=later(first.k)), own, last) == [True, True, False]
    assert changed(first._replace(q=later(first.q)), own, last) == [True, True, False]


def test_projections_of_its_own_are_what_could_be_given():
    """Keys and values of hidden states, the local keys with positions, which all learn."""
    length, base = 50, 20.0
    q, k, v = qkv(length)
    x = hidden(length)
    sizes = {**SMALL, "rope_base": base, "compression": js.windows.mean()}
    method, plain = js.nsa(**sizes, own_projections=True), js.nsa(**sizes)
    params = params_of(method)

    @jax.jit
    def by_hand(params, q, k, v, x):
        made = jax.tree.map(lambda kernel: jnp.tensordot(x, kernel, 1), params["own"])
        first, last = made["compressed"], made["local"]
        turned = rotary(last["k"], jnp.arange(length), base=base)
        given = {
            "compressed": Tokens(q, first["k"], first["v"]),
            "local": Tokens(q, turned, last["v"]),
        }
        return plain.attend(params, q, k, v, x=x, **given)[0]

    def itself(params, q, k, v, x):
        out = method.attend(params, q, k, v, x=x)[0]
        return jnp.sin(out).sum(), out

    gradients, out = jax.jit(jax.grad(itself, has_aux=True))(params, q, k, v, x)
    np.testing.assert_allclose(out, by_hand(params, q, k, v, x), atol=5e-6)
    # all of them learn
    assert len(jax.tree.leaves(gradients["own"])) == 4
    assert all(np.abs(y).max() > 1e-3 for y in jax.tree.leaves(gradients))


def test_worked_mapping():
    importance = np.arange(1, 8) / 28
    expected = oracle.block_scores(importance, 2, size=32, stride=16, block=64)
    np.testing.assert_allclose(expected * 28, [16, 40])
    # a window before the first, and one that is not complete
    padded = jnp.pad(on_device(importance, jnp.float32), 1)[None]
    scores = block_importance(padded, Windows(32, 16), 64)[0]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert float(scores.sum()) == pytest.approx(2.0)


def test_worked_example():
    # one key per token, windows and blocks of two, the current block forced
    q = jnp.zeros((6, 2, 1)).at[5, :, 0].set(on_device([1.0, 2.0]))
    k = on_device([1, 1, 0, 0, 2, 2], jnp.float32)[:, None, None]
    v = jnp.arange(6, dtype=jnp.float32)[:, None, None]
    method = js.nsa(
        compression=js.windows.mean(),
        **{"compression_size": 2, "stride": 2, "block_kv": 2, "top_k": 2},
        **{"num_init": 0, "num_local": 1, "window": 2},
    )
    params = {"k": (), "v": (), "gates": jnp.zeros((1, 2, 3))}

    @jax.jit
    def branch(which):
        # a gate of 1 for one branch, of 0 for the others
        gates = jnp.full((1, 2, 3), -1e9).at[..., which].set(1e9)
        x = jnp.ones((6, 1))
        return method.attend({**params, "gates": gates}, q, k, v, x=x, scale=1.0)[0][5, :, 0]

    np.testing.assert_allclose(branch(0), [3.341025, 3.999006], atol=1e-6)
    np.testing.assert_allclose(branch(1), [3.424234, 4.023188], atol=1e-6)
    np.testing.assert_allclose(branch(2), [4.5, 4.5], atol=1e-6)
    plan, info = method.plan(params, q, k, v=v)
    assert plan.kv_indices[0, 5].tolist() == [0, 2]
    # of the first block and of the last, which is forced
    np.testing.assert_allclose(info.block_scores[0, 5], [0.362039, 1.532054], atol=1e-6)
    every = js.nsa(
        compression=js.windows.mean(),
        **{"compression_size": 2, "stride": 2, "block_kv": 2, "top_k": 3, "num_init": 0},
        num_local=1,
    )
    _, of_all = every.plan(params, q, k, v=v)
    np.testing.assert_allclose(of_all.block_scores[0, 5], [0.362039, 0.105907, 1.532054], atol=1e-6)
    np.testing.assert_allclose(info.state.k[:, 0, 0], [1, 0, 2])


def test_branches_reduce_to_dense_and_to_the_window():
    q, k, v = qkv(90)
    x = jnp.ones((90, FEATURES))

    def gated(branch, **sizes):
        method = js.nsa(**{**SMALL, **sizes})
        params = params_of(method)
        gates = np.full((FEATURES, 4, 3), -1e3)
        gates[..., branch] = 1e3
        given = {**params, "gates": on_device(gates, jnp.float32)}
        return jax.jit(method.attend)(given, q, k, v, x=x)[0]

    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    np.testing.assert_allclose(gated(1, top_k=6), dense, atol=4e-6)
    np.testing.assert_allclose(gated(2, window=90), dense, atol=4e-6)
    local = js.masks.sliding_window(left=23)
    expected = js.attend(q, k, v, mask=local, implementation="reference")
    np.testing.assert_allclose(gated(2), expected, atol=4e-6)


def test_rows_before_the_first_window_have_no_compressed_part():
    q, k, v = qkv(40)
    params = params_of(METHOD)
    only = {**params, "gates": jnp.full((FEATURES, 4, 3), -1e3).at[..., 0].set(1e3)}
    x = jnp.ones((40, FEATURES))

    def loss(q):
        out = METHOD.attend(only, q, k, v, x=x)[0]
        return out.sum(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(q)
    assert not out[:7].any()
    assert out[7:].all()
    assert jnp.isfinite(gradient).all()
    # fewer keys than a window: there is nothing compressed at all
    short = attended(only, q[:5], k[:5], v[:5], x=x[:5])[0]
    assert not short.any()


def test_heads_of_a_group_share_blocks_whatever_their_order():
    q, k, _ = qkv(90)
    params = params_of(METHOD)
    chosen = jax.jit(METHOD.plan)
    plan, _ = chosen(params, q, k)
    swapped, _ = chosen(params, q[:, on_device([1, 0, 3, 2])], k)
    assert plan.list_heads == 2
    np.testing.assert_array_equal(plan.kv_indices, swapped.kv_indices)


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_gradients_are_those_of_masked_dense_attention(separate):
    """With the blocks as they are, by autodiff of dense attention under their mask."""
    length = 70
    own, first, last = of_branches(length)
    given = {"compressed": first, "local": last} if separate else {}
    x = hidden(length)
    method = js.nsa(**SMALL)
    params = params_of(method)
    plan, _ = jax.jit(method.plan)(params, own.q, own.k, **given)
    windows = Windows(8, 4)
    seen = js.masks.whole_windows(CAUSAL, size=8, stride=4, kv_len=length)

    def dense(params, own, x, given):
        options = {"implementation": "reference"}
        first, last = given.get("compressed", own), given.get("local", own)
        pair = [
            js.windows.mlp().apply(params[name], windows.of(y))
            for name, y in (("k", first.k), ("v", first.v))
        ]
        outputs = (
            js.attend(first.q, *pair, mask=seen, **options),
            js.attend(*own, plan, mask=CAUSAL, **options),
            js.attend(*last, mask=js.masks.sliding_window(left=23), **options),
        )
        gates = jax.nn.sigmoid(jnp.einsum("tf,fhb->bth", x, params["gates"]))
        return sum(g[..., None] * o for g, o in zip(gates, outputs, strict=True))

    def sparse(params, own, x, given):
        return method.attend(params, *own, x=x, **given)[0]

    def gradients(function):
        def loss(*inputs):
            return jnp.sin(function(*inputs)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(params, own, x, given)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5),
        gradients(sparse),
        gradients(dense),
    )


def test_a_mask_hides_windows_of_which_it_hides_a_key():
    length = 80
    q, k, v = qkv(length)
    ids = on_device(np.repeat([0, 1, 2], [21, 30, 29]))
    method = js.nsa(**{**SMALL, "num_init": 0})
    params, x = params_of(method), hidden(length)
    run = jax.jit(method.attend)
    mask = CAUSAL & js.masks.segments(ids)
    run = jax.jit(lambda q, k, v: method.attend(params, q, k, v, x=x, mask=mask)[0])
    out = run(q, k, v)
    # a mask of which nothing is known but its pairs hides the same
    pairs = CAUSAL & js.masks.predicate(lambda b, h, i, j: ids[i] == ids[j])
    same = jax.jit(lambda q, k, v: method.attend(params, q, k, v, x=x, mask=pairs)[0])(q, k, v)
    np.testing.assert_allclose(same, out, atol=4e-6)
    # what another document says changes nothing
    other = ids[:, None, None] == 1
    changed = run(q, jnp.where(other, k + 1, k), jnp.where(other, v - 2, v))
    np.testing.assert_array_equal(changed[:21], out[:21])
    np.testing.assert_array_equal(changed[51:], out[51:])
    assert not np.allclose(changed[21:51], out[21:51])


@pytest.mark.parametrize("told", ["documents", "heads"])
def test_blocks_that_a_mask_hides_whole_take_no_place_of_others(told):
    length = 150
    q, k, v = qkv(length, heads=4, kv_heads=2)
    ids = np.repeat([0, 1, -1], [37, 100, 13])
    windows = [150, 40, 30, 70]
    masks = {
        "documents": js.masks.segments(on_device(ids)),
        # heads of a group choose from what either sees
        "heads": js.masks.head_windows(num_sink=[0, 0, 0, 0], window=windows),
    }

    def sees(head, row, token):
        if told == "heads":
            return row - token < windows[head]
        return ids[row] == ids[token] >= 0

    method = js.nsa(compression=js.windows.mean(), **SMALL)
    params, x = params_of(method), hidden(length)
    run = jax.jit(lambda q, k, v: method.attend(params, q, k, v, x=x, mask=masks[told]))
    out, _ = run(q, k, v)
    plan, _ = jax.jit(method.plan)(params, q, k, v=v, mask=masks[told])
    means = {"phi_k": phi("mean", ()), "phi_v": phi("mean", ())}
    outputs, chosen = oracle.branches(q, k, v, **means, **IN_LOOPS, sees=sees)
    assert_lists(plan, chosen)
    np.testing.assert_allclose(out, oracle.mix(outputs, x, params["gates"]), atol=5e-6)
    # in the second document the first block of all is hidden, and four others are chosen
    if told == "documents":
        assert chosen[130, 0][0] > 1
        assert len(chosen[130, 0]) == 4
        assert not chosen[145, 0]


def test_steps_of_decoding_equal_the_whole_and_add_to_the_state():
    length, max_len = 60, 72
    q, k, v = qkv(length, batch=(2,))
    x = hidden(length, (2,))
    method = js.nsa(**SMALL)
    params = params_of(method)
    whole = np.asarray(jax.jit(method.attend)(params, q, k, v, x=x)[0])
    room = [(0, 0), (0, max_len - length), (0, 0), (0, 0)]
    k, v = jnp.pad(k, room), jnp.pad(v, room, constant_values=7.0)

    @jax.jit
    def step(q, x, positions, state):
        # what comes later is not there yet
        past = jnp.arange(max_len)[None, :, None, None] <= positions[:, -1, None, None, None]
        keys, values = jnp.where(past, k, 0), jnp.where(past, v, 0)
        mask = js.masks.causal(offset=positions[:, 0])
        return METHOD.attend(
            params, q, keys, values, x=x, positions=positions, mask=mask, state=state
        )

    state = METHOD.init_state(k, v)
    first = 0
    for count in (29, 1, 1, 6, *[1] * 23):
        at = slice(first, first + count)
        positions = jnp.broadcast_to(jnp.arange(max_len)[at], (2, count))
        out, info = step(q[:, at], x[:, at], positions, state)
        np.testing.assert_allclose(out, whole[:, at], atol=5e-6)
        state, first = info.state, first + count
    assert first == length


def test_a_step_makes_the_windows_that_it_completes_and_no_others():
    """Of older tokens nothing is read: they may be gone."""
    q, k, v = qkv(44)
    params = params_of(METHOD)
    made = jax.jit(METHOD.plan)(params, q, k, v=v)[1].state
    windows = np.arange(len(made.k))[:, None, None]
    # tokens 36 to 43 are in the last window, which the last query completes
    before = jax.tree.map(lambda x: jnp.where(windows < 9, x, 0), made)
    gone = jnp.arange(44)[:, None, None] < 36
    pair = (jnp.where(gone, jnp.nan, x) for x in (k, v))
    step = jax.jit(lambda q, k, v: METHOD.plan(params, q, k, v=v, state=before)[1].state)
    after = step(q[43:], *pair)
    for found, known, whole in zip(after, before, made, strict=True):
        np.testing.assert_array_equal(found[:9], known[:9])
        np.testing.assert_allclose(found[9:], whole[9:], atol=1e-6)


@pytest.mark.parametrize("kind", ["choice", pytest.param("gradient", marks=pytest.mark.slow)])
def test_memory_is_not_that_of_all_scores(kind):
    """Neither probabilities of windows nor scores of blocks are ever all there."""
    length, heads, dim = 2**13, 4, 16
    method = js.nsa(**{**SMALL, "compression": js.windows.mean()})
    params = params_of(method, heads, dim)

    def choice(q, k, v, x):
        return method.plan(params, q, k, v=v)[0].kv_indices

    def total(q, k, v, x):
        return method.attend(params, q, k, v, x=x)[0].sum()

    call = {"choice": choice, "gradient": jax.grad(total, argnums=(0, 1, 2))}[kind]
    shapes = (heads, dim), (2, dim), (2, dim), (FEATURES,)
    given = (jax.ShapeDtypeStruct((length, *shape), jnp.float32) for shape in shapes)
    memory = jax.jit(call).lower(*given).compile().memory_analysis()
    # a number per query, head and window would be 128 arrays of the size of q
    most = {"choice": 4, "gradient": 32}[kind]
    assert memory.temp_size_in_bytes < most * length * heads * dim * 4


@pytest.mark.parametrize("own_projections", [pytest.param(False, marks=pytest.mark.slow), True])
def test_branches_that_see_other_tokens_decode_too(own_projections):
    """Windows are turned, local tokens given; or the method makes both, without positions."""
    length, max_len, base = 34, 40, 20.0
    own, _, last = of_branches(max_len, batch=(2,))
    x = hidden(max_len, (2,))
    options = {"own_projections": own_projections, "turn_windows": not own_projections}
    method = js.nsa(**SMALL, rope_base=base, **options)
    params = params_of(method)
    given = {} if own_projections else {"local": last}

    @jax.jit
    def whole(x, own, given):
        return method.attend(params, *own, x=x, **given)[0]

    @jax.jit
    def step(x, own, given, state, index):
        def of_row(y):
            return jax.lax.dynamic_slice_in_dim(y, index, 1, axis=1)

        def so_far(tokens):
            # what comes later is not there yet
            there = jnp.arange(max_len)[:, None, None] <= index
            k, v = (jnp.where(there, y, 0) for y in tokens[1:])
            return Tokens(of_row(tokens.q), k, v)

        positions = jnp.broadcast_to(index, (2, 1))
        others = {name: so_far(tokens) for name, tokens in given.items()}
        attend = functools.partial(method.attend, params, *so_far(own), x=of_row(x), **others)
        return attend(positions=positions, state=state)

    expected = np.asarray(whole(x, own, given))
    state = method.init_state(own.k, own.v)
    kinds = jax.tree.structure(state)
    for index in range(length):
        out, info = step(x, own, given, state, index)
        state = info.state
        np.testing.assert_allclose(out[:, 0], expected[:, index], atol=5e-6)
    assert jax.tree.structure(state) == kinds


@pytest.mark.slow
def test_bfloat16_is_as_good_as_plain_bfloat16():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(90))
    x = hidden(90)
    # every block, so that near ties choose nothing
    method = js.nsa(compression=js.windows.mean(), **{**SMALL, "top_k": 6})
    params = params_of(method)
    run = jax.jit(method.attend)
    out = run(params, q, k, v, x=x)[0]
    assert out.dtype == jnp.bfloat16
    exact = run(params, *(y.astype(jnp.float32) for y in (q, k, v)), x=x)[0]
    rounding = jnp.abs(exact.astype(jnp.bfloat16).astype(jnp.float32) - exact).max()
    # compressed keys and values are rounded too, and so are the outputs of three branches
    assert jnp.abs(out.astype(jnp.float32) - exact).max() <= 8 * rounding


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stride": 0}, "stride=0"),
        ({"compression_size": 24}, "compression_size=24 must be a multiple of 16"),
        ({"block_kv": 40}, "block_kv=40 must be a multiple of 16"),
        ({"top_k": 2}, "top_k=2 blocks must have room for num_init=1 and num_local=2"),
        ({"num_local": 0}, "num_local=0"),
        ({"window": 0}, "window=0"),
        ({"num_init": -1}, "num_init=-1"),
        ({"rope_base": 0.0}, "rope_base=0.0"),
    ],
)
def test_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        js.nsa(**options)


def test_what_branches_cannot_have():
    q, k, v = qkv(20)
    method = js.nsa(**SMALL)
    params, x = params_of(method), hidden(20)
    with pytest.raises(ValueError, match=r"pass x \(20, 12\)"):
        method.attend(params, q, k, v)
    with pytest.raises(ValueError, match=r"x \(19, 12\) must be \(20, 12\)"):
        method.attend(params, q, k, v, x=x[:19])
    with pytest.raises(ValueError, match="bias changes the logits of single keys"):
        method.attend(params, q, k, v, x=x, bias=jnp.zeros((4, 20, 20)))
    with pytest.raises(ValueError, match="return_lse=True"):
        method.attend(params, q, k, v, x=x, return_lse=True)
    with pytest.raises(ValueError, match="hidden=0"):
        js.windows.mlp(hidden=0)


def test_tokens_that_do_not_fit_their_branch():
    q, k, v = qkv(20)
    method, own = js.nsa(**SMALL), js.nsa(**SMALL, own_projections=True)
    x = hidden(20)
    with pytest.raises(ValueError, match=r"local has shapes .*\(19, 2, 16\).* must be .*\(20, 2"):
        method.attend(params_of(method), q, k, v, x=x, local=Tokens(q, k[1:], v[1:]))
    with pytest.raises(ValueError, match=r"compressed has shapes .* a query, key and value"):
        method.plan(params_of(method), q, k, compressed=(k, v))
    with pytest.raises(ValueError, match="local is given, and own_projections=True makes it"):
        own.attend(params_of(own), q, k, v, x=x, local=Tokens(q, k, v))
    with pytest.raises(ValueError, match="hidden states of 9 queries, and 20 keys need some"):
        own.attend(params_of(own), q[11:], k, v, x=x[11:])
    with pytest.raises(ValueError, match=r"pass x \(20, 12\)"):
        own.plan(params_of(own), q, k)
    with pytest.raises(ValueError, match="dim=15 must be a multiple of 2"):
        params_of(js.nsa(**SMALL, rope_base=20.0), dim=15)
