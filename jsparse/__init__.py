"""Sparse attention in JAX: masks, methods that plan, executors that compute what was planned."""

# types
# masks and the plans they make
from jsparse import masks as masks

# methods
from jsparse import registry as registry

# attention
from jsparse.attention.attend import attend as attend
from jsparse.attention.skipping import attend_skipping as attend_skipping
from jsparse.attention.length_switch import from_length as from_length
from jsparse.attention.paged import attend_paged as attend_paged
from jsparse import cache as cache
from jsparse.core.merging import merge as merge
from jsparse.core.receptive_field import receptive_field as receptive_field
from jsparse.core.tiling import block_mask as block_mask
from jsparse.core import windows as windows
from jsparse.core import group_queries as group_queries
from jsparse.estimators import AShape as AShape
from jsparse.estimators import BlockSparse as BlockSparse
from jsparse.estimators import VerticalSlash as VerticalSlash
from jsparse.estimators import blasst as blasst
from jsparse.estimators import mean_pooled as mean_pooled
from jsparse.estimators import minference as minference
from jsparse.estimators import pbs_attn as pbs_attn
from jsparse.estimators import xattention as xattention
from jsparse.attention.explain import explain as explain
from jsparse.evaluation.density import density_report as density_report
from jsparse.evaluation.density import reporting as reporting
from jsparse.functional import dot_product_attention as dot_product_attention
from jsparse.functional import sparse_attention as sparse_attention
from jsparse.hierarchical import nsa as nsa
from jsparse.learned import hisa as hisa
from jsparse.learned import seerattention as seerattention
from jsparse.learned import seerattention_r as seerattention_r
from jsparse.masks.flashmask import flashmask as flashmask
from jsparse.masks.fna import fna as fna
from jsparse.masks.gna import gna as gna
from jsparse.masks.moa import ElasticRule as ElasticRule
from jsparse.masks.moa import moa as moa
from jsparse.masks.powerattention import powerattention as powerattention
from jsparse.masks.s2_attention import s2_attention as s2_attention
from jsparse.masks.streaming import streaming as streaming
from jsparse.routing import biformer as biformer
from jsparse.routing import flashmoba as flashmoba
from jsparse.routing import routing_transformer as routing_transformer
from jsparse.types import BlockMask as BlockMask
from jsparse.types import BlockPyramid as BlockPyramid
from jsparse.types import LatentStates as LatentStates
from jsparse.types import Method as Method
from jsparse.types import PagedKV as PagedKV
from jsparse.types import TokenGroups as TokenGroups

# for finding what is wrong
from jsparse.checks import debug_checks as debug_checks

# for tests of one's own kernels
from jsparse import testing as testing
