"""Flax: the only place that imports it."""

from jsparse.core.rotary import interleaved_rotary as interleaved_rotary
from jsparse.core.rotary import rotary as rotary
from jsparse.nn.adapters import attention_fn as attention_fn
from jsparse.nn.attention import SparseAttention as SparseAttention
from jsparse.nn.biformer import BiFormerBlock as BiFormerBlock
from jsparse.nn.biformer import RegionAttention as RegionAttention
from jsparse.nn.cache import KVCache as KVCache
from jsparse.nn.cache import LatentCache as LatentCache
from jsparse.nn.latent import LatentAttention as LatentAttention
from jsparse.nn.layer import AttentionLayer as AttentionLayer
from jsparse.nn.layer import Statistic as Statistic
from jsparse.nn.surgery import attention_layers as attention_layers
from jsparse.nn.surgery import probing as probing
from jsparse.nn.surgery import recording as recording
from jsparse.nn.surgery import with_attention as with_attention
from jsparse.nn.surgery import with_methods as with_methods
