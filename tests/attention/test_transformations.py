"""attend under JAX's transformations: scan, remat, vmap of any argument, shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention.attend import prepare
from jsparse.attention.block_sparse import block_sparse_attention
from jsparse.attention.xla import PASSES
from tests.inputs import on_device, qkv

CAUSAL = js.masks.causal()
METHODS = {
    "mask": None,
    "mean_pooled": js.mean_pooled(block_size=8, density=0.5),
    "xattention": js.xattention(block_size=8, stride=2, threshold=0.6),
}
# two estimates differ in what they choose, and not in how their plans are mapped and scanned
REPEATED = pytest.param("mean_pooled", marks=pytest.mark.slow)
by_name = pytest.mark.parametrize("name", ["mask", REPEATED, "xattention"])


def layer(name, x, weight, implementation="xla"):
    """A residual layer whose plan depends on its input."""
    q = (x @ weight).reshape(*x.shape[:-1], 4, 4)
    k, v = q[..., ::2, :], jnp.flip(q[..., ::2, :], -1)
    options = {"mask": CAUSAL, "implementation": implementation}
    if METHODS[name] is None:
        out = js.attend(q, k, v, **options)
    else:
        out = js.sparse_attention(q, k, v, METHODS[name], **options)
    return x + out.reshape(x.shape)


def inputs():
    x, weights = jax.random.normal(jax.random.key(0), (29, 16)), jax.random.key(1)
    # small weights: the loss must not magnify roundings
    return x, 0.1 * jax.random.normal(weights, (3, 16, 16))


def close(got, expected):
    for mine, true in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # a few hundred roundings, relative to the largest entry
        size = max(1.0, float(jnp.abs(true).max()))
        np.testing.assert_allclose(mine, true, rtol=0, atol=400 * 2**-24 * size)


@by_name
def test_scan_over_layers_with_and_without_remat(name):
    def unrolled(x, weights):
        for weight in weights:
            x = layer(name, x, weight, "reference")
        return jnp.sin(x).sum()

    def scanned(step):
        def loss(x, weights):
            return jnp.sin(jax.lax.scan(lambda x, w: (step(x, w), None), x, weights)[0]).sum()

        return loss

    def step(x, weight):
        return layer(name, x, weight)

    expected = jax.jit(jax.value_and_grad(unrolled, argnums=(0, 1)))(*inputs())
    for function in (step, jax.checkpoint(step)):
        got = jax.jit(jax.value_and_grad(scanned(function), argnums=(0, 1)))(*inputs())
        close(got, expected)


@by_name
def test_gradients_of_a_mapped_layer(name):
    x, weights = inputs()
    xs = jnp.stack([x, 2 * x[::-1], x - 1])

    def alone(weight):
        return sum(jnp.sin(layer(name, x, weight, "reference")).sum() for x in xs)

    def mapped(weight):
        return jnp.sin(jax.vmap(lambda x: layer(name, x, weight))(xs)).sum()

    got, expected = (jax.jit(jax.value_and_grad(f))(weights[0]) for f in (mapped, alone))
    close(got, expected)


@pytest.mark.newest
def test_mapping_over_any_argument():
    """Operands, lists, mask arrays, bias and sinks may each be the mapped one."""
    q, k, v = qkv(24, dim=8)
    rng = np.random.default_rng(0)
    tiles = on_device(rng.random((2, 1, 3, 3)) < 0.6).at[..., 0].set(True)
    sizes = {"q_len": 24, "kv_len": 24, "block_q": 8, "block_kv": 8}
    mapped = {
        "q": jnp.stack([q, -q]),
        "v": jnp.stack([v, v + 1]),
        "plan": jax.vmap(lambda t: js.BlockMask.from_dense(t, **sizes))(tiles),
        "mask": js.masks.segments(on_device(np.sort(rng.integers(0, 3, (2, 24)), -1))),
        "bias": on_device(rng.normal(size=(2, 1, 24)), jnp.float32),
        "sinks": on_device(rng.normal(size=(2, 4)), jnp.float32),
    }
    plain = {"q": q, "k": k, "v": v}

    def run(changes, implementation):
        options = {**plain, **changes}
        return js.attend(**options, implementation=implementation)

    for name, values in mapped.items():
        got = jax.jit(jax.vmap(lambda x, name=name: run({name: x}, "xla")))(values)
        alone = jax.jit(lambda x, name=name: run({name: x}, "reference"))
        for n in range(2):
            one = jax.tree.map(lambda x, n=n: x[n], values)
            np.testing.assert_allclose(got[n], alone(one), atol=4e-6)


@pytest.mark.newest
def test_a_mapped_call_is_one_call_with_a_longer_batch():
    """No loop over calls: both passes see all sequences at once, lists that are shared once."""
    q, k, v = qkv(24, dim=8, batch=(2,))
    ran = []

    def spy(compute):
        def computed(operands, lists, *rest):
            sizes = rest[-1].batches, len(operands.q), len(operands.k), len(lists.kv_indices)
            jax.debug.callback(lambda: ran.append(sizes))
            return compute(operands, lists, *rest)

        return computed

    passes = PASSES._replace(forward=spy(PASSES.forward), backward=spy(PASSES.backward))

    def attention(q):
        problem = prepare(q, k, v, None, mask=CAUSAL)
        plan = js.block_mask(CAUSAL, 24, 24, block_q=8, block_kv=8)
        plan = jax.tree.map(lambda x: x[None], plan)
        return block_sparse_attention(problem.operands, plan, CAUSAL, problem.rule, passes)[0]

    def loss(q):
        return jnp.sin(attention(q)).sum()

    def expected(q):
        return jnp.sin(js.attend(q, k, v, mask=CAUSAL, implementation="reference")).sum()

    qs = jnp.stack([jnp.stack([q, -q, 2 * q])] * 2)
    got = jax.jit(jax.vmap(jax.vmap(jax.grad(loss))))(qs)
    close(got[1], jax.jit(jax.vmap(jax.grad(expected)))(qs[1]))
    jax.effects_barrier()
    assert ran == [(12, 12, 12, 1)] * 2, "a forward and a backward pass"


@pytest.mark.newest
def test_what_knows_its_sequence_keeps_it_when_mapped():
    """Batch indices count the sequences of one call, and each call has its own gradients."""
    q, k, v = qkv(24, dim=8, batch=(2,))
    rng = np.random.default_rng(0)
    bias = on_device(rng.normal(size=(1, 4, 24, 24)), jnp.float32)
    slope = on_device([0.5, -1.0])
    window = js.masks.predicate(lambda b, h, i, j: (i - j < 5 + 7 * b) & (j <= i))
    options = {
        "bias": ({}, bias),
        "score_mod": ({"score_mod": lambda s, b, h, i, j: s * (b + 1) - h}, bias),
        "captured": ({"score_mod": lambda s, b, h, i, j: s * slope[b]}, bias),
        "predicate": ({"mask": window}, bias),
        "scale": ({"scale": on_device(0.3)}, bias[:, :, :1]),
    }

    def gradients(q, bias, implementation, **options):
        def loss(q, bias):
            return jnp.sin(
                js.attend(q, k, v, bias=bias, implementation=implementation, **options)
            ).sum()

        return jax.grad(loss, argnums=(0, 1))(q, bias)

    qs = jnp.stack([q, -q, 2 * q])
    for name, (option, bias) in options.items():
        got = jax.jit(jax.vmap(lambda q: gradients(q, bias, "xla", **option)))(qs)  # noqa: B023
        alone = jax.jit(lambda q: gradients(q, bias, "reference", **option))  # noqa: B023
        for n in range(3):
            one = jax.tree.map(lambda x: x[n], got)  # noqa: B023
            try:
                close(one, alone(qs[n]))
            except AssertionError as error:
                raise AssertionError(name) from error
