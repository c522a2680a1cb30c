"""StreamingLLM: the first tokens and a sliding window. Xiao et al. 2023, arXiv:2309.17453."""

from typing import Any

from jsparse import checks
from jsparse.attention.planned import Queries, masked
from jsparse.masks.tokens import sinks
from jsparse.masks.window import sliding_window
from jsparse.types import Mask, Method


def sink_and_window(*, num_sink: int, window: int, offset: Any = None) -> Mask:
    """Lets each query see the first `num_sink` keys and the last `window`, its own included."""
    return sinks(num_sink) | sliding_window(left=window - 1, offset=offset)


def streaming(*, num_sink: int = 4, window: int = 1024) -> Method:
    """Keeps the attention sinks and a sliding window, token by token.

    Args:
      num_sink: Tokens at the start that every query sees; 4 in the paper (section 3.2).
      window: Tokens of the window, the query's own included, at least 1.

    Differs from the paper:
      Positions are the tokens' own; the paper counts them inside the cache, which matters only for
      streams longer than the model's context.

    Raises:
      ValueError: if a number is out of range.
    """
    checks.non_negative(num_sink=num_sink)
    checks.positive(window=window)

    def own_mask(queries: Queries) -> Mask:
        return sink_and_window(num_sink=num_sink, window=window, offset=queries.offset)

    return masked(own_mask)
