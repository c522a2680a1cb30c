"""What every method of the registry must keep; exceptions are columns of its row."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import attend as executors
from jsparse.attention.reference import visible
from jsparse.core.blocks import candidates
from jsparse.core.reordering import Orders
from jsparse.masks.reordered import follow
from jsparse.types import Frame, parts_of
from tests.inputs import leveled, on_device, qkv

CAUSAL = js.masks.causal()
LENGTH = 300  # two tiles and a ragged one
by_name = pytest.mark.parametrize("row", js.registry.METHODS, ids=lambda row: row.name)
# executors treat all masks alike: in the fast run one that keeps the order of tokens, and one that
# changes it, stand for the others
MASKS_FOR_ALL = "streaming", "gna"


def one_of_each_kind(rows):
    """Those rows, with masks that the others stand for as slow cases."""
    kept = [
        row
        if row.family != "masks" or row.name in MASKS_FOR_ALL
        else pytest.param(row, marks=pytest.mark.slow)
        for row in rows
    ]
    return pytest.mark.parametrize("row", kept, ids=lambda row: row.name)


by_kind = one_of_each_kind(js.registry.METHODS)
controlled = pytest.mark.parametrize(
    "row", [row for row in js.registry.METHODS if row.control], ids=lambda row: row.name
)
# tiles for all heads, and what is trained: each of these computes in a way of its own
KINDS = "streaming nsa flashmoba seerattention hisa routing_transformer biformer".split()
# what methods learn besides, if they are told to
FURTHER = {
    "nsa": (("own_projections", True),),
    "flashmoba": (("taps", 3),),
    "routing_transformer": (("num_memory", 2),),
}


def made(row, value, **further):
    """The method, small, at a value of what controls its density."""
    control = {row.control: value} if row.control else {}
    return row.factory(**control, **dict(row.small), **further)


def sparsest(row, **further):
    """The method at its sparsest setting, so that something is left out."""
    return made(row, row.settings[0] if row.control else None, **further)


def inputs_of(row, *sizes, **named):
    """q, k, v with something for the method to leave out."""
    return leveled(*sizes, block=128, **named) if row.by_running_maximum else qkv(*sizes, **named)


@functools.cache
def params_for(method, sizes):
    with jax.ensure_compile_time_eval():
        return method.init(jax.random.key(0), **dict(sizes))


def params_of(method, q, k):
    heads, dim = q.shape[-2:]
    sizes = {"num_heads": heads, "num_kv_heads": k.shape[-2], "dim": dim, "features": heads * dim}
    return params_for(method, tuple(sizes.items()))


def hidden(q):
    """Hidden states that know nothing of other tokens."""
    return q.reshape(*q.shape[:-2], -1)


def run(method, q, k, v, x=None, mask=CAUSAL, params=None, **attend):
    params = params_of(method, q, k) if params is None else params
    given = {"params": params, "x": hidden(q) if x is None else x}
    return js.sparse_attention(q, k, v, method, mask=mask, **given, **attend)


def plan_of(method, q, k, mask=CAUSAL):
    return method.plan(params_of(method, q, k), q, k, x=hidden(q), mask=mask)


def lists_of(method, q, k, mask=CAUSAL):
    return plan_of(method, q, k, mask)[0]


def tiles_of(plan):
    """A plan as bools, the parts of a tuple side by side."""
    return np.concatenate([np.asarray(part.to_dense()) for part in parts_of(plan)], axis=-1)


# compiled once per shape, for all tests that need no more than this


@functools.cache
def attend(row):
    method = sparsest(row)
    return jax.jit(lambda q, k, v, x=None: run(method, q, k, v, x))


@functools.cache
def plan(row, further=()):
    method = sparsest(row, **dict(further))
    return jax.jit(lambda q, k: lists_of(method, q, k))


@functools.cache
def gradients(row, implementation, further=()):
    """By q, k, v and what is learnt, of outputs times weights."""
    method = sparsest(row, **dict(further))

    def loss(q, k, v, params, weights):
        out = run(method, q, k, v, params=params, implementation=implementation)
        return (out.astype(jnp.float32) * weights).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))


@pytest.mark.newest
@by_kind
def test_jit_equals_eager(row):
    method = sparsest(row)
    q, k, v = inputs_of(row, LENGTH)
    # the same lists; sums may be taken in another order
    np.testing.assert_array_equal(tiles_of(plan(row)(q, k)), tiles_of(lists_of(method, q, k)))
    np.testing.assert_allclose(attend(row)(q, k, v), run(method, q, k, v), atol=2e-6)


@by_kind
def test_other_data_is_no_other_program(row):
    """Nothing that depends on data is in a plan's structure: programs that take one know others."""
    q, k, _ = inputs_of(row, LENGTH)
    structure = jax.tree.structure(jax.eval_shape(plan(row), q, k))
    for seed in (0, 1):
        q, k, _ = inputs_of(row, LENGTH, seed=seed)
        # outside of jit lists may be cut to the longest
        assert jax.tree.structure(lists_of(sparsest(row), q, k)) == structure


