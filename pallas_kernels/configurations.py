"""Which configuration a kernel is laid out by: the shipped default, or one timed on this device.

`jsparse tune` times configurations and writes them to a file, which every later process reads once.
The file is named by the environment variable JSPARSE_TUNED; an empty value switches it off. Where
the variable is not set it is `jsparse/tuned.json` in the user's cache: `$XDG_CACHE_HOME` or
`~/.cache`, `~/Library/Caches` on macOS, `%LOCALAPPDATA%` on Windows.

A tuned configuration is taken only for the key it was timed for, under the jax it was timed under,
if it is legal and still compiles, which its first use in a process finds out by compiling the
kernel once more. Anything else is the default, with one warning.
"""

import dataclasses
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels import _compat

VARIABLE = "JSPARSE_TUNED"
FORMAT = 1  # of the file; a file of another format is not read
INTERPRETER = "interpreter"  # the device of a kernel that is traced for JAX's interpreter
MARGIN = 0.02  # share of the default's time that a configuration must save: less may be noise
REGISTERS = 65_536  # of a multiprocessor
THREADS = 128  # of a warpgroup
C = TypeVar("C")


class Key(NamedTuple):
    """What a configuration is chosen by.

    Attributes:
      operation: The kernel: "forward", "d_q", "d_k_d_v", "d_k" or "d_v".
      masked: Whether a rule changes its logits.
      device: The kind of device, as JAX names it.
      dtype: Of q, k and v.
      dim: Width of q and k, padded.
      v_dim: Width of v, padded.
      block_q: Queries per tile.
      block_kv: Keys per tile.
    """

    operation: str
    masked: bool
    device: str
    dtype: str
    dim: int
    v_dim: int
    block_q: int
    block_kv: int


@dataclasses.dataclass
class Entry:
    """What was timed for one key.

    Attributes:
      key: The key.
      jax: The version of JAX that compiled it.
      problem: The sizes it was timed on.
      candidates: The configurations, the default first: `{"config": {...}}` with `"ms"`, or with
        `"failed"` and why.
    """

    key: Key
    jax: str
    problem: dict[str, Any]
    candidates: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def best(self) -> dict[str, Any] | None:
        """The fastest candidate; the default where nothing beats it by more than the margin."""
        timed = [candidate for candidate in self.candidates if "ms" in candidate]
        if not timed or "ms" not in self.candidates[0]:
            return None
        default, fastest = self.candidates[0], min(timed, key=lambda candidate: candidate["ms"])
        return fastest if fastest["ms"] < (1 - MARGIN) * default["ms"] else default


def device_kind() -> str:
    """The device that a kernel traced now is for."""
    return INTERPRETER if _compat.interpreting() else jax.devices()[0].device_kind


def key(
    operation: str, masked: bool, dtype: Any, block_q: int, block_kv: int, dim: int, v_dim: int
) -> Key:
    """The key of a kernel that is traced now."""
    name = jnp.dtype(dtype).name
    return Key(operation, masked, device_kind(), name, dim, v_dim, block_q, block_kv)


