"""NSA against its oracle, and the checks of its specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.tile_scores import block_importance
from jsparse.core.windows import Windows
from tests.inputs import on_device, qkv
from tests.oracles import nsa as oracle

CAUSAL = js.masks.causal()
SIZES = {"top_k": 4, "num_init": 1, "num_local": 2, "window": 24}
SMALL = {"compression_size": 8, "stride": 4, "block_kv": 16, **SIZES}
FEATURES = 12


# a method outside of jit is hundreds of programs; what tests do not change is compiled once
METHOD = js.nsa(**SMALL)
attended = jax.jit(METHOD.attend)


def hidden(length, batch=(), seed=3):
    rng = np.random.default_rng(seed)
    return on_device(rng.normal(size=(*batch, length, FEATURES)), jnp.float32)


def params_of(method):
    params = method.init(jax.random.key(0), num_heads=4, num_kv_heads=2, dim=16, features=FEATURES)
    return unlike_at_first(params)


def unlike_at_first(params):
    """Weights are equal at first, positions zero and gates near a half: values that say more."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + on_device(rng.normal(size=x.shape) * 0.1, x.dtype), params)


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
    sizes = {"size": 8, "stride": 4, "block": 16, **SIZES}
    outputs, chosen = oracle.branches(
        q, k, v, phi_k=phi(name, params["k"]), phi_v=phi(name, params["v"]), **sizes
    )
    for (row, head), blocks in chosen.items():
        count = int(plan.kv_num_blocks[head, row])
        assert plan.kv_indices[head, row, :count].tolist() == blocks
    assert {len(blocks) for blocks in chosen.values()} == {2, 3, 4}
    np.testing.assert_allclose(out, oracle.mix(outputs, x, params["gates"]), atol=5e-6)
    assert info.state.k.shape == (Windows(8, 4).count(kv_len), 2, 16)


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


def test_gradients_are_those_of_masked_dense_attention():
    """With the blocks as they are, by autodiff of dense attention under their mask."""
    length = 70
    q, k, v = qkv(length)
    x = hidden(length)
    params = params_of(METHOD)
    plan, _ = jax.jit(METHOD.plan)(params, q, k)
    windows = Windows(8, 4)
    seen = js.masks.whole_windows(CAUSAL, size=8, stride=4, kv_len=length)

    def dense(params, q, k, v, x):
        options = {"implementation": "reference"}
        pair = [
            js.windows.mlp().apply(params[name], windows.of(y)) for name, y in (("k", k), ("v", v))
        ]
        outputs = (
            js.attend(q, *pair, mask=seen, **options),
            js.attend(q, k, v, plan, mask=CAUSAL, **options),
            js.attend(q, k, v, mask=js.masks.sliding_window(left=23), **options),
        )
        gates = jax.nn.sigmoid(jnp.einsum("tf,fhb->bth", x, params["gates"]))
        return sum(g[..., None] * o for g, o in zip(gates, outputs, strict=True))

    def sparse(params, q, k, v, x):
        return METHOD.attend(params, q, k, v, x=x)[0]

    def gradients(function):
        def loss(*inputs):
            return jnp.sin(function(*inputs)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(params, q, k, v, x)

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
    out = run(params, q, k, v, x=x, mask=mask)[0]
    # a mask of which nothing is known but its pairs hides the same
    pairs = CAUSAL & js.masks.predicate(lambda b, h, i, j: ids[i] == ids[j])
    same = run(params, q, k, v, x=x, mask=pairs)[0]
    np.testing.assert_allclose(same, out, atol=4e-6)
    # what another document says changes nothing
    other = ids[:, None, None] == 1
    changed = run(
        params, q, jnp.where(other, k + 1, k), jnp.where(other, v - 2, v), x=x, mask=mask
    )[0]
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
    sizes = {"size": 8, "stride": 4, "block": 16, **SIZES}
    outputs, chosen = oracle.branches(q, k, v, **means, **sizes, sees=sees)
    for (row, head), blocks in chosen.items():
        count = int(plan.kv_num_blocks[head, row])
        assert plan.kv_indices[head, row, :count].tolist() == blocks
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
    params = params_of(METHOD)
    whole, _ = attended(params, q, k, v, x=x)
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
