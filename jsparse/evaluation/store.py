"""Figures kept in a file as they come, so that a run that was stopped goes on where it was."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jsparse import checks


def fingerprint(arrays: Iterable[Any], *settings: Any) -> str:
    """A hash of arrays, bit by bit, and of anything else that figures depend on."""
    digest = hashlib.sha256(repr((jax.__version__, jax.default_backend(), settings)).encode())
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(repr((array.shape, str(array.dtype))).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class Store:
    """Figures by label, for one fingerprint and no other; without a path, in memory alone."""

    def __init__(self, path: str | Path | None, of: str):
        """Takes up what a file holds, if it was kept for the same fingerprint.

        A file of another run, or one that cannot be read, is started afresh.
        """
        self._path = None if path is None else Path(path)
        self._of = of
        self._figures: dict[str, Any] = {}
        if self._path is not None and self._path.is_file():
            try:
                kept = json.loads(self._path.read_text())
            except ValueError:
                kept = None
            if isinstance(kept, dict) and kept.get("of") == of:
                self._figures = kept["figures"]

    def get(self, label: str, compute: Callable[[], Any]) -> Any:
        """What is kept under a label, or computed and kept now."""
        if label not in self._figures:
            self._figures[label] = compute()
            self._write()
        return self._figures[label]

    def discard(self) -> None:
        """Removes the file: a finished run is not to be resumed."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._path is None:
            return
        write_whole(self._path, json.dumps({"of": self._of, "figures": self._figures}))


def write_whole(path: str | Path, text: str) -> None:
    """Writes a file in one go, its folders made; being stopped leaves the old one, not half of it.

    Raises:
      ValueError: if it cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        checks.writable(path, error)
