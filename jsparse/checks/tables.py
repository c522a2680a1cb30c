"""Checks of saved tables of what each head is given, and of the searches that make them."""

import dataclasses
from typing import Any

from jsparse.checks.files import finite_layers, same_layers
from jsparse.checks.values import positive


def table_readable(path: Any, error: Any) -> None:
    """A table could not be read."""
    raise ValueError(f"{path} is not a readable table ({error}); make one with jsparse plan.")


def table_schema(path: Any, content: Any, schema: str, version: int) -> None:
    """A file is a table, of a version that is known."""
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise ValueError(f"{path} is no table of heads; make one with jsparse plan.")
    if content.get("version") != version:
        raise ValueError(
            f"{path} has version {content.get('version')!r} of the schema, this jsparse reads "
            f"{version}; make it anew with jsparse plan, or update jsparse."
        )
    missing = {"method", "per_head", "arguments", "provenance", "layers"} - {*content}
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; make it with jsparse plan.")


def table_method(path: Any, name: Any, known: Any) -> None:
    """The table's method takes something per head."""
    if name not in known:
        raise ValueError(
            f"{path} is of the method {name!r}, which has nothing to set per head here; those that "
            f"have: {', '.join(sorted(known))}."
        )


def table_parts(path: Any, content: Any, per_head: Any, provenance: tuple[str, ...]) -> None:
    """What a table says besides its layers is complete."""
    if content["per_head"] != per_head:
        raise ValueError(
            f"{path} sets {content['per_head']!r} per head; {content['method']} takes {per_head!r}."
        )
    for name in ("arguments", "provenance"):
        if not isinstance(content[name], dict):
            raise ValueError(f"{path}: {name} is {content[name]!r}; it must map names to values.")
    if {*content["provenance"]} != {*provenance}:
        raise ValueError(f"{path}: provenance must have {', '.join(provenance)}.")


def table_layers(path: Any, layers: Any, fields: tuple[str, ...]) -> None:
    """Layers are lists of as many heads each."""
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{path} has no layers; each is a list with an entry per query head.")
    for number, layer in enumerate(layers):
        if not isinstance(layer, list) or not layer or len(layer) != len(layers[0]):
            heads = [len(x) if isinstance(x, list) else x for x in (layer, layers[0])]
            raise ValueError(
                f"{path}: layer {number} has {heads[0]} heads and layer 0 {heads[1]}; all layers "
                "need as many, at least 1."
            )
        for head, cell in enumerate(layer):
            if not isinstance(cell, dict) or {*cell} != {*fields}:
                raise ValueError(
                    f"{path}: layer {number}, head {head} is {cell!r}; it must have "
                    f"{', '.join(fields)}."
                )


def table_value(path: Any, layer: int, head: int, value: Any, kinds: tuple[type, ...]) -> None:
    """A head's value is a number, or one of the kinds that the method has."""
    where = f"{path}: layer {layer}, head {head}"
    if not kinds:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where} has {value!r}; it must be a number.")
        return
    known = {kind.__name__: kind for kind in kinds}
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in known:
        raise ValueError(f"{where} has {value!r}; its kind must be one of {', '.join(known)}.")
    names = [field.name for field in dataclasses.fields(known[kind])]
    if {*value} != {"kind", *names}:
        raise ValueError(f"{where} has {value!r}; {kind} takes {', '.join(names)}.")


def table_refused(path: Any, layer: int, error: Any) -> None:
    """A method does not take what a layer of the table holds."""
    raise ValueError(f"{path}: layer {layer}: {error}")


def rows_left(start: int, q_len: int) -> None:
    """A score over the rows past a start has some."""
    if start >= q_len:
        raise ValueError(
            f"start={start} leaves none of {q_len} queries to score; pass a lower start, or a "
            "longer text."
        )


def all_queries(q_len: int, kv_len: int) -> None:
    """Queries and keys are the same tokens."""
    if q_len != kv_len:
        raise ValueError(
            f"There are {q_len} queries of {kv_len} keys; capture a whole text, with a query each."
        )


