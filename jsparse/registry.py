"""METHODS: one literal row per method. Tests, the README table and the CLI read it."""

from collections.abc import Callable
from typing import NamedTuple

from jsparse.estimators import blasst, mean_pooled, minference, pbs_attn, xattention
from jsparse.estimators.blasst import Calibration
from jsparse.estimators.minference import AShape, BlockSparse, VerticalSlash
from jsparse.hierarchical import nsa
from jsparse.learned import hisa, seerattention, seerattention_r
from jsparse.masks.flashmask import flashmask
from jsparse.masks.fna import fna
from jsparse.masks.gna import gna
from jsparse.masks.moa import ElasticRule, moa
from jsparse.masks.powerattention import powerattention
from jsparse.masks.s2_attention import s2_attention
from jsparse.masks.streaming import streaming
from jsparse.routing import biformer, flashmoba, routing_transformer
from jsparse.types import Method


class Row(NamedTuple):
    """What is known of a method without running it.

    Attributes:
      name: The factory's name, and that of its file, oracle and test.
      family: The folder that holds it.
      factory: Makes the method; every argument is keyword-only and has a default.
      summary: What it does, in under ten words.
      paper: The source.
      year: Of the source.
      causal: Whether it serves causal attention.
      bidirectional: Whether it serves attention without a mask.
      training_free: Whether it works on a trained model as it is.
      learns: Whether it has parameters, of which it knows nothing before it is trained.
      control: The argument that trades density for accuracy; None where there is none.
      control_traced: Whether `control` may be a traced array, so that one compiled program serves
        all settings.
      settings: Values of `control` worth comparing, sparsest first.
      keeps_all: The value of `control` at which nothing is left out; None is one as well.
      per_head: The argument of which a table of `jsparse.planning` holds a value per query head;
        None where there is none.
      kinds: What those values are, where they are not numbers.
      by_kv_head: Whether what a query head keeps depends on which kv head it shares.
      at_most_kv_heads: The argument that can be no more than there are kv heads, if each is to do
        its part; None where there is none.
      by_last_queries: Whether the last queries, or all tokens, decide for all rows, so that which
        tiles a row gets depends on tokens after it; what is in them does not.
      by_running_maximum: Whether it leaves out only tiles that are far below the largest logit
        before them, which purely random inputs have none of.
      by_gates: Whether it mixes several attentions by gates of the hidden states, so that no
        setting is dense attention.
      small: Arguments that make it small, where its defaults are those of a large model, and leave
        logits the products of q and k.
      needs_all_queries: Whether queries and keys have to be the same tokens.
      needs_state: Whether it carries state over steps or layers.
      needs_key: Whether it samples.
    """

    name: str
    family: str
    factory: Callable[..., Method]
    summary: str
    paper: str
    year: int
    causal: bool
    bidirectional: bool
    training_free: bool
    learns: bool = False
    control: str | None = None
    control_traced: bool = False
    settings: tuple[float, ...] = ()
    keeps_all: float | None = None
    per_head: str | None = None
    kinds: tuple[type, ...] = ()
    by_kv_head: bool = False
    at_most_kv_heads: str | None = None
    by_last_queries: bool = False
    by_running_maximum: bool = False
    by_gates: bool = False
    small: tuple[tuple[str, int], ...] = ()
    needs_all_queries: bool = False
    needs_state: bool = False
    needs_key: bool = False


