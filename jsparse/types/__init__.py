"""The plans, the mask interface, and `Method`."""

from jsparse.types.block_mask import BlockMask as BlockMask
from jsparse.types.block_mask import parts_of as parts_of
from jsparse.types.block_pyramid import BlockPyramid as BlockPyramid
from jsparse.types.inverse_list import InverseList as InverseList
from jsparse.types.mask import Frame as Frame
from jsparse.types.mask import Mask as Mask
from jsparse.types.mask import TileBounds as TileBounds
from jsparse.types.mask import TileGrid as TileGrid
from jsparse.types.method import Branch as Branch
from jsparse.types.method import LatentStates as LatentStates
from jsparse.types.method import Method as Method
from jsparse.types.method import Untrained as Untrained
from jsparse.types.paged_kv import PagedKV as PagedKV
from jsparse.types.pytree import array_field as array_field
from jsparse.types.pytree import entry as entry
from jsparse.types.pytree import pytree_dataclass as pytree_dataclass
from jsparse.types.pytree import static_field as static_field
from jsparse.types.token_groups import TokenGroups as TokenGroups
