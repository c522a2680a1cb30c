"""Plans from q and k; no parameters."""

from jsparse.estimators.mean_pooled import mean_pooled as mean_pooled
from jsparse.estimators.minference import minference as minference
from jsparse.estimators.xattention import xattention as xattention
