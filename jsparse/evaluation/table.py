"""The comparison as a table, for the terminal and for pages."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jsparse.evaluation.compare import Comparison, Result
from jsparse.registry import METHODS


def percent(x: float, digits: int = 1) -> str:
    """A share in percent, its sign kept on the line by a space that does not break."""
    return f"{100 * x:.{digits}f}\N{NO-BREAK SPACE}%"


def counted(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def mean(values: list[list[float]]) -> float:
    """Over layers and heads."""
    return float(np.mean(values))


class Column(NamedTuple):
    """A column of the table.

    Attributes:
      name: Its header; that of the score is replaced by the score's own name.
      meaning: What the figure is, in a few words.
      cell: The figure of a setting.
      brief: Whether a narrow terminal shows it.
    """

    name: str
    meaning: str
    cell: Callable[[Result], str]
    brief: bool = False


COLUMNS = (
    Column(
        "density", "share of the visible tiles computed", lambda r: percent(mean(r.density)), True
    ),
    Column(
        "pairs",
        "share of the visible pairs of tokens attended to",
        lambda r: percent(mean(r.token_density)),
    ),
    Column(
        "recall",
        "share of dense attention's probability on attended pairs",
        lambda r: percent(mean(r.recall)),
        True,
    ),
    Column(
        "error",
        "norm of the output less the dense output, over the latter's",
        lambda r: f"{mean(r.error):.3f}",
        True,
    ),
    Column(
        "largest",
        "largest difference of a single number of the output",
        lambda r: f"{np.max(r.largest_error):.2g}",
    ),
    Column(
        "cosine",
        "of the angle between the output and the dense output",
        lambda r: f"{mean(r.cosine):.3f}",
    ),
    Column(
        "score",
        "of the model with the method in every layer",
        lambda r: "" if r.score is None else f"{r.score:.4f}",
        True,
    ),
    Column("ms", "time of all layers, planning included", lambda r: f"{r.seconds * 1e3:.0f}", True),
    Column("plan ms", "of it, planning", lambda r: f"{r.plan_seconds * 1e3:.0f}"),
    Column(
        "x dense",
        "how many times as fast as dense attention",
        lambda r: f"{r.dense_seconds / r.seconds:.2f}",
        True,
    ),
    Column("GFLOP", "operations, counted, planning included", lambda r: f"{r.flops / 1e9:.1f}"),
    Column(
        "of dense",
        "those over dense attention's",
        lambda r: percent(r.flops / r.dense_flops, 0),
    ),
    Column(
        "backward",
        "operations of the gradients over dense attention's",
        lambda r: percent(r.backward_flops / r.dense_backward_flops, 0),
    ),
    Column("MB", "read and written at least, counted", lambda r: f"{r.bytes / 1e6:.0f}"),
)


def columns(comparison: Comparison, score_name: str) -> tuple[Column, ...]:
    """The columns that the comparison has figures for, the score under its own name."""
    return tuple(
        c._replace(name=score_name) if c.name == "score" else c
        for c in COLUMNS
        if c.name != "score" or comparison.dense_score is not None
    )


def rows(comparison: Comparison) -> list[Result]:
    """Dense attention as a setting among the others, then the settings."""
    first = comparison.results[0]
    same = np.ones_like(np.asarray(first.density)).tolist()
    nothing = np.zeros_like(np.asarray(first.density)).tolist()
    dense = first._replace(
        label="dense",
        method="dense",
        density=same,
        token_density=same,
        recall=same,
        error=nothing,
        largest_error=nothing,
        cosine=same,
        plan_seconds=0.0,
        seconds=first.dense_seconds,
        flops=first.dense_flops,
        backward_flops=first.dense_backward_flops,
        bytes=first.dense_bytes,
        overflowed=False,
        score=comparison.dense_score,
    )
    return [dense, *comparison.results]


def of_trained_models(comparison: Comparison) -> str:
    """What is to be known of methods that models are trained with; empty where there are none."""
    shown = {result.method for result in comparison.results}
    names = [row.name for row in METHODS if row.name in shown and not row.training_free]
    return f"For models that are trained with them: {', '.join(names)}." if names else ""


def print_table(comparison: Comparison, score_name: str = "score") -> None:
    """Prints the table: every column where the terminal has room, else those that matter most."""
    every = columns(comparison, score_name)
    brief = [column for column in every if column.brief]
    print_first_that_fits(_table(comparison, every), _table(comparison, brief))


def print_first_that_fits(*tables: Table) -> None:
    """Prints the first table that is not wider than the terminal, or else the last."""
    console = Console()
    endless = console.options.update(width=10_000)
    fitting = (t for t in tables if console.measure(t, options=endless).maximum <= console.width)
    console.print(next(fitting, tables[-1]))


def _table(comparison: Comparison, shown: Sequence[Column]) -> Table:
    layers = counted(len(comparison.results[0].density), "layer")
    table = Table(
        title=f"against dense attention: {layers}, {counted(comparison.heads, 'head')}, "
        f"{comparison.q_len} tokens",
        caption="; ".join(f"{column.name}: {column.meaning}" for column in shown)
        + f". {of_trained_models(comparison)}".rstrip(),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    # the one column that may wrap: of a long name the setting goes to the next line
    table.add_column("method", overflow="fold")
    for column in shown:
        table.add_column(column.name, justify="right", no_wrap=True)
    for result in rows(comparison):
        table.add_row(result.label, *(column.cell(result) for column in shown))
    return table
