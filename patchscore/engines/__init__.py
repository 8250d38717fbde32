"""The engines, and the choice among them.

An engine is a module with two functions: `unavailable(device)` says why it cannot serve on a device, or None, and
`posterior_sum(z, sigma, bank, competition, memory_limit)` returns a PosteriorSum. It knows nothing of machines,
schedules or noise conventions: z = x_0 + sigma eps is all it sees.
"""

from __future__ import annotations

import warnings
from types import ModuleType

import torch

from . import reference, sliding

ENGINES: dict[str, ModuleType] = {"sliding": sliding, "reference": reference}
"""By name, the fastest first: "auto" takes the first that can serve."""

_warned: set[str] = set()


def check_name(engine: str) -> None:
    """ValueError unless `engine` is "auto" or the name of an engine."""
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f'engine: got {engine!r}, takes "auto", {", ".join(map(repr, ENGINES))}')


def choose(engine: str, device: torch.device) -> tuple[str, ModuleType]:
    """The engine that serves: the one named, or the fastest that can. One warning says when the best is missing."""
    for name in _candidates(engine):
        reason = ENGINES[name].unavailable(device)
        if reason is None:
            return name, ENGINES[name]
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"engine {name!r} cannot serve: {reason}; the next one does", RuntimeWarning, stacklevel=4)
    raise AssertionError("engine reference always serves")


def explain_choice(engine: str, device: torch.device) -> str:
    """One line an engine: which one `choose` takes on this device, and why not those before it."""
    lines: list[str] = []
    for name in _candidates(engine):
        reason = ENGINES[name].unavailable(device)
        if reason is None:
            why = "named" if name == engine else "the fastest that can serve here"
            return "\n".join([*lines, f"{name}: serves on {device.type} ({why})"])
        lines.append(f"{name}: not here, {reason}")
    raise AssertionError("engine reference always serves")


def _candidates(engine: str) -> list[str]:
    """The named engine, then the others by speed, for when it cannot serve."""
    return [engine] * (engine != "auto") + [name for name in ENGINES if name != engine]