def place() -> Path | None:
    """Where tuned configurations are read from and written to; None if they are switched off."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        cache = "~/Library/Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "jsparse" / "tuned.json"


def read(path: Path) -> dict[Key, Entry]:
    """Reads a file of tuned configurations.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is not such a file.
    """
    whole = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ValueError(f"it does not say that its format is {FORMAT}")
    try:
        entries = [
            Entry(
                Key(**row["key"]),
                str(row["jax"]),
                dict(row["problem"]),
                [_candidate(**candidate) for candidate in row["timed"]],
            )
            for row in whole["entries"]
        ]
        return {entry.key: entry for entry in entries}
    except (KeyError, TypeError) as error:
        raise ValueError(f"an entry of it is not whole: {error}") from error


def _candidate(config: Any, ms: Any = None, failed: Any = None) -> dict[str, Any]:
    outcome = {"failed": str(failed)} if ms is None else {"ms": float(ms)}
    return {"config": dict(config), **outcome}


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Writes a file of tuned configurations; stopped in between, the old file is still whole.

    Raises:
      OSError: if it cannot be written.
    """
    rows = []
    for entry in entries:
        best = entry.best()
        rows.append(
            {
                "key": entry.key._asdict(),
                "config": best and best["config"],
                "jax": entry.jax,
                "problem": entry.problem,
                "timed": entry.candidates,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps({"format": FORMAT, "entries": rows}, indent=1) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def chosen(
    key: Key,
    default: C,
    refusal: Callable[[C], str | None],
    trial: Callable[[C], Any],
) -> C:
    """The configuration for a key: the tuned one if there is one that is legal, or the default.

    Args:
      key: What it is chosen by.
      default: The shipped configuration, a frozen dataclass.
      refusal: Why a configuration is not legal here, or None if it is.
      trial: Compiles the kernel with a configuration and raises where that fails; called once per
        key and process, and only for a configuration other than the default.
    """
    path = place()
    entry = None if path is None else _tuned(path, key.device).get(key)
    best = entry and entry.best()
    if best is None:
        return default
    if (path, key) not in _SETTLED:
        config = _settle(path, key, best["config"], default, refusal, trial)
        _SETTLED[path, key] = config
    # the default may depend on more than the key
    return default if _SETTLED[path, key] is None else _SETTLED[path, key]


# the tuned configuration of a file and key, None where it is the default after all
_SETTLED: dict[tuple[Path | None, Key], Any] = {}


def forget() -> None:
    """Makes the next choice read the file anew."""
    _SETTLED.clear()
    _tuned.cache_clear()


def layout_refusal(
    config: Any, *, consumers: int, rows: int, needed: int, limit: int
) -> str | None:
    """Why a program with a producer and some consumer warpgroups cannot be laid out so, or None.

    Args:
      config: A dataclass with `stages`, `columns`, `consumer_registers`, `producer_registers`.
      consumers: How many consumer warpgroups there are.
      rows: Tokens of a tile in the ring; `columns` of them are multiplied at once.
      needed: Bytes of shared memory it asks for.
      limit: Bytes of shared memory it may have.
    """
    if config.stages < 1:
        return f"stages must be at least 1, not {config.stages}."
    if config.columns not in (64, 128):
        return f"columns must be 64 or 128, not {config.columns}."
    if rows % min(config.columns, rows):
        return f"columns={config.columns} must divide a tile of {rows}."
    registers = config.consumer_registers, config.producer_registers
    if any(n % 8 or not 24 <= n <= 240 for n in registers):
        return (
            f"registers must be multiples of 8 from 24 to 240, not {registers[0]}, {registers[1]}."
        )
    # what all warpgroups are launched with is what they may share out among themselves
    warpgroups = consumers + 1
    shared = warpgroups * (REGISTERS // (THREADS * warpgroups) // 8 * 8)
    asked = consumers * registers[0] + registers[1]
    if asked > shared:
        return f"its warpgroups ask for {asked} registers per lane, of {shared} that there are."
    if needed > limit:
        return f"it asks for {needed} bytes of shared memory, of {limit} that there are."
    return None


def candidates(
    default: C | None, others: Iterable[C], refusal: Callable[[C], str | None]
) -> tuple[C, ...]:
    """The default and those of the others that are legal; none where there is no default."""
    if default is None:
        return ()
    return (default, *(c for c in others if c != default and refusal(c) is None))


def compiles(function: Callable[..., Any], *arrays: Any, **named_arrays: Any) -> None:
    """Compiles a function for arrays like these, traced ones too, and raises where that fails."""
    args, kwargs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (arrays, named_arrays)
    )
    # in a thread of its own, where no mesh, transformation or interpreter of the caller is at work
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: jax.jit(function).lower(*args, **kwargs).compile()).result()


@functools.cache
def _tuned(path: Path, device: str) -> dict[Key, Entry]:
    """The entries of a file for a device and for this version of JAX."""
    if not path.exists() and VARIABLE not in os.environ:
        return {}
    try:
        entries = read(path)
    except (OSError, ValueError) as error:
        _warn(
            f"Tuned configurations in {path} cannot be used ({error}); the defaults are. Delete "
            f"the file and run `jsparse tune`, or name another in {VARIABLE}."
        )
        return {}
    here = {key: entry for key, entry in entries.items() if key.device == device}
    usable = {key: entry for key, entry in here.items() if entry.jax == jax.__version__}
    if entries and not here:
        others = ", ".join(sorted({key.device for key in entries}))
        _warn(
            f"The tuned configurations in {path} are for {others}, not for {device}; the defaults "
            f"are used. Run `jsparse tune` on this device, or unset {VARIABLE}."
        )
    elif len(usable) < len(here):
        _warn(
            f"{len(here) - len(usable)} of the tuned configurations for {device} in {path} were "
            f"timed under another jax than {jax.__version__}; the defaults are used for them. Run "
            "`jsparse tune` again."
        )
    return usable


def _settle(
    path: Path | None,
    key: Key,
    fields: dict[str, Any],
    default: C,
    refusal: Callable[[C], str | None],
    trial: Callable[[C], Any],
) -> C | None:
    try:
        config = type(default)(**fields)
    except TypeError as error:
        reason = f"it has other fields than this version: {error}"
    else:
        if config == default:
            return None
        shipped = vars(default)
        if all(type(value) is type(shipped[name]) for name, value in vars(config).items()):
            reason = refusal(config)
        else:
            reason = f"its values are of other types than those of {default}"
        if reason is None:
            try:
                # nothing is compiled for the interpreter
                if key.device != INTERPRETER:
                    trial(config)
                return config
            except Exception as error:  # a compiler's errors are of many classes
                reason = f"it does not compile: {type(error).__name__}: {str(error)[:200]}"
    _warn(
        f"The tuned configuration of {key} in {path} cannot be used ({reason}); the default is. "
        "Run `jsparse tune --again`."
    )
    return None


def _warn(sentence: str) -> None:
    warnings.warn(sentence, UserWarning, stacklevel=3)
