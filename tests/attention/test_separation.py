"""A rule in two parts says what the whole rule says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention.separation import separate
from jsparse.types import Frame
from tests.inputs import on_device

BATCHES, HEADS, Q_LEN, KV_LEN = 2, 3, 12, 16
RNG = np.random.default_rng(0)
IDS = on_device(np.sort(RNG.integers(0, 3, (BATCHES, KV_LEN)), axis=1), jnp.int32)
ENDS = on_device(RNG.integers(0, Q_LEN + 1, (BATCHES, HEADS, KV_LEN, 4)), jnp.int32)
SLOPES = on_device(RNG.normal(size=HEADS), jnp.float32)
TABLE = on_device(RNG.normal(size=KV_LEN), jnp.float32)
m = js.masks

MASKS = {
    "causal": m.causal(),
    "window": m.causal() & m.sliding_window(left=3),
    "prefix_lm": m.prefix_lm(on_device([3, 5])),
    "segments": m.segments(IDS[:, -Q_LEN:], IDS),
    "lengths": m.lengths(on_device([9, 12]), on_device([16, 7])),
    "sinks": m.sinks(2) | m.sliding_window(left=2),
    "global_tokens": m.global_tokens(2) | m.sliding_window(left=2),
    "dilated": m.dilated(stride=3, window=2),
    "strided": m.strided(stride=4, count=2) & m.causal(),
    "intervals": m.intervals(ENDS, causal=False, q_len=Q_LEN),
    "not": ~m.sliding_window(left=2),
    "predicate": m.predicate(lambda batch, head, q, kv: (q * 3 + kv + head) % 4 != batch),
}


def masked(mask):
    mask = mask.flatten_batch((BATCHES,))

    def function(logit, q_index, kv_index, batch, head):
        frame = Frame(Q_LEN, KV_LEN, batch, head)
        return jnp.where(mask.visible(q_index, kv_index, frame), logit, -jnp.inf)

    return function


def whole(function, logits):
    """The rule pair by pair."""
    per_key = jax.vmap(function, (0, None, 0, None, None))
    per_query = jax.vmap(per_key, (0, 0, None, None, None))
    per_head = jax.vmap(per_query, (0, None, None, None, 0))
    per_batch = jax.vmap(per_head, (0, None, None, 0, None))
    return per_batch(logits, *(jnp.arange(n) for n in (Q_LEN, KV_LEN, BATCHES, HEADS)))


def readers(parts, full):
    rows = tuple(partial(jnp.broadcast_to, x[..., None], full) for x in parts.row_values)
    columns = tuple(partial(jnp.broadcast_to, x[..., None, :], full) for x in parts.column_values)
    return rows, columns


def indices(full):
    q_index = jnp.broadcast_to(jnp.arange(Q_LEN, dtype=jnp.int32)[:, None], full)
    return q_index, jnp.broadcast_to(jnp.arange(KV_LEN, dtype=jnp.int32), full)


def in_parts(function, logits):
    parts = separate(function, batches=BATCHES, heads=HEADS, q_len=Q_LEN, kv_len=KV_LEN)
    assert not isinstance(parts, str), parts
    assert all(x.shape[2] in (Q_LEN, 1) for x in parts.row_values)
    assert all(x.shape[2] in (KV_LEN, 1) for x in parts.column_values)
    full = logits.shape
    return parts.rule(logits, *indices(full), *readers(parts, full)), parts


@pytest.fixture(scope="module")
def logits():
    return on_device(RNG.normal(size=(BATCHES, HEADS, Q_LEN, KV_LEN)), jnp.float32)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, logits):
    function = masked(MASKS[name])
    got, _ = in_parts(function, logits)
    np.testing.assert_array_equal(got, whole(function, logits))


def test_what_positions_say_needs_no_values(logits):
    _, parts = in_parts(masked(m.causal() & m.sliding_window(left=3)), logits)
    assert parts.row_values == parts.column_values == ()


def test_values_have_an_axis_only_where_they_differ(logits):
    _, parts = in_parts(masked(MASKS["segments"]), logits)
    assert {x.shape[:2] for x in (*parts.row_values, *parts.column_values)} == {(BATCHES, 1)}


def test_score_mod_with_lookups_per_head_and_per_key(logits):
    def function(logit, q_index, kv_index, batch, head):
        tilt = SLOPES[head] * (q_index - kv_index).astype(jnp.float32)
        return 5.0 * jnp.tanh(logit / 5.0) + tilt + jax.nn.relu(TABLE[kv_index]) * TABLE[0] + batch

    got, _ = in_parts(function, logits)
    np.testing.assert_allclose(got, whole(function, logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, q, kv, b, h: 5.0 * jnp.tanh(s / 5.0) + SLOPES[h] * TABLE[kv] * s,
        lambda s, q, kv, b, h: jnp.where(kv <= q, s * jnp.abs(s), -jnp.inf) + TABLE[kv] ** 2,
        lambda s, q, kv, b, h: TABLE[kv] * SLOPES[h],
        lambda s, q, kv, b, h: jnp.float32(1.0),
        lambda s, q, kv, b, h: s,
    ],
)
def test_gradients(function, logits):
    d_logits = on_device(RNG.normal(size=logits.shape), jnp.float32)
    _, parts = in_parts(function, logits)
    got = parts.gradient(logits, *indices(logits.shape), *readers(parts, logits.shape), d_logits)

    def whole_of(logits, rows, columns):
        changed = parts._replace(row_values=rows, column_values=columns)
        return parts.rule(logits, *indices(logits.shape), *readers(changed, logits.shape))

    _, pullback = jax.vjp(whole_of, logits, parts.row_values, parts.column_values)
    d_in, d_rows, d_columns = pullback(d_logits)
    _, direct = jax.vjp(lambda x: whole(function, x), logits)
    np.testing.assert_allclose(got[0], direct(d_logits)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[0], d_in, rtol=1e-5, atol=1e-6)
    values = [*parts.row_values, *parts.column_values]
    wanted = [d for d, x in zip([*d_rows, *d_columns], values, strict=True) if d.dtype == x.dtype]
    assert len(got) == 1 + len(wanted)
    for d, expected in zip(got[1:], wanted, strict=True):
        d = d.sum(3 if any(expected is x for x in d_rows) else 2)
        summed = d.sum(tuple(n for n in range(3) if expected.shape[n] == 1), keepdims=True)
        np.testing.assert_allclose(summed, expected, rtol=1e-4, atol=1e-5)


def test_traced_arrays(logits):
    @jax.jit
    def run(slopes, logits):
        return in_parts(lambda s, q, kv, b, h: s * slopes[h], logits)[0]

    np.testing.assert_allclose(run(SLOPES, logits), logits * SLOPES[:, None, None], rtol=1e-6)


def test_a_function_called_twice(logits):
    twist = jax.jit(lambda x, n: jnp.where(n > 2, x * 2.0, x + 1.0))

    def function(logit, q_index, kv_index, batch, head):
        return twist(twist(logit, q_index), kv_index)

    got, _ = in_parts(function, logits)
    np.testing.assert_array_equal(got, whole(function, logits))


def test_a_rule_that_ignores_the_logit(logits):
    got, _ = in_parts(lambda s, q, kv, b, h: TABLE[kv], logits)
    np.testing.assert_array_equal(got, jnp.broadcast_to(TABLE, logits.shape))


@pytest.mark.parametrize(
    "function",
    [
        lambda s, q, kv, b, h: s + jnp.ones((Q_LEN, KV_LEN))[q, kv],
        lambda s, q, kv, b, h: TABLE[s.astype(jnp.int32)],
        masked(m.dense(jnp.ones((1, Q_LEN, KV_LEN), bool))),
    ],
    ids=["pair_table", "table_by_logit", "dense_mask"],
)
def test_a_lookup_by_query_and_key_is_refused(function):
    answer = separate(function, batches=BATCHES, heads=HEADS, q_len=Q_LEN, kv_len=KV_LEN)
    assert isinstance(answer, str)
    assert "cannot do in registers" in answer


def test_values_per_pair_are_as_many_as_the_array_they_come_from():
    sizes = {"batches": BATCHES, "heads": HEADS, "q_len": Q_LEN, "kv_len": KV_LEN}
    pairs = on_device(RNG.random((BATCHES, 1, Q_LEN, KV_LEN)) < 0.5)
    parts = separate(masked(m.dense(pairs)), **sizes, pairs=Q_LEN * KV_LEN)
    assert not isinstance(parts, str), parts
    (found,) = parts.pair_values
    np.testing.assert_array_equal(found != 0, pairs)
    small = separate(
        lambda logit, q, kv, batch, head: logit + TABLE[q - kv], **sizes, pairs=Q_LEN * KV_LEN
    )
    assert isinstance(small, str)
    assert "all pairs" in small
    assert "with a query and a key" in separate(masked(m.dense(pairs)), **sizes)