def lengths_to_fit(lengths: Any, block_size: int, captured: int) -> None:
    """Each length has a tile and was captured."""
    positive(lengths=len(lengths))
    for length in lengths:
        if not block_size <= length <= captured:
            raise ValueError(
                f"lengths={list(lengths)} must lie between a tile of {block_size} and the "
                f"{captured} tokens that were captured."
            )


def something_to_fit(fitted: Any) -> None:
    """Some threshold skipped neither too few tiles nor too many."""
    if fitted is None:
        raise ValueError(
            "No two thresholds skip different shares between 0.1 and 0.9 of the tiles of any head; "
            "capture a longer text, or pass a smaller block_size or more thresholds."
        )


def layer_methods(methods: int, layers: int) -> None:
    """A method for each attention layer."""
    if methods != layers:
        raise ValueError(f"There are {methods} methods for {layers} attention layers.")


def search_options(method: str, given: Any, allowed: Any) -> None:
    """Options given are ones that the method's search has."""
    for name in given:
        if name not in allowed:
            options = ", ".join(_option(n) for n in sorted(allowed))
            raise ValueError(f"{_option(name)} is not for {method}, whose search takes {options}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def one_text(method: str, files: Any) -> None:
    """A search on a single text is given one file."""
    if len(files) != 1:
        raise ValueError(f"{len(files)} files are given; the search for {method} takes one.")


def texts_held_out(held_out: Any) -> None:
    """A search that chooses by texts of another length is given some."""
    if not held_out:
        raise ValueError(
            "--held-out is missing: the search chooses among its plans by texts of a length that "
            "the others do not have; name one file or more."
        )


def profiles(texts: Any, held_out: Any) -> None:
    """Profiles of texts fit each other, and those held out have a length of their own."""
    for name, given in (("texts", texts), ("held_out", held_out)):
        if not len(given) or not all(len(text) for text in given):
            raise ValueError(
                f"{name} is empty or has a text without layers; make each with "
                "jsparse.evaluation.profile."
            )
        for number, text in enumerate(given):
            where = f"{name}[{number}]"
            try:
                same_layers(text)
                finite_layers(text)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            q, k, v, d_out = text[0]
            if len(q) != len(k):
                raise ValueError(
                    f"{where} has {len(q)} queries and {len(k)} keys; profile whole texts."
                )
            if d_out.shape != (*q.shape[:-1], v.shape[-1]):
                raise ValueError(
                    f"{where} has d_out of shape {d_out.shape}; the output has "
                    f"{(*q.shape[:-1], v.shape[-1])}."
                )
            first = texts[0]
            model, own = ((len(x), x[0].q.shape[1:], x[0].k.shape[1:]) for x in (first, text))
            if model != own:
                raise ValueError(
                    f"{where} has (layers, q, k) {own}, texts[0] {model}; profile one model."
                )
    lengths, unseen = {len(text[0].q) for text in texts}, {len(text[0].q) for text in held_out}
    if len(unseen) != 1 or unseen & lengths:
        raise ValueError(
            f"held_out has texts of {_listed(unseen)} tokens, texts of {_listed(lengths)}; those "
            "held out must all have one length that the others do not have."
        )


def _listed(lengths: Any) -> str:
    return ", ".join(map(str, sorted(lengths)))


def some_rules(rules: Any, lengths: Any) -> None:
    """There are rules to choose from."""
    if not rules:
        raise ValueError(
            f"No elastic rule of the grid fits lengths of {', '.join(map(str, lengths))}; pass a "
            "smaller interval or more num_betas."
        )


def some_plan(found: Any, bounds: str) -> None:
    """Every objective has a plan that keeps to the bounds."""
    if any(plan is None for plan in found):
        raise ValueError(f"No plan keeps to {bounds}, or none was found in time; loosen these.")
