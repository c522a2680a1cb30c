"""Attention inside groups of tokens, by lists of tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import grouped
from jsparse.types import Frame
from pallas_kernels import _compat
from tests.attention import exact
from tests.inputs import on_device, qkv

Q_LEN, KV_LEN, HEADS, KV_HEADS, GROUPS = 70, 90, 4, 2, 6
# a few hundred roundings of f32
TOLERANCE = 2e-5


def random_ids(list_heads, batch=(2,), seed=0):
    """Group 2 has no queries, group 3 no keys, group 4 neither; some tokens are in none."""
    rng = np.random.default_rng(seed)
    q_ids = rng.choice([-1, 0, 1, 3, 5], (*batch, list_heads, Q_LEN))
    kv_ids = rng.choice([-1, 0, 1, 2, 5, GROUPS], (*batch, list_heads, KV_LEN))
    return q_ids, kv_ids


def groups_of(q_ids, kv_ids):
    return js.TokenGroups.from_ids(on_device(q_ids), on_device(kv_ids), groups=GROUPS)


def same_group(q_ids, kv_ids):
    pairs = (q_ids[..., :, None] == kv_ids[..., None, :]) & (q_ids[..., :, None] >= 0)
    return np.repeat(pairs, HEADS // pairs.shape[-3], -3)


def everything(operands, groups, implementation):
    """`(out, lse)` with every option, each of which has a gradient."""
    table, slopes = operands["table"], operands["slopes"]

    def score_mod(logit, batch, head, q_index, kv_index):
        distance = (q_index - kv_index).astype(jnp.float32)
        return logit + slopes[head] * distance + table[kv_index] + 0.1 * batch

    return js.attend(
        *(operands[name] for name in "qkv"),
        groups,
        mask=js.masks.causal(),
        **{name: operands[name] for name in ("bias", "sinks", "scale")},
        score_mod=score_mod,
        softcap=3.0,
        return_lse=True,
        implementation=implementation,
    )


def value_and_gradients(run, operands, *rest):
    def loss(operands, *rest):
        out, lse = run(operands, *rest)
        return jnp.sin(out).sum() + jnp.cos(jnp.where(jnp.isneginf(lse), 0.0, lse)).sum(), (
            out,
            lse,
        )

    (_, value), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(operands, *rest)
    return value, gradients


@pytest.mark.parametrize("list_heads", [KV_HEADS, pytest.param(HEADS, marks=pytest.mark.slow)])
def test_everything_at_once_against_float64_and_the_reference(list_heads):
    q, k, v = qkv(Q_LEN, KV_LEN, heads=HEADS, kv_heads=KV_HEADS, v_dim=24, batch=(2,))
    rng = np.random.default_rng(1)
    shapes = {"bias": (2, 1, Q_LEN, KV_LEN), "table": KV_LEN, "slopes": HEADS, "sinks": HEADS}
    operands = {name: on_device(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    operands |= {"q": q, "k": k, "v": v, "scale": jnp.float32(0.4)}
    operands["slopes"] *= 0.05
    ids = random_ids(list_heads)
    groups = groups_of(*ids)

    value, gradients = value_and_gradients(
        functools.partial(everything, implementation="xla"), operands, groups
    )
    x = {name: np.asarray(array, np.float64) for name, array in operands.items()}
    distance = np.arange(Q_LEN)[:, None] - np.arange(KV_LEN)
    added = x["slopes"][:, None, None] * distance + x["table"]
    added = added + 0.1 * np.arange(2)[:, None, None, None] + x["bias"]
    expected = exact.attention(
        x["q"],
        *(np.repeat(x[name], HEADS // KV_HEADS, 2) for name in "kv"),
        same_group(*ids) & (distance >= Q_LEN - KV_LEN),
        scale=0.4,
        softcap=3.0,
        added=added,
        sinks=x["sinks"],
    )
    exact.close(value, expected, TOLERANCE)
    _, expected = value_and_gradients(
        functools.partial(everything, implementation="reference"), operands, groups
    )
    exact.close(*map(jax.tree.leaves, (gradients, expected)), TOLERANCE)


@pytest.mark.numbers
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("shared", "list_heads"),
    [
        ("queries", KV_HEADS),
        ("keys", HEADS),
        ("sequences", KV_HEADS),
        pytest.param("queries", HEADS, marks=pytest.mark.slow),
        pytest.param("keys", KV_HEADS, marks=pytest.mark.slow),
        pytest.param("sequences", HEADS, marks=pytest.mark.slow),
    ],
)
def test_one_side_may_be_grouped_for_all_heads_or_sequences(list_heads, shared, implementation):
    q, k, v = qkv(Q_LEN, KV_LEN, heads=HEADS, kv_heads=KV_HEADS, batch=(2,))
    q_ids, kv_ids = random_ids(list_heads)
    if shared == "queries":
        q_ids = q_ids[:, :1]
    elif shared == "keys":
        kv_ids = kv_ids[:, :1]
    else:
        q_ids = q_ids[0]
    groups, mask = groups_of(q_ids, kv_ids), js.masks.causal()
    assert (groups.batch_shape, groups.list_heads) == ((2,), list_heads)
    out = js.attend(q, k, v, groups, mask=mask, implementation=implementation)
    pairs = js.masks.dense(on_device(same_group(q_ids, kv_ids)))
    expected = js.attend(q, k, v, mask=mask & pairs, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=TOLERANCE)


@pytest.mark.numbers
def test_tokens_of_no_group_and_concrete_groups():
    """Lists of concrete groups are as wide as they need to be; results are the same."""
    q, k, v = qkv(Q_LEN, KV_LEN)
    ids = random_ids(1, ())
    groups = groups_of(*ids)
    assert grouped.tile_list(groups, 32).width < -(-KV_LEN // 32)
    out, lse = js.attend(q, k, v, groups, return_lse=True)
    alone = ~same_group(*ids).any(-1)[0]
    assert alone.any()
    assert (np.asarray(out)[alone] == 0).all()
    assert np.isneginf(np.asarray(lse)[:, alone]).all()
    expected = exact.attention(
        q[None], *(np.repeat(x, 2, 1)[None] for x in (k, v)), same_group(*ids), scale=0.25
    )
    exact.close((out[None], lse[None]), expected, TOLERANCE)


def ids_by_the_rule(order, offsets):
    """The group of each token, entry by entry."""
    order, offsets = np.asarray(order), np.asarray(offsets)
    ids = np.full(order.shape, -1)
    for row in np.ndindex(order.shape[:-1]):
        begin = 0
        for group, (first, last) in enumerate(zip(offsets[row], offsets[row][1:], strict=False)):
            begin = max(begin, first)
            for token in order[row][begin : max(last, 0)]:
                if 0 <= token < len(ids[row]) and ids[row][token] < 0:
                    ids[row][token] = group
            begin = max(begin, last)
    return ids


def with_entry(groups, name, place, value):
    return dataclasses.replace(groups, **{name: getattr(groups, name).at[place].set(value)})


# offsets of head 0 of sequence 1 of these are 0, 4, 9, 13, 16 and the number of tokens, 20
BAD_GROUPS = {
    "key past the end": ("kv_order", 3, 999, r"kv_order\[1, 0, 3\]=999 names no token: .* 20,"),
    "negative key": ("kv_order", 5, -1, r"kv_order\[1, 0, 5\]=-1 names no token"),
    "query past the end": ("q_order", 0, 20, r"q_order\[1, 0, 0\]=20 names no token"),
    "key twice": ("kv_order", 6, 3, r"kv_order\[1, 0, 6\]=3 stands at place 3 too"),
    "query twice": ("q_order", 17, 0, r"q_order\[1, 0, 17\]=0 stands at place 0 too"),
    "offset past the end": ("kv_offsets", 2, 77, r"kv_offsets\[1, 0, 2\]=77 must .* tokens, 20,"),
    "offset that falls": ("q_offsets", 2, 3, r"q_offsets\[1, 0, 2\]=3 .* the one before it, 4\."),
    "negative offset": ("q_offsets", 0, -5, r"q_offsets\[1, 0, 0\]=-5 must be between 0"),
    "last offset past the end": ("q_offsets", 5, 21, r"q_offsets\[1, 0, 5\]=21 must"),
}


@functools.cache
def sorted_groups():
    ids = np.repeat(np.arange(5), [4, 5, 4, 3, 4])
    ids = np.broadcast_to(ids, (2, 2, 20))
    return js.TokenGroups.from_ids(on_device(ids), on_device(ids), groups=5)


@functools.partial(jax.jit, static_argnames="implementation")
def attended(q, k, v, groups, implementation):
    return js.attend(q, k, v, groups, implementation=implementation, return_lse=True)


@pytest.mark.numbers
@pytest.mark.parametrize("name", BAD_GROUPS)
def test_what_names_no_token_or_place_counts_as_padding_and_is_named(name):
    q, k, v = qkv(20, heads=2, kv_heads=2, dim=8, batch=(2,))
    field, place, value, message = BAD_GROUPS[name]
    groups = with_entry(sorted_groups(), field, (1, 0, place), value)
    ids = [
        ids_by_the_rule(groups.q_order, groups.q_offsets),
        ids_by_the_rule(groups.kv_order, groups.kv_offsets),
    ]
    for found, expected in zip((groups.q_ids(), groups.kv_ids()), ids, strict=True):
        np.testing.assert_array_equal(found, expected)
    pairs = (ids[0][..., :, None] == ids[1][..., None, :]) & (ids[0][..., :, None] >= 0)
    expected = exact.attention(q, k, v, pairs, scale=8**-0.5)
    as_padded = js.TokenGroups.from_ids(*map(on_device, ids), groups=5)
    for plan in (groups, as_padded):
        for implementation in ("reference", "xla"):
            exact.close(attended(q, k, v, plan, implementation), expected, TOLERANCE)
    with js.debug_checks():
        with pytest.raises(ValueError, match=message):
            js.attend(q, k, v, groups)
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(attended(q, k, v, groups, "reference"))
        jax.block_until_ready(attended(q, k, v, as_padded, "reference"))


def test_tokens_that_are_not_listed_are_no_error_behind_the_last_group():
    """Orders of fewer tokens than there are are padded there, with whatever it is."""
    q, k, v = qkv(20, heads=2, kv_heads=2, dim=8, batch=(2,))
    groups = with_entry(sorted_groups(), "kv_offsets", (1, 0, 5), 17)
    groups = with_entry(groups, "kv_order", (1, 0, slice(17, None)), on_device([-1, 3, 99]))
    ids = np.array(sorted_groups().kv_ids())
    ids[1, 0, 17:] = -1
    expected = js.TokenGroups.from_ids(sorted_groups().q_ids(), on_device(ids), groups=5)
    expected = attended(q, k, v, expected, "reference")
    for implementation in ("reference", "xla"):
        exact.close(attended(q, k, v, groups, implementation), expected, TOLERANCE)
    with js.debug_checks():
        jax.block_until_ready(attended(q, k, v, groups, "reference"))


@pytest.mark.numbers
def test_bad_groups_under_vmap_and_over_devices():
    q, k, v = qkv(20, heads=2, kv_heads=2, dim=8, batch=(2,))
    groups = with_entry(sorted_groups(), "kv_order", (1, 0, 3), 999)
    expected = attended(q, k, v, groups, "reference")
    mapped = jax.vmap(functools.partial(attended, implementation="xla"))
    spec = jax.sharding.PartitionSpec("parts")
    mesh = jax.make_mesh((1,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
    shared = jax.shard_map(
        functools.partial(attended, implementation="xla"), mesh=mesh, in_specs=spec, out_specs=spec
    )
    for run in (mapped, shared):
        exact.close(jax.jit(run)(q, k, v, groups), expected, TOLERANCE)


@pytest.mark.parametrize("side", [32, 64])
def test_lists_hold_the_tiles_of_pairs_and_bounds_are_bounds(side):
    ids = np.sort(np.random.default_rng(0).integers(-1, 9, (3, 2, 200)))
    ids[0, 0] = 7  # one group has all
    groups = js.TokenGroups.from_ids(on_device(ids), on_device(ids), groups=9)
    lists, runs = grouped.tile_list(groups, side), grouped.Runs(*groups.kv_runs())
    order = np.asarray(groups.q_order)
    sorted_ids = np.take_along_axis(ids, order, -1)
    pairs = (sorted_ids[..., :, None] == sorted_ids[..., None, :]) & (sorted_ids[..., None] >= 0)
    tiles = -(-200 // side)
    padded = np.pad(pairs, ((0, 0), (0, 0), *(((0, tiles * side - 200),) * 2)))
    padded = padded.reshape(3, 2, tiles, side, tiles, side)
    np.testing.assert_array_equal(lists.to_dense(), padded.any((-3, -1)))
    rows, columns = np.arange(tiles)[:, None], np.arange(tiles)
    for batch, head in np.ndindex(3, 2):
        frame = Frame(200, 200, batch, head)
        bounds = runs.classifier(lists.grid)(rows, columns, frame)
        assert (np.asarray(bounds.some) >= padded[batch, head].any((1, 3))).all()
        past = np.arange(tiles * side).reshape(tiles, side) >= 200
        every = padded[batch, head] | past | past[:, :, None, None]
        np.testing.assert_array_equal(bounds.every, every.all((1, 3)))


def test_sides_follow_the_mean_size_and_keep_lists_short():
    def side(tokens, groups, least=1):
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        build = functools.partial(js.TokenGroups.from_ids, groups=groups)
        return grouped.tile_side(jax.eval_shape(build, ids, ids), least)

    assert [side(4096, 4096 // n) for n in (16, 32, 64, 128, 512)] == [32, 32, 64, 128, 128]
    assert side(4096, 256, least=64) == 64
    assert side(2**18, 2**14) == 128


@pytest.mark.parametrize("groups", [16, 2048])
def test_no_array_of_all_pairs(groups):
    """Temporary memory of output and gradients is a few arrays of the size of q."""
    length, heads, dim = 2**15, 2, 64
    tokens = jax.ShapeDtypeStruct((length, heads, dim), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, ids):
        plan = js.TokenGroups.from_ids(ids, ids, groups=groups)
        return js.attend(q, k, v, plan, implementation="xla").sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    memory = run.lower(tokens, tokens, tokens, ids).compile().memory_analysis()
    # one bool per pair would be 64 such arrays
    assert memory.temp_size_in_bytes < 16 * length * heads * dim * 4


@pytest.mark.newest
def test_second_derivatives_and_vmap():
    q, k, v = qkv(40, 40, heads=2, kv_heads=1, dim=8, batch=(2,))
    ids = on_device(np.random.default_rng(3).integers(-1, 3, (2, 1, 40)))

    def curvature(implementation):
        def one(q, k, v, ids):
            groups = js.TokenGroups.from_ids(ids, ids, groups=3)

            def total(q, k, v):
                out = js.attend(q, k, v, groups, implementation=implementation)
                return jnp.sin(out).sum()

            def slope(*operands):
                return sum(jnp.sin(x).sum() for x in jax.grad(total, (0, 1, 2))(*operands))

            return jax.grad(slope, (0, 1, 2))(q, k, v)

        return one

    got = jax.jit(jax.vmap(curvature("xla")))(q, k, v, ids)
    exact.close(got, jax.jit(curvature("reference"))(q, k, v, ids), 2e-4)


def test_explain_counts_tiles_of_grouped_tokens():
    q, k, v = qkv(256, heads=4, kv_heads=2, dim=16)
    ids = on_device(np.arange(256)[None] // 64)
    found = js.explain(q, k, v, js.TokenGroups.from_ids(ids, ids, groups=4))
    assert found.implementation == "xla"
    assert (found.block_q, found.block_kv) == (64, 64)
    assert (found.tiles, found.computed, found.full) == (4 * 16, 4 * 4, 4 * 4)
    assert found.flops == 16 * 64 * 64 * 2 * 32


@pytest.mark.newest
@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_kernels_compute_groups(implementation):
    """In the interpreter: a group that fills a tile, small ones that share one, tokens of none."""
    q, k, v = qkv(192, heads=2, kv_heads=1, dim=64, dtype=jnp.bfloat16)
    sizes = [128, 7, 20, 17, 20]
    ids = np.repeat([2, 0, 1, 3, -1], sizes)
    ids = on_device(np.random.default_rng(0).permutation(ids)[None])
    groups = js.TokenGroups.from_ids(ids, ids, groups=4)

    def run(implementation):
        def loss(q, k, v):
            out = js.attend(q, k, v, groups, mask=js.masks.causal(), implementation=implementation)
            return (out.astype(jnp.float32) ** 2).sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    surrounding = _compat.triton_interpreter if implementation == "triton" else _compat.interpreter
    with surrounding():
        (_, got), gradients = jax.block_until_ready(run(implementation))
    (_, expected), exact_gradients = run("reference")
    # outputs and gradients are rounded to 8 bits, and so are probabilities on the way
    exact.close((got, *gradients), (expected, *exact_gradients), 2**-6)
