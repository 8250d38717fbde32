"""The tile configuration of a Triton kernel: the first that compiles, or the fastest of a few, which is then cached.

Failures are told apart here: if a compiler rejects a kernel, the next configuration or engine serves; a CUDA error at a
launch is a bug, and propagates.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..files import write_atomically
from ..version import __version__
from . import device
from .base import EngineError

Result = TypeVar("Result")


class KernelError(EngineError):
    """No configuration of the kernel compiles here, or none fits this GPU."""


@dataclass(frozen=True)
class Configuration:
    """A tile of queries x patches and how it is compiled.

    block: columns at a time, or 0: whole rows.
    cubic: of so many exponentials one is a cubic polynomial's, or 0: none.
    """

    queries: int
    patches: int
    warps: int
    stages: int
    block: int = 0
    cubic: int = 0


# Starting a kernel.


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Around the start of a kernel, tells apart what goes wrong.

    Raises:
        KernelError: Triton, its assembler or the host's C compiler refuse the kernel, or it asks for more shared memory
            or registers than the GPU has.
        torch.OutOfMemoryError: the GPU has no memory left, whoever noticed.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError) and "CUDA]: out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        if _refused(error):
            raise KernelError(str(error).splitlines()[0] if str(error) else repr(error)) from error
        raise


def _refused(error: Exception) -> bool:
    """Whether a compiler refused the kernel.

    Triton raises its own exceptions where its frontend, ptxas or the limits of the GPU refuse, CalledProcessError where
    the C compiler of its launcher does, and bare RuntimeErrors for the rest: those of its passes are told by how they
    begin, and so are CUDA's ("Triton Error [CUDA]: ..."), which are not meant here.
    """
    kind = type(error)
    if kind.__module__.startswith("triton."):
        return kind.__name__ != "InterpreterError"
    if kind is RuntimeError:
        return str(error).startswith(("PassManager::run failed", "Failed to find C compiler", "Cannot find "))
    return isinstance(error, subprocess.CalledProcessError)


def started(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches a kernel.

    Raises:
        KernelError: it does not compile.
    """
    with starting():
        kernel[grid](*arguments, **constants)


# The choice.

_chosen: dict[tuple, Configuration] = {}
"""The configuration that served, by what it served and whether it was the fastest of several."""


def wanted() -> bool:
    """Whether configurations may be timed: PATCHSCORE_AUTOTUNE=0 says no."""
    return os.environ.get("PATCHSCORE_AUTOTUNE") != "0"


def first_that_serves(
    key: tuple, candidates: list[Configuration], work: Callable[[Configuration], Result], tune: bool
) -> Result:
    """`work` done in the first configuration that compiles, or with `tune` in the fastest.

    The fastest is known from then on, in other processes too (`remembered`), as long as Triton, this package and the
    candidates are the same; work without `tune` never takes it, so that it adds in the same order before and after.
    PATCHSCORE_AUTOTUNE=0 takes the first that compiles, and so does a CUDA graph that records what is not known yet, as
    it cannot be timed. What is known and no longer compiles is forgotten.

    Raises:
        KernelError: no configuration compiles.
    """
    tune = tune and wanted() and len(candidates) > 1
    name = f"{key}, patchscore {__version__}, Triton {_triton()}, of {[astuple(candidate) for candidate in candidates]}"
    purpose = (*key, tune)
    known = _chosen.get(purpose)
    if known is None and tune:
        known = remembered(name, candidates)
    if known is not None:
        try:
            with starting():
                result = work(known)
        except KernelError:
            _chosen.pop(purpose, None)  # in the loop below it fails again, and the next one serves
        else:
            _chosen[purpose] = known
            return result
    if device.recording():
        tune, purpose = False, (*key, False)
    best: tuple[Configuration, Result] | None = None
    fastest, failure = float("inf"), None
    for candidate in candidates:
        try:
            with starting():
                result = work(candidate)
                seconds = _timed(work, candidate) if tune else 0.0
        except KernelError as error:
            failure = error
            continue
        if seconds < fastest:
            best, fastest = (candidate, result), seconds
        if not tune:
            break
    if best is None:
        assert failure is not None
        raise failure
    _chosen[purpose] = best[0]
    if tune:
        remember(name, best[0])
    return best[1]


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

_files: dict[Path, dict[str, object]] = {}
"""What each file held when this process first asked for it, and what it added."""


def path() -> Path:
    """tuned.json in PATCHSCORE_CACHE, else in the user's cache folder."""
    folder = os.environ.get("PATCHSCORE_CACHE")
    if folder:
        return Path(folder) / "tuned.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchscore" / "tuned.json"


def remembered(name: str, candidates: list[Configuration]) -> Configuration | None:
    """The candidate that was the fastest, or None."""
    with contextlib.suppress(RuntimeError):  # where there is no home
        file = path()
        if file not in _files:
            _files[file] = _read(file)
        found = _files[file].get(name)
        return next((candidate for candidate in candidates if list(astuple(candidate)) == found), None)
    return None


def remember(name: str, configuration: Configuration) -> None:
    """Adds to what is known; where nothing can be written, other processes find it themselves."""
    with contextlib.suppress(OSError, RuntimeError):
        file = path()
        _files[file] = {**_read(file), name: list(astuple(configuration))}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(_files[file], indent=1).encode())


def _read(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