@pytest.mark.newest
@by_kind
def test_batch_axes_and_vmap_agree(row):
    q, k, v = inputs_of(row, LENGTH, batch=(2, 1))
    together = attend(row)(q, k, v)[:, 0]
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    alone = [attend(row)(q[n], k[n], v[n]) for n in range(2)]
    np.testing.assert_allclose(together, jnp.stack(alone), atol=2e-6)
    method = sparsest(row)
    mapped = jax.jit(jax.vmap(lambda *a: run(method, *a)))(q, k, v)
    np.testing.assert_allclose(mapped, together, atol=2e-6)


@pytest.mark.newest
@by_kind
def test_each_sequence_gets_its_own_tiles(row):
    q, k, _ = inputs_of(row, 1200, batch=(2,))
    together = tiles_of(plan(row)(q, k))
    for n in range(2):
        alone = tiles_of(plan(row)(q[n], k[n]))
        # lists that no data enters are one for the whole batch
        np.testing.assert_array_equal(together[n] if together.ndim == 4 else together, alone)


@by_name
def test_lists_are_ascending_unique_and_in_range(row):
    q, k, _ = inputs_of(row, LENGTH)
    parts = parts_of(plan(row)(q, k))
    for tiles in parts:
        entries, indices = np.asarray(tiles.entries()), np.asarray(tiles.kv_indices)
        assert not tiles.overflowed.any()
        assert ((indices >= 0) & (indices < tiles.grid.kv_blocks))[entries].all()
        both = entries[..., 1:] & entries[..., :-1]
        assert (np.diff(indices, axis=-1) > 0)[both].all()
    counts = sum(np.asarray(tiles.kv_num_blocks) for tiles in parts)
    assert (counts >= 1).all(), "a visible row has at least one tile"


@by_name
def test_parts_of_a_plan_have_no_pair_in_common(row):
    q, k, _ = inputs_of(row, LENGTH)
    pairs = sum(
        np.asarray(visible(part, part.list_heads), int) for part in parts_of(plan(row)(q, k))
    )
    assert pairs.max() == 1


