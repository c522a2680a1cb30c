"""BiFormer's vision block: attention to routed regions beside a convolution of the values."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.routing.biformer import biformer

# of the authors, for whatever the width; theirs is cut at a hundred deviations, which none reaches
_NORMAL = nnx.initializers.normal(0.02)


class RegionAttention(nnx.Module):
    """Multi-head attention of a feature map to its regions, and what a convolution adds to it."""

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        qk_dim: int | None = None,
        regions: int = 7,
        top_k: int | None = 4,
        kernel: int = 5,
        scale: float | None = None,
        implementation: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          features: Width of the map.
          num_heads: Heads; divides `features`.
          qk_dim: Width of queries and keys, all heads together; default `features`.
          regions: Regions along each axis.
          top_k: Regions that each attends to; None for all, as in the paper's last stage.
          kernel: Side of the depthwise convolution of the values, odd; 5 in the paper, 0 for none.
          scale: Factor on the logits; default `qk_dim ** -0.5`, as in the authors' checkpoints.
          implementation: See `js.attend`.
          dtype: The computation's dtype, default that of the input and parameters.
          param_dtype: The parameters' dtype.
          rngs: Where initial parameters come from.

        Raises:
          ValueError: if heads do not divide the width, or a number is out of range.
        """
        qk_dim = features if qk_dim is None else qk_dim
        checks.positive(features=features, num_heads=num_heads, qk_dim=qk_dim, regions=regions)
        if top_k is not None:
            checks.positive(top_k=top_k)
        checks.multiple(of=num_heads, features=features, qk_dim=qk_dim)
        checks.odd_or_zero(kernel=kernel)
        self.num_heads, self.regions, self.top_k = num_heads, regions, top_k
        self.qk_dim, self.scale, self.implementation = qk_dim, scale, implementation
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.qkv = nnx.Linear(features, 2 * qk_dim + features, kernel_init=_NORMAL, **options)
        self.out = nnx.Linear(features, features, kernel_init=_NORMAL, **options)
        self.local = (
            nnx.Conv(features, features, (kernel, kernel), feature_group_count=features, **options)
            if kernel
            else None
        )

    def __call__(
        self, x: Float[Array, "*batch height width features"]
    ) -> Float[Array, "*batch height width features"]:
        """Attends from each region to the regions it is routed to, and adds the convolution."""
        *batch, height, width, _ = x.shape
        parts = jnp.split(self.qkv(x), (self.qk_dim, 2 * self.qk_dim), axis=-1)
        q, k, v = (y.reshape(*batch, height * width, self.num_heads, -1) for y in parts)
        method = biformer(grid=(height, width), regions=self.regions, top_k=self.top_k)
        out, _ = method.attend((), q, k, v, scale=self.scale, implementation=self.implementation)
        out = out.reshape(x.shape)
        if self.local is not None:
            out += self.local(v.reshape(x.shape))
        return self.out(out)


class BiFormerBlock(nnx.Module):
    """A block of the paper's backbones: position by convolution, attention, perceptron."""

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        qk_dim: int | None = None,
        regions: int = 7,
        top_k: int | None = 4,
        kernel: int = 5,
        expansion: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the block.

        Args:
          features: Width of the map.
          num_heads: Heads; divides `features`. 32 features per head in the paper.
          qk_dim: See `RegionAttention`.
          regions: Regions along each axis.
          top_k: Regions that each attends to; 1, 4 and 16 in the paper's first three stages, all,
            which is None, in the last.
          kernel: See `RegionAttention`.
          expansion: Width of the perceptron's hidden layer over that of the map; 3 in the paper.
          dtype: The computation's dtype, default that of the input and parameters.
          param_dtype: The parameters' dtype.
          rngs: Where initial parameters come from.

        Raises:
          ValueError: if heads do not divide the width, or a number is out of range.
        """
        checks.positive(expansion=expansion)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        routed: dict[str, Any] = {"regions": regions, "top_k": top_k, "kernel": kernel}
        self.attention = RegionAttention(
            features, num_heads=num_heads, qk_dim=qk_dim, **routed, **options
        )
        self.position = nnx.Conv(
            features, features, (3, 3), feature_group_count=features, **options
        )
        self.attention_norm = nnx.LayerNorm(features, epsilon=1e-6, **options)
        self.perceptron_norm = nnx.LayerNorm(features, epsilon=1e-6, **options)
        inside = expansion * features
        self.expand = nnx.Linear(features, inside, kernel_init=_NORMAL, **options)
        self.contract = nnx.Linear(inside, features, kernel_init=_NORMAL, **options)

    def __call__(
        self, x: Float[Array, "*batch height width features"]
    ) -> Float[Array, "*batch height width features"]:
        """Adds to a feature map what each of the three finds."""
        x = x + self.position(x)
        x = x + self.attention(self.attention_norm(x))
        hidden = nnx.gelu(self.expand(self.perceptron_norm(x)), approximate=False)
        return x + self.contract(hidden)
