"""A wrong call of attend gets one sentence that names the argument, its value and the remedy."""

import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import qkv

Q, K, V = qkv(32)


def plan(q_len=32, kv_len=32, heads=1):
    grid = {"q_len": q_len, "kv_len": kv_len, "block_q": 16, "block_kv": 16}
    tiles = jnp.ones((heads, -(-q_len // 16), -(-kv_len // 16)), bool)
    return js.BlockMask.from_dense(tiles, **grid)


CASES = {
    "rank": (lambda: js.attend(Q[:, 0], K, V), r"q has shape \(32, 16\)"),
    "heads": (lambda: js.attend(Q[:, :3], K, V), "q has 3 heads and k 2"),
    "dim": (lambda: js.attend(Q[..., :8], K, V), "q has dim 8 and k 16"),
    "kv lengths": (lambda: js.attend(Q, K[:9], V), "k has 9 tokens and v 32"),
    "kv heads": (lambda: js.attend(Q, K, V[:, :1]), "k has 2 heads and v 1"),
    "dtype": (lambda: js.attend(Q, K.astype(jnp.bfloat16), V), "cast them to one dtype"),
    "integers": (lambda: js.attend(*[x.astype(int) for x in (Q, K, V)]), "q holds int32"),
    "batch": (lambda: js.attend(Q[None], K, V), "batch axes"),
    "empty": (lambda: js.attend(Q[:0], K, V), "no axis may be empty"),
    "plan length": (lambda: js.attend(Q, K, V, plan(kv_len=48)), "made for q_len=32, kv_len=48"),
    "plan heads": (lambda: js.attend(Q, K, V, plan(heads=3)), "3 lists per sequence"),
    "plan type": (lambda: js.attend(Q, K, V, jnp.ones((2, 2), bool)), "must be one of BlockMask"),
    "no plans": (lambda: js.attend(Q, K, V, ()), "empty tuple"),
    "mask array": (lambda: js.attend(Q, K, V, mask=jnp.ones((32, 32), bool)), "js.masks.dense"),
    "mask and array": (
        lambda: js.masks.causal() & jnp.ones((32, 32), bool),
        "mask is .*Array.*; .*js.masks.dense",
    ),
    "mask or array": (lambda: js.masks.causal() | np.ones((32, 32), bool), "mask is ndarray"),
    "tiles of an array": (
        lambda: js.block_mask(jnp.ones((32, 32), bool), 32, 32),
        "mask is .*Array.*; .*js.masks.dense",
    ),
    "tiles of None": (lambda: js.block_mask(None, 32, 32), "mask is NoneType"),
    "method with an array": (
        lambda: js.sparse_attention(Q, K, V, js.xattention(), mask=jnp.ones((32, 32), bool)),
        "mask is .*Array.*; .*js.masks.dense",
    ),
    "factory": (
        lambda: js.sparse_attention(Q, K, V, js.pbs_attn),
        r"method is function; .*js\.pbs_attn\(\)",
    ),
    "method None": (
        lambda: js.sparse_attention(Q, K, V, None),
        r"method is NoneType; .*js\.xattention\(\).*js\.attend",
    ),
    "method of dot_product_attention": (
        lambda: js.dot_product_attention(Q, K, V, method=js.xattention),
        r"method is function; .*js\.xattention\(\)",
    ),
    "mask length": (
        lambda: js.attend(Q, K, V, mask=js.masks.segments(jnp.zeros(31, int))),
        "covers 31 tokens; the input has 32",
    ),
    "mask heads": (
        lambda: js.attend(Q, K, V, mask=js.masks.dense(jnp.ones((3, 32, 32), bool))),
        "The mask has 3 heads",
    ),
    "mask batch": (
        lambda: js.attend(Q, K, V, mask=js.masks.segments(jnp.zeros((2, 32), int))),
        "mask has batch axes",
    ),
    "bias": (lambda: js.attend(Q, K, V, bias=jnp.zeros((31, 32))), "bias has shape"),
    "sinks": (lambda: js.attend(Q, K, V, sinks=jnp.zeros(3)), "one logit per query head"),
    "softcap": (lambda: js.attend(Q, K, V, softcap=-1.0), "softcap=-1.0"),
    "softcap of none": (
        lambda: js.attend(Q, K, V, softcap=float("inf")),
        "softcap=inf must be finite; None is for no cap",
    ),
    "few positions": (
        lambda: js.sparse_attention(Q, K, V, js.streaming(), positions=jnp.arange(9)),
        r"positions has shape \(9,\); expected one per query, \[\*batch, 32\]",
    ),
    "positions in reverse": (
        lambda: js.sparse_attention(Q, K, V, js.streaming(), positions=jnp.arange(32)[::-1]),
        "must be consecutive in each sequence",
    ),
    "positions of floats": (
        lambda: js.sparse_attention(Q, K, V, js.blasst(), positions=jnp.arange(32.0)),
        "positions holds float32",
    ),
    "scale": (lambda: js.attend(Q, K, V, scale=jnp.ones(4)), "scale has shape"),
    "score_mod": (
        lambda: js.attend(Q, K, V, score_mod=lambda s, b, h, i, j: s[None]),
        "one scalar logit",
    ),
    "implementation": (
        lambda: js.attend(Q, K, V, implementation="cuda"),
        "implementation='cuda' must be one of 'reference', 'xla', 'mosaic', 'triton'",
    ),
    "float64": (
        lambda: js.attend(*[np.asarray(x, np.float64) for x in (Q, K, V)]),
        "cast it first",
    ),
    "float8": (
        lambda: js.attend(*[x.astype(jnp.float8_e4m3fn) for x in (Q, K, V)]),
        "q holds float8",
    ),
    "bias of bools": (
        lambda: js.attend(Q, K, V, bias=jnp.ones((32, 32), bool)),
        "bias holds bool.*js.masks.dense",
    ),
    "bias of integers": (
        lambda: js.attend(Q, K, V, bias=jnp.ones((32, 32), int)),
        "bias holds int",
    ),
    "bias list": (lambda: js.attend(Q, K, V, bias=[0.0]), "bias holds list"),
    "scale text": (lambda: js.attend(Q, K, V, scale="big"), "scale='big' must be a number"),
    "scale NumPy": (lambda: js.attend(Q, K, V, scale=np.ones(4)), "scale=array"),
    "softcap array": (
        lambda: js.attend(Q, K, V, softcap=jnp.ones(())),
        "softcap=.*must be a number",
    ),
    "score_mod of bools": (
        lambda: js.attend(Q, K, V, score_mod=lambda s, b, h, i, j: i >= j),
        "returned .*bool.*js.masks.predicate",
    ),
    "list entry": (
        lambda: js.BlockMask.from_lists(
            jnp.full((1, 2, 1), 2),
            jnp.ones((1, 2), int),
            q_len=32,
            kv_len=32,
            block_q=16,
            block_kv=16,
        ),
        r"kv_indices\[0, 0, 0\] holds block 2; there are 2",
    ),
    "list heads": (lambda: plan(heads=2) | plan(heads=3), "list_heads=3 must be a multiple of 2"),
    "threshold per head": (
        lambda: js.xattention(threshold=jnp.full((3,), 0.5)).plan((), Q, K),
        r"threshold has shape \(3,\); expected a number, or one per query head, \(4,\)",
    ),
    "density per head": (
        lambda: js.mean_pooled(density=jnp.full((2, 1), 0.5)).plan((), Q, K),
        r"density has shape \(2, 1\); expected a number, or one per query head, \(4,\)",
    ),
    "threshold text": (
        lambda: js.xattention(threshold="most"),
        "threshold='most' must be a number",
    ),
    "offset": (lambda: js.masks.causal(offset=1.5), "offset holds float64"),
    "window offset": (lambda: js.masks.sliding_window(left=1, offset=0.5), "offset holds float64"),
    "lengths": (lambda: js.masks.lengths(jnp.ones(2)), "q_lengths holds float32"),
    "large segment ids": (
        lambda: js.masks.segments(np.array([2**32 + 7, 7])),
        r"q_ids holds 4294967303, which int32 does not; .*return_inverse=True\)\[1\]",
    ),
    "unsigned segment ids": (
        lambda: js.masks.segments(jnp.zeros(2, int), np.array([2**31 + 5, 1], np.uint32)),
        "kv_ids holds 2147483653, which int32 does not",
    ),
    "large offset": (
        lambda: js.masks.causal(offset=np.array([2**32])),
        "offset holds 4294967296, which int32 does not; it counts tokens",
    ),
    "large bounds": (
        lambda: js.masks.intervals(np.full((1, 2, 1), 2**32), causal=True, q_len=2),
        "startend_row_indices holds 4294967296, .*is q_len",
    ),
    "prefix": (lambda: js.masks.prefix_lm(2.5), "prefix_len holds float64"),
    "kv head columns": (
        lambda: js.sparse_attention(
            Q, K, V, js.flashmask(startend_row_indices=jnp.full((3, 32, 1), 32))
        ),
        "heads=4 must be a multiple of 3",
    ),
    "no parameters": (
        lambda: js.sparse_attention(Q, K, V, js.nsa()),
        "this method has parameters: make them by method.init.*pass them as params=",
    ),
    "merge": (lambda: js.merge([]), "merge got no parts"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_sentence(name, without_shape_checks):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call()
