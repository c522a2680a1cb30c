"""The text: the source of Python's own standard library, which every machine with Python has."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np

# directories whose text is tests, installed packages or tables rather than the library itself
LEFT_OUT = {"test", "tests", "site-packages", "idle_test", "__pycache__", "encodings", "lib2to3"}
HELD_OUT_EVERY = 20


def files() -> list[Path]:
    """The library's source files, in an order that does not depend on the machine."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts)]
    return sorted(found, key=name_of)


def name_of(path: Path) -> str:
    """A file's name within the library, such as "asyncio/events.py"."""
    return path.relative_to(sysconfig.get_path("stdlib")).as_posix()


def is_held_out(path: Path) -> bool:
    """Whether a file is kept from training: by a hash of its name, on every Python the same."""
    return int(hashlib.sha256(name_of(path).encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0


def read(paths: list[Path]) -> np.ndarray:
    """Files as one stream of bytes, a zero byte before each."""
    parts = [b"\0" + p.read_bytes() for p in paths]
    return np.frombuffer(b"".join(parts), np.uint8)


def split() -> tuple[np.ndarray, np.ndarray]:
    """All training bytes and all held-out bytes."""
    every = files()
    held_out = [p for p in every if is_held_out(p)]
    return read([p for p in every if p not in set(held_out)]), read(held_out)


def held_out_file(min_bytes: int) -> Path:
    """The first held-out file of at least `min_bytes`.

    Raises:
      ValueError: if there is none that long.
    """
    for path in files():
        if is_held_out(path) and path.stat().st_size >= min_bytes:
            return path
    raise ValueError(f"No held-out file has {min_bytes} bytes; ask for fewer.")


def windows(stream: np.ndarray, length: int, count: int, seed: int) -> np.ndarray:
    """Random windows of the stream, [count, length].

    Raises:
      ValueError: if the stream is shorter than a window.
    """
    if len(stream) < length:
        raise ValueError(f"The text has {len(stream)} bytes, a window {length}; use shorter ones.")
    starts = np.random.default_rng(seed).integers(0, len(stream) - length + 1, count)
    return np.stack([stream[s : s + length] for s in starts])
