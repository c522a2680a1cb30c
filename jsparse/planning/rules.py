"""Which elastic rule suits which head, found offline. Fu et al. 2024, arXiv:2406.14909."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jsparse import checks
from jsparse.evaluation.capture import Profiled
from jsparse.evaluation.store import Store, fingerprint
from jsparse.masks.moa import ElasticRule, span
from jsparse.planning.influence import Influence, figures, mean
from jsparse.planning.pareto import Program, Range, pareto_front, programs_to_solve, solve
from jsparse.planning.table import Choice, Provenance, Table, methods_of
from jsparse.types import Method


class Lengths(NamedTuple):
    """What lengths of text a search is about.

    Attributes:
      profiled: Those whose losses are made small.
      bounded: Those at which the budget holds: the profiled ones and a longer one.
      unseen: The one that decides among the plans found.
    """

    profiled: tuple[int, ...]
    bounded: tuple[int, ...]
    unseen: int

    @property
    def every(self) -> tuple[int, ...]:
        """All of them, ascending."""
        return tuple(sorted({*self.bounded, self.unseen}))


def elastic_rules(
    lengths: Lengths, *, interval: int = 1024, num_betas: int = 9
) -> tuple[ElasticRule, ...]:
    """The rules that heads may be given, by their spans at the greatest length.

    Those of a grid whose spans are positive at the least length, and at most the length itself at
    the longest profiled one and at the greatest of all.

    Args:
      lengths: What the search is about.
      interval: Tokens between the offsets of the grid; 1024 in the authors' code.
      num_betas: How many slopes between 0 and 1 there are; 9 in the authors' code.
    """
    shortest, longest, greatest = lengths.every[0], lengths.profiled[-1], lengths.every[-1]
    alphas = np.linspace(-shortest, longest, (longest + shortest) // interval + 1)
    rules = [
        ElasticRule(round(alpha), float(beta))
        for alpha, beta in itertools.product(alphas, np.linspace(0.0, 1.0, num_betas))
    ]

    def at(rule: ElasticRule, length: int) -> float:
        return rule.alpha + rule.beta * length

    kept = [
        rule
        for rule in rules
        if at(rule, longest) <= longest
        and at(rule, greatest) <= greatest
        and at(rule, shortest) > 0
    ]
    return tuple(sorted(kept, key=lambda rule: at(rule, greatest)))


class Spans(NamedTuple):
    """Rules that differ at some length of a search, and how much each keeps at any length."""

    rules: tuple[ElasticRule, ...]
    block_size: int

    @classmethod
    def of(cls, rules: Sequence[ElasticRule], lengths: Lengths, block_size: int) -> "Spans":
        """Of rules that keep the same at all lengths the first."""
        every = cls(tuple(rules), block_size)
        tokens = zip(*(every.tokens(length).tolist() for length in lengths.every), strict=True)
        first: dict[tuple[int, ...], ElasticRule] = {}
        for rule, spans in zip(rules, tokens, strict=True):
            first.setdefault(spans, rule)
        return every._replace(rules=tuple(first.values()))

    def tokens(self, length: int) -> Int[np.ndarray, " rules"]:
        """Sink and window of each rule."""
        sizes = {"num_sink": self.block_size, "min_span": 2 * self.block_size}
        spans = (span(r, length, block_size=self.block_size, **sizes) for r in self.rules)
        return np.array([sum(tokens) for tokens in spans], int)

    def blocks(self, length: int) -> Int[np.ndarray, " rules"]:
        """The same in blocks."""
        return self.tokens(length) // self.block_size


def search_rules(
    texts: Sequence[Sequence[Profiled]],
    *,
    held_out: Sequence[Sequence[Profiled]],
    density: float = 0.5,
    extended: int | None = None,
    interval: int = 1024,
    num_betas: int = 9,
    ranges: int = 4,
    least_spent: float = 0.9,
    most_rules: int = 2,
    share_in_group: bool = False,
    block_size: int = 64,
    time_limit: float = 60.0,
    loss: Callable[[list[Method]], float] | None = None,
    source: str = "",
    progress: Callable[[str, int], None] = lambda label, steps: None,
    partial: str | Path | None = None,
) -> Table:
    """Finds each head of a model a rule for its span, under a bound on the spans of all heads.

    What a rule costs is the influence on the loss of the pairs that `js.moa` drops by it, each by
    its size, a first-order estimate; at every profiled length that is an objective of its own.
    Of the plans that no other beats the one with the least loss at a length not seen before is
    taken. Memory is that of attention by tiles.

    Args:
      texts: What `jsparse.evaluation.profile` gave of texts of one or more lengths; 2048, 4096 and
        8192 tokens in the paper, the loss that of the model's own answers. Those of one length
        count by their mean. Attention is a plain causal softmax, without sinks or softcap.
      held_out: The same of texts of one other length, for the choice; 12288 in the paper.
      density: Most tokens that heads may keep, sink and window together, as a share of the length,
        in (0, 1], mean over heads.
      extended: A greater length at which the bound holds too; default twice the longest profiled.
      interval: See `elastic_rules`.
      num_betas: See `elastic_rules`.
      ranges: See `jsparse.planning.pareto_front`.
      least_spent: Share of the budget that has to be spent at each length; 0.9 in the authors'
        code.
      most_rules: Most different rules in a layer; 2 in the authors' code.
      share_in_group: Whether query heads that share a kv head also share one rule, so that one
        cache serves them.
      block_size: Tokens per block of `js.moa`.
      time_limit: Seconds for one program, after which its best plan so far is taken.
      loss: What the model costs with a method for each layer, such as `bits_per_byte` of a text of
        unseen length through `js.nn.with_methods`; default the estimate of `held_out`.
      source: The name of the model, for the table.
      progress: Called with a label and the number of steps before each step.
      partial: A JSON file that keeps figures as they come, so that a search that was stopped goes
        on where it was; removed at the end.

    Differs from the paper:
      The choice at the unseen length is by the first-order estimate on `held_out`, where the paper
      runs the model with each plan; with `loss=` it is by that. A rule is charged, in loss and in
      tokens, for what `js.moa` does by it, so that the bound is one on what runs; the authors'
      search counts a block more. Losses of heads that share a rule add up, where theirs takes the
      largest in each block. Rules of the same spans at all lengths are tried once. HiGHS solves the
      programs, theirs is Gurobi, and may be stopped by `time_limit`. Influences are not normalised
      by head or layer, which theirs can be. Any lengths and any loss may be profiled; theirs is
      that of answers which the model gave.

    Raises:
      ValueError: if there is no text, texts differ in layers or heads, a number is out of range, or
        no plan keeps to the bounds.
    """
    checks.profiles(texts, held_out)
    checks.fractions(density=density)
    checks.positive(block_size=block_size, interval=interval, num_betas=num_betas)
    checks.positive(ranges=ranges, most_rules=most_rules)
    checks.shares(least_spent=least_spent)
    checks.positive_number(time_limit=time_limit)
    arguments = {"num_sink": block_size, "min_span": 2 * block_size, "block_size": block_size}
    profiled = tuple(sorted({_length(text) for text in texts}))
    extended = 2 * profiled[-1] if extended is None else extended
    checks.positive(extended=extended)
    lengths = Lengths(profiled, tuple(sorted({*profiled, extended})), _length(held_out[0]))
    rules = elastic_rules(lengths, interval=interval, num_betas=num_betas)
    spans = Spans.of(rules, lengths, block_size)
    checks.some_rules(spans.rules, lengths.every)
    layers, heads, kv_heads = len(texts[0]), texts[0][0].q.shape[1], texts[0][0].k.shape[1]
    lists = kv_heads if share_in_group else heads

    tensors = (x for text in (*texts, *held_out) for layer in text for x in layer)
    told = density, lengths, interval, num_betas, ranges, least_spent, most_rules, share_in_group
    store = Store(partial, fingerprint(tensors, "rules", *told, block_size, time_limit, len(texts)))
    steps = (len(texts) + len(held_out)) * layers + programs_to_solve(len(profiled), ranges)

    def influence_of(name: str, text: Sequence[Profiled]) -> Influence:
        found = []
        for number, layer in enumerate(text):
            label = f"{name} layer {number}"
            progress(label, steps)
            found.append(store.get(label, functools.partial(figures, layer, block_size)))
        return Influence.of(found)

    of_texts = [(_length(x), influence_of(f"text {n}", x)) for n, x in enumerate(texts)]
    by_length = {n: mean([x for of, x in of_texts if of == n]) for n in profiled}
    unseen = mean([influence_of(f"held out {n}", text) for n, text in enumerate(held_out)])
    program = Program(
        loss=np.stack([_losses(x, spans, n, lists) for n, x in by_length.items()]),
        cost=np.stack([np.minimum(spans.tokens(n), n) for n in lengths.bounded]).astype(float),
        budget=np.array([density * n * layers * lists for n in lengths.bounded]),
        least_spent=least_spent,
        most_rules=most_rules,
    )

    def solved(
        program: Program, objective: int, inside: Mapping[int, Range]
    ) -> Int[np.ndarray, "layers lists"] | None:
        progress(f"plan for {profiled[objective]}", steps)

        def numbers():
            plan = solve(program, objective, inside, time_limit=time_limit)
            return None if plan is None else plan.tolist()

        plan = store.get(f"plan {objective} {sorted(inside.items())}", numbers)
        return None if plan is None else np.array(plan)

    front = pareto_front(program, ranges=ranges, solve=solved)
    of_heads = [np.repeat(plan, heads // lists, axis=1) for plan in front]
    chosen = [_choices(plan, spans, unseen, lengths.unseen) for plan in of_heads]
    provenance = Provenance(source, lengths.unseen, lengths.unseen, "kept_influence", {})
    tables = [Table("moa", arguments, layers, provenance) for layers in chosen]
    if loss is None:
        unseen_losses = _losses(unseen, spans, lengths.unseen, lists)
        found = [np.take_along_axis(unseen_losses, x[..., None], -1).sum() for x in front]
    else:
        found = [loss(methods_of(table)) for table in tables]
    store.discard()
    search = {
        "density": density,
        "profiled": list(profiled),
        "extended": extended,
        "share_in_group": share_in_group,
        "front": [
            {"losses": program.losses(plan).tolist(), "unseen": float(x)}
            for plan, x in zip(front, found, strict=True)
        ],
    }
    best = tables[int(np.argmin(found))]
    return best._replace(provenance=provenance._replace(search=search))


def causal_share(kept: int, blocks: int) -> float:
    """Tiles of a sink and a window of `kept` blocks, over those of dense causal attention."""
    rows = np.arange(1, blocks + 1)
    return float(np.minimum(rows, kept).sum() / rows.sum())


def _length(text: Sequence[Profiled]) -> int:
    return len(text[0].q)


def _losses(
    influence: Influence, spans: Spans, length: int, lists: int
) -> Float[np.ndarray, "layers lists rules"]:
    """What each rule makes a head lose, or the heads that share one."""
    of_heads = influence.dropped(spans.blocks(length) - 1)
    layers, heads, rules = of_heads.shape
    return of_heads.reshape(layers, lists, heads // lists, rules).sum(2)


def _choices(
    plan: Int[np.ndarray, "layers heads"], spans: Spans, unseen: Influence, length: int
) -> tuple[tuple[Choice, ...], ...]:
    """What each head is given, with its share of influence and of tiles at a length."""
    kept = spans.blocks(length)[plan]
    shares = unseen.kept(kept - 1)
    tiles = -(-length // spans.block_size)
    return tuple(
        tuple(
            Choice(spans.rules[n], float(share), causal_share(int(blocks), tiles))
            for n, share, blocks in zip(*layer, strict=True)
        )
        for layer in zip(plan, shares, kept, strict=True)
    )
