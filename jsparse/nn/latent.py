"""`LatentAttention`: keys and values of all heads from one small vector per token, any method."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.core.rotary import interleaved_rotary
from jsparse.nn.cache import LatentCache
from jsparse.nn.layer import AttentionLayer
from jsparse.types import LatentStates, Mask, Method


class LatentAttention(AttentionLayer):
    """Multi-head latent attention, sparse by any method that takes one key for all heads.

    Of each token `kv_lora_rank + rope_dim` numbers are kept: the latent, which each head's keys and
    values are projections of, and a key of `rope_dim` features that has the position and is the
    same for all heads.

    A method, and whatever stands in the place of `attention`, sees the absorbed form: queries
    projected to the latents, and one key for all heads, those numbers, which is the value too; of
    the output the first `kv_lora_rank` features are taken. The queries have a factor with which the
    default scale of whoever takes them is the layer's. Without either, attention of a prompt is
    computed with the keys and values of each head, that of a few tokens over a cache in the
    absorbed form: whichever multiplies less. Both are the same function. A window or documents
    given as `mask` leave that choice; as a method they do not.

    Methods that look at products of queries and keys see the true ones, and choose for all heads as
    for a group that shares a key. Those that turn positions back expect all features of a key to
    have one, and here the last `rope_dim` alone have: `seerattention`, `seerattention_r` and `nsa`
    are for this layer with `rope_base=None`. `hisa` makes its indexer's queries of the
    low-rank ones; it learns as in `js.nn.SparseAttention`, by `index_loss` of what `attention` is
    given.

    Parameters are those of DeepSeek's checkpoints: the kernel of `kv_b_proj` is `kv_b_proj.weight`
    transposed, and so on, with `kv_a_proj` for `kv_a_proj_with_mqa`, norms' `scale` for their
    `weight`, `out_proj` for `o_proj`, and `q_b_proj` for `q_proj` where `q_lora_rank` is 0. The
    indexer of `hisa` has `wq_b`, `wk` and `weights_proj`, transposed, as `q`, `k` and `weights`,
    and the weight and bias of `k_norm` as `k_scale` and `k_bias`. Frequencies are those of one
    `rope_base`: checkpoints extended by YaRN have others, which are not offered.

    Reference:
      DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1 and appendix C; DeepSeek-V3.2, 2025,
      inference/model.py of deepseek-ai/DeepSeek-V3.2-Exp.
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        v_dim: int | None = None,
        rope_dim: int | None = None,
        q_lora_rank: int | None = None,
        kv_lora_rank: int | None = None,
        method: Method | None = None,
        rope_base: float | None = 10_000.0,
        scale: float | None = None,
        implementation: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        With `head_dim=128` the defaults of a layer of 7168 features are those of DeepSeek-V3.2.

        Args:
          in_features: Width of the input and of the output.
          num_heads: Heads.
          head_dim: Features per head of queries and keys that have no position; default
            `in_features // num_heads`. `qk_nope_head_dim`, 128 in DeepSeek-V3.2.
          v_dim: Features per head of values; default `head_dim`. `v_head_dim`, 128 there.
          rope_dim: Features that have the position, even; default half of `head_dim`, to an even
            number. `qk_rope_head_dim`, 64 there.
          q_lora_rank: Width of the low-rank queries; default 12 times `head_dim`, 1536 there, but
            no more than half of `in_features`. 0 makes queries of the input at once, as
            DeepSeek-V2-Lite does.
          kv_lora_rank: Width of the latent; default 4 times `head_dim`, 512 there, but no more than
            half of `in_features`.
          method: What chooses the pairs to compute. Default: all that the mask allows.
          rope_base: Base of the rotary embedding, whose pairs are neighbours; None leaves it out.
          scale: Factor on the logits, default `(head_dim + rope_dim) ** -0.5`. Models that were
            extended by YaRN have that times `(0.1 * mscale * ln(factor) + 1) ** 2`.
          implementation: See `js.attend`.
          dtype: The computation's dtype, default that of the input and parameters.
          param_dtype: The parameters' dtype.
          rngs: Where initial parameters come from.

        Raises:
          ValueError: if heads do not divide `in_features` and there is no `head_dim`, a number
            is out of range, or the method turns back positions of all features.
        """
        checks.positive(in_features=in_features, num_heads=num_heads)
        if head_dim is None:
            checks.multiple(of=num_heads, in_features=in_features)
            head_dim = in_features // num_heads
        checks.positive(head_dim=head_dim)
        most = max(1, in_features // 2)
        v_dim = head_dim if v_dim is None else v_dim
        rope_dim = max(2, head_dim // 4 * 2) if rope_dim is None else rope_dim
        q_lora_rank = min(12 * head_dim, most) if q_lora_rank is None else q_lora_rank
        kv_lora_rank = min(4 * head_dim, most) if kv_lora_rank is None else kv_lora_rank
        checks.positive(v_dim=v_dim, rope_dim=rope_dim, kv_lora_rank=kv_lora_rank)
        checks.multiple(of=2, rope_dim=rope_dim)
        checks.non_negative(q_lora_rank=q_lora_rank)
        if rope_base is not None:
            checks.positive_number(rope_base=rope_base)
        if scale is not None:
            checks.finite(scale=scale)
        self.in_features, self.num_heads = in_features, num_heads
        self.head_dim, self.v_dim, self.rope_dim = head_dim, v_dim, rope_dim
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
        self.rope_base, self.implementation = rope_base, implementation
        self.scale = (head_dim + rope_dim) ** -0.5 if scale is None else float(scale)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, **options)

        of_queries = q_lora_rank or in_features
        self.q_a_proj = linear(in_features, q_lora_rank) if q_lora_rank else None
        self.q_a_norm = nnx.RMSNorm(q_lora_rank, **options) if q_lora_rank else None
        self.q_b_proj = linear(of_queries, num_heads * (head_dim + rope_dim))
        self.kv_a_proj = linear(in_features, kv_lora_rank + rope_dim)
        self.kv_a_norm = nnx.RMSNorm(kv_lora_rank, **options)
        self.kv_b_proj = linear(kv_lora_rank, num_heads * (head_dim + v_dim))
        self.out_proj = linear(num_heads * v_dim, in_features)
        self._take(method, rngs)

    def sizes(self, method: Method | None = None) -> dict[str, Any]:
        """What a method's parameters are made for."""
        heads = {"num_heads": self.num_heads, "num_kv_heads": 1}
        features: Any = self.in_features
        if self.q_lora_rank and method is not None and method.of_latents:
            features = LatentStates(self.in_features, self.q_lora_rank)
        return {**heads, "dim": self.kv_lora_rank + self.rope_dim, "features": features}

    def rotation(self) -> None:
        """Not all features have positions."""

    def init_cache(
        self, batch_shape: tuple[int, ...], max_len: int, dtype: Any = jnp.float32
    ) -> LatentCache:
        """An empty cache for `max_len` tokens of this layer, and what its method carries."""
        dim = self.kv_lora_rank + self.rope_dim
        return self._with_state(LatentCache.empty(batch_shape, max_len, dim, dtype))

    def __call__(
        self,
        x: Float[Array, "*batch length features"],
        *,
        mask: Mask | None = None,
        positions: Int[Array, "*batch length"] | None = None,
        cache: LatentCache | None = None,
    ) -> Any:
        """Attends from each token to those that `mask` and the method let it see.

        Args:
          x: Hidden states.
          mask: Who may see whom; with a cache see `SparseAttention`.
          positions: For the rotary embedding; default 0, 1, ... counted on from the cache. The
            indexer of `hisa` counts keys instead.
          cache: Tokens before these. Which methods decode by themselves: see `SparseAttention`.

        Returns:
          The output, `[*batch, length, features]`; with a cache `(output, cache)`.

        Raises:
          ValueError: if `x` has another width, the cache is another layer's or full, or the mask is
            an array.
        """
        positions = self._positions(x, mask, positions, cache)
        if cache is not None:
            checks.a_latent_cache(cache, self.kv_lora_rank + self.rope_dim)
        q_latent = x if self.q_a_proj is None else self.q_a_proj(x)
        if self.q_a_norm is not None:
            q_latent = self.q_a_norm(q_latent)
        q = self.q_b_proj(q_latent).reshape(*x.shape[:-1], self.num_heads, -1)
        q, last = q[..., : self.head_dim], q[..., self.head_dim :]
        # rounded once, after its factor
        turned = self._turned(last.astype(jnp.float32), positions)
        latents = self._latents(x, positions)
        where = None
        if cache is not None:
            mask, where = self._after(cache, x.shape[-2], mask)
            cache = cache.append(latents)
            latents = cache.latents.astype(latents.dtype)
        if self.method is None and self.attention is None and self._expands(q, latents):
            q = self._scaled(q, turned, q.dtype)
            out = self._dense(q, *self._of_heads(latents), mask=mask, x=x, positions=where)
        else:
            both = self.q_lora_rank and self.method is not None and self.method.of_latents
            out, cache = self._run(
                self._scaled(self._absorbed(q), turned, q.dtype),
                latents,
                # not a part of them, which would be a copy of the cache: what comes of the rest
                # is left out of the output
                latents,
                mask=mask,
                x=LatentStates(x, q_latent) if both else x,
                positions=where,
                cache=cache,
            )
            up = self._up(out.dtype)[..., self.head_dim :]
            out = jnp.einsum("...hc,chv->...hv", out[..., : self.kv_lora_rank], up)
        out = self.out_proj(out.reshape(*x.shape[:-1], -1))
        return out if cache is None else (out, cache)

    def _latents(self, x: Array, positions: Array) -> Float[Array, "*batch length 1 dim"]:
        """What is kept of each token: its latent, normalised, and the key with its position."""
        projected = self.kv_a_proj(x)[..., None, :]
        content = self.kv_a_norm(projected[..., : self.kv_lora_rank])
        turned = self._turned(projected[..., self.kv_lora_rank :], positions)
        return jnp.concatenate([content, turned], axis=-1)

    def _turned(self, x: Array, positions: Array) -> Array:
        if self.rope_base is None:
            return x
        return interleaved_rotary(x, positions, base=self.rope_base)

    def _expands(self, q: Array, latents: Array) -> bool:
        """Whether keys and values of each head take fewer products, of all pairs, than latents."""
        q_len, kv_len, latent = q.shape[-3], latents.shape[-3], self.kv_lora_rank
        up = self.head_dim + self.v_dim
        of_heads = kv_len * latent * up + q_len * kv_len * (up + self.rope_dim)
        of_latents = q_len * latent * up + q_len * kv_len * 2 * (latent + self.rope_dim)
        return of_heads < of_latents

    def _up(self, dtype: Any) -> Float[Array, "kv_lora_rank heads both"]:
        """What makes keys, and after them values, of latents."""
        kernel = self.kv_b_proj.kernel[...].astype(dtype)
        return kernel.reshape(self.kv_lora_rank, self.num_heads, -1)

    def _absorbed(self, q: Array) -> Float[Array, "*batch length heads kv_lora_rank"]:
        """Queries of the latents, whose products with those are the ones with the heads' keys."""
        up = self._up(q.dtype)[..., : self.head_dim]
        return jnp.einsum("...hd,chd->...hc", q, up, preferred_element_type=jnp.float32)

    def _of_heads(self, latents: Array) -> tuple[Array, Array]:
        """The keys and values of each head."""
        content, turned = latents[..., : self.kv_lora_rank], latents[..., self.kv_lora_rank :]
        both = self.kv_b_proj(content[..., 0, :])
        both = both.reshape(*latents.shape[:-2], self.num_heads, -1)
        k, v = both[..., : self.head_dim], both[..., self.head_dim :]
        shared = jnp.broadcast_to(turned, (*k.shape[:-1], self.rope_dim))
        return jnp.concatenate([k, shared], axis=-1), v

    def _scaled(
        self, q: Array, turned: Array, dtype: Any
    ) -> Float[Array, "*batch length heads dim"]:
        """Whole queries, with which the default scale of attention comes to the layer's."""
        whole = jnp.concatenate([q.astype(jnp.float32), turned], axis=-1)
        return (whole * (self.scale * whole.shape[-1] ** 0.5)).astype(dtype)