@pytest.mark.numbers
@pytest.mark.parametrize("row", [r for r in js.registry.METHODS if r.causal], ids=lambda r: r.name)
def test_causal_never_looks_ahead(row):
    q, k, v = inputs_of(row, LENGTH)
    found, info = plan_of(sparsest(row), q, k)
    # the mask as the method sees it, if it has put tokens in another order
    mask = follow(CAUSAL, Orders.of(info), q.shape[-2])
    for tiles in parts_of(found):
        to_see, _ = candidates(mask, tiles.grid, (), q.shape[-2])
        chosen = np.repeat(tiles.to_dense(), len(to_see) // tiles.list_heads, axis=0)
        assert not (chosen & ~to_see).any()
    # the last tile's values change, and its keys: rows before it must not notice
    later = k if row.by_last_queries else k.at[256:].add(3.0)
    changed = attend(row)(q, later, v.at[256:].add(3.0))
    np.testing.assert_array_equal(changed[:256], attend(row)(q, k, v)[:256])
    # nor rows of one tile the values ahead of them in it
    changed = attend(row)(q, k, v.at[140:].add(3.0))
    np.testing.assert_array_equal(changed[:140], attend(row)(q, k, v)[:140])


@pytest.mark.parametrize(
    "row",
    [r for r in js.registry.METHODS if r.causal and not r.by_last_queries],
    ids=lambda r: r.name,
)
def test_estimates_never_look_ahead(row):
    """Which tiles a row gets does not depend on keys after it, however large they are."""
    q, k, _ = inputs_of(row, 1200)
    before, after = plan(row)(q, k), plan(row)(q, k.at[768:].mul(-9.0))
    rows = 768 // before.block_q
    np.testing.assert_array_equal(after.to_dense()[..., :rows, :], before.to_dense()[..., :rows, :])


@pytest.mark.newest
@controlled
def test_density_grows_with_the_control(row):
    q, k, _ = inputs_of(row, 1200)

    def of_plan(plan):
        return sum(part.density().mean() for part in parts_of(plan))

    def density(value):
        return of_plan(lists_of(made(row, value), q, k))

    values = [*row.settings, row.keeps_all]
    if row.control_traced:
        densities = jax.jit(lambda values: jax.lax.map(density, values))(on_device(values))
    else:
        # the sparsest is compiled for other tests too
        further = [jax.jit(lambda value=value: density(value))() for value in values[1:]]
        densities = [of_plan(plan(row)(q, k)), *further]
    densities = [float(d) for d in densities]
    assert densities == sorted(densities)
    assert densities[0] < densities[-1]


@pytest.mark.numbers
@pytest.mark.parametrize(
    "row",
    [r for r in js.registry.METHODS if r.control and not r.by_gates],
    ids=lambda r: r.name,
)
def test_keeping_all_is_dense(row):
    q, k, v = inputs_of(row, LENGTH)
    method = made(row, row.keeps_all)
    # a method may have a default scale of its own
    out = jax.jit(lambda q, k, v: run(method, q, k, v, scale=0.2))(q, k, v)
    dense = js.attend(q, k, v, mask=CAUSAL, scale=0.2, implementation="reference")
    np.testing.assert_allclose(out, dense, atol=4e-6)


@pytest.mark.slow  # plans say as much by their densities, and outputs are those of plans
@controlled
def test_the_sparsest_setting_leaves_something_out(row):
    # nine of the largest blocks that a method has by default
    q, k, v = inputs_of(row, 2100, heads=2, kv_heads=1)
    dense = js.attend(q, k, v, mask=CAUSAL, implementation="reference")
    assert float(jnp.abs(attend(row)(q, k, v) - dense).max()) > 1e-3


@pytest.mark.numbers
@pytest.mark.parametrize(
    "row", [r for r in js.registry.METHODS if r.bidirectional], ids=lambda r: r.name
)
def test_without_a_mask_all_keys_can_be_chosen(row):
    q, k, v = inputs_of(row, LENGTH)
    method = made(row, row.keeps_all)
    out = jax.jit(lambda q, k, v: run(method, q, k, v, mask=None, scale=0.2))(q, k, v)
    dense = js.attend(q, k, v, scale=0.2, implementation="reference")
    np.testing.assert_allclose(out, dense, atol=4e-6)


@by_name
def test_output_is_attention_over_the_plan(row):
    """The executor computes what the plan says, no more and no less."""
    method = sparsest(row)
    q, k, v = inputs_of(row, LENGTH)
    got = attend(row)(q, k, v)
    expected = run(method, q, k, v, implementation="reference")
    np.testing.assert_allclose(got, expected, atol=4e-6)


@by_kind
def test_gradients_are_finite_and_those_of_the_plan(row):
    q, k, v = inputs_of(row, LENGTH)
    given = q, k, v, params_of(sparsest(row), q, k), qkv(LENGTH, seed=1)[0]
    got, expected = gradients(row, "xla")(*given), gradients(row, "reference")(*given)
    chex.assert_tree_all_finite(got)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got[:3], expected[:3])
    # what is learnt is used by all tokens
    far = jax.tree.map(lambda a, b: norm(a - b) - 1e-5 * norm(b), got[3], expected[3])
    assert all(x <= 0 for x in jax.tree.leaves(far)), far


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64))


