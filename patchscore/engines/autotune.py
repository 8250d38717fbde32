"""In which tiles a Triton kernel runs: the first that compile, or the fastest of a few, which are then remembered."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..files import write_atomically
from ..version import __version__
from .base import EngineError

Result = TypeVar("Result")


class KernelError(EngineError):
    """No configuration of the kernel could be compiled and started."""


@dataclass(frozen=True)
class Configuration:
    """A tile of queries x patches and how it is compiled; `block` columns at a time, or 0: whole rows."""

    queries: int
    patches: int
    warps: int
    stages: int
    block: int = 0


_chosen: dict[tuple, Configuration] = {}
"""The configuration that served, by what it served and whether it was the fastest of several."""


def wanted() -> bool:
    """Whether configurations may be timed: PATCHSCORE_AUTOTUNE=0 says no."""
    return os.environ.get("PATCHSCORE_AUTOTUNE") != "0"


def first_that_serves(
    key: tuple, candidates: list[Configuration], work: Callable[[Configuration], Result], tune: bool
) -> Result:
    """`work` done in the configuration known for `key`, else in the first that compiles, or with `tune` the fastest.

    The fastest is known from then on, in other processes too (`remembered`), as long as Triton, this package and the
    candidates are the same. PATCHSCORE_AUTOTUNE=0 takes the first that compiles, whatever is known. What is known and
    no longer compiles is forgotten.

    Raises:
        KernelError: no configuration could be compiled and started.
    """
    tune = tune and len(candidates) > 1
    name = f"{key}, patchscore {__version__}, Triton {_triton()}, of {[astuple(candidate) for candidate in candidates]}"
    tuned, untuned = (*key, True), (*key, False)
    known = None
    if wanted():
        known = _chosen.get(tuned) or remembered(name, candidates)
    if known is not None:
        _chosen[tuned] = known
    elif not tune:
        known = _chosen.get(untuned)
    if known is not None:
        try:
            return work(known)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # In the loop below it fails again, and the next one serves.
            _chosen.pop(tuned, None)
            _chosen.pop(untuned, None)
    best, fastest, failure = None, float("inf"), None
    for candidate in candidates:
        try:
            result = work(candidate)
            seconds = _timed(work, candidate) if tune else 0.0
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton raises what its compiler, ptxas or the driver raised
            failure = error
            continue
        if seconds < fastest:
            best, fastest = (candidate, result), seconds
        if not tune:
            break
    if best is None:
        raise KernelError(str(failure).splitlines()[0] if str(failure) else repr(failure)) from failure
    _chosen[tuned if tune else untuned] = best[0]
    if tune:
        remember(name, best[0])
    return best[1]


def started(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches a kernel; KernelError where it does not compile."""
    try:
        kernel[grid](*arguments, **constants)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton raises what its compiler, ptxas or the driver raised
        raise KernelError(str(error).splitlines()[0] if str(error) else repr(error)) from error


def _timed(work: Callable[[Configuration], object], configuration: Configuration) -> float:
    """Seconds of one run, which was compiled before."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work(configuration)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


# What was found before.


def path() -> Path:
    """tuned.json in PATCHSCORE_CACHE, else in the user's cache folder."""
    folder = os.environ.get("PATCHSCORE_CACHE")
    if folder:
        return Path(folder) / "tuned.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchscore" / "tuned.json"


def remembered(name: str, candidates: list[Configuration]) -> Configuration | None:
    """The candidate that was the fastest, or None."""
    found = _known().get(name)
    return next((candidate for candidate in candidates if list(astuple(candidate)) == found), None)


def remember(name: str, configuration: Configuration) -> None:
    """Adds to what is known; where nothing can be written, other processes find it themselves."""
    known = {**_known(), name: list(astuple(configuration))}
    with contextlib.suppress(OSError, RuntimeError):
        path().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path(), json.dumps(known, indent=1).encode())


def _known() -> dict[str, object]:
    try:
        found = json.loads(path().read_bytes())
    except (OSError, ValueError, RuntimeError):  # the last where there is no home
        return {}
    return found if isinstance(found, dict) else {}
