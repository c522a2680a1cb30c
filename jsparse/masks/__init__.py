"""Who may see whom from positions alone: masks that compose, and methods that are only a mask."""

from jsparse.masks.causal import causal as causal
from jsparse.masks.dense import dense as dense
from jsparse.masks.dense import full as full
from jsparse.masks.dense import predicate as predicate
from jsparse.masks.head_windows import head_windows as head_windows
from jsparse.masks.intervals import intervals as intervals
from jsparse.masks.lengths import lengths as lengths
from jsparse.masks.lengths import prefix_lm as prefix_lm
from jsparse.masks.neighborhood import neighborhood as neighborhood
from jsparse.masks.reordered import reordered as reordered
from jsparse.masks.segments import segments as segments
from jsparse.masks.strides import dilated as dilated
from jsparse.masks.strides import strided as strided
from jsparse.masks.tokens import global_tokens as global_tokens
from jsparse.masks.tokens import sinks as sinks
from jsparse.masks.whole_windows import whole_windows as whole_windows
from jsparse.masks.window import sliding_window as sliding_window
