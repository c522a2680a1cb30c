"""Dense attention of other JAX libraries on GPUs, as `benchmarks.gpu` times it.

Each function gets `q, k, v` in bf16 as `jsparse.attend` does and returns a call without arguments.
What does not belong to attention, such as scaling q for a kernel that does not, is done before.
"""

from collections.abc import Callable
from typing import Any

import jax

Call = Callable[[], Any]


def jax_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> Call:
    """By cuDNN through `jax.nn.dot_product_attention`; by XLA on machines without a GPU."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    attention = jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, implementation=implementation
        )
    )
    return lambda: attention(q, k, v)


def jax_pallas(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> Call:
    """The FlashAttention-3 of `jax.experimental.pallas`, with the widest kv tile that fits.

    In f16: bf16 it announces, but multiplies by values in f16.
    """
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # it has no scale
    inputs = [x.astype("float16") for x in (q * q.shape[-1] ** -0.5, k, v)]
    failed: Exception | None = None
    for block_kv in (256, 128, 64):
        config = attention_mgpu.TuningConfig(
            block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=causal
        )
        attention = jax.jit(lambda q, k, v, c=config: attention_mgpu.attention(q, k, v, c))
        try:
            jax.block_until_ready(attention(*inputs))
        except ValueError as error:
            failed = error
            continue
        return lambda a=attention: a(*inputs)
    raise NotImplementedError(f"no kv tile will do; for 64: {failed}") from failed


def tokamax(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> Call:
    """Attention of tokamax by its Mosaic kernel."""
    import tokamax  # pyright: ignore[reportMissingImports]

    attention = jax.jit(
        lambda q, k, v: tokamax.dot_product_attention(
            q, k, v, is_causal=causal, implementation="mosaic"
        )
    )
    return lambda: attention(q, k, v)


def fa4_jax(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> Call:
    """FlashAttention-4's kernels through fa4-jax."""
    import fa4_jax  # pyright: ignore[reportMissingImports]

    attention = jax.jit(lambda q, k, v: fa4_jax.flash_attn(q, k, v, causal=causal))
    return lambda: attention(q, k, v)


def jax_linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> Call:
    """The softmax attention of jax-linear-attention, which is causal only."""
    from jla.ops.mosaic_gpu.attention import (  # pyright: ignore[reportMissingImports]
        flash_attention,
    )

    if not causal:
        raise NotImplementedError("jax-linear-attention has causal attention only")
    attention = jax.jit(lambda q, k, v: flash_attention(q, k, v))
    return lambda: attention(q, k, v)


DENSE: dict[str, Callable[..., Call]] = {
    "jax.nn cudnn": jax_cudnn,
    "jax pallas": jax_pallas,
    "tokamax": tokamax,
    "fa4-jax": fa4_jax,
    "jax-linear-attention": jax_linear_attention,
}
