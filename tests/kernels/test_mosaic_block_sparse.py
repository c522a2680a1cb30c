"""The Mosaic kernel in JAX's interpreter, which also looks for data races.

Small on purpose: the interpreter makes a host call for every access to shared memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

import jsparse as js
from jsparse.attention import mosaic as adapter
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import mosaic, mosaic_backward
from pallas_kernels.block_sparse_attention.chip import Problem
from pallas_kernels.block_sparse_attention.logits import LOG2_E, Rule, Tiles
from pallas_kernels.block_sparse_attention.walk import Lists, order
from tests.inputs import on_device, qkv


def lists(q_len, kv_len, *, block_q, block_kv, heads=1, batch=(), density=0.6, seed=0):
    """A random plan whose second row of tiles is empty."""
    rng = np.random.default_rng(seed)
    shape = (*batch, heads, -(-q_len // block_q), -(-kv_len // block_kv))
    tiles = rng.random(shape) < density
    tiles[..., 0, 0] = True
    if shape[-2] > 1:
        tiles[..., 1, :] = False
    return js.BlockMask.from_dense(
        on_device(tiles), q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv
    )


def compare(q, k, v, plan, *, capability=_compat.HOPPER, exact=None, **options):
    """Holds the kernel to the f32 reference, within the rounding of probabilities and output.

    `exact` are what the reference gets in the place of q, k and v.
    """
    with _compat.interpreter(capability):
        run = jax.jit(
            lambda q, k, v: js.attend(
                q, k, v, plan, return_lse=True, implementation="mosaic", **options
            )
        )
        out, lse = jax.block_until_ready(run(q, k, v))
    assert out.dtype == v.dtype
    q, k, v = (x.astype(jnp.float32) for x in exact or (q, k, v))

    def reference(v):
        return js.attend(q, k, v, plan, return_lse=True, implementation="reference", **options)

    want, want_lse = reference(v)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    # probabilities are rounded once, the output too, and once more when a sink takes its share
    roundings = 3 if "sinks" in options else 2
    unit = float(jnp.finfo(out.dtype).eps) / 2
    allowed = roundings * unit * np.asarray(reference(jnp.abs(v))[0]) + 1e-6
    error = np.abs(np.asarray(out, np.float32) - np.asarray(want))
    assert (error <= allowed).all(), float((error / allowed).max())


@pytest.mark.newest
def test_lists_per_head_grouped_heads_and_an_empty_row():
    q, k, v = qkv(128, 192, heads=4, kv_heads=2, dim=64, v_dim=128, dtype=jnp.bfloat16)
    plan = lists(128, 192, block_q=64, block_kv=64, heads=4)
    assert len({tuple(row) for row in np.asarray(plan.to_dense())[:, 0].tolist()}) > 1
    compare(q, k, v, plan)


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_consumers_share_a_ring_that_is_used_again(stages, monkeypatch):
    config = mosaic.Config(stages, columns=64, overlap=stages > 1)
    forward = mosaic.FORWARD._replace(default_config=lambda *_: config)
    monkeypatch.setitem(adapter.CHIPS, "9", adapter.CHIPS["9"]._replace(forward=forward))
    q, k, v = qkv(128, 384, heads=1, kv_heads=1, dim=128, v_dim=64, dtype=jnp.float16)
    compare(
        q, k, v, lists(128, 384, block_q=128, block_kv=128, density=1.0), mask=js.masks.causal()
    )


@pytest.mark.newest
def test_masks_from_lookups_ragged_lengths_and_odd_widths():
    q, k, v = qkv(100, 150, heads=1, kv_heads=1, dim=40, v_dim=24, batch=(2,), dtype=jnp.bfloat16)
    rng = np.random.default_rng(1)
    ids = on_device(np.sort(rng.integers(0, 3, (2, 150)), axis=1), jnp.int32)
    # the first queries see nothing at all, the last nothing in their first tile
    q_ids = ids[:, 50:].at[:, :5].set(-1)
    window = js.masks.sliding_window(left=19)
    mask = js.masks.causal() & window & js.masks.segments(q_ids, ids)
    plan = lists(100, 150, block_q=128, block_kv=128, density=1.0)
    compare(q, k, v, plan, mask=mask)


@pytest.mark.newest
def test_everything_that_changes_logits():
    q, k, v = qkv(64, 70, heads=2, kv_heads=1, dim=64, batch=(1,), dtype=jnp.bfloat16)
    rng = np.random.default_rng(2)
    slopes, table = (on_device(rng.normal(size=n), jnp.float32) for n in (2, 70))
    bias = on_device(rng.normal(size=(2, 1, 70)), jnp.bfloat16)

    def score_mod(logit, batch, head, q_index, kv_index):
        far = jnp.abs(q_index - kv_index).astype(jnp.float32)
        return logit - slopes[head] * far * 0.05 + table[kv_index] * table[0] + 0.1 * batch

    compare(
        q,
        k,
        v,
        lists(64, 70, block_q=64, block_kv=64),
        mask=js.masks.causal() | js.masks.sinks(3),
        bias=bias,
        score_mod=score_mod,
        softcap=20.0,
        sinks=on_device([0.5, -1.0]),
        scale=on_device(0.2),
    )


def compare_gradients(operands, call, capability=_compat.HOPPER):
    """Holds the gradient of outputs and lse to that of the f32 reference."""
    rng = np.random.default_rng(7)
    weights = {}

    def loss(operands, implementation):
        out, lse = call(operands, implementation)
        for name, x in (("out", out), ("lse", lse)):
            weights.setdefault(name, on_device(rng.normal(size=x.shape), jnp.float32))
        seen = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return (out.astype(jnp.float32) * weights["out"]).sum() + (seen * weights["lse"]).sum()

    # not one program: some versions of the interpreter stop when five kernels share one
    with _compat.interpreter(capability):
        got = jax.block_until_ready(jax.grad(loss)(operands, "mosaic"))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), operands)
    want = jax.grad(loss)(exact, "reference")
    for name, value in got.items():
        assert value.dtype == operands[name].dtype
        error = jnp.linalg.norm((value.astype(jnp.float32) - want[name]).ravel())
        # inputs of the products are rounded to 8 bits, at random, and so is the result
        assert float(error) <= 2**-7 * float(jnp.linalg.norm(want[name].ravel())), name


@pytest.mark.newest
def test_gradients_of_q_k_v_and_through_the_lse():
    q, k, v = qkv(192, 128, heads=2, kv_heads=1, dim=64, v_dim=40, dtype=jnp.bfloat16)
    # four steps of two heads through a ring of three tiles, and rows without tiles
    plan = lists(192, 128, block_q=64, block_kv=128, heads=2, density=1.0)
    # the first tile of queries is partly hidden, the last seen entirely
    mask = js.masks.segments(jnp.zeros(192, jnp.int32).at[:9].set(-1), jnp.zeros(128, jnp.int32))

    def call(x, implementation):
        return js.attend(
            x["q"], x["k"], x["v"], plan, mask=mask, return_lse=True, implementation=implementation
        )

    compare_gradients({"q": q, "k": k, "v": v}, call)


@pytest.mark.newest
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
            lists(64, 70, block_q=64, block_kv=64, density=1.0),
            mask=js.masks.causal(),
            bias=x["bias"],
            score_mod=score_mod,
            softcap=20.0,
            scale=x["scale"],
            return_lse=True,
            implementation=implementation,
        )

    compare_gradients(operands, call)


@pytest.mark.newest
def test_tiles_that_are_whole_skip_the_mask_and_no_others():
    q, k, v = qkv(64, 192, heads=1, kv_heads=1, dim=64, batch=(1,), dtype=jnp.bfloat16)
    number = lambda n: jnp.full((1, 1, 1), n, jnp.int32)  # noqa: E731
    ids = on_device([[[2, 0, 1]]], jnp.int32)
    per_key = on_device([[[1, 0, 1]]], jnp.int32)  # tile 1 is the one that is not whole
    own = jnp.arange(3, dtype=jnp.int32)[None, None]
    # a mask that hides all it is asked about: tile 1 then counts for nothing
    nothing = Rule(lambda logits, *_: jnp.full_like(logits, -jnp.inf))
    masked = (
        Lists(ids, number(0), number(3), number(2)),
        Lists(jnp.zeros((1, 1, 3), jnp.int32), own, own + 1, own + per_key),
        Tiles(64, 64, 0.1, mask=nothing),
    )
    without = (
        Lists(ids, number(0), number(2)),
        Lists(jnp.zeros((1, 1, 3), jnp.int32), own, own + per_key),
        Tiles(64, 64, 0.1),
    )

    def results(by_query, by_key, tiles):
        with _compat.interpreter():
            out, lse = jax.block_until_ready(mosaic.FORWARD(q, k, v, by_query, tiles))
            problem = Problem(q, k, v, out, lse * LOG2_E, lse)
            found = mosaic_backward.gradients(problem, by_query, by_key, tiles)
            return jax.tree.map(np.asarray, jax.block_until_ready((out, lse, found)))

    got, want = results(*masked), results(*without)
    assert np.isfinite(want[1]).all()
    assert not np.asarray(want[2].k, np.float32)[:, 64:128].any()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = a.astype(np.float32), b.astype(np.float32)
        # other passes for k and v: sums in f32 may round otherwise, and results to 8 bits
        assert np.linalg.norm(a - b) <= 2**-9 * np.linalg.norm(b)


@pytest.mark.parametrize("together", [2, 1])
def test_programs_with_the_most_tiles_start_first_and_a_group_stays_side_by_side(together):
    work = np.random.default_rng(3).integers(0, 4, (2, 3, 5, 1)).repeat(2, axis=3)
    work[:, :, 3, 1] += 1
    found = np.asarray(order(on_device(work, jnp.int32), together))
    sections = work.reshape(-1, together * 10)
    want = [
        section * together * 10 + n
        for section, counts in enumerate(sections)
        for n in sorted(range(len(counts)), key=lambda n, counts=counts: (-counts[n], n))
    ]
    assert found.tolist() == want
    at = np.argsort(found).reshape(work.shape)
    alike = work[..., 0] == work[..., 1]
    assert (at[..., 1] == at[..., 0] + 1)[alike].all()


def test_nan_stays_in_its_row_and_unlisted_tiles_are_not_read():
    q, k, v = qkv(64, 192, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    tiles = on_device([[[True, False, True]]])
    plan = js.BlockMask.from_dense(tiles, q_len=64, kv_len=192, block_q=64, block_kv=64)
    q = q.at[7].set(jnp.nan)
    k, v = k.at[64:128].set(jnp.nan), v.at[64:128].set(jnp.nan)
    with _compat.interpreter():
        out = jax.block_until_ready(js.attend(q, k, v, plan, implementation="mosaic"))
    bad = np.isnan(np.asarray(out, np.float32)).any(axis=(1, 2))
    assert bad.tolist() == [row == 7 for row in range(64)]


@pytest.mark.newest
def test_vmap_is_the_batch_axis():
    q, k, v = qkv(64, heads=1, kv_heads=1, dim=64, batch=(2,), dtype=jnp.bfloat16)
    plan = lists(64, 64, block_q=64, block_kv=64)
    attend = lambda q, k, v: js.attend(q, k, v, plan, implementation="mosaic")  # noqa: E731
    with _compat.interpreter():
        batched = jax.block_until_ready(attend(q, k, v))
        mapped = jax.block_until_ready(jax.vmap(attend)(q, k, v))
    np.testing.assert_array_equal(np.asarray(batched, np.float32), np.asarray(mapped, np.float32))


def test_the_choice_falls_on_the_kernel_and_can_be_asked_for():
    q, k, v = qkv(64, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    with _compat.interpreter():
        assert js.explain(q, k, v).implementation == "mosaic"
        refused = js.explain(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert refused.implementation == "xla"
    assert "float32" in refused.refused["mosaic"]
    assert "Hopper or Blackwell" in js.explain(q, k, v).refused["mosaic"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "bfloat16 or float16, not float32"),
        ({"block_q": 256}, "8, 16, 32, 64 or 128 queries, not 256"),
        ({"block_kv": 1}, "8, 16, 32, 64 or 128 keys, not 1"),
        ({"block_kv": 24}, "8, 16, 32, 64 or 128 keys, not 24"),
        ({"dim": 320}, "up to 256, not 320"),
        ({"mask": js.masks.dense(jnp.ones((1, 256, 256), bool))}, "with a query and a key"),
        ({"bias": jnp.ones((256, 256))}, "with a query and a key"),
        ({"block_kv": 128, "dim": 192, "v_dim": 256}, "do not fit in shared memory"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(change, reason):
    sizes = {"dtype": jnp.bfloat16, "block_q": 128, "block_kv": 64, "dim": 64, **change}
    widths = {"dim": sizes["dim"], "v_dim": sizes.get("v_dim")}
    q, k, v = qkv(256, heads=1, kv_heads=1, **widths, dtype=sizes["dtype"])
    plan = lists(256, 256, block_q=sizes["block_q"], block_kv=sizes["block_kv"])
    options = {name: change[name] for name in ("mask", "bias") if name in change}
    with (
        _compat.interpreter(detect_races=False),
        pytest.raises(NotImplementedError, match=reason),
    ):
        js.attend(q, k, v, plan, implementation="mosaic", **options)


def test_without_a_gpu_it_is_refused():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    q, k, v = qkv(64, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="needs a Hopper or Blackwell GPU"):
        js.attend(q, k, v, implementation="mosaic")


def test_the_interpreter_notices_a_race():
    def racy(x_ref, out_ref, scratch):
        member = lax.axis_index("member")

        @pl.when(member == 0)
        def _():
            scratch[...] = x_ref[...]

        @pl.when(member == 1)
        def _():
            # nobody waited for the other
            out_ref[...] = scratch[...]

    x = jnp.ones((128,), jnp.float32)
    run = plgpu.kernel(
        racy,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=(plgpu.SMEM(x.shape, x.dtype),),
        grid=(1,),
        grid_names=("program",),
        num_threads=2,
        thread_name="member",
    )
    with pytest.raises(RuntimeError, match="data race|RACE DETECTED"), _compat.interpreter():
        jax.block_until_ready(run(x))
