"""MoA against its oracle, and the figures of its specification."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jsparse as js
import jsparse.nn
from jsparse.masks.moa import span
from tests.inputs import on_device, qkv
from tests.oracles import moa as oracle

CAUSAL = js.masks.causal()
SMALL = {"num_sink": 8, "min_span": 16, "block_size": 8}
GIVEN = (-40, 0.7), (0, 0.25), (20, 0.0), (0, 1.0)
RULES = tuple(js.ElasticRule(*rule) for rule in GIVEN)


@pytest.mark.parametrize(
    ("rule", "length", "size"),
    [
        ((-1024, 0.5), 2048, 128),
        ((-1024, 0.5), 4096, 1024),
        ((-1024, 0.5), 8192, 3072),
        ((-1024, 0.5), 16384, 7168),
        ((2048, 0.0), 1024, 1024),
        ((2048, 0.0), 2048, 2048),
        ((2048, 0.0), 4096, 2048),
        ((2048, 0.0), 16384, 2048),
        ((0, 0.25), 1000, 256),
        ((-1024, 0.125), 8192, 128),
    ],
)
def test_spans_of_the_specification(rule, length, size):
    assert span(js.ElasticRule(*rule), length) == (64, size - 64)
    assert oracle.span(*rule, length) == (64, size - 64)


def test_spans_are_those_of_the_oracle():
    rng = np.random.default_rng(0)
    for _ in range(200):
        alpha, beta, length = (
            int(rng.integers(-2000, 2000)),
            rng.random(),
            int(rng.integers(1, 5000)),
        )
        assert span(js.ElasticRule(alpha, beta), length) == oracle.span(alpha, beta, length)


@pytest.mark.parametrize(("q_len", "kv_len", "new"), [(150, 150, 0), (37, 150, 0), (100, 100, 60)])
def test_output_is_attention_to_the_pairs_of_the_oracle(q_len, kv_len, new):
    q, k, v = qkv(q_len, kv_len)
    pairs = oracle.pairs(q_len, kv_len, GIVEN, block=8, fewest=16, new=new)
    assert len({int(x.sum()) for x in pairs}) == 4
    method = js.moa(rules=RULES, **SMALL, max_new_tokens=new)
    # forms every pair; that the others compute the same is the contract's to see
    out = js.sparse_attention(q, k, v, method, mask=CAUSAL, implementation="reference")
    dense = js.masks.dense(on_device(pairs))
    expected = js.attend(q, k, v, mask=dense, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_a_tile_is_listed_where_a_row_keeps_it_and_the_report_counts_it():
    q, k, v = qkv(160)
    method = js.moa(rules=RULES, **SMALL)
    plan, _ = method.plan((), q, k, mask=CAUSAL)
    pairs = oracle.pairs(160, 160, GIVEN, block=8, fewest=16)
    tiles = pairs.reshape(4, 20, 8, 20, 8).any((2, 4))
    np.testing.assert_array_equal(plan.to_dense(), tiles)
    report = js.density_report(method, q, k, v, mask=CAUSAL)
    np.testing.assert_allclose(report.tiles, tiles.sum((1, 2)) / 210, rtol=1e-6)
    np.testing.assert_allclose(report.pairs, pairs.sum((1, 2)) / (160 * 161 / 2), rtol=1e-5)


def test_all_of_the_length_is_dense():
    q, k, v = qkv(300)
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    for rules in (1.0, [js.ElasticRule(0, 1.0)] * 4):
        method = js.moa(rules=rules)
        out = js.sparse_attention(q, k, v, method, mask=CAUSAL, implementation="reference")
        np.testing.assert_allclose(out, dense, atol=2e-6)


def test_heads_of_one_span_share_their_lists():
    q, k, _ = qkv(400)
    same = js.moa(rules=[js.ElasticRule(0, 0.5)] * 4).plan((), q, k)[0]
    assert same.list_heads == 1
    np.testing.assert_array_equal(same.to_dense(), js.moa().plan((), q, k)[0].to_dense())
    # 0.5 n and 200 + 0.0 n are one rule at this length alone
    rules = [js.ElasticRule(0, 0.5), js.ElasticRule(200, 0.0)] * 2
    assert js.moa(rules=rules).plan((), q, k)[0].list_heads == 1
    q, k, _ = qkv(800)
    assert js.moa(rules=rules).plan((), q, k)[0].list_heads == 4


def test_what_grows_with_the_length_is_what_the_rule_says():
    """At twice the length twice the tiles per row for a slope, the same for an offset."""
    rules = [js.ElasticRule(0, 0.25), js.ElasticRule(320, 0.0)]
    most = {}
    for length in (1024, 2048):
        q, k, _ = qkv(length, heads=2, kv_heads=1, dim=2)
        plan, _ = js.moa(rules=rules).plan((), q, k, mask=CAUSAL)
        most[length] = np.asarray(plan.kv_num_blocks).max(-1).tolist()
    assert most == {1024: [4, 5], 2048: [8, 5]}


def test_the_mask_of_a_span_is_what_a_ring_buffer_holds():
    """The first tokens pinned and the last ones in a ring: dense attention masked to both."""
    length, sink, local = 60, 8, 17
    q, k, v = (np.asarray(x, np.float64) for x in qkv(length, heads=1, kv_heads=1))
    decoded = oracle.ring_decode(q[:, 0], k[:, 0], v[:, 0], sink=sink, local=local)
    held = CAUSAL & js.masks.head_windows(num_sink=[sink], window=[local])
    single = [on_device(x, jnp.float32) for x in (q, k, v)]
    out = js.attend(*single, mask=held, implementation="reference")
    np.testing.assert_allclose(out[:, 0], decoded, atol=2e-6)
    # a prompt's rows keep whole blocks of the same span: no more, and all of it at a block's end
    first, last = span(js.ElasticRule(0, 0.4), length, **SMALL)
    prompt = oracle.pairs(length, length, [(0, 0.4)], block=8, fewest=16)[0]
    i, j = np.indices((length, length))
    ring = (j <= i) & ((j < first) | (i - j < last))
    assert not (prompt & ~ring).any()
    np.testing.assert_array_equal(prompt[7::8], ring[7::8])


def test_heads_in_another_order_with_their_rules_give_the_same_output():
    layer = js.nn.SparseAttention(
        32,
        num_heads=4,
        method=js.moa(rules=RULES, **SMALL),
        implementation="reference",
        rngs=nnx.Rngs(0),
    )
    moved = nnx.clone(layer)
    order = np.array([2, 0, 3, 1])
    moved.method = js.moa(rules=[RULES[n] for n in order], **SMALL)
    for name in ("q_proj", "k_proj", "v_proj"):
        kernel = getattr(layer, name).kernel[...].reshape(32, 4, 8)
        getattr(moved, name).kernel[...] = kernel[:, order].reshape(32, 32)
    kernel = layer.out_proj.kernel[...].reshape(4, 8, 32)
    moved.out_proj.kernel[...] = kernel[order].reshape(32, 32)
    x = qkv(150, heads=1, dim=32)[0][:, 0]
    np.testing.assert_allclose(moved(x, mask=CAUSAL), layer(x, mask=CAUSAL), atol=2e-6)
    assert float(jnp.abs(moved.q_proj.kernel[...] - layer.q_proj.kernel[...]).max()) > 0.1


def test_short_inputs_may_stay_dense():
    q, k, v = qkv(150)
    method = js.from_length(js.moa(rules=RULES, **SMALL), min_length=151)
    out = js.sparse_attention(q, k, v, method, mask=CAUSAL, implementation="reference")
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    np.testing.assert_allclose(out, dense, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": 0.0}, "rules=0.0"),
        ({"rules": 1.5}, "rules=1.5"),
        ({"rules": "all"}, "rules='a' must be a number"),
        ({"rules": js.ElasticRule(0, float("nan"))}, "beta=nan must be finite"),
        ({"block_size": 0}, "block_size=0"),
        ({"num_sink": 32}, "num_sink=32 must be a multiple of 64"),
        ({"num_sink": -64}, "num_sink=-64"),
        ({"min_span": 100}, "num_sink=64 must be at most 36"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ],
)
def test_bad_input_is_named(arguments, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        js.moa(**arguments)


@pytest.mark.parametrize("rules", [RULES[:3], []])
def test_one_rule_per_head(rules):
    q, k, _ = qkv(64)
    with pytest.raises(ValueError, match=f"rules has {len(rules)} entries; expected one per query"):
        js.moa(rules=rules).plan((), q, k)
