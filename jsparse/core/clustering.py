"""Online spherical k-means: the vectors that tokens are grouped by, as data no gradient moves."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jsparse import _compat, checks
from jsparse.types import Untrained, pytree_dataclass

# vectors [..., dim] to vectors of one length, in f32
Normalize = Callable[[Array], Array]


@pytree_dataclass
class Centroids(Untrained):
    """What tokens are compared with, and what `counted_average` remembers of earlier steps."""

    means: Float[Array, "heads clusters dim"]
    counts: Float[Array, "heads clusters"]
    sums: Float[Array, "heads clusters dim"]

    @classmethod
    def of(cls, means: Float[Array, "heads clusters dim"], *, as_sums: bool = False) -> "Centroids":
        """Centroids before the first step.

        Args:
          means: Where they stand.
          as_sums: Whether these also begin the sums, with counts that begin at 0: then the first
            means of `counted_average` are far too long, as in the authors' code.
        """
        sums = means if as_sums else jnp.zeros_like(means)
        return cls(means, jnp.zeros(means.shape[:-1]), sums)


class Tally(NamedTuple):
    """How many tokens are closest to each centroid, and their sum."""

    counts: Float[Array, "heads clusters"]
    sums: Float[Array, "heads clusters dim"]


UpdateRule = Callable[[Centroids, Tally], Centroids]


@jax.jit
def layer_norm(x: Float[Array, "*tokens dim"]) -> Float[Array, "*tokens dim"]:
    """Each vector less its mean, over its deviation: as long as `sqrt(dim)`. Zeros stay zeros."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)


@jax.jit
def l2_norm(x: Float[Array, "*tokens dim"]) -> Float[Array, "*tokens dim"]:
    """Each vector over its length. Zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def centroid_scores(
    x: Float[Array, "*batch length heads dim"], means: Float[Array, "heads clusters dim"]
) -> Float[Array, "*batch heads length clusters"]:
    """Products of normalised tokens with the centroids of their head; nothing has a gradient."""
    x, means = (jax.lax.stop_gradient(y).astype(jnp.float32) for y in (x, means))
    return jnp.einsum("...thd,hcd->...htc", x, means)


@jax.jit
def tally(
    x: Float[Array, "*batch length heads dim"],
    means: Float[Array, "heads clusters dim"],
    *,
    exists: Bool[Array, "*batch length"] | None = None,
) -> Tally:
    """Counts and sums normalised tokens by their closest centroid, those of all sequences together.

    Args:
      x: Normalised tokens. Vectors of zeros are padding and count for nothing, nor do those with a
        number that is not finite: it would stay in the centroids for good.
      means: The centroids.
      exists: Which tokens count; default all.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    counted = _counted(x, exists)
    x = jnp.where(counted[..., None], x, 0.0)
    closest = jnp.swapaxes(centroid_scores(x, means).argmax(-1), -1, -2)
    own = jax.nn.one_hot(closest, means.shape[1]) * counted[..., None]
    own, x = own.reshape(-1, *own.shape[-2:]), x.reshape(-1, *x.shape[-2:])
    return Tally(own.sum(0), jnp.einsum("thc,thd->hcd", own, x))


def _counted(
    x: Float[Array, "*batch length heads dim"], exists: Bool[Array, "*batch length"] | None
) -> Bool[Array, "*batch length heads"]:
    counted = (x != 0).any(-1) & jnp.isfinite(x).all(-1)
    return counted if exists is None else counted & exists[..., None]


@jax.jit
def commitment(
    x: Float[Array, "*batch length heads dim"],
    means: Float[Array, "heads clusters dim"],
    *,
    exists: Bool[Array, "*batch length"] | None = None,
) -> Float[Array, ""]:
    """How far normalised tokens are from their closest centroids: squares, mean over all numbers.

    Its gradient pulls tokens to their centroids and leaves these where they are. The tokens are
    those that `tally` counts.
    """
    counted = _counted(jax.lax.stop_gradient(x), exists)
    closest = centroid_scores(x, means).argmax(-1)
    target = jax.lax.stop_gradient(means)[jnp.arange(len(means))[:, None], closest]
    apart = jnp.where(counted[..., None], x.astype(jnp.float32) - jnp.swapaxes(target, -2, -3), 0.0)
    return jnp.square(apart).sum() / jnp.maximum(counted.sum() * x.shape[-1], 1)


