"""Plans from q and k; no parameters."""

from jsparse.estimators.blasst import Calibration as Calibration
from jsparse.estimators.blasst import blasst as blasst
from jsparse.estimators.mean_pooled import mean_pooled as mean_pooled
from jsparse.estimators.minference import AShape as AShape
from jsparse.estimators.minference import BlockSparse as BlockSparse
from jsparse.estimators.minference import VerticalSlash as VerticalSlash
from jsparse.estimators.minference import minference as minference
from jsparse.estimators.pbs_attn import pbs_attn as pbs_attn
from jsparse.estimators.xattention import xattention as xattention
