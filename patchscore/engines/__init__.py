"""The engines, and the choice among them.

An engine is a module with two functions: `unavailable(device)` says why it cannot serve on a device, or None, and
`posterior_sum(z, sigma, bank, competition, memory_limit)` returns a PosteriorSum. It knows nothing of machines,
schedules or noise conventions: z = x_0 + sigma eps is all it sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from . import reference, sliding

ENGINES: dict[str, ModuleType] = {"sliding": sliding, "reference": reference}
"""By name, the fastest first: "auto" takes the first that can serve."""

FLOAT32_ONLY = "it computes in float32"

_warned: set[str] = set()


def choose(engine: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, ModuleType]:
    """The engine that serves: the one named, or the fastest that can. One warning says when a faster one is missing.

    float64 images ask for float64 digits, which only `reference` gives; "auto" takes it for them.
    """
    for name, reason in _reasons(engine, device, dtype):
        if reason is None:
            return name, ENGINES[name]
        if reason != FLOAT32_ONLY and reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"engine {name!r} cannot serve: {reason}; the next one does", RuntimeWarning, stacklevel=4)
    raise AssertionError("engine reference always serves")


def explain_choice(engine: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """One line an engine: which one `choose` takes, and why not those before it."""
    lines: list[str] = []
    for name, reason in _reasons(engine, device, dtype):
        if reason is None:
            why = "named" if name == engine else "the fastest that can"
            return "\n".join([*lines, f"{name}: serves {str(dtype).removeprefix('torch.')} on {device} ({why})"])
        lines.append(f"{name}: cannot serve, {reason}")
    raise AssertionError("engine reference always serves")


def _reasons(engine: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str | None]]:
    """The named engine, then the others by speed, each with why it cannot serve, or None."""
    for name in [engine] * (engine != "auto") + [name for name in ENGINES if name != engine]:
        float32_only = name != "reference" and name != engine and dtype == torch.float64
        yield name, FLOAT32_ONLY if float32_only else ENGINES[name].unavailable(device)
