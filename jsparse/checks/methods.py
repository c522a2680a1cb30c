"""Checks of what methods are made of and called with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import _compat
from jsparse.checks.attention import positions_fit


def of_single_keys(**values: Any) -> None:
    """What belongs to single keys and one softmax is not given to a method of branches."""
    for name, value in values.items():
        if value is not None:
            raise ValueError(
                f"{name} changes the logits of single keys in one softmax; this method has several "
                f"branches, one of them over compressed keys. Leave {name} at None."
            )


def one_softmax(return_lse: bool) -> None:
    """No log-sum-exp is asked for where several softmaxes are mixed."""
    if return_lse:
        raise ValueError(
            "return_lse=True: this method mixes the outputs of several softmaxes, which have no "
            "log-sum-exp together; leave it at False."
        )


def hidden_states(x: Any, q: Any, features: int) -> None:
    """The hidden states that a method looks at fit its queries and parameters."""
    expected = (*q.shape[:-2], features)
    if x is None:
        raise ValueError(
            f"This method looks at hidden states; pass x {expected}, one vector per query."
        )
    if not hasattr(x, "shape"):
        raise ValueError(
            f"x is {type(x).__name__}; this method looks at hidden states alone: pass x "
            f"{expected}, one vector per query."
        )
    if x.shape != expected:
        raise ValueError(f"x {x.shape} must be {expected}, one vector per query.")


def query_latents(q_latent: Any, q: Any, features: int) -> None:
    """The low-rank queries that a method looks at fit its queries and parameters."""
    expected = (*q.shape[:-2], features)
    if q_latent.shape != expected:
        raise ValueError(
            f"q_latent {q_latent.shape} must be {expected}, one vector per query, for which the "
            "parameters were made: pass x=js.LatentStates(x, q_latent)."
        )


def a_latent_cache(cache: Any, width: int) -> None:
    """A cache is one of latent attention, of the layer's sizes."""
    found = getattr(cache, "latents", None)
    if found is None or found.shape[-2:] != (1, width):
        shape = "" if found is None else f" of latents {found.shape}"
        raise ValueError(
            f"The cache is {type(cache).__name__}{shape}; this layer keeps one vector of {width} "
            "numbers per token. Make the cache by `layer.init_cache`."
        )


def keys_of_all_tokens(q_len: int, kv_len: int) -> None:
    """Without a state, hidden states of all keys are those of the queries."""
    if q_len != kv_len:
        raise ValueError(
            f"x has the hidden states of {q_len} queries, and {kv_len} keys need some; give all "
            "tokens at once, or the state that the step before returned."
        )


def tokens_of_branches(q: Any, k: Any, v: Any, own: bool, **branches: Any) -> None:
    """What branches are given is of the same tokens, heads and features; or they make their own."""
    for name, given in branches.items():
        if given is None:
            continue
        if own:
            raise ValueError(
                f"{name} is given, and own_projections=True makes it of hidden states; leave one "
                "of the two out."
            )
        shapes = tuple(getattr(x, "shape", None) for x in given)
        expected = tuple(x.shape for x in (q, k, v) if x is not None)
        if len(shapes) != 3 or shapes[: len(expected)] != expected:
            raise ValueError(
                f"{name} has shapes {shapes}; it must be a query, key and value (q, k, v) of the "
                f"shapes of q, k and v, {expected}."
            )


def room_for_both_ends(block_top_k: Any) -> None:
    """Chosen blocks include the first and the last, whose mean tells of what comes later."""
    if block_top_k is not None and block_top_k < 2:
        raise ValueError(
            f"block_top_k={block_top_k} must be at least 2: a query's first and last block are "
            "always among them. None looks at every token."
        )


def room_for_tokens(top_k: int, block_kv: int, block_top_k: Any) -> None:
    """Chosen blocks hold as many tokens as are chosen among them."""
    if block_top_k is not None and top_k > block_top_k * block_kv:
        raise ValueError(
            f"top_k={top_k} tokens are more than block_top_k={block_top_k} blocks of "
            f"block_kv={block_kv} hold, {block_top_k * block_kv}; take more or larger blocks, or "
            "block_top_k=None, which looks at every token."
        )


def an_indexer_for(indexed: Any, q: Any, k: Any) -> None:
    """An indexer saw the tokens that attention is between."""
    found = indexed.q.shape[:-2], indexed.weights.shape[:-1], indexed.k.shape[:-1]
    rows, columns = q.shape[:-2], k.shape[:-2]
    if found != (rows, rows, columns):
        raise ValueError(
            f"indexed has queries, weights and keys of tokens {found[0]}, {found[1]} and "
            f"{found[2]}; q and k have {rows} and {columns}. Pass the info.indexed of the call "
            "with these tokens."
        )


def gate_width(gate_dim: int, dim: int) -> None:
    """Queries that are not projected for a gate are as wide as it is."""
    if gate_dim != dim:
        raise ValueError(
            f"gate_dim={gate_dim} must be {dim}, the width of a query, as this `group_query` "
            "projects none; `js.group_queries.projected()` maps queries to any width."
        )


