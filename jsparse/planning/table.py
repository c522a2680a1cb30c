"""A table of what each head of each layer is given: one JSON schema for all methods."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jsparse import checks
from jsparse.evaluation.store import write_whole
from jsparse.registry import METHODS, Row
from jsparse.types import Method

SCHEMA, VERSION = "jsparse heads", 1


class Choice(NamedTuple):
    """What one head is given.

    Attributes:
      value: Of the method's argument that takes one per head: a number, or one of its patterns.
      score: How good the search found it, higher is better; None where it was not measured.
      cost: Floating-point operations of attending, over those of dense causal attention.
    """

    value: Any
    score: float | None = None
    cost: float | None = None


class Provenance(NamedTuple):
    """Where a table comes from.

    Attributes:
      source: The model, or the file of captured tensors.
      q_len: Queries of the example it was found on.
      kv_len: Keys of it.
      score: What the scores are.
      search: What the search was told.
    """

    source: str
    q_len: int
    kv_len: int
    score: str
    search: dict[str, Any]


class Table(NamedTuple):
    """A method's setting for each head of each layer.

    Attributes:
      method: The method's name in the registry.
      arguments: Arguments of its factory that are the same for all heads.
      layers: Per layer one choice per query head.
      provenance: Where it comes from.
    """

    method: str
    arguments: dict[str, Any]
    layers: tuple[tuple[Choice, ...], ...]
    provenance: Provenance


def methods_of(table: Table) -> list[Method]:
    """Makes each layer's method, for `js.nn.SparseAttention` or `js.nn.with_methods`.

    Raises:
      ValueError: if the registry has no such method or the method takes nothing per head, or its
        factory refuses a value.
    """
    row = _row(table.method)
    made = []
    for layer in table.layers:
        values = [choice.value for choice in layer]
        values = values if row.kinds else jnp.asarray(values, jnp.float32)
        made.append(row.factory(**table.arguments, **{str(row.per_head): values}))
    return made


def save_table(table: Table, path: str | Path) -> None:
    """Writes a table as JSON; folders are made.

    Raises:
      ValueError: if the file cannot be written.
    """
    layers = [
        [choice._replace(value=_as_json(choice.value))._asdict() for choice in layer]
        for layer in table.layers
    ]
    content = {
        "schema": SCHEMA,
        "version": VERSION,
        "method": table.method,
        "per_head": _row(table.method).per_head,
        "arguments": table.arguments,
        "provenance": table.provenance._asdict(),
        "layers": layers,
    }
    write_whole(path, json.dumps(content, indent=1, default=_number) + "\n")


def load_table(path: str | Path) -> Table:
    """Reads what `save_table` wrote.

    Raises:
      ValueError: if the file cannot be read, is no such table or one of a later version, its layers
        have different numbers of heads, or a value is not one that the method takes.
    """
    content: Any = None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        checks.table_readable(path, error)
    checks.table_schema(path, content, SCHEMA, VERSION)
    row = _row(content["method"], path)
    checks.table_parts(path, content, row.per_head, Provenance._fields)
    checks.table_layers(path, content["layers"], Choice._fields)
    layers = []
    for number, layer in enumerate(content["layers"]):
        choices = []
        for head, cell in enumerate(layer):
            checks.table_value(path, number, head, cell["value"], row.kinds)
            choices.append(Choice(**cell)._replace(value=_from_json(cell["value"], row)))
        layers.append(tuple(choices))
    provenance = Provenance(**content["provenance"])
    table = Table(content["method"], content["arguments"], tuple(layers), provenance)
    for number in range(len(layers)):
        try:
            methods_of(table._replace(layers=(layers[number],)))
        except (TypeError, ValueError) as error:
            checks.table_refused(path, number, error)
    return table


def _row(name: Any, path: str | Path = "The table") -> Row:
    known = {row.name: row for row in METHODS if row.per_head}
    checks.table_method(path, name, known)
    return known[name]


def _number(value: Any) -> Any:
    """A NumPy or JAX number as Python's own."""
    return value.item()


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {"kind": type(value).__name__, **dataclasses.asdict(value)}  # type: ignore[arg-type]
    return float(value)


def _from_json(value: Any, row: Row) -> Any:
    if not row.kinds:
        return value
    kind = {kind.__name__: kind for kind in row.kinds}[value["kind"]]
    return kind(**{name: number for name, number in value.items() if name != "kind"})
