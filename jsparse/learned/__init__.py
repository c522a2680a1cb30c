"""Methods whose plans have parameters."""

from jsparse.learned.hisa import hisa as hisa
from jsparse.learned.seerattention import seerattention as seerattention
from jsparse.learned.seerattention_r import seerattention_r as seerattention_r
