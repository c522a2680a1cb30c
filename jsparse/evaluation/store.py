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
        whole = json.dumps({"of": self._of, "figures": self._figures})
        # written aside and renamed: being stopped in between leaves the old file, not half a one
        aside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(whole)
            aside.replace(self._path)
        except OSError as error:
            checks.writable(self._path, error)
