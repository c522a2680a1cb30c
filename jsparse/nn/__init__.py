"""Flax: the only place that imports it."""

from jsparse.nn.attention import SparseAttention as SparseAttention
from jsparse.nn.cache import KVCache as KVCache
from jsparse.nn.rotary import rotary as rotary
