"""MoA: a sink and a window per head that grow with the length. Fu et al. 2024, arXiv:2406.14909."""

import dataclasses
from collections.abc import Sequence

from jsparse import checks
from jsparse.attention.planned import Queries, masked
from jsparse.masks.causal import causal
from jsparse.masks.head_windows import head_windows
from jsparse.types import Mask, Method


# a dataclass, so that tables of `jsparse.planning` can tell it from a pair of numbers
@dataclasses.dataclass(frozen=True)
class ElasticRule:
    """A head's span at length `n` is `alpha + beta * n` tokens, sink and window together."""

    alpha: int = 0
    beta: float = 0.5


def span(
    rule: ElasticRule,
    length: int,
    *,
    num_sink: int = 64,
    min_span: int = 128,
    block_size: int = 64,
) -> tuple[int, int]:
    """How many first tokens, and how many last ones, a head keeps of so many.

    Together at most `length`, at least `min_span`, then rounded up to whole blocks. What a ring
    buffer for decoding holds of a head is exactly these; a prompt's rows keep the blocks of
    `head_windows(num_sink=, window=, block_size=)`.

    Args:
      rule: The head's rule.
      length: Tokens, those to come included.
      num_sink: First tokens that every query sees; 64 in the authors' code.
      min_span: The least span; 128 in the authors' code.
      block_size: Tokens per block; 64 in the authors' code.
    """
    tokens = max(min(int(rule.alpha + rule.beta * length), length), min_span)
    tokens = -(-tokens // block_size) * block_size
    return num_sink, tokens - num_sink


def moa(
    *,
    rules: ElasticRule | float | Sequence[ElasticRule] = 0.5,
    num_sink: int = 64,
    min_span: int = 128,
    block_size: int = 64,
    max_new_tokens: int = 0,
) -> Method:
    """Gives each head the first block and a window that grows with the length; always causal.

    `jsparse plan --method moa` finds which rule suits which head of a model, under a bound on the
    spans of all; `jsparse.planning.search_rules` does it in Python.

    Args:
      rules: One for all heads, or one per query head, as `ElasticRule(alpha, beta)`; a number is
        the share of the length that all heads see, `ElasticRule(0, share)`, in (0, 1].
      num_sink: First tokens that every query sees, whole blocks; 64 in the authors' code.
      min_span: The least tokens of sink and window together, at least a block more than the sink;
        128 in the authors' code.
      block_size: Tokens per block, by which spans are rounded and windows cut; 64 in the paper.
      max_new_tokens: Tokens to come that the keys have no room for yet; they count as length.

    Differs from the paper:
      The length is that of the keys, a cache's room included, so `max_new_tokens` is 0 by default;
      the authors' cache is made for 1024 tokens more than the prompt. Without rules found by a
      search, all heads see half of the length, which is what the authors' search allows on average.
      Heads with grouped keys and values have rules of their own. Heads are not put in another
      order, for lists are per head. A single query keeps whole blocks as its row of a prompt does,
      and a cache keeps all keys; `span` says what a ring buffer would hold.

    Raises:
      ValueError: if a number is out of range, or there is not one rule per head.
    """
    checks.positive(min_span=min_span, block_size=block_size)
    checks.non_negative(num_sink=num_sink, max_new_tokens=max_new_tokens)
    checks.multiple(of=block_size, num_sink=num_sink)
    checks.at_most(min_span - block_size, num_sink=num_sink)
    shared = not isinstance(rules, Sequence)
    given = tuple(map(_rule, [rules] if shared else rules))
    sizes = {"num_sink": num_sink, "min_span": min_span, "block_size": block_size}

    def own_mask(queries: Queries) -> Mask:
        if not shared:
            checks.one_per_head(queries.heads, rules=given)
        spans = [span(rule, queries.kv_len + max_new_tokens, **sizes) for rule in given]
        if len({*spans}) == 1:
            # lists that all heads share are built once
            spans = spans[:1]
        first, last = zip(*spans, strict=True)
        offset = queries.offset
        sizes_of_heads = {"num_sink": first, "window": last, "block_size": block_size}
        return head_windows(**sizes_of_heads, right=0, offset=offset) & causal(offset=offset)

    return masked(own_mask, block_q=min(128, block_size), block_kv=min(128, block_size))


def _rule(rule: ElasticRule | float) -> ElasticRule:
    if isinstance(rule, ElasticRule):
        checks.finite(alpha=rule.alpha, beta=rule.beta)
        return rule
    checks.number(rules=rule)
    checks.fractions(rules=rule)
    return ElasticRule(0, float(rule))
