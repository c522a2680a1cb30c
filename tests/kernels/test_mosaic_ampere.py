"""The Mosaic kernel for compute capability 8 in JAX's interpreter, which also looks for data races.

What the interpreter lacks, mma.sync and cp.async, has forms of its own there; see `mma`, `stream`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import kernels, mosaic
from pallas_kernels import _compat, stream
from pallas_kernels.block_sparse_attention import mosaic_ampere
from pallas_kernels.block_sparse_attention import mosaic_ampere_backward as backward
from pallas_kernels.block_sparse_attention.chip import Problem
from pallas_kernels.block_sparse_attention.logits import LOG2_E, Rule, Tiles
from pallas_kernels.block_sparse_attention.mosaic_ampere import Config
from pallas_kernels.block_sparse_attention.walk import Lists
from tests.inputs import on_device, qkv
from tests.kernels.test_mosaic_block_sparse import compare as compare_with_reference
from tests.kernels.test_mosaic_block_sparse import compare_gradients, lists

needs_mma = pytest.mark.skipif(
    not _compat.HAS_MMA, reason=f"mma.sync needs jax 0.11 or newer; this is {jax.__version__}"
)


compare = functools.partial(compare_with_reference, capability="8.0")


@needs_mma
class TestForward:
    def test_lists_per_head_grouped_heads_and_an_empty_row(self):
        q, k, v = qkv(128, 192, heads=4, kv_heads=2, dim=64, v_dim=128, dtype=jnp.bfloat16)
        compare(q, k, v, lists(128, 192, block_q=64, block_kv=64, heads=4))

    @pytest.mark.parametrize(
        "config",
        [
            Config(rows=64, columns=64, stages=1, hold_queries=True),
            Config(rows=128, columns=64, stages=2, hold_queries=False),
            Config(rows=128, columns=32, stages=3, hold_queries=True),
        ],
        ids=str,
    )
    def test_pieces_stream_through_rings_of_any_depth(self, config, monkeypatch):
        forward = mosaic_ampere.FORWARD._replace(default_config=lambda *_: config)
        monkeypatch.setitem(mosaic.CHIPS, "8", mosaic.CHIPS["8"]._replace(forward=forward))
        q, k, v = qkv(128, 256, heads=1, kv_heads=1, dim=128, v_dim=64, dtype=jnp.float16)
        plan = lists(128, 256, block_q=128, block_kv=128, density=1.0)
        compare(q, k, v, plan, mask=js.masks.causal())

    def test_masks_from_lookups_ragged_lengths_and_odd_widths(self):
        q, k, v = qkv(
            100, 150, heads=1, kv_heads=1, dim=40, v_dim=24, batch=(2,), dtype=jnp.bfloat16
        )
        rng = np.random.default_rng(1)
        ids = on_device(np.sort(rng.integers(0, 3, (2, 150)), axis=1), jnp.int32)
        # the first queries see nothing at all, the last nothing in their first tile
        q_ids = ids[:, 50:].at[:, :5].set(-1)
        window = js.masks.sliding_window(left=19)
        mask = js.masks.causal() & window & js.masks.segments(q_ids, ids)
        compare(q, k, v, lists(100, 150, block_q=128, block_kv=128, density=1.0), mask=mask)

    def test_everything_that_changes_logits(self):
        q, k, v = qkv(64, 70, heads=2, kv_heads=1, dim=64, batch=(1,), dtype=jnp.bfloat16)
        slopes = on_device([0.3, -0.2])
        compare(
            q,
            k,
            v,
            lists(64, 70, block_q=64, block_kv=64),
            mask=js.masks.causal() | js.masks.sinks(3),
            bias=jax.random.normal(jax.random.key(2), (2, 1, 70), jnp.bfloat16),
            score_mod=lambda logit, batch, head, q, kv: logit - slopes[head] * 0.05 * (q - kv),
            softcap=20.0,
            scale=on_device(0.2),
        )

    def test_the_interpreter_notices_tiles_that_nobody_waits_for(self, monkeypatch):
        monkeypatch.setattr(stream.InterpretedCopies, "wait", lambda self, running: None)
        q, k, v = qkv(64, 128, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16)
        plan = lists(64, 128, block_q=64, block_kv=64, density=1.0)
        with pytest.raises(RuntimeError, match="data race|RACE DETECTED"):
            compare(q, k, v, plan)


@needs_mma
class TestGradients:
    def test_of_q_k_v_and_through_the_lse(self):
        q, k, v = qkv(192, 64, heads=2, kv_heads=1, dim=64, v_dim=40, dtype=jnp.bfloat16)
        # a head of the group after the other, and rows without tiles
        plan = lists(192, 64, block_q=64, block_kv=64, heads=2, density=1.0)
        # the first tile of queries is partly hidden, the last seen entirely
        hidden = jnp.zeros(192, jnp.int32).at[:9].set(-1)
        mask = js.masks.segments(hidden, jnp.zeros(64, jnp.int32))

        def call(x, implementation):
            q, k, v = (x[name] for name in "qkv")
            options = {"mask": mask, "return_lse": True, "implementation": implementation}
            return js.attend(q, k, v, plan, **options)

        compare_gradients({"q": q, "k": k, "v": v}, call, "8.0")

    @pytest.mark.newest
    def test_of_everything_that_changes_logits(self):
        q, k, v = qkv(64, 70, heads=2, kv_heads=1, dim=64, dtype=jnp.bfloat16)
        rng = np.random.default_rng(2)
        operands = {
            **{"q": q, "k": k, "v": v, "scale": on_device(0.2)},
            "slopes": on_device(rng.normal(size=2), jnp.float32),
            "table": on_device(rng.normal(size=70), jnp.float32),
            "bias": on_device(rng.normal(size=(2, 1, 70)), jnp.bfloat16),
            "sinks": on_device([0.5, -1.0]),
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
                score_mod=score_mod,
                softcap=20.0,
                return_lse=True,
                implementation=implementation,
                **{name: x[name] for name in ("bias", "scale", "sinks")},
            )

        compare_gradients(operands, call, "8.0")

    def problem(self):
        """Two tiles of queries and of keys, causal, whose second head meets one less."""
        q, k, v = qkv(256, heads=2, kv_heads=1, dim=64, batch=(1,), dtype=jnp.bfloat16)
        d_out = jax.random.normal(jax.random.key(5), q.shape, q.dtype)
        rows = jax.random.normal(jax.random.key(6), (2, 1, 2, 256))
        # of the last tile of queries, or of keys, the second head has but the first of the others
        ids, first, last = [[0, 1, 0, 1]], [[0, 2]] * 2, [[2, 4], [2, 3]]
        # the last tile of queries sees all of the first of keys
        whole = [[0, 3]] * 2
        by_query = Lists(*(on_device([x], jnp.int32) for x in (ids * 2, first, last, whole)))
        by_key = by_query._replace(whole=by_query.first)
        return Problem(q, k, v, d_out, rows[0] + 4.0, rows[1]), by_query, by_key

    @pytest.mark.parametrize(
        ("config", "passes"),
        [
            (backward.Config(rows=64, columns=32, stages=3), 2),
            (backward.Config(rows=128, columns=64, stages=2, hold=True), 3),
        ],
    )
    def test_are_right_by_any_layout_in_any_passes_and_the_same_again(self, config, passes):
        problem, by_query, by_key = self.problem()
        tiles = Tiles(128, 128, 0.1, mask=Rule(hide_later))

        @jax.jit
        def gradients(problem):
            d_q, _ = backward.d_queries(problem, by_query, tiles, config)
            if passes == 2:
                return d_q, *backward.d_keys(problem, by_key, tiles, config)[:2]
            d_k, *_ = backward.d_keys(problem, by_key, tiles, config, with_v=False)
            _, d_v, _ = backward.d_keys(problem, by_key, tiles, config, with_k=False)
            return d_q, d_k, d_v

        with _compat.interpreter("8.0"):
            once = jax.block_until_ready(gradients(problem))
            again = jax.block_until_ready(gradients(problem))
        for x, y, want in zip(once, again, reference(problem, tiles), strict=True):
            np.testing.assert_array_equal(*(z.astype(jnp.float32) for z in (x, y)))
            error = jnp.linalg.norm(x.astype(jnp.float32) - want)
            assert float(error) <= 2**-7 * float(jnp.linalg.norm(want))

    def test_the_interpreter_notices_a_piece_that_is_overwritten_too_early(self, monkeypatch):
        problem, _, by_key = self.problem()
        whole = stream.Stream
        monkeypatch.setattr(stream, "Stream", lambda *parts: whole(*parts[:4]))
        with (
            pytest.raises(RuntimeError, match="data race|RACE DETECTED"),
            _compat.interpreter("8.0"),
        ):
            jax.block_until_ready(backward.d_keys(problem, by_key, Tiles(128, 128, 0.1))[:2])


def hide_later(logits, q_index, kv_index, row_values, column_values):
    return jnp.where(q_index >= kv_index, logits, -jnp.inf)


def reference(problem, tiles):
    """The gradients by q, k and v in f32, over the pairs of `TestGradients.problem`."""
    q, k, v, d_out = (x[0].astype(jnp.float32) for x in problem[:4])
    listed = np.tril(np.ones((2, 256, 256), bool))
    listed[1, 128:, 128:] = False
    logits = jnp.einsum("qhd,kd->hqk", q, k[:, 0]) * tiles.scale
    probs = jnp.where(listed, jnp.exp(logits - problem.lse2[0, ..., None] / LOG2_E), 0.0)
    d_probs = jnp.einsum("qhd,kd->hqk", d_out, v[:, 0])
    d_raw = probs * (d_probs - problem.delta[0, ..., None]) * tiles.scale
    d_q = jnp.einsum("hqk,kd->qhd", d_raw, k[:, 0])
    d_k, d_v = (jnp.einsum("hqk,qhd->kd", x, y) for x, y in ((d_raw, q), (probs, d_out)))
    return d_q[None], d_k[None, :, None], d_v[None, :, None]


class TestChoice:
    @pytest.fixture(params=["8.0", "8.6", "8.9", "9.0"])
    def found(self, request, monkeypatch):
        monkeypatch.setattr(kernels, "capability", lambda: request.param)
        return request.param

    def test_each_device_has_its_kernel(self, found, monkeypatch):
        monkeypatch.setattr(_compat, "HAS_MMA", True)
        assert mosaic.device_refusal() is None
        assert mosaic.chip() is mosaic.CHIPS[found[0]]

    def test_older_jax_has_none_before_hopper(self, found, monkeypatch):
        monkeypatch.setattr(_compat, "HAS_MMA", False)
        reason = mosaic.device_refusal()
        assert (reason is None) == (found == "9.0")
        assert reason is None or (found in reason and "jax 0.11" in reason)
        assert "jax 0.11" in mosaic_ampere.FORWARD.refusal(jnp.bfloat16, 64, 64, 64, 64)

    def test_others_are_refused(self, monkeypatch):
        for capability in ("7.5", "unknown", None):
            monkeypatch.setattr(kernels, "capability", lambda found=capability: found)
            assert "it needs a Hopper" in mosaic.device_refusal()


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("block_kv", [64, 128])
@pytest.mark.parametrize(
    ("dim", "v_dim"), [(64, 64), (64, 128), (128, 128), (192, 128), (256, 256)]
)
def test_shipped_configurations_are_legal_and_come_first(block_q, block_kv, dim, v_dim):
    sizes = block_q, block_kv, dim, v_dim
    default = mosaic_ampere.default_config(Tiles(block_q, block_kv), dim, v_dim)
    for module, first, found in (
        (mosaic_ampere, default, mosaic_ampere.FORWARD.candidates(*sizes)),
        (backward, backward.default_config(dim, v_dim), backward.candidates(*sizes)),
    ):
        assert found[0] == first
        assert len(set(found)) == len(found)
        assert all(module.layout_refusal(config, *sizes) is None for config in found)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 96}, "rows must be 64 or 128"),
        ({"rows": 128}, "at most a tile's 64"),
        ({"columns": 48}, "columns must be"),
        ({"columns": 128}, "at most 64"),
        ({"stages": 0}, "at least 1"),
        ({"stages": 4}, "bytes of shared memory"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_in_a_sentence(change, reason):
    assert reason in mosaic_ampere.layout_refusal(Config(**change), 64, 64, 128, 128)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 128}, "at most a tile's 64"),
        ({"columns": 128}, "columns must be 16, 32 or 64"),
        ({"stages": 1}, "at least 2"),
        ({"stages": 4, "columns": 64}, "bytes of shared memory"),
    ],
)
def test_what_gradients_cannot_be_laid_out_by_is_refused_too(change, reason):
    assert reason in backward.layout_refusal(backward.Config(**change), 64, 64, 128, 128)
