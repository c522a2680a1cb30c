"""Plans from q and k; no parameters."""

from jsparse.estimators.mean_pooled import mean_pooled as mean_pooled
from jsparse.estimators.pbs_attn import pbs_attn as pbs_attn
from jsparse.estimators.xattention import xattention as xattention
