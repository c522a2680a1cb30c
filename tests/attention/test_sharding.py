"""Over devices: the same on each its part, gradients of what all of them share summed."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jsparse as js
from jsparse.learned.hisa import Indexed, index_loss
from jsparse.types import BlockMask
from tests.inputs import qkv

CAUSAL = js.masks.causal()
# a mesh of one device has its axes in types, as one of many has
METHODS = {
    "dense": None,
    "xattention": js.xattention(block_size=8, stride=4),
    "blasst": js.blasst(block_q=8, block_kv=8),
    "flashmoba": js.flashmoba(block_kv=8, top_k=2),
}


def attention_by(method):
    def attention(q, k, v):
        if method is None:
            return js.attend(q, k, v, mask=CAUSAL, implementation="xla")
        return js.sparse_attention(q, k, v, method, mask=CAUSAL)

    return attention


def mesh_of(kind, devices=1):
    return jax.make_mesh((devices,), ("parts",), axis_types=(kind,))


@pytest.mark.parametrize(
    "name",
    # the one with most to share stands for the others
    ["dense", "flashmoba"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("xattention", "blasst")],
)
def test_each_device_computes_its_sequences(name):
    q, k, v = qkv(24, heads=4, kv_heads=2, dim=8, batch=(2,))
    attention, spec = attention_by(METHODS[name]), PartitionSpec("parts")

    def gradients(q, k, v):
        return jax.grad(lambda *x: jnp.sin(attention(*x)).sum(), argnums=(0, 1, 2))(q, k, v)

    for run in (attention, gradients):
        shared = jax.shard_map(run, mesh=mesh_of(AxisType.Auto), in_specs=spec, out_specs=spec)
        got, expected = (jax.tree.leaves(jax.jit(f)(q, k, v)) for f in (shared, run))
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.newest
def test_each_device_computes_its_heads_and_second_derivatives():
    q, k, v = qkv(24, heads=4, kv_heads=2, dim=8)
    attention, spec = attention_by(None), PartitionSpec(None, "parts", None)

    def twice(q, k, v):
        inner = jax.grad(lambda q: jnp.sin(attention(q, k, v)).sum())
        return jax.grad(lambda q: jnp.square(inner(q)).sum())(q)

    for run in (attention, twice):
        shared = jax.shard_map(run, mesh=mesh_of(AxisType.Auto), in_specs=spec, out_specs=spec)
        np.testing.assert_allclose(
            jax.jit(shared)(q, k, v), jax.jit(run)(q, k, v), rtol=1e-5, atol=1e-5
        )


def test_explicit_axes_are_refused_with_a_way_out():
    q, k, v = qkv(24, dim=8, batch=(2,))
    where = NamedSharding(mesh_of(AxisType.Explicit), PartitionSpec("parts"))
    split = jax.device_put(q, where)
    for run in (js.attend, jax.jit(js.attend)):
        with pytest.raises(ValueError, match="q is split over parts, an explicit axis.*Auto"):
            run(split, k, v)


def on_two_devices():
    """What needs a process of its own: the number of devices is set once."""
    q, k, v = qkv(24, heads=4, kv_heads=2, dim=8, batch=(2,))
    mesh, spec = mesh_of(AxisType.Auto, 2), PartitionSpec("parts")
    bias = jax.random.normal(jax.random.key(0), (4, 24, 24))

    def loss(q, k, bias):
        # all devices have the keys of one sequence, and the bias
        k = jnp.broadcast_to(k, (q.shape[0], *k.shape[1:]))
        return jnp.sin(js.attend(q, k, k, mask=CAUSAL, bias=bias)).sum()

    def added(q, k, bias):
        return jax.lax.psum(loss(q, k, bias), "parts")

    specs = spec, PartitionSpec(), PartitionSpec()
    shared = jax.shard_map(added, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    got, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k[:1], bias) for f in (shared, loss))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6)
    losses_on(mesh, q, k)
    # without shard_map, by the compiler
    parts = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
    attention = jax.jit(attention_by(METHODS["xattention"]))
    np.testing.assert_allclose(attention(*parts), attention(q, k, v), atol=2e-6)


def losses_on(mesh, q, k):
    """Indexers of two sequences, of which all devices have the keys and the heads' weights."""
    lists = jnp.broadcast_to(jnp.array([0, 3, 5, 6, 9]), (1, 24, 5))
    plan = BlockMask(lists, jnp.full((1, 24), 5), jnp.zeros(1, bool), 24, 24, 1, 1)
    spec, alike = PartitionSpec("parts"), PartitionSpec()

    def loss(index_q, weights, index_k, q, k):
        weights, index_k, k = (
            jnp.broadcast_to(x, (len(q), *x.shape[1:])) for x in (weights, index_k, k)
        )
        return index_loss(Indexed(index_q, weights, index_k), q, k, plan, mask=CAUSAL)

    def mean(*given):
        return jax.lax.pmean(loss(*given), "parts")

    given = jnp.cos(q), jnp.sin(q[:1, :, :, 0]), k[:1, :, 0], q, k[:1]
    specs = spec, alike, alike, spec, alike
    shared = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=alike)
    got, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*given) for f in (shared, loss))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.newest
def test_what_devices_share_gets_the_gradients_of_all():
    flags = "--xla_force_host_platform_device_count=2"
    script = "from tests.attention import test_sharding; test_sharding.on_two_devices()"
    # compiled as other tests of this folder are
    quickly = str(jax.config.read("jax_disable_most_optimizations"))
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": quickly}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
