"""Routing Transformer against its oracle, and the checks of its specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import jsparse as js
import jsparse.nn
from jsparse.core import clustering
from jsparse.core.clustering import Centroids, Tally, l2_norm, layer_norm
from tests.inputs import on_device, qkv
from tests.oracles import routing_transformer as oracle

CAUSAL = js.masks.causal()


def params_of(method, *, heads=4, kv_heads=2, dim=16, seed=0):
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "dim": dim, "features": heads * dim}
    return method.init(jax.random.key(seed), **sizes)


def with_means(means):
    return {"centroids": Centroids.of(on_device(means, jnp.float32))}


CASES = {
    "shared": {"q_len": 45, "kv_len": 45, "window": 7, "self_logit": -5e4},
    "last queries": {"q_len": 13, "kv_len": 45, "l2": True},
    "apart": {"q_len": 40, "kv_len": 40, "shared": False, "count_eps": 1e-2, "num_memory": 2},
    "by rank": {"q_len": 40, "kv_len": 40, "shared": False, "by_rank": True, "causal": False},
    "across": {"q_len": 21, "kv_len": 45, "shared": False, "causal": False, "as_given": True},
    "own": {"q_len": 45, "kv_len": 45, "balanced": False},
    "own, apart": {"q_len": 21, "kv_len": 45, "balanced": False, "shared": False, "num_memory": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_places_output_and_statistics_equal_the_oracle(name):
    case = dict(CASES[name])
    q_len, kv_len, causal = case.pop("q_len"), case.pop("kv_len"), case.pop("causal", True)
    normal, expected_norm = layer_norm, oracle.layer_norm
    if case.pop("l2", False):
        normal, expected_norm = l2_norm, oracle.l2_norm
    if case.pop("as_given", False):
        case["normalize_logits"] = False
    q, k, v = qkv(q_len, kv_len, v_dim=16)
    method = js.routing_transformer(clusters=4, normalize=normal, **case)
    params = params_of(method)
    run = jax.jit(lambda *x: method.attend(params, *x, mask=CAUSAL if causal else None, **LSE))
    (out, lse), info = run(q, k, v)

    means = params["centroids"].means
    keys, queries = expected_norm(k), expected_norm(q)
    scores, q_scores = oracle.scores(keys, means), oracle.scores(queries, np.repeat(means, 2, 0))
    shared, window = case.get("shared", True), case.get("window")
    if case.get("balanced", True):
        members = oracle.balanced(scores, window or -(-kv_len // 4))
        own = oracle.balanced(q_scores, window or -(-q_len // 4))
    else:
        members, own = oracle.own(scores), oracle.own(q_scores)
    own = oracle.queries_of(members, kv_len - q_len, q_len) if shared else own
    if shared and q_len == kv_len or not case.get("balanced", True):
        assert info.q_order.tolist() == [sum(head, []) for head in own]
    assert info.kv_order.tolist() == [sum(head, []) for head in members]
    if case.get("normalize_logits", True):
        q, k = queries, keys
    options = {x: case[x] for x in ("by_rank", "self_logit", "count_eps") if x in case}
    if "num_memory" in case:
        options["memory"] = tuple(np.asarray(params[x]) for x in ("memory_k", "memory_v"))
    expected, expected_lse, counts = oracle.attention(
        q, k, v, own, members, causal=causal, **options
    )
    np.testing.assert_allclose(out, expected, atol=4e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
    np.testing.assert_array_equal(info.memberships, counts[:: 2 if shared else 1])

    tallies = [oracle.tally(keys, means)]
    distance = oracle.commitment(keys, means)
    if not shared:
        each = oracle.tally(queries, np.repeat(means, 2, 0))
        tallies.append([x.reshape(2, 2, *x.shape[1:]).sum(1) for x in each])
        distance += oracle.commitment(queries, np.repeat(means, 2, 0))
    for got, *parts in zip(info.tally, *tallies, strict=True):
        np.testing.assert_allclose(got, sum(parts), atol=2e-5)
    assert float(info.commitment) == pytest.approx(distance, rel=1e-5)


LSE = {"return_lse": True}


def test_local_heads_stand_beside_routed_ones():
    q, k, v = qkv(45, heads=6, kv_heads=3)
    method = js.routing_transformer(
        clusters=4, window=6, num_local_heads=1, local_block=8, count_eps=0.5, self_logit=-2.0
    )
    params = params_of(method, heads=6, kv_heads=3)
    for q_len, causal in ((45, True), (45, False), (17, True)):
        mask = CAUSAL if causal else None
        out, info = jax.jit(lambda *x, mask=mask: method.attend(params, *x, mask=mask))(
            q[45 - q_len :], k, v
        )
        keys = oracle.layer_norm(k)[:, 1:]
        members = oracle.balanced(oracle.scores(keys, params["centroids"].means), 6)
        own = oracle.queries_of(members, 45 - q_len, q_len)
        routed = oracle.attention(
            oracle.layer_norm(q)[45 - q_len :, 2:],
            keys,
            v[:, 1:],
            own,
            members,
            causal=causal,
            count_eps=0.5,
            self_logit=-2.0,
        )
        queries, keys = oracle.local_members(45, 8, 1)
        queries = oracle.queries_of([queries], 45 - q_len, q_len)
        of_tail = q[45 - q_len :, :2]
        local = oracle.attention(of_tail, k[:, :1], v[:, :1], queries, [keys], causal=causal)
        np.testing.assert_allclose(out[:, :2], local[0], atol=4e-6)
        np.testing.assert_allclose(out[:, 2:], routed[0], atol=4e-6)
        np.testing.assert_array_equal(info.memberships[0], np.ones(q_len))
    assert (info.memberships[1:] == 0).any(), "a token that no cluster has"


# two features, so that angles are all there is
ANGLES = np.deg2rad(np.arange(0, 120, 20))
TURNING = on_device(np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)[:, None], jnp.float32)
AXES = on_device([[[1.0, 0.0], [0.0, 1.0]]])


def test_worked_example():
    v = jnp.arange(6, dtype=jnp.float32)[:, None, None]
    method = js.routing_transformer(clusters=2, window=4, normalize=l2_norm)
    run = jax.jit(lambda m, *x: m.attend(with_means(AXES), *x, mask=CAUSAL), static_argnums=0)
    out, info = run(method, TURNING, TURNING, v)
    assert info.kv_order.tolist() == [[0, 1, 2, 3, 2, 3, 4, 5]]
    first = js.attend(TURNING[:4], TURNING[:4], v[:4], mask=CAUSAL)
    np.testing.assert_allclose(first[:, 0, 0], [0, 0.510659, 1.054342, 1.643125], atol=1e-6)
    second = js.attend(TURNING[2:], TURNING[2:], v[2:], mask=CAUSAL)
    np.testing.assert_allclose(second[:, 0, 0], [2, 2.510659, 3.054342, 3.643125], atol=1e-6)
    expected = [0, 0.510659, 1.527171, 2.076892, 3.054342, 3.643125]
    np.testing.assert_allclose(out[:, 0, 0], expected, atol=1e-6)
    assert info.memberships.tolist() == [[1, 1, 2, 2, 1, 1]]
    scores = clustering.centroid_scores(TURNING, AXES)
    assert scores.argmax(-1).tolist() == [[0, 0, 0, 1, 1, 1]]
    assert float(info.commitment) == pytest.approx(0.076437, abs=1e-6)
    moved = clustering.spherical_average(decay=0.9)(Centroids.of(AXES), info.tally)
    expected = [[[0.993969, 0.034202], [0.017365, 0.998481]]]
    np.testing.assert_allclose(moved.means, expected, atol=1e-6)
    # the authors' sum over memberships is divided by a little more
    soft = js.routing_transformer(clusters=2, window=4, normalize=l2_norm, count_eps=1e-2)
    softer, _ = run(soft, TURNING, TURNING, v)
    counts = np.array([1, 1, 2, 2, 1, 1])
    np.testing.assert_allclose(softer[:, 0, 0], out[:, 0, 0] * counts / (counts + 0.01), rtol=1e-6)


def test_normalisation_by_hand():
    four = jnp.arange(1.0, 5.0)
    np.testing.assert_allclose(
        layer_norm(four), [-1.341640, -0.447213, 0.447213, 1.341640], atol=1e-6
    )
    assert float(jnp.linalg.norm(layer_norm(four))) == pytest.approx(2, abs=1e-5)
    for normal in (layer_norm, l2_norm):
        assert not normal(jnp.zeros(4)).any()
        assert jnp.isfinite(jax.grad(lambda x: normal(x).sum())(jnp.zeros(4))).all()  # noqa: B023


def test_the_first_step_of_counted_averages():
    seen = Tally(on_device([[100.0]]), on_device([[[50.0, -50.0]]]))
    start = on_device([[[1.0, -1.0]]])
    long = clustering.counted_average()(Centroids.of(start, as_sums=True), seen)
    np.testing.assert_allclose(long.means[0, 0], [10.49, -10.49], rtol=1e-5)
    right = clustering.counted_average()(Centroids.of(start), seen)
    np.testing.assert_allclose(right.means[0, 0], [0.5, -0.5], rtol=1e-5)


@pytest.mark.parametrize("as_sums", [False, True])
def test_moving_centroids_equals_the_oracle(as_sums):
    rng = np.random.default_rng(0)
    x = layer_norm(on_device(rng.normal(size=(3, 2, 30, 2, 8)), jnp.float32))
    # the last cluster is nobody's
    means = on_device(rng.normal(size=(2, 5, 8)), jnp.float32)
    means = means.at[:, 1].set(-means[:, 0]).at[:, 4].set(means[:, 0] / 2)
    spherical, counted = Centroids.of(means), Centroids.of(means, as_sums=as_sums)
    by_hand, counts, sums = means, np.zeros((2, 5)), np.asarray(means) * as_sums
    average, divide = (
        rule(decay=0.8) for rule in (clustering.spherical_average, clustering.counted_average)
    )
    for step in range(3):
        seen = clustering.tally(x[step], means)
        expected = oracle.tally(x[step].reshape(60, 2, 8), means)
        assert not expected[0][:, 4].any()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), (*seen,), expected)
        spherical, counted = average(spherical, seen), divide(counted, seen)
        by_hand = oracle.spherical_step(by_hand, *expected, 0.8)
        of_counts, counts, sums = oracle.counted_step(counts, sums, *expected, 0.8)
        np.testing.assert_allclose(spherical.means, by_hand, atol=1e-5)
        if not as_sums:
            of_counts[:, 4] = means[:, 4]
        np.testing.assert_allclose(counted.means, of_counts, rtol=1e-5, atol=1e-5)
    unit = jnp.linalg.norm(spherical.means[:, :4], axis=-1)
    assert (unit < 0.99 * jnp.linalg.norm(means[:, :4], axis=-1)).any(), "not normalised again"


def test_a_centroid_without_tokens_stays_and_padding_counts_for_nothing():
    means = on_device([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    x = jnp.concatenate([TURNING, jnp.zeros((4, 1, 2))])
    seen = clustering.tally(x, means)
    np.testing.assert_array_equal(seen.counts, [[3, 3, 0]])
    exists = jnp.arange(10) < 4
    np.testing.assert_array_equal(clustering.tally(x, means, exists=exists).counts, [[3, 1, 0]])
    for rule in (clustering.spherical_average(), clustering.counted_average()):
        moved = rule(Centroids.of(means), seen)
        np.testing.assert_array_equal(moved.means[0, 2], means[0, 2])
        nobody = rule(Centroids.of(means), jax.tree.map(jnp.zeros_like, seen))
        np.testing.assert_array_equal(nobody.means, means)
    # which the authors' start makes long, as their sums are and their counts are not
    long = clustering.counted_average()(Centroids.of(means, as_sums=True), seen)
    assert abs(float(long.means[0, 2, 0])) > 1e3


def test_a_broken_token_moves_no_centroid():
    x, means = on_device([[[1.0, 0.1]], [[0.2, 1.0]], [[0.9, 0.0]]]), AXES
    for broken in (jnp.nan, jnp.inf):
        seen = clustering.tally(x.at[2, 0, 1].set(broken), means)
        np.testing.assert_array_equal(seen.counts, [[1, 1]])
        np.testing.assert_allclose(seen.sums, [[[1.0, 0.1], [0.2, 1.0]]])
        assert jnp.isfinite(clustering.commitment(x.at[2, 0, 1].set(broken), means))


def test_what_does_not_exist_is_committed_to_nothing():
    x = on_device([[[1.0, 0.1]], [[0.2, 1.0]], [[5.0, 5.0]]])
    found = clustering.commitment(x, AXES, exists=jnp.array([True, True, False]))
    np.testing.assert_allclose(found, clustering.commitment(x[:2], AXES), rtol=1e-6)
    np.testing.assert_allclose(found, (0.1**2 + 0.2**2) / 4, rtol=1e-5)


def test_centroids_become_as_long_as_tokens():
    x = layer_norm(jax.random.normal(jax.random.key(5), (50, 1, 16)))
    means = layer_norm(jax.random.normal(jax.random.key(6), (1, 3, 16)))
    method = js.routing_transformer(clusters=3)
    params = {"centroids": Centroids.of(means)}
    _, info = method.plan(params, x, x)
    assert method.update is not None
    for _ in range(20):
        params = method.update(params, info)
    lengths = jnp.linalg.norm(params["centroids"].means, axis=-1)
    np.testing.assert_allclose(lengths, 4.0, atol=0.2)


def test_centroids_of_tokens_find_what_is_there():
    rng = np.random.default_rng(0)
    true = oracle.l2_norm(rng.normal(size=(2, 4, 16)))
    x = true[:, rng.integers(0, 4, 400)] + 0.05 * rng.normal(size=(2, 400, 16))
    x = l2_norm(on_device(x.swapaxes(0, 1).reshape(4, 100, 2, 16), jnp.float32))
    # more than there are directions, so that each has one from the start
    found = clustering.centroids_of_tokens(jax.random.key(3), x, 12, normalize=l2_norm)
    nearest = np.einsum("hcd,hed->hce", found, true)
    assert nearest.max(1).min() > 0.98
    first = clustering.centroids_of_tokens(
        jax.random.key(3), x, 12, iterations=0, normalize=l2_norm
    )
    assert clustering.commitment(x, found) < clustering.commitment(x, first)
    with pytest.raises(ValueError, match="clusters=401 must be at most 400"):
        clustering.centroids_of_tokens(jax.random.key(3), x, 401, normalize=l2_norm)


@pytest.mark.parametrize("rule", [clustering.spherical_average, clustering.counted_average])
def test_replicas_move_centroids_together(rule):
    x = layer_norm(qkv(40, heads=2, batch=(4,))[0])
    centroids = Centroids.of(on_device(np.random.default_rng(1).normal(size=(2, 3, 16)), x.dtype))

    def step(axis_name, x):
        return rule(decay=0.5, axis_name=axis_name)(centroids, clustering.tally(x, centroids.means))

    whole = step(None, x)
    mapped = jax.vmap(functools.partial(step, "replicas"), axis_name="replicas")(x)
    mesh = Mesh(np.asarray(jax.devices()[:1]), "replicas")
    split = jax.shard_map(
        functools.partial(step, "replicas"),
        mesh=mesh,
        in_specs=PartitionSpec("replicas"),
        out_specs=PartitionSpec(),
    )(x)
    for got in (jax.tree.map(lambda y: y[0], mapped), jax.tree.map(lambda y: y[3], mapped), split):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, whole)
    alone = step(None, x[0])
    assert float(jnp.abs(alone.means - whole.means).max()) > 1e-2


@pytest.mark.parametrize("normal", [layer_norm, l2_norm])
def test_one_cluster_is_dense_attention_over_normalised_tokens(normal):
    q, k, v = qkv(45)
    method = js.routing_transformer(clusters=1, normalize=normal)
    run = jax.jit(lambda *x: method.attend(params_of(method), *x, mask=CAUSAL, scale=0.7)[0])
    dense = js.attend(normal(q), normal(k), v, mask=CAUSAL, scale=0.7, implementation="reference")
    np.testing.assert_allclose(run(q, k, v), dense, atol=4e-6)


def test_what_changes_nothing():
    """Tokens in another order, centroids in another order, centroids of another length."""
    q, k, v = qkv(45)
    method = js.routing_transformer(clusters=4, window=15, num_memory=2)
    params = params_of(method)
    run = jax.jit(lambda params, *x: method.attend(params, *x))
    out, info = run(params, q, k, v)
    order = np.random.default_rng(0).permutation(45)
    moved, _ = run(params, *(x[order] for x in (q, k, v)))
    np.testing.assert_allclose(moved, out[order], atol=4e-6)

    swapped = jax.tree.map(lambda x: x[:, on_device([2, 0, 3, 1])], params)
    np.testing.assert_allclose(run(swapped, q, k, v)[0], out, atol=4e-6)

    longer = {**params, "centroids": Centroids.of(3 * params["centroids"].means)}
    same, other = run(longer, q, k, v)
    np.testing.assert_array_equal(same, out)
    np.testing.assert_array_equal(other.kv_order, info.kv_order)
    assert float(jnp.abs(other.commitment - info.commitment)) > 0.1


def clusters_by_pairs(q, k, v, own, members):
    """Attention in clusters as jax.nn.softmax over all pairs, for autodiff; causal."""
    heads, q_len = len(own) if len(own) == q.shape[1] else q.shape[1], len(q)
    total, counts = 0.0, np.zeros((q_len, heads))
    rounded = v.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    logits = jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    for c in range(len(members[0])):
        pairs = np.zeros((heads, q_len, q_len), bool)
        for h in range(heads):
            rows, columns = own[h * len(own) // heads][c], members[h * len(members) // heads][c]
            pairs[h][np.ix_(rows, columns)] = True
        pairs &= np.tri(q_len, dtype=bool)
        some = pairs.any(-1, keepdims=True)
        weights = jax.nn.softmax(jnp.where(pairs | ~some, logits, -jnp.inf), axis=-1)
        total += jnp.einsum(
            "hqk,khd->qhd", jnp.where(some, weights, 0.0).astype(rounded).astype(v.dtype), v
        )
        counts += np.array(
            [[i in own[h * len(own) // heads][c] for h in range(heads)] for i in range(q_len)]
        )
    return total / np.maximum(counts, 1)[..., None]


@pytest.mark.parametrize(
    "shared", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["shared", "apart"]
)
def test_gradients_are_those_of_masked_dense_attention(shared):
    q, k, v = qkv(45)
    method = js.routing_transformer(clusters=4, window=9, shared=shared)
    params = params_of(method)

    def loss(out):
        return jnp.sin(out.astype(jnp.float32)).sum()

    def sparse(q, k, v, params):
        return loss(method.attend(params, q, k, v, mask=CAUSAL)[0])

    def dense(own, members, q, k, v):
        return loss(
            clusters_by_pairs(*(layer_norm(x).astype(x.dtype) for x in (q, k)), v, own, members)
        )

    gradients = jax.jit(jax.grad(sparse, argnums=(0, 1, 2, 3)))
    means = params["centroids"].means
    for dtype in (jnp.float32, jnp.bfloat16)[: 2 if shared else 1]:
        given = [x.astype(dtype) for x in (q, k, v)]
        single = [x.astype(jnp.float32) for x in given]
        members = oracle.balanced(oracle.scores(oracle.layer_norm(single[1]), means), 9)
        own = members
        if not shared:
            scores = oracle.scores(oracle.layer_norm(single[0]), np.repeat(means, 2, 0))
            own = oracle.balanced(scores, 9)
        plain = jax.jit(jax.grad(functools.partial(dense, own, members), argnums=(0, 1, 2)))
        *got, of_params = gradients(*given, params)
        exact = plain(*single)
        if dtype == jnp.float32:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), tuple(got), exact
            )
        else:
            # no worse than a few times what plain arithmetic of 16 bits loses
            for ours, its, true in zip(got, plain(*given), exact, strict=True):
                lost = jnp.abs(its.astype(jnp.float32) - true).max()
                assert jnp.abs(ours.astype(jnp.float32) - true).max() <= 4 * lost
        assert not any(leaf.any() for leaf in jax.tree.leaves(of_params))


def test_tokens_without_a_cluster_learn_by_commitment_alone():
    q, k, v = qkv(45, heads=1, kv_heads=1)
    method = js.routing_transformer(clusters=3, window=5)
    params = params_of(method, heads=1, kv_heads=1)

    def loss(q, k, v, params, weight):
        out, info = method.attend(params, q, k, v, mask=CAUSAL)
        return jnp.sin(out).sum() + weight * info.commitment, info.memberships[0] == 0

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (*alone, _), outside = gradient(q, k, v, params, 0.0)
    assert 10 < outside.sum() < 45
    for x in alone:
        assert not x[outside].any()
        assert x[~outside].any((1, 2)).sum() > 5
    committed, _ = gradient(q, k, v, params, 1.0)
    assert committed[1][outside].any((1, 2)).all()
    assert not any(leaf.any() for leaf in jax.tree.leaves(committed[3])), "it moves tokens alone"
    # it pulls: a step against the gradient brings keys closer
    distance = functools.partial(clustering.commitment, means=params["centroids"].means)
    pull = jax.grad(lambda k: distance(layer_norm(k)))(k)
    assert distance(layer_norm(k - 0.1 * len(k) * pull)) < distance(layer_norm(k))


def test_balanced_membership_looks_ahead_and_own_clusters_do_not():
    """The leak that the method's page warns of, and that values are no part of it."""
    q, k, v = qkv(45)
    later = k.at[30:].set(-k[30:] * 5)
    for balanced in (True, False):
        method = js.routing_transformer(clusters=4, balanced=balanced, normalize=l2_norm)
        run = jax.jit(lambda *x, m=method: m.attend(params_of(m), *x, mask=CAUSAL)[0])
        out = run(q, k, v)
        np.testing.assert_array_equal(run(q, k, v.at[30:].add(9.0))[:30], out[:30])
        leaks = float(jnp.abs(run(q, later, v)[:30] - out[:30]).max())
        # where clusters begin changes, and with it the order of sums
        assert leaks > 0.1 if balanced else leaks < 1e-6


