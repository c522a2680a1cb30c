"""Methods whose plans have parameters."""

from jsparse.learned.hisa import hisa as hisa
