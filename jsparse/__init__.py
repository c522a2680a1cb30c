"""Sparse attention in JAX: masks, methods that plan, and executors that compute what was planned."""

from jsparse import masks as masks
from jsparse.attention.attend import attend as attend
from jsparse.core.merging import merge as merge
from jsparse.core.tiling import block_mask as block_mask
from jsparse.functional import sparse_attention as sparse_attention
from jsparse.types import BlockMask as BlockMask
from jsparse.types import BlockPyramid as BlockPyramid
from jsparse.types import Method as Method
from jsparse.types import TokenGroups as TokenGroups