@pytest.mark.parametrize("balanced", [pytest.param(True, marks=pytest.mark.slow), False])
def test_decoding_sees_what_is_there(balanced):
    """Each step is the last of a call over the tokens so far; of own clusters, one of the whole."""
    method = js.routing_transformer(clusters=3, window=6, balanced=balanced)
    layer = js.nn.SparseAttention(32, num_heads=4, share_qk=True, method=method, rngs=nnx.Rngs(0))
    assert layer.k_proj is None
    x = on_device(np.random.default_rng(0).normal(size=(2, 26, 32)), jnp.float32)
    step = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))
    whole = nnx.jit(lambda layer, x: layer(x, mask=CAUSAL))
    cache = layer.init_cache((2,), 30)
    for first, length in ((0, 22), (22, 1), (23, 1)):
        out, cache = step(layer, x[:, first : first + length], cache)
    np.testing.assert_allclose(out, whole(layer, x[:, :24])[:, -1:], atol=5e-6)
    ahead = jnp.abs(out - whole(layer, x)[:, 23:24]).max()
    assert (ahead > 1e-3) if balanced else (ahead < 5e-6)


def test_a_cache_longer_than_what_it_holds():
    """Keys after the last query are in no cluster, whatever they are, and move no centroid."""
    q, k, v = qkv(3, 30, batch=(2,))
    starts = on_device([17, 9])
    method = js.routing_transformer(clusters=3, window=6)
    params = params_of(method)
    where = {"mask": js.masks.causal(offset=starts), "positions": starts[:, None] + jnp.arange(3)}

    @jax.jit
    def run(q, k, v):
        held = [slice(0, start + 3) for start in (17, 9)]
        each = [
            method.attend(params, q[n], k[n, at], v[n, at], mask=CAUSAL)
            for n, at in enumerate(held)
        ]
        return method.attend(params, q, k, v, **where), each

    (out, info), each = run(q, k, v)
    np.testing.assert_allclose(out, jnp.stack([alone for alone, _ in each]), atol=4e-6)
    counts = sum(own.tally.counts for _, own in each)
    np.testing.assert_array_equal(info.tally.counts, counts)