def per_kv_head(kv_heads: int, **values: Any) -> None:
    """A number for all lists or one for each kv head, whose group shares one."""
    for name, value in values.items():
        if jnp.shape(value) not in ((), (kv_heads,)):
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}; expected a number, or one per kv head, "
                f"({kv_heads},)."
            )


def method_type(method: Any) -> None:
    """A method is what a factory made, not the factory."""
    if not hasattr(method, "attend"):
        name = getattr(method, "__name__", "")
        factory = name if name.isidentifier() else "xattention"
        raise ValueError(
            f"method is {type(method).__name__}; it must be made by a factory, e.g. "
            f"js.{factory}(). To attend without a method call js.attend."
        )


def positions_to_turn_back(of_method: float | None, of_layer: float | None, layer: str) -> None:
    """A method that turns rotary positions back is in a layer whose q and k have them."""
    if of_method is None or of_method == of_layer:
        return
    have = "do not all have any" if of_layer is None else f"have those of rope_base={of_layer}"
    raise ValueError(
        f"The method turns back rotary positions of rope_base={of_method}, and the features of q "
        f"and k of this {layer} {have}: make the method with rope_base={of_layer}."
    )


def parameters_given(needed: bool) -> None:
    """A method that has parameters is called with some."""
    if needed:
        raise ValueError(
            "params=(), and this method has parameters: make them by method.init(key, num_heads=, "
            "num_kv_heads=, dim=, features=) and pass them as params= to js.sparse_attention or "
            "js.nn.attention_fn. js.nn.SparseAttention(method=...) makes its own."
        )


def nothing_to_learn(number: int, needed: bool) -> None:
    """A method that a built layer takes needs no parameters that the layer does not have."""
    if needed:
        raise ValueError(
            f"methods[{number}] has parameters, which the layer does not have; pass rngs=, from "
            "which they are made, or build the model with js.nn.SparseAttention(method=...)."
        )


def a_state(state: Any, expected: Any) -> None:
    """A cache carries the state of the layer's method."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise ValueError(
            "The cache has no state for the layer's method; make it by `layer.init_cache`."
        )


def positions_of_a_grid(positions: Any, length: int) -> None:
    """Known positions are those of all tokens of a grid: where they stand is the grid's to say."""
    if positions is None:
        return
    positions_fit(positions, length)
    if not _compat.is_traced(positions) and (np.asarray(positions)[..., 0] != 0).any():
        raise ValueError(
            f"positions={np.asarray(positions)} must be 0 to {length - 1}: a grid's tokens are all "
            "there, row-major from its first. Leave positions out; a part of a grid is a grid of "
            "its own."
        )


def offsets_of_axes(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """A table has heads and, for each axis of a grid, as many offsets to either side."""
    if len(shape) != 1 + len(grid) or not all(size % 2 for size in shape[1:]):
        wanted = ", ".join(["heads", *["2 * window - 1"] * len(grid)])
        raise ValueError(
            f"table has shape {shape}; of a grid of {len(grid)} axes it must be [{wanted}]."
        )


def token_lists(plan: Any) -> None:
    """A plan lists single tokens for single queries, the same for all heads."""
    if plan is not None and (plan.block_q, plan.block_kv, plan.list_heads) != (1, 1, 1):
        raise ValueError(
            f"plan has tiles of {plan.block_q} x {plan.block_kv} and {plan.list_heads} lists per "
            "sequence; it must list tokens (1 x 1) for all heads together."
        )


def forced_blocks(top_k: int, **forced: int) -> None:
    """Blocks that are always chosen are no more than are chosen."""
    if sum(forced.values()) > top_k:
        given = " and ".join(f"{name}={value}" for name, value in forced.items())
        raise ValueError(f"top_k={top_k} blocks must have room for {given} forced ones.")


def ranks_of_clusters(by_rank: bool, balanced: bool, shared: bool) -> None:
    """Places are ranks where the queries and keys of each cluster begin at the same place."""
    if by_rank and not balanced and not shared:
        raise ValueError(
            "by_rank=True needs clusters of which queries and keys begin at the same place; take "
            "balanced=True or shared=True."
        )


def scales_of_eight_bits(power_of_two_scales: bool, eight_bits: bool) -> None:
    """There are scales to round."""
    if power_of_two_scales and not eight_bits:
        raise ValueError(
            "power_of_two_scales=True rounds the scales of eight bits, which other types do not "
            "have; take index_dtype='float8_e4m3fn', or leave it."
        )


def centroids_fit(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Centroids are for these heads, clusters and features."""
    if shape != expected:
        raise ValueError(
            f"The centroids have shape {shape}; the routed kv heads, clusters and features of this "
            f"call need {expected}. Make the parameters by `method.init` for its sizes."
        )


def keys_for_all_queries(share_qk: bool, num_heads: int, num_kv_heads: int) -> None:
    """Where keys are the queries, there are as many heads of them."""
    if share_qk and num_kv_heads != num_heads:
        raise ValueError(
            f"share_qk=True makes each query head its own keys, so num_kv_heads={num_kv_heads} "
            f"must be num_heads={num_heads}; leave it out."
        )