METHODS: tuple[Row, ...] = (
    Row(
        name="flashmask",
        family="masks",
        factory=flashmask,
        summary="exact attention under column-interval masks",
        paper="arXiv:2410.01359",
        year=2024,
        causal=True,
        bidirectional=False,
        training_free=True,
    ),
    Row(
        name="streaming",
        family="masks",
        factory=streaming,
        summary="attention sinks and a sliding window",
        paper="arXiv:2309.17453",
        year=2023,
        causal=True,
        bidirectional=False,
        training_free=True,
        control="window",
        settings=(256, 512, 1024),
        keeps_all=2**20,
    ),
    Row(
        name="powerattention",
        family="masks",
        factory=powerattention,
        summary="blocks at power-of-two distances",
        paper="arXiv:2503.03588",
        year=2025,
        causal=True,
        bidirectional=False,
        training_free=False,
        control="window_size",
        settings=(1, 2, 5),
        keeps_all=2**20,
    ),
    Row(
        name="s2_attention",
        family="masks",
        factory=s2_attention,
        summary="a window, old blocks shared among heads",
        paper="arXiv:2407.17678",
        year=2024,
        causal=True,
        bidirectional=False,
        training_free=False,
        control="local_blocks",
        settings=(1, 4, 16),
        keeps_all=2**20,
        by_kv_head=True,
        at_most_kv_heads="vert_stride",
    ),
    Row(
        name="moa",
        family="masks",
        factory=moa,
        summary="per head a sink and a window, by length",
        paper="arXiv:2406.14909",
        year=2024,
        causal=True,
        bidirectional=False,
        training_free=True,
        control="rules",
        settings=(0.125, 0.25),
        keeps_all=1.0,
        per_head="rules",
        kinds=(ElasticRule,),
    ),
    Row(
        name="fna",
        family="masks",
        factory=fna,
        summary="each token's neighbors on a grid",
        paper="arXiv:2403.04690",
        year=2024,
        causal=False,
        bidirectional=True,
        training_free=False,
        control="window",
        settings=(16, 64, 256),
        needs_all_queries=True,
    ),
    Row(
        name="gna",
        family="masks",
        factory=gna,
        summary="windows on a grid, shared by groups of queries",
        paper="arXiv:2504.16922",
        year=2025,
        causal=False,
        bidirectional=True,
        training_free=True,
        control="window",
        settings=(16, 64, 256),
        needs_all_queries=True,
    ),
    Row(
        name="mean_pooled",
        family="estimators",
        factory=mean_pooled,
        summary="top-k blocks by products of block means",
        paper="arXiv:2407.02490",
        year=2024,
        causal=True,
        bidirectional=True,
        training_free=True,
        control="density",
        control_traced=True,
        settings=(0.1, 0.2, 0.4),
        keeps_all=1.0,
    ),
    Row(
        name="minference",
        family="estimators",
        factory=minference,
        summary="per head a window, stripes or best blocks",
        paper="arXiv:2407.02490",
        year=2024,
        causal=True,
        bidirectional=False,
        training_free=True,
        control="minference_ratio",
        settings=(0.02, 0.025, 0.04),
        keeps_all=2.0**20,
        per_head="patterns",
        kinds=(AShape, VerticalSlash, BlockSparse),
        by_last_queries=True,
    ),
    Row(
        name="xattention",
        family="estimators",
        factory=xattention,
        summary="top-p blocks by antidiagonal sums",
        paper="arXiv:2503.16428",
        year=2025,
        causal=True,
        bidirectional=True,
        training_free=True,
        control="threshold",
        control_traced=True,
        settings=(0.7, 0.9, 0.95),
        keeps_all=1.0,
        per_head="threshold",
    ),
    Row(
        name="pbs_attn",
        family="estimators",
        factory=pbs_attn,
        summary="keys sorted in segments, top-p blocks by means",
        paper="arXiv:2510.21270",
        year=2025,
        causal=True,
        bidirectional=True,
        training_free=True,
        control="threshold",
        control_traced=True,
        settings=(0.5, 0.7, 0.9),
        keeps_all=1.0,
        by_last_queries=True,
    ),
    Row(
        name="blasst",
        family="estimators",
        factory=blasst,
        summary="tiles skipped on the way, by the running maximum",
        paper="arXiv:2512.12087",
        year=2025,
        causal=True,
        bidirectional=True,
        training_free=True,
        control="threshold",
        control_traced=True,
        settings=(1.0, 0.1),
        keeps_all=0.0,
        per_head="calibration",
        kinds=(Calibration,),
        by_running_maximum=True,
    ),
    Row(
        name="nsa",
        family="hierarchical",
        factory=nsa,
        summary="compressed, selected and local keys, mixed by gates",
        paper="arXiv:2502.11089",
        year=2025,
        causal=True,
        bidirectional=False,
        training_free=False,
        learns=True,
        control="top_k",
        settings=(3, 4, 8),
        keeps_all=2**20,
        by_kv_head=True,
        by_gates=True,
    ),
    Row(
        name="seerattention",
        family="learned",
        factory=seerattention,
        summary="tiles that a distilled gate finds probable",
        paper="arXiv:2410.13276",
        year=2024,
        causal=True,
        bidirectional=True,
        training_free=False,
        learns=True,
        control="threshold",
        control_traced=True,
        settings=(0.5, 0.2, 0.02),
        keeps_all=0.0,
        by_kv_head=True,
    ),
    Row(
        name="seerattention_r",
        family="learned",
        factory=seerattention_r,
        summary="blocks that a gate for each query finds probable",
        paper="arXiv:2506.08889",
        year=2025,
        causal=True,
        bidirectional=False,
        training_free=False,
        learns=True,
        control="token_budget",
        settings=(128, 256, 1024),
        keeps_all=2**20,
        by_kv_head=True,
        small=(("gate_dim", 16),),
    ),
    Row(
        name="hisa",
        family="learned",
        factory=hisa,
        summary="tokens picked by an indexer, inside blocks",
        paper="arXiv:2603.28458",
        year=2026,
        causal=True,
        bidirectional=True,
        training_free=False,
        learns=True,
        control="top_k",
        settings=(64, 256, 1024),
        # what the default blocks hold: all, of no more keys
        keeps_all=64 * 128,
        small=(("index_heads", 4), ("index_dim", 16), ("rotary_dim", 8)),
        needs_all_queries=True,
    ),
    Row(
        name="flashmoba",
        family="routing",
        factory=flashmoba,
        summary="each query to blocks, by their mean keys",
        paper="arXiv:2511.11571",
        year=2025,
        causal=True,
        bidirectional=True,
        training_free=False,
        control="top_k",
        settings=(1, 2, 4),
        keeps_all=2**20,
    ),
    Row(
        name="routing_transformer",
        family="routing",
        factory=routing_transformer,
        summary="inside clusters of tokens, by online k-means",
        paper="arXiv:2003.05997",
        year=2020,
        causal=True,
        bidirectional=True,
        training_free=False,
        learns=True,
        control="clusters",
        settings=(16, 8, 4),
        keeps_all=1,
        by_kv_head=True,
        by_last_queries=True,
        small=(("normalize_logits", False),),
    ),
    Row(
        name="biformer",
        family="routing",
        factory=biformer,
        summary="regions of a picture to regions, by means",
        paper="arXiv:2303.08810",
        year=2023,
        causal=False,
        bidirectional=True,
        training_free=False,
        control="top_k",
        settings=(1, 2, 4),
        keeps_all=2**20,
        needs_all_queries=True,
    ),
)


def readme_table() -> str:
    """The methods as a Markdown table, as README.md holds it between its markers."""
    lines = ["| method | family | what it does | source | trained |", "|---|---|---|---|---|"]
    for row in METHODS:
        number = row.paper.removeprefix("arXiv:")
        source = f"[{row.paper}](https://arxiv.org/abs/{number}) ({row.year})"
        trained = "no" if row.training_free else "yes"
        lines.append(f"| `{row.name}` | {row.family} | {row.summary} | {source} | {trained} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(readme_table())
