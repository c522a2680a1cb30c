"""FlashMoBA against its oracle, and the checks of its specification."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.routing.flashmoba import convolve_keys, failure_rate, signal_to_noise
from tests.inputs import on_device, qkv
from tests.oracles import flashmoba as oracle

CAUSAL = js.masks.causal()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("q_len", "kv_len", "block"), [(70, 90, 16), (33, 33, 1)])
def test_blocks_and_output_equal_the_oracle(q_len, kv_len, block, causal):
    q, k, v = qkv(q_len, kv_len, v_dim=8)
    mask = CAUSAL if causal else None
    method = js.flashmoba(block_kv=block, top_k=3, taps=3)
    rng = np.random.default_rng(2)
    params = {"convolution": on_device(rng.normal(size=(3, 2, 16)) * 0.5, jnp.float32)}
    run = jax.jit(lambda *inputs: method.attend(params, *inputs, mask=mask))
    out, info = run(q, k, v)
    plan, _ = method.plan(params, q, k, mask=mask)
    keys = oracle.convolve(k, params["convolution"])
    np.testing.assert_allclose(convolve_keys(k, params["convolution"]), keys, atol=2e-6)
    scores = oracle.gates(q, keys, block)
    chosen = oracle.select(scores, kv_len, block, 3, causal)
    for (head, row), blocks in chosen.items():
        count = int(plan.kv_num_blocks[head, row])
        assert plan.kv_indices[head, row, :count].tolist() == blocks
        np.testing.assert_allclose(
            info.block_scores[head, row, :count], scores[head, row, blocks], atol=1e-5
        )
    expected, _ = oracle.attention(q, keys, v, chosen, block, causal)
    np.testing.assert_allclose(out, expected, atol=4e-6)


def test_worked_example():
    k = [[1, 0], [1, 0], [0, 1], [0, 1], [-1, 0], [-1, 0], [0.5, 0], [0, 0]]
    k = on_device(k, jnp.float32)[:, None]
    q = jnp.zeros((8, 1, 2)).at[7, 0].set(on_device([1.0, 0.2]))
    v = jnp.arange(8, dtype=jnp.float32)[:, None, None]
    scores = oracle.gates(q, k, 2)
    np.testing.assert_allclose(scores[0, 7, :3], [1, 0.2, -1])
    _, info = js.flashmoba(block_kv=2, top_k=4).plan((), q, k, mask=CAUSAL)
    np.testing.assert_allclose(info.block_scores[0, 7], scores[0, 7])
    chosen = oracle.select(scores, 8, 2, 2)
    assert chosen[0, 7] == [0, 3]
    _, lse = oracle.attention(q, k, v, chosen, 2)
    assert lse[0, 7, 0] == pytest.approx(1.400254, abs=1e-6)
    assert lse[0, 7, 3] == pytest.approx(0.885468, abs=1e-6)
    method = js.flashmoba(block_kv=2, top_k=2)
    out, merged = method.attend((), q, k, v, mask=CAUSAL, return_lse=True)[0]
    assert out[7, 0, 0] == pytest.approx(2.711710, abs=1e-6)
    assert merged[0, 7] == pytest.approx(1.868774, abs=1e-6)
    dense = js.attend(q, k, v, mask=CAUSAL)
    assert dense[7, 0, 0] == pytest.approx(2.842285, abs=1e-6)


def test_of_equal_scores_the_lower_block_is_taken():
    q, k, _ = qkv(40)
    plan, _ = js.flashmoba(block_kv=8, top_k=3).plan((), jnp.zeros_like(q), k, mask=CAUSAL)
    np.testing.assert_array_equal(plan.kv_indices[:, 39], [[0, 1, 4]] * 4)


def test_one_block_is_block_diagonal_and_all_are_dense():
    q, k, v = qkv(70)
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    out = js.sparse_attention(q, k, v, js.flashmoba(block_kv=16, top_k=5), mask=CAUSAL)
    np.testing.assert_allclose(out, dense, atol=4e-6)
    own = CAUSAL & js.masks.segments(jnp.arange(70) // 16)
    expected = js.attend(q, k, v, mask=own, implementation="reference")
    out = js.sparse_attention(q, k, v, js.flashmoba(block_kv=16, top_k=1), mask=CAUSAL)
    np.testing.assert_allclose(out, expected, atol=4e-6)


def test_the_inverse_list_is_that_of_the_specification():
    q, k, _ = qkv(90)
    plan, _ = js.flashmoba(block_kv=16, top_k=3).plan((), q, k, mask=CAUSAL)
    inverse = plan.inverse()
    own = np.arange(90) // 16
    for head in range(4):
        offsets = np.asarray(inverse.offsets[head])
        assert offsets[-1] == np.minimum(3, own + 1).sum()
        for block in range(6):
            users = np.asarray(inverse.q_indices[head, offsets[block] : offsets[block + 1]])
            assert (np.diff(users) > 0).all()
            assert (users >= block * 16).all()
            assert set(np.flatnonzero(own == block)) <= set(users)


def test_a_vector_added_to_all_keys_changes_nothing():
    q, k, v = qkv(90, dim=8)
    method = js.flashmoba(block_kv=16, top_k=3)
    shifted = k + jnp.arange(8, dtype=jnp.float32)
    plan, _ = method.plan((), q, k, mask=CAUSAL)
    same, _ = method.plan((), q, shifted, mask=CAUSAL)
    np.testing.assert_array_equal(plan.kv_indices, same.kv_indices)
    out, again = (js.sparse_attention(q, x, v, method, mask=CAUSAL) for x in (k, shifted))
    # logits of up to 30 or so, so errors of up to 30 eps in the exponents
    np.testing.assert_allclose(out, again, atol=1e-4)


def test_a_planted_needle_is_found():
    q, k, _ = qkv(90, heads=1, kv_heads=1)
    needle = q[80, 0]
    k = k.at[32:48, 0].set(20 * needle)
    q = q.at[48:, 0].set(needle)
    plan, info = js.flashmoba(block_kv=16, top_k=2).plan((), q, k, mask=CAUSAL)
    assert (plan.kv_indices[0, 48:] == 2).any(-1).all()
    assert float(info.block_scores[0, 80].max()) == pytest.approx(20 * float(needle @ needle), 1e-5)


def test_gradients_are_those_of_masked_dense_attention():
    q, k, v = qkv(70)
    method = js.flashmoba(block_kv=16, top_k=2, taps=3)
    rng = np.random.default_rng(2)
    params = {"convolution": on_device(rng.normal(size=(3, 2, 16)) * 0.5, jnp.float32)}
    plan, _ = method.plan(params, q, k, mask=CAUSAL)

    def dense(params, q, k, v):
        keys = convolve_keys(k, params["convolution"])
        return js.attend(q, keys, v, plan, mask=CAUSAL, implementation="reference")

    def sparse(params, q, k, v):
        return method.attend(params, q, k, v, mask=CAUSAL)[0]

    def gradients(function):
        def loss(*inputs):
            return jnp.sin(function(*inputs)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(params, q, k, v)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5),
        gradients(sparse),
        gradients(dense),
    )


def test_blocks_merge_in_any_order_with_gradients_of_the_whole():
    """One softmax over all chosen blocks, though each is attended to by itself."""
    q, k, v = qkv(45, dim=8)
    plan, _ = js.flashmoba(block_kv=8, top_k=3).plan((), q, k, mask=CAUSAL)

    def together(q, k, v):
        options = {"mask": CAUSAL, "return_lse": True, "implementation": "reference"}
        return js.attend(q, k, v, plan, **options)

    def one_by_one(order, q, k, v):
        def part(n):
            count = (plan.kv_num_blocks > n).astype(jnp.int32)
            one = dataclasses.replace(
                plan, kv_indices=plan.kv_indices[..., n : n + 1], kv_num_blocks=count
            )
            return js.attend(q, k, v, one, mask=CAUSAL, return_lse=True, implementation="xla")

        return js.merge([part(n) for n in order])

    def with_gradients(attention):
        def loss(*inputs):
            out, lse = attention(*inputs)
            return jnp.sin(out).sum() + jnp.cos(lse).sum(), (out, lse)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    expected = with_gradients(together)
    for order in ((0, 1, 2), (2, 0, 1)):
        got = with_gradients(functools.partial(one_by_one, order))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def means_of(keys, block):
    return np.stack([keys[n : n + block].mean(0) for n in range(0, len(keys), block)])


@pytest.mark.parametrize(("dtype", "taps"), [(jnp.float32, 3), (jnp.bfloat16, 0)])
def test_steps_choose_as_the_whole_and_average_the_newest_blocks_alone(dtype, taps):
    """Of two sequences at places of their own, in a cache that has room for more."""
    block, top_k, length, room, first = 8, 3, 45, 53, [0, 22]
    method = js.flashmoba(block_kv=block, top_k=top_k, taps=taps)
    q, k, v = qkv(length, batch=(2,), dtype=dtype)
    weights = np.random.default_rng(2).normal(size=(taps, 2, 16)) * 0.5
    params = {"convolution": on_device(weights, jnp.float32)} if taps else ()
    whole, _ = jax.jit(lambda q, k: method.plan(params, q, k, mask=CAUSAL))(q, k)
    chosen = np.asarray(whole.kv_indices)
    k, v = (np.pad(np.asarray(x), [(0, 0), (0, room - length), (0, 0), (0, 0)]) for x in (k, v))
    state = np.array(method.init_state(k, v))
    assert (state.shape, state.dtype) == ((2, 7, 2, 16), jnp.float32)
    seen = [np.float64(x[:length]) for x in k]
    if taps:
        seen = [oracle.convolve(x, weights) for x in seen]
    scores = [oracle.gates(*each, block) for each in zip(q, seen, strict=True)]
    for n in range(2):
        for (head, row), blocks in oracle.select(scores[n], length, block, top_k).items():
            assert chosen[n, head, row, : len(blocks)].tolist() == blocks
        done = first[n] // block
        state[n, :done] = means_of(seen[n], block)[:done]

    @jax.jit
    def step(q, k, positions, state):
        mask = js.masks.causal(offset=positions[:, 0])
        return method.plan(params, q, k, positions=positions, mask=mask, state=state)

    at, rows, state = np.array(first), np.arange(2)[:, None], on_device(state)
    # those of the second sequence are in three blocks
    for count in (11, *[1] * 12):
        new = at[:, None] + np.arange(count)
        # keys of older blocks are gone but for those that the convolution reaches; and what comes
        # later is not there yet
        older = np.arange(room) < new[:, :1] // block * block - max(0, taps - 1)
        gone = older | (np.arange(room) > new[:, -1:])
        keys = on_device(np.where(gone[..., None, None], np.nan, k), dtype)
        tiles, info = step(q[rows, new], keys, on_device(new, jnp.int32), state)
        state, at = info.state, at + count
        for n in range(2):
            listed = chosen[n][:, new[n]]
            np.testing.assert_array_equal(tiles.kv_indices[n], listed)
            expected = np.take_along_axis(scores[n][:, new[n]], listed, axis=-1)
            # a query's own block is averaged as far as it is there
            others = (listed >= 0) & (listed < new[n][:, None] // block)
            found = np.asarray(info.block_scores[n])
            np.testing.assert_allclose(found[others], expected[others], atol=1e-5)
            means = means_of(seen[n][: at[n]], block)
            np.testing.assert_allclose(state[n, : len(means)], means, atol=1e-6)
    assert at.tolist() == [23, 45]


def test_a_step_that_attends_chooses_by_the_means_it_is_given():
    """Any means, so that those of the keys would choose otherwise; and it hands them on."""
    method = js.flashmoba(block_kv=8, top_k=2, taps=3)
    q, k, v = qkv(45, v_dim=8)
    rng = np.random.default_rng(3)
    weights, known = rng.normal(size=(3, 2, 16)), rng.normal(size=(6, 2, 16))
    params = {"convolution": on_device(weights * 0.5, jnp.float32)}
    state = on_device(known, jnp.float32)
    given = {"positions": jnp.array([44]), "mask": js.masks.causal(offset=44)}

    @jax.jit
    def step(q, k, v):
        tiles, _ = method.plan(params, q, k, **given, state=state)
        keys = convolve_keys(k, params["convolution"])
        expected = js.attend(q, keys, v, tiles, mask=given["mask"])
        return method.attend(params, q, k, v, **given, state=state), expected

    (out, info), expected = step(q[44:], k, v)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    # the query is in the last block
    np.testing.assert_array_equal(info.state[:5], state[:5])
    keys = oracle.convolve(k, params["convolution"])
    np.testing.assert_allclose(info.state, [*state[:5], keys[40:].mean(0)], atol=1e-6)


def test_where_the_room_ends_means_are_of_the_tokens_that_are_there():
    method = js.flashmoba(block_kv=8, top_k=2)
    q, k, v = qkv(45)

    @jax.jit
    def step(q, k, positions, state):
        mask = js.masks.causal(offset=positions[0])
        given = {"positions": positions, "mask": mask, "state": state}
        return method.plan((), q, k, **given)[1].state

    state = method.init_state(k, v)
    # as many tokens as have all blocks; then the last ones, which might be in one more
    for first, end in ((0, 42), (42, 45)):
        keys = np.where(np.arange(45)[:, None, None] < end, k, np.nan)
        places = on_device(np.arange(first, end), jnp.int32)
        state = step(q[first:end], on_device(keys), places, state)
        np.testing.assert_allclose(state, means_of(np.float64(k[:end]), 8), atol=1e-6)


def test_the_choice_never_holds_a_score_for_each_pair():
    """Neither of queries and keys, nor of queries, heads and blocks."""
    length, heads, dim, top_k = 2**13, 4, 16, 4
    method = js.flashmoba(block_kv=16, top_k=top_k)
    q, k = (jax.ShapeDtypeStruct((length, n, dim), jnp.float32) for n in (heads, 2))
    call = jax.jit(lambda q, k: method.plan((), q, k, mask=CAUSAL))
    memory = call.lower(q, k).compile().memory_analysis()
    # the chosen blocks with their scores, and of a tile of 256 queries and 64 blocks some arrays; a
    # number per query and block would be 256 such arrays for each head, a bool 64
    chosen, tile = length * heads * top_k * 4, 256 * 64 * 4
    assert memory.temp_size_in_bytes < 2 * chosen + 16 * tile


def test_signal_to_noise():
    assert signal_to_noise(64, 128, gap=1.0) == pytest.approx(0.5)
    assert failure_rate(0.5) == pytest.approx(0.3085, abs=1e-4)
    for block, ratio in ((512, 0.125), (128, 0.25), (32, 0.5)):
        assert signal_to_noise(64, block, gap=0.5) == pytest.approx(ratio)
    assert signal_to_noise(64, 128, gap=0.5, related=4, gain=0.4) == pytest.approx(0.85)
    trials = 20_000
    for gap, related, gain in ((1.0, 1, 0.0), (0.5, 1, 0.0), (0.5, 4, 0.4)):
        simulated = oracle.pairwise_failure(64, 128, gap, related, gain, trials)
        expected = failure_rate(signal_to_noise(64, 128, gap=gap, related=related, gain=gain))
        deviation = (expected * (1 - expected) / trials) ** 0.5
        assert abs(simulated - expected) < 4 * deviation


@pytest.mark.parametrize(
    ("options", "says"),
    [({"block_kv": 0}, "block_kv=0"), ({"top_k": 0}, "top_k=0"), ({"taps": -1}, "taps=-1")],
)
def test_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        js.flashmoba(**options)