def test_training_moves_what_no_optimizer_sees():
    rule = clustering.spherical_average(decay=0.5)
    method = js.routing_transformer(clusters=4, window=12, num_memory=1, update=rule)
    method = js.from_length(method, min_length=20)
    layer = js.nn.SparseAttention(32, num_heads=4, share_qk=True, method=method, rngs=nnx.Rngs(0))
    x = on_device(np.random.default_rng(0).normal(size=(2, 40, 32)), jnp.float32)
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    params = jax.tree.leaves(nnx.state(layer, nnx.Param))
    # three matrices and a memory of keys and of values
    assert len(params) == 5

    def centroids():
        return np.asarray(layer.method_params["centroids"].means[...])

    @nnx.jit
    def step(layer, optimizer, x):
        @nnx.remat
        def run(layer, x):
            return layer(x, mask=CAUSAL)

        loss, gradient = nnx.value_and_grad(lambda m: jnp.square(run(m, x) - x).mean())(layer)
        optimizer.update(layer, gradient)
        return loss

    before = centroids()
    losses = [float(step(layer, optimizer, x))]
    np.testing.assert_array_equal(centroids(), before)
    layer.train()
    # one step of the rule, though a forward pass is made twice
    q = layer.q_proj(x).reshape(2, 40, 4, 8)
    q = js.nn.rotary(q, jnp.broadcast_to(jnp.arange(40), (2, 40)))
    start = on_device(before)
    expected = rule(Centroids.of(start), clustering.tally(layer_norm(q), start))
    losses += [float(step(layer, optimizer, x))]
    np.testing.assert_allclose(centroids(), expected.means, atol=1e-5)
    layer(x[:, :10], mask=CAUSAL)
    np.testing.assert_allclose(centroids(), expected.means, atol=1e-5)
    layer.eval()
    assert layer.use_running_average
    assert losses[1] < losses[0]