def spherical_average(
    *, decay: float = 0.999, normalize: Normalize = l2_norm, axis_name: str | None = None
) -> UpdateRule:
    """Moves each centroid towards the direction of its tokens; one without tokens stays.

    `decay * mean + (1 - decay) * normalize(sum)`, not normalised again.

    Args:
      decay: What stays, in [0, 1).
      normalize: As tokens are normalised, so that centroids become as long as these.
      axis_name: The axis of replicas, whose tokens count together.
    """
    checks.decays(decay=decay)

    @jax.jit
    def update(centroids: Centroids, seen: Tally) -> Centroids:
        counts, sums = _of_replicas(seen, axis_name)
        moved = decay * centroids.means + (1 - decay) * normalize(sums)
        means = jnp.where(counts[..., None] > 0, moved, centroids.means)
        return dataclasses.replace(centroids, means=means)

    return update


def counted_average(
    *, decay: float = 0.999, smoothing: float = 1e-5, axis_name: str | None = None
) -> UpdateRule:
    """Divides the average of each centroid's sums by that of its counts.

    Both begin at 0, so that the first mean is that of the first tokens; `as_sums=True` of
    `Centroids.of` begins as the authors do. What has neither count nor sum stays.

    Args:
      decay: What stays of sums and counts, in [0, 1).
      smoothing: Added to each count, all of which are then scaled to their former total.
      axis_name: The axis of replicas, whose tokens count together.
    """
    checks.decays(decay=decay)

    @jax.jit
    def update(centroids: Centroids, seen: Tally) -> Centroids:
        new = _of_replicas(seen, axis_name)
        counts = decay * centroids.counts + (1 - decay) * new.counts
        sums = decay * centroids.sums + (1 - decay) * new.sums
        total = counts.sum(-1, keepdims=True)
        smooth = (counts + smoothing) / (total + counts.shape[-1] * smoothing) * total
        known = (smooth > 0) & ((counts > 0) | (sums != 0).any(-1))
        means = sums / jnp.where(known, smooth, 1.0)[..., None]
        return Centroids(jnp.where(known[..., None], means, centroids.means), counts, sums)

    return update


@functools.partial(jax.jit, static_argnames=("clusters", "iterations", "normalize"))
def centroids_of_tokens(
    key: PRNGKeyArray,
    x: Float[Array, "*batch length heads dim"],
    clusters: int,
    *,
    iterations: int = 10,
    normalize: Normalize,
) -> Float[Array, "heads clusters dim"]:
    """Takes tokens at random, then moves them to the means of those closest to them.

    Args:
      key: For which tokens.
      x: Normalised tokens.
      clusters: How many centroids, at most as many as tokens.
      iterations: Steps of Lloyd's algorithm; 10 in the PyTorch port.
      normalize: What was done to tokens, for sums of them: centroids then are as long as they.
    """
    checks.positive(clusters=clusters)
    checks.non_negative(iterations=iterations)
    tokens = jax.lax.stop_gradient(x).astype(jnp.float32).reshape(-1, *x.shape[-2:])
    checks.at_most(len(tokens), clusters=clusters)
    first = jax.random.choice(key, len(tokens), (clusters,), replace=False)

    def step(_, means):
        counts, sums = tally(tokens, means)
        return jnp.where(counts[..., None] > 0, normalize(sums), means)

    return _compat.fori_loop(0, iterations, step, jnp.swapaxes(tokens[first], 0, 1))


@functools.partial(jax.jit, static_argnames="window")
def closest_tokens(
    scores: Float[Array, "*batch heads length clusters"],
    window: int,
    *,
    exists: Bool[Array, "*batch length"] | None = None,
) -> Int[Array, "*batch heads clusters window"]:
    """The `window` tokens with the largest score for each cluster, ascending; ties to the lower.

    Args:
      scores: As `centroid_scores`.
      window: At most as many as there are tokens.
      exists: Which tokens can be chosen. Where those are too few, entries are `length`, last.
    """
    by_cluster, length = jnp.swapaxes(scores, -1, -2), scores.shape[-2]
    if exists is None:
        return jnp.sort(jax.lax.top_k(by_cluster, window)[1], axis=-1)
    by_cluster = jnp.where(exists[..., None, None, :], by_cluster, -jnp.inf)
    chosen = jax.lax.top_k(by_cluster, window)[1]
    real = jnp.take_along_axis(
        jnp.broadcast_to(exists[..., None, None, :], by_cluster.shape), chosen, axis=-1
    )
    return jnp.sort(jnp.where(real, chosen, length), axis=-1)


def _of_replicas(seen: Tally, axis_name: str | None) -> Tally:
    return seen if axis_name is None else jax.lax.psum(seen, axis_name)
