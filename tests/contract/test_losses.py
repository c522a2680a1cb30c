"""What learns by a loss of its own learns as well from q and k in bf16 as dense attention would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.distillation import gate_loss, shares_of_rows
from jsparse.learned.hisa import index_loss
from jsparse.learned.seerattention import gate_targets
from jsparse.learned.seerattention_r import gate_targets as targets_of_rows
from tests.inputs import qkv

CAUSAL = js.masks.causal()
LENGTH, BLOCK, HEADS, KV_HEADS = 96, 8, 4, 2
INDEXER = js.hisa(
    **{"top_k": 16, "block_kv": BLOCK, "block_top_k": 4},
    **{"index_heads": 2, "index_dim": 8, "rotary_dim": 4},
)
GATE = js.seerattention(block_size=BLOCK, gate_dim=8)
ROW_GATE = js.seerattention_r(block_size=BLOCK, token_budget=32, gate_dim=8)
BEFORE = np.tri(LENGTH, dtype=bool)


def attention(q, k):
    """The map of dense causal attention, its numbers rounded to the dtype of q."""
    k = jnp.repeat(k, HEADS // KV_HEADS, axis=1)
    logits = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(BEFORE, logits * q.shape[-1] ** -0.5, -jnp.inf)
    bits = jnp.finfo(q.dtype)
    # not a conversion there and back, which a compiler may leave out
    return jax.lax.reduce_precision(jax.nn.softmax(logits, axis=-1), bits.nexp, bits.nmant)


def of_indexer(info, plan, q, k):
    return index_loss(info.indexed, q, k, mask=CAUSAL)


def of_indexer_densely(info, plan, probs):
    return divergence(info.indexed, probs, BEFORE)


def of_listed_tokens(info, plan, q, k):
    return index_loss(info.indexed, q, k, plan, mask=CAUSAL)


def of_listed_tokens_densely(info, plan, probs):
    return divergence(info.indexed, probs, BEFORE & plan.to_dense()[0])


def divergence(indexed, probs, shown):
    """Of the indexer's softmax from the attention of all heads, each over the tokens that it has.

    A head's softmax is over these alone, so the map is divided by what it has there.
    """
    inside = jnp.where(shown, probs, 0.0)
    inside = (inside / inside.sum(-1, keepdims=True)).sum(0)
    target = inside / inside.sum(-1, keepdims=True)
    products = jnp.einsum("rhd,td->rth", indexed.q, indexed.k)
    scores = jnp.einsum("rth,rh->rt", jax.nn.relu(products), indexed.weights)
    logs = jnp.where(shown, jax.nn.log_softmax(jnp.where(shown, scores, -jnp.inf), axis=-1), 0.0)
    return (target * (jnp.log(jnp.where(target > 0, target, 1.0)) - logs)).sum(-1).mean()


def of_tiles(info, plan, q, k):
    targets = gate_targets(q, k, block_size=BLOCK, mask=CAUSAL)
    return gate_loss(info.gate_logits, targets)


def of_tiles_densely(info, plan, probs):
    blocks = LENGTH // BLOCK
    largest = probs.reshape(HEADS, blocks, BLOCK, blocks, BLOCK).max((2, 4))
    return gate_loss(info.gate_logits, shares_of_rows(largest))


def of_rows(info, plan, q, k):
    targets = targets_of_rows(q, k, block_size=BLOCK)
    return gate_loss(info.gate_logits, targets, skipped=0.5)


def of_rows_densely(info, plan, probs):
    largest = probs.reshape(KV_HEADS, -1, LENGTH, LENGTH // BLOCK, BLOCK).max((1, 4))
    return gate_loss(info.gate_logits, shares_of_rows(largest), skipped=0.5)


CASES = {
    "hisa": (INDEXER, of_indexer, of_indexer_densely),
    "hisa sparse": (INDEXER, of_listed_tokens, of_listed_tokens_densely),
    "seerattention": (GATE, of_tiles, of_tiles_densely),
    "seerattention_r": (ROW_GATE, of_rows, of_rows_densely),
}


@pytest.mark.numbers
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_losses_through_bfloat16_are_as_good_as_plain_ones(name):
    method, loss, densely = CASES[name]
    q, k, _ = qkv(LENGTH, heads=HEADS, kv_heads=KV_HEADS, dtype=jnp.bfloat16)
    x = q.reshape(LENGTH, -1)
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "dim": 16, "features": x.shape[-1]}
    params = method.init(jax.random.key(0), **sizes)

    def gradients(of, *inputs):
        def run(params, q, k, x):
            plan, info = method.plan(params, q, k, x=x, mask=CAUSAL)
            return of(info, plan, q, k)

        return jax.tree.leaves(jax.jit(jax.grad(run))(params, *inputs))

    single = [y.astype(jnp.float32) for y in (q, k, x)]
    exact, plain = (
        gradients(lambda info, plan, q, k: densely(info, plan, attention(q, k)), *inputs)
        for inputs in (single, (q, k, x))
    )
    found = [gradients(loss, *inputs) for inputs in (single, (q, k, x))]
    for true, its, alone, ours in zip(exact, plain, *found, strict=True):
        true, its, alone, ours = (np.asarray(y, np.float64) for y in (true, its, alone, ours))
        lost = np.linalg.norm(its - true)
        assert np.linalg.norm(ours - true) <= 2 * lost
        # in f32 they are those of the dense map
        assert np.linalg.norm(alone - true) <= 1e-5 * np.linalg.norm(true)