def dense(problem):
    """Masked dense attention, differentiated by JAX; it multiplies in the dtype of its inputs."""
    (q, k, v, *_), tiles, mask, rule, *_ = problem
    assert not rule.changes_logits
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    shown = jnp.ones(logits.shape, bool)
    if mask is not None:
        batch, head = jnp.arange(len(q))[:, None, None, None], jnp.arange(q.shape[2])[:, None, None]
        frame = Frame(rule.q_len, rule.kv_len, batch, head)
        shown &= mask.visible(jnp.arange(rule.q_len)[:, None], jnp.arange(rule.kv_len), frame)
    if tiles is not None:
        shown &= visible(tiles, q.shape[2])
    some = shown.any(-1, keepdims=True)
    logits = jnp.where(shown | ~some, logits * rule.scale, -jnp.inf)
    probs = jnp.where(some, jax.nn.softmax(logits, axis=-1), 0.0).astype(v.dtype)
    lse = jnp.where(some[..., 0], jax.nn.logsumexp(logits, axis=-1), -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", probs, v).astype(jnp.float32), lse


def dense_skipping(problem, skipping=executors._SKIPPING_CALLS["reference"]):
    """The same over the tiles that the reference keeps."""
    kept = skipping(problem)[2]
    return *dense(problem._replace(plan=kept)), kept


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("row", "further"),
    [
        pytest.param(
            *(row, further),
            id=f"{row.name}{'-learning' if further else ''}",
            marks=[] if row.name in KINDS and not further else pytest.mark.slow,
        )
        for row in js.registry.METHODS
        for further in dict.fromkeys([(), FURTHER.get(row.name, ())])
    ],
)
def test_gradients_through_bfloat16_are_as_good_as_plain_ones(row, further, monkeypatch):
    """Beside those of dense attention in bf16, what methods do around it being the same."""
    given = inputs_of(row, LENGTH, dtype=jnp.bfloat16)
    single = tuple(x.astype(jnp.float32) for x in given)
    tiles = (tiles_of(plan(row, further)(*x[:2])) for x in (given, single))
    np.testing.assert_array_equal(*tiles, err_msg="numbers of 16 bits choose alike")
    params = params_of(sparsest(row, **dict(further)), *single[:2])
    # numbers of 16 bits too, so that their rounding is none of attention's
    rest = params, qkv(LENGTH, seed=1, dtype=jnp.bfloat16)[0].astype(jnp.float32)
    exact = gradients(row, "reference", further)(*single, *rest)
    got = gradients(row, "xla", further)(*given, *rest)
    monkeypatch.setitem(executors._CALLS, "reference", dense)
    monkeypatch.setitem(executors._SKIPPING_CALLS, "reference", dense_skipping)
    plain = gradients.__wrapped__(row, "reference", further)(*given, *rest)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(got)]
    for path, *found in zip(paths, *map(jax.tree.leaves, (got, plain, exact)), strict=True):
        ours, its, true = (np.asarray(x, np.float64) for x in found)
        lost = norm(its - true)
        assert norm(ours - true) <= 2 * lost, path
        # what no output depends on learns by a loss of its own
        assert (lost > 0) == true.any(), path


