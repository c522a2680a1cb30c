"""The Mosaic kernel for Blackwell in JAX's interpreter, tensor memory included."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import kernels, triton
from jsparse.attention import mosaic as adapter
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import (
    mosaic_backward,
    mosaic_blackwell,
    mosaic_blackwell_backward,
)
from pallas_kernels.block_sparse_attention.logits import Tiles
from pallas_kernels.block_sparse_attention.softmax import Softmax, merge
from tests.inputs import on_device, qkv
from tests.kernels import test_mosaic_block_sparse as hopper

compare = functools.partial(hopper.compare, capability=_compat.BLACKWELL)
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 does not interpret tensor memory"
)


@pytest.fixture
def blackwell():
    with _compat.interpreter(_compat.BLACKWELL):
        yield


@interpreted
def test_lists_per_head_grouped_heads_and_an_empty_row():
    q, k, v = qkv(256, 384, heads=2, kv_heads=1, dim=64, v_dim=128, dtype=jnp.bfloat16)
    plan = hopper.lists(256, 384, block_q=128, block_kv=128, heads=2, seed=1)
    counts = np.asarray(plan.kv_num_blocks)
    assert counts.tolist() == [[2, 0], [3, 0]]
    compare(q, k, v, plan)


@interpreted
@pytest.mark.parametrize("block_kv", [64, 128])
def test_a_ring_that_is_used_again_whole_tiles_and_a_mask(block_kv, monkeypatch):
    forward = mosaic_blackwell.FORWARD._replace(
        default_config=lambda *_: mosaic_blackwell.Config(2)
    )
    monkeypatch.setitem(adapter.CHIPS, "10", adapter.CHIPS["10"]._replace(forward=forward))
    q, k, v = qkv(128, 384, heads=1, kv_heads=1, dim=64, dtype=jnp.float16)
    plan = hopper.lists(128, 384, block_q=128, block_kv=block_kv, density=1.0)
    compare(q, k, v, plan, mask=js.masks.causal())


@interpreted
@pytest.mark.parametrize("growth", [3.0, 30.0])
def test_sums_whose_maximum_grows_from_tile_to_tile(growth):
    q, k, v = qkv(128, 256, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    # logits grow by less, in base 2, than sums have room for, or by more; down to none in some rows
    steps = jnp.arange(256) // 64 * growth
    shares = on_device(np.linspace(0, 1, 128), jnp.float32)

    def score_mod(logit, batch, head, q_index, kv_index):
        return logit + steps[kv_index] * shares[q_index]

    plan = hopper.lists(128, 256, block_q=128, block_kv=64, density=1.0)
    compare(q, k, v, plan, score_mod=score_mod)


@interpreted
def test_masks_from_lookups_ragged_lengths_and_odd_widths():
    q, k, v = qkv(100, 150, heads=1, kv_heads=1, dim=40, v_dim=24, batch=(2,), dtype=jnp.bfloat16)
    ids = np.sort(np.random.default_rng(1).integers(0, 3, (2, 150)), axis=1)
    ids = on_device(ids, jnp.int32)
    # the first queries see nothing at all, the last nothing in their first tile
    q_ids = ids[:, 50:].at[:, :5].set(-1)
    mask = js.masks.causal() & js.masks.sliding_window(left=19) & js.masks.segments(q_ids, ids)
    compare(q, k, v, hopper.lists(100, 150, block_q=128, block_kv=128, density=1.0), mask=mask)


@interpreted
def test_everything_that_changes_logits():
    q, k, v = qkv(128, 70, heads=2, kv_heads=1, dim=64, batch=(1,), dtype=jnp.bfloat16)
    rng = np.random.default_rng(2)
    slopes, table = (on_device(rng.normal(size=n), jnp.float32) for n in (2, 70))

    def score_mod(logit, batch, head, q_index, kv_index):
        far = jnp.abs(q_index - kv_index).astype(jnp.float32)
        return logit - slopes[head] * far * 0.05 + table[kv_index] * table[0] + 0.1 * batch

    compare(
        q,
        k,
        v,
        hopper.lists(128, 70, block_q=128, block_kv=64, density=1.0),
        mask=js.masks.causal() | js.masks.sinks(3),
        bias=on_device(rng.normal(size=(2, 1, 70)), jnp.bfloat16),
        score_mod=score_mod,
        softcap=20.0,
        sinks=on_device([0.5, -1.0]),
        scale=on_device(0.2),
    )


@interpreted
def test_nan_stays_in_its_row_and_unlisted_tiles_are_not_read(blackwell):
    q, k, v = qkv(128, 384, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    tiles = on_device([[[True, False, True]]])
    plan = js.BlockMask.from_dense(tiles, q_len=128, kv_len=384, block_q=128, block_kv=128)
    q = q.at[7].set(jnp.nan)
    k, v = k.at[128:256].set(jnp.nan), v.at[128:256].set(jnp.nan)
    out = jax.block_until_ready(js.attend(q, k, v, plan, implementation="mosaic"))
    bad = np.isnan(np.asarray(out, np.float32)).any(axis=(1, 2))
    assert bad.tolist() == [row == 7 for row in range(128)]


@interpreted
def test_gradients_of_q_k_v_and_through_the_lse(monkeypatch):
    config = mosaic_backward.Config(2, 64)
    monkeypatch.setattr(mosaic_blackwell_backward, "default_config", lambda *sizes: config)
    q, k, v = qkv(256, 128, heads=2, kv_heads=1, dim=64, v_dim=40, dtype=jnp.bfloat16)
    # three steps of two heads through a ring of two tiles, and rows without tiles
    tiles = on_device([[[True], [True]], [[True], [False]]])
    plan = js.BlockMask.from_dense(tiles, q_len=256, kv_len=128, block_q=128, block_kv=128)
    # the first tile of queries is partly hidden, the second seen entirely
    mask = js.masks.segments(jnp.zeros(256, jnp.int32).at[:9].set(-1), jnp.zeros(128, jnp.int32))

    def call(x, implementation):
        return js.attend(
            x["q"], x["k"], x["v"], plan, mask=mask, return_lse=True, implementation=implementation
        )

    hopper.compare_gradients({"q": q, "k": k, "v": v}, call, _compat.BLACKWELL)


@interpreted
@pytest.mark.slow
def test_gradients_of_everything_that_changes_logits():
    q, k, v = qkv(64, 70, heads=2, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    rng = np.random.default_rng(2)
    operands = {
        **{"q": q, "k": k, "v": v, "scale": on_device(0.2)},
        "slopes": on_device(rng.normal(size=2), jnp.float32),
        "table": on_device(rng.normal(size=70), jnp.float32),
        "bias": on_device(rng.normal(size=(2, 1, 70)), jnp.bfloat16),
    }

    def call(x, implementation):
        def score_mod(logit, batch, head, q_index, kv_index):
            far = (q_index - kv_index).astype(jnp.float32)
            return logit + x["slopes"][head] * far * 0.05 + x["table"][kv_index] * logit

        return js.attend(
            x["q"],
            x["k"],
            x["v"],
            hopper.lists(64, 70, block_q=128, block_kv=128, density=1.0),
            mask=js.masks.causal(),
            bias=x["bias"],
            score_mod=score_mod,
            softcap=20.0,
            scale=x["scale"],
            return_lse=True,
            implementation=implementation,
        )

    hopper.compare_gradients(operands, call, _compat.BLACKWELL)


@interpreted
@pytest.mark.parametrize("refused", [None, "it cannot."], ids=["triton", "xla"])
def test_gradients_of_other_tiles_are_the_triton_kernels_or_those_of_xla(refused, monkeypatch):
    problem_refusal = triton.problem_refusal
    monkeypatch.setattr(triton, "problem_refusal", lambda *x: refused or problem_refusal(*x))
    q, k, v = qkv(128, 64, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    plan = hopper.lists(128, 64, block_q=128, block_kv=64, density=1.0)

    def call(q, k, v, implementation):
        return js.attend(q, k, v, plan, return_lse=True, implementation=implementation)

    with _compat.interpreter(_compat.BLACKWELL):
        outputs, pullback = jax.vjp(functools.partial(call, implementation="mosaic"), q, k, v)
        jax.block_until_ready(outputs)
    cotangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), outputs)
    cotangents = cotangents[0].astype(q.dtype), cotangents[1]
    with contextlib.nullcontext() if refused else _compat.triton_interpreter():
        found = jax.block_until_ready(pullback(cotangents))
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    _, pullback = jax.vjp(functools.partial(call, implementation="reference"), *exact)
    want = pullback((cotangents[0].astype(jnp.float32), cotangents[1]))
    for a, b in zip(found, want, strict=True):
        assert a.dtype == q.dtype
        error = jnp.linalg.norm((a.astype(jnp.float32) - b).ravel())
        assert float(error) <= 2**-7 * float(jnp.linalg.norm(b.ravel()))


def test_softmaxes_over_some_keys_each_merge_to_that_over_all():
    logits = np.random.default_rng(4).normal(size=(5, 12)).astype(np.float32) * 9
    logits[0] = -np.inf
    logits[1, :6] = -np.inf
    nothing = Softmax(jnp.full(5, -jnp.inf), jnp.zeros(5))
    parts, numerators = [], []
    for half in (logits[:, :6], logits[:, 6:]):
        softmax, before = nothing, jnp.zeros((5, 0))
        for piece in (half[:, :3], half[:, 3:]):
            softmax, probs, decay = softmax.add(on_device(piece), 1.0, slack=8.0)
            before = jnp.concatenate([before * decay[:, None], probs], axis=1)
            assert float(before.max()) <= 2.0**8
        parts.append(softmax)
        numerators.append(before)
    softmax, shares = merge(parts)
    norm, lse = softmax.end()
    found = jnp.concatenate([x * s[:, None] for x, s in zip(numerators, shares, strict=True)], 1)
    weights = np.exp2(logits.astype(np.float64))
    want = weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)
    np.testing.assert_allclose(found * norm[:, None], want, rtol=1e-5, atol=1e-7)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(weights.sum(1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "bfloat16 or float16, not float32"),
        ({"block_q": 64}, "it takes tiles of 128 queries, not 64"),
        ({"block_kv": 32}, "64 or 128 keys, not 32"),
        ({"dim": 320}, "up to 256, not 320"),
        ({"block_kv": 128, "dim": 256}, "v_dim 256 do not fit in tensor memory"),
        ({"mask": js.masks.dense(jnp.ones((1, 256, 256), bool))}, "with a query and a key"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(change, reason, blackwell):
    sizes = {"dtype": jnp.bfloat16, "block_q": 128, "block_kv": 64, "dim": 64, **change}
    q, k, v = qkv(256, heads=1, kv_heads=1, dim=sizes["dim"], dtype=sizes["dtype"])
    plan = hopper.lists(256, 256, block_q=sizes["block_q"], block_kv=sizes["block_kv"])
    options = {name: change[name] for name in ("mask",) if name in change}
    with pytest.raises(NotImplementedError, match=reason):
        js.attend(q, k, v, plan, implementation="mosaic", **options)


def test_layouts_that_would_wait_for_ever_or_do_not_fit_are_refused():
    sizes = 128, 128, 128, 128
    refusals = [
        mosaic_blackwell.layout_refusal(config, *sizes)
        for config in (mosaic_blackwell.Config(1), mosaic_blackwell.Config(4))
    ]
    assert "stages must be at least 2" in refusals[0]
    assert "bytes of shared memory" in refusals[1]
    candidates = mosaic_blackwell.FORWARD.candidates(*sizes)
    assert candidates[0] == mosaic_blackwell.default_config(Tiles(*sizes[:2]), *sizes[2:])
    assert len(set(candidates)) == len(candidates) > 1
    assert all(mosaic_blackwell.layout_refusal(c, *sizes) is None for c in candidates)


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_the_chip_decides_which_kernels_run(capability, monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda: capability)
    assert adapter.device_refusal() is None
    assert adapter.chip() is adapter.CHIPS[capability.split(".")[0]]


@pytest.mark.parametrize("capability", ["7.5", "12.0", None])
def test_other_chips_are_refused(capability, monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda: capability)
    assert "Hopper or Blackwell GPU" in adapter.device_refusal()