@pytest.mark.parametrize("causal", [True, False])
def test_what_it_computes_is_counted(causal):
    """Whole clusters, 1 / clusters of the map; of tiles on later keys only none."""
    q, k, v = qkv(512, heads=2, kv_heads=1, dim=8)
    method = js.routing_transformer(clusters=4, normalize_logits=False)
    params, mask = params_of(method, heads=2, kv_heads=1, dim=8), CAUSAL if causal else None
    plan, info = jax.jit(lambda q, k: method.plan(params, q, k, mask=mask))(q, k)
    assert (plan.block_q, plan.block_kv, plan.list_heads, plan.width) == (128, 128, 1, 1)
    assert float(plan.density()[0]) == 1 / 4
    small = js.routing_transformer(clusters=2, window=96, normalize_logits=False)
    params = params_of(small, heads=2, kv_heads=1, dim=8)
    plan, info = jax.jit(lambda q, k: small.plan(params, q, k, mask=mask))(q, k)
    assert (plan.block_q, plan.block_kv, plan.width) == (32, 32, 3)
    # tokens of a cluster ascend, so that later tiles hold later keys, save those that overlap
    order = np.asarray(info.kv_order[0]).reshape(6, 32)
    expected = [
        [j for j in range(i // 3 * 3, i // 3 * 3 + 3) if not causal or order[j, 0] <= order[i, -1]]
        for i in range(6)
    ]
    assert plan.kv_num_blocks[0].tolist() == [len(row) for row in expected]
    assert not causal or plan.kv_num_blocks.sum() < 18
    # pairs, counted by the executor, and by hand
    if not causal:
        return
    report = jax.jit(lambda *x: js.density_report(small, *x, mask=mask, params=params))(q, k, v)
    members = order.reshape(2, 96)
    assert (np.diff(members) > 0).all()
    share = (2 * 96 * 97 // 2) / (512 * 513 // 2)
    np.testing.assert_allclose(report.pairs, np.full(2, share), rtol=1e-5)


def test_memory_is_not_that_of_all_pairs():
    method = js.routing_transformer(clusters=16, num_local_heads=1)
    params = params_of(method, heads=2, kv_heads=2)

    def temporary(length):
        tokens = jax.ShapeDtypeStruct((length, 2, 16), jnp.float32)
        gradient = jax.grad(lambda *x: method.attend(params, *x, mask=CAUSAL)[0].sum(), (0, 1, 2))
        compiled = jax.jit(gradient).lower(tokens, tokens, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # a number per pair would be 1024 arrays of the size of q
    assert temporary(2**14) < 20 * 2**14 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clusters": 0}, "clusters=0"),
        ({"window": 0}, "window=0"),
        ({"num_memory": -1}, "num_memory=-1"),
        ({"num_local_heads": -1}, "num_local_heads=-1"),
        ({"local_block": 0}, "local_block=0"),
        ({"flange": -1}, "flange=-1"),
        ({"count_eps": 0.0}, "count_eps=0.0"),
        ({"self_logit": float("nan")}, "self_logit=nan"),
        ({"by_rank": True, "balanced": False, "shared": False}, "balanced=True or shared=True"),
    ],
)
def test_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        js.routing_transformer(**options)


def test_bad_calls():
    q, k, v = qkv(20)
    method = js.routing_transformer(clusters=2)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 16\).* need \(2, 2, 16\)"):
        method.plan(params_of(js.routing_transformer(clusters=3)), q, k)
    with pytest.raises(ValueError, match="q_len=20 must be at most 10"):
        method.plan(params_of(method), q, k[:10])
    ranked = js.routing_transformer(clusters=2, by_rank=True)
    with pytest.raises(ValueError, match="lengths of queries and keys differ"):
        ranked.plan(params_of(ranked), q[10:], k)
    with pytest.raises(ValueError, match="num_local_heads=2 must be at most 1"):
        params_of(js.routing_transformer(num_local_heads=2))
    with pytest.raises(ValueError, match=r"decay=1.0 must lie in \[0, 1\)"):
        clustering.spherical_average(decay=1.0)
    with pytest.raises(ValueError, match="num_kv_heads=2"):
        js.nn.SparseAttention(32, num_heads=4, num_kv_heads=2, share_qk=True, rngs=nnx.Rngs(0))