@pytest.mark.numbers
@by_kind
def test_a_nan_stays_in_its_row_of_tiles_and_is_seen(row):
    q, k, v = inputs_of(row, LENGTH)
    # keys are not broken, so hidden states are not
    out = attend(row)(q.at[140].set(jnp.nan), k, v, hidden(q))
    clean = attend(row)(q, k, v, hidden(q))
    # a query may get nothing, of all its heads
    gets = clean[140] != 0
    assert gets.any()
    assert jnp.isnan(out[140])[gets].all()
    # an estimate may be spoilt for the whole row of tiles, the outputs of other tokens never
    assert jnp.isfinite(out[jnp.arange(LENGTH) != 140]).all()
    np.testing.assert_array_equal(out[:128], clean[:128])
    np.testing.assert_array_equal(out[256:], clean[256:])


@pytest.mark.newest
@by_kind
def test_rows_without_keys_give_zeros(row):
    q, k, v = inputs_of(row, LENGTH)
    ids = jnp.where(jnp.arange(LENGTH) < 130, -1, 0)
    mask = CAUSAL & js.masks.segments(ids)
    method = sparsest(row)

    def loss(q):
        rows = run(method, q, k, v, mask=mask)
        return rows.sum(), rows

    gradient, rows = jax.jit(jax.grad(loss, has_aux=True))(q)
    assert not rows[:130].any()
    assert jnp.isfinite(rows).all()
    assert jnp.isfinite(gradient).all()
    assert not gradient[:130].any()


@pytest.mark.numbers
@one_of_each_kind(r for r in js.registry.METHODS if not r.needs_all_queries)
def test_fewer_queries_than_keys_are_the_last_ones(row):
    """Whole tiles of queries dropped at the front leave the rest as it was."""
    q, k, v = inputs_of(row, LENGTH)
    whole, part = attend(row)(q, k, v), attend(row)(q[128:], k, v)
    np.testing.assert_allclose(part, whole[128:], atol=4e-6)


@pytest.mark.numbers
@one_of_each_kind(r for r in js.registry.METHODS if not r.by_kv_head)
def test_grouped_heads_equal_repeated_ones(row):
    q, k, v = inputs_of(row, LENGTH)
    repeated = attend(row)(q, jnp.repeat(k, 2, axis=-2), jnp.repeat(v, 2, axis=-2))
    np.testing.assert_allclose(attend(row)(q, k, v), repeated, atol=2e-6)


# branches are rounded one by one, and what they choose by is; gradients above are of outputs too
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.slow if row.name in KINDS else ())
        for row in js.registry.METHODS
        if not row.by_gates
    ],
    ids=lambda row: row.name,
)
def test_bfloat16_is_as_good_as_plain_bfloat16(row):
    q, k, v = inputs_of(row, LENGTH, dtype=jnp.bfloat16)
    method = sparsest(row)
    out = np.asarray(attend(row)(q, k, v), np.float64)
    single = [x.astype(jnp.float32) for x in (q, k, v)]
    tiles, same_tiles = tiles_of(plan(row)(q, k)), tiles_of(plan(row)(*single[:2]))
    np.testing.assert_array_equal(tiles, same_tiles, err_msg="numbers of 16 bits choose alike")
    exact = run(method, *single, implementation="reference")
    plain = exact.astype(jnp.bfloat16)
    rounding = float(jnp.abs(plain.astype(jnp.float32) - exact).max())
    # rounding q k^T's inputs is shared; probabilities in bf16 add about as much as the output's
    assert np.abs(out - np.asarray(exact, np.float64)).max() <= 4 * rounding


@pytest.mark.numbers
@pytest.mark.parametrize(
    "row",
    [r for r in js.registry.METHODS if "width" in inspect.signature(r.factory).parameters],
    ids=lambda r: r.name,
)
def test_a_narrow_list_says_that_it_overflowed(row):
    q, k, _ = inputs_of(row, LENGTH)
    method = made(row, row.keeps_all, width=2)
    tiles = parts_of(jax.jit(lambda q, k: lists_of(method, q, k))(q, k))[0]
    assert tiles.width == 2
    assert tiles.overflowed.all()
