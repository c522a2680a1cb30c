"""What every method of the registry must keep; exceptions are columns of its row."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from tests.inputs import qkv

CAUSAL = js.masks.causal()
LENGTH = 300  # two tiles and a ragged one
by_name = pytest.mark.parametrize("row", js.registry.METHODS, ids=lambda row: row.name)
controlled = pytest.mark.parametrize(
    "row", [row for row in js.registry.METHODS if row.control], ids=lambda row: row.name
)


def sparsest(row):
    """The method at its sparsest setting, so that something is left out."""
    return row.factory(**({row.control: row.settings[0]} if row.control else {}))


def run(method, q, k, v, mask=CAUSAL, **attend):
    return js.sparse_attention(q, k, v, method, mask=mask, **attend)


def lists_of(method, q, k, mask=CAUSAL):
    return method.plan((), q, k, mask=mask)[0]


@by_name
def test_jit_equals_eager_and_traces_once(row):
    method = sparsest(row)
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(lambda q, k, v: run(method, q, k, v), n=1))
    for seed in (0, 1):
        q, k, v = qkv(LENGTH, seed=seed)
        # the same lists; sums may be taken in another order
        chex.assert_trees_all_equal(
            jax.jit(lambda q, k: lists_of(method, q, k).to_dense())(q, k),
            lists_of(method, q, k).to_dense(),
        )
        np.testing.assert_allclose(traced(q, k, v), run(method, q, k, v), atol=2e-6)


@by_name
def test_vmap_equals_a_batch_axis(row):
    method = sparsest(row)
    q, k, v = qkv(LENGTH, batch=(2,))
    together = jax.jit(lambda *a: run(method, *a))(q, k, v)
    mapped = jax.jit(jax.vmap(lambda *a: run(method, *a)))(q, k, v)
    np.testing.assert_allclose(mapped, together, atol=2e-6)


@by_name
def test_two_batch_axes_equal_one(row):
    method = sparsest(row)
    q, k, v = qkv(LENGTH, batch=(2, 1))
    out = jax.jit(lambda *a: run(method, *a))(q, k, v)
    flat = jax.jit(lambda *a: run(method, *a))(q[:, 0], k[:, 0], v[:, 0])
    np.testing.assert_allclose(out[:, 0], flat, atol=2e-6)


@by_name
def test_lists_are_ascending_unique_and_in_range(row):
    q, k, _ = qkv(LENGTH)
    plan = lists_of(sparsest(row), q, k)
    entries, indices = np.asarray(plan.entries()), np.asarray(plan.kv_indices)
    assert not plan.overflowed.any()
    assert ((indices >= 0) & (indices < plan.grid.kv_blocks))[entries].all()
    both = entries[..., 1:] & entries[..., :-1]
    assert (np.diff(indices, axis=-1) > 0)[both].all()
    assert (np.asarray(plan.kv_num_blocks) >= 1).all(), "a visible row has at least one tile"


@pytest.mark.parametrize("row", [r for r in js.registry.METHODS if r.causal], ids=lambda r: r.name)
def test_causal_never_looks_ahead(row):
    method = sparsest(row)
    q, k, v = qkv(LENGTH)
    plan = lists_of(method, q, k)
    grid = plan.grid
    above = np.arange(grid.kv_blocks) * grid.block_kv >= np.minimum(
        (np.arange(grid.q_blocks)[:, None] + 1) * grid.block_q, LENGTH
    )
    assert not (np.asarray(plan.to_dense()) & above).any()
    attend = jax.jit(lambda k, v: run(method, q, k, v))
    # the last tile's keys change: rows before it must not notice
    changed = attend(k.at[256:].add(3.0), v.at[256:].add(3.0))
    np.testing.assert_array_equal(changed[:256], attend(k, v)[:256])


@controlled
def test_density_grows_with_the_control(row):
    q, k, _ = qkv(1200)
    densities = []
    values = [*row.settings, row.keeps_all]
    for value in values:
        plan = jax.jit(lambda q, k, v=value: lists_of(row.factory(**{row.control: v}), q, k))(q, k)
        densities.append(float(plan.density().mean()))
    assert densities == sorted(densities)
    assert densities[0] < densities[-1]


@controlled
def test_keeping_all_is_dense(row):
    q, k, v = qkv(LENGTH)
    out = run(row.factory(**{row.control: row.keeps_all}), q, k, v)
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    np.testing.assert_allclose(out, dense, atol=4e-6)


@controlled
def test_the_sparsest_setting_leaves_something_out(row):
    q, k, v = qkv(1200)
    dense = js.attend(q, k, v, mask=CAUSAL)
    assert float(jnp.abs(run(sparsest(row), q, k, v) - dense).max()) > 1e-3


@pytest.mark.parametrize(
    "row", [r for r in js.registry.METHODS if r.bidirectional], ids=lambda r: r.name
)
def test_without_a_mask_all_keys_can_be_chosen(row):
    q, k, v = qkv(LENGTH)
    out = run(row.factory(**{row.control: row.keeps_all}), q, k, v, mask=None)
    dense = js.attend(q, k, v, implementation="reference")
    np.testing.assert_allclose(out, dense, atol=4e-6)


@by_name
def test_output_is_attention_over_the_plan(row):
    """The executor computes what the plan says, no more and no less."""
    method = sparsest(row)
    q, k, v = qkv(LENGTH)
    got = run(method, q, k, v, implementation="xla")
    expected = run(method, q, k, v, implementation="reference")
    np.testing.assert_allclose(got, expected, atol=4e-6)


@by_name
def test_gradients_are_finite_and_those_of_the_plan(row):
    method = sparsest(row)
    q, k, v = qkv(LENGTH)

    def gradients(implementation):
        def loss(q, k, v):
            return jnp.sin(run(method, q, k, v, implementation=implementation)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    got, expected = gradients("xla"), gradients("reference")
    chex.assert_tree_all_finite(got)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got, expected)


@by_name
def test_a_nan_stays_in_its_row_of_tiles_and_is_seen(row):
    q, k, v = qkv(LENGTH)
    method = sparsest(row)
    attend = jax.jit(lambda q: run(method, q, k, v))
    out, clean = attend(q.at[140].set(jnp.nan)), attend(q)
    assert jnp.isnan(out[140]).all()
    # an estimate may be spoilt for the whole row of tiles, the outputs of other tokens never
    assert jnp.isfinite(out[jnp.arange(LENGTH) != 140]).all()
    np.testing.assert_array_equal(out[:128], clean[:128])
    np.testing.assert_array_equal(out[256:], clean[256:])


@by_name
def test_rows_without_keys_give_zeros(row):
    q, k, v = qkv(LENGTH)
    ids = jnp.where(jnp.arange(LENGTH) < 130, -1, 0)
    mask = CAUSAL & js.masks.segments(ids)
    method = sparsest(row)
    out, gradient = jax.jit(
        jax.value_and_grad(lambda q: run(method, q, k, v, mask=mask).sum(), has_aux=False)
    )(q)
    rows = run(method, q, k, v, mask=mask)
    assert not rows[:130].any()
    assert jnp.isfinite(out)
    assert jnp.isfinite(gradient).all()
    assert not gradient[:130].any()


@by_name
def test_fewer_queries_than_keys_are_the_last_ones(row):
    """Whole tiles of queries dropped at the front leave the rest as it was."""
    q, k, v = qkv(384)
    method = sparsest(row)
    whole = run(method, q, k, v)
    part = run(method, q[128:], k, v)
    np.testing.assert_allclose(part, whole[128:], atol=4e-6)


@by_name
def test_grouped_heads_equal_repeated_ones(row):
    q, k, v = qkv(LENGTH)
    method = sparsest(row)
    repeated = run(method, q, jnp.repeat(k, 2, axis=-2), jnp.repeat(v, 2, axis=-2))
    np.testing.assert_allclose(run(method, q, k, v), repeated, atol=2e-6)


@by_name
def test_bfloat16_is_as_good_as_plain_bfloat16(row):
    q, k, v = qkv(LENGTH, dtype=jnp.bfloat16)
    method = sparsest(row)
    out = np.asarray(run(method, q, k, v), np.float64)
    plan = lists_of(method, q, k)
    single = [x.astype(jnp.float32) for x in (q, k, v)]
    mask = CAUSAL
    if row.family == "masks":  # such a method hides pairs inside its tiles as well
        exact = run(method, *single, implementation="reference")
        plain = exact.astype(jnp.bfloat16)
    else:
        exact = js.attend(*single, plan, mask=mask, implementation="reference")
        plain = exact.astype(jnp.bfloat16)
    rounding = float(jnp.abs(plain.astype(jnp.float32) - exact).max())
    # rounding q k^T's inputs is shared; probabilities in bf16 add about as much as the output's
    assert np.abs(out - np.asarray(exact, np.float64)).max() <= 4 * rounding


@pytest.mark.parametrize(
    "row",
    [r for r in js.registry.METHODS if "width" in inspect.signature(r.factory).parameters],
    ids=lambda r: r.name,
)
def test_a_narrow_list_says_that_it_overflowed(row):
    q, k, _ = qkv(LENGTH)
    method = row.factory(**{row.control: row.keeps_all, "width": 2})
    plan = jax.jit(lambda q, k: lists_of(method, q, k))(q, k)
    assert plan.width == 2
    assert plan.overflowed.all()
