"""StreamingLLM against its oracle."""

import numpy as np
import pytest

import jsparse as js
from tests.inputs import on_device, qkv
from tests.oracles import streaming as oracle


@pytest.mark.parametrize(("q_len", "kv_len"), [(40, 40), (17, 40)])
@pytest.mark.parametrize("causal", [True, False])
def test_output_is_attention_to_sinks_and_window(q_len, kv_len, causal):
    q, k, v = qkv(q_len, kv_len)
    mask = js.masks.causal() if causal else None
    out = js.sparse_attention(q, k, v, js.streaming(num_sink=3, window=7), mask=mask)
    pairs = oracle.pairs(q_len, kv_len, num_sink=3, window=7, causal=causal)
    dense = js.masks.dense(on_device(pairs)[None])
    expected = js.attend(q, k, v, mask=dense, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_tiles_grow_with_the_window_not_with_the_length():
    q, k, _ = qkv(2048, heads=1, kv_heads=1, dim=4)
    plan, _ = js.streaming(num_sink=4, window=200).plan((), q, k, mask=js.masks.causal())
    assert int(plan.kv_num_blocks.max()) == 4
    assert plan.width == 4


@pytest.mark.parametrize(
    ("arguments", "message"), [({"window": 0}, "window=0"), ({"num_sink": -1}, "num_sink=-1")]
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.streaming(**arguments)
