"""The engines, and the choice among them.

An engine has two functions: `unavailable(device)` says why it cannot serve on a device, or None, and
`posterior_sum(z, sigma, bank, competition, memory_limit)` returns a PosteriorSum. It knows nothing of machines,
schedules or noise conventions: z = x_0 + sigma eps is all it sees. Exact engines are modules; `pruned` is bound to an
index and a budget, and `lacks(competition)` says what the index cannot serve.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ..windows import Competition
from . import reference
from .fused import launch as fused
from .pruned.engine import TIED
from .pruned.triton import PrunedOnDevice as Pruned
from .sliding import cpu as sliding

ENGINES: dict[str, Any] = {"fused": fused, "sliding": sliding, "reference": reference}
"""The exact engines by name, the fastest first: "auto" takes the first that can serve."""

FLOAT32_ONLY = "it computes in float32"
ELSEWHERE = "it runs on "
"""How a reason starts that is no fault of the machine's: the engine is for another device."""

_warned: set[str] = set()


def choose(
    engine: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    pruned: Pruned | None = None,
    competition: Competition | None = None,
    tolerance: float | None = None,
) -> tuple[str, Any]:
    """The engine that serves: the one named, or the fastest that can. One warning says when a faster one is missing.

    float64 images ask for float64 digits, which only `reference` gives; "auto" takes it for them. `pruned`, where there
    is an index, comes first. `tolerance` is what `fused`, which rounds, may add to the error of a denoised pixel.
    """
    for name, found, reason in _reasons(engine, device, dtype, pruned, competition, tolerance):
        if reason is None:
            return name, found
        expected = reason in (FLOAT32_ONLY, TIED) or (name != engine and reason.startswith(ELSEWHERE))
        if not expected and reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"engine {name!r} cannot serve: {reason}; the next one does", RuntimeWarning, stacklevel=4)
    raise AssertionError("engine reference always serves")


def explain_choice(
    engine: str, device: torch.device, dtype: torch.dtype = torch.float32, pruned: Pruned | None = None
) -> str:
    """One line an engine: which one `choose` takes, and why not those before it."""
    lines: list[str] = []
    for name, _, reason in _reasons(engine, device, dtype, pruned, None, None):
        if reason is None:
            why = "named" if name == engine else "the fastest that can"
            return "\n".join([*lines, f"{name}: serves {str(dtype).removeprefix('torch.')} on {device} ({why})"])
        lines.append(f"{name}: cannot serve, {reason}")
    raise AssertionError("engine reference always serves")


def _reasons(
    engine: str,
    device: torch.device,
    dtype: torch.dtype,
    pruned: Pruned | None,
    competition: Competition | None,
    tolerance: float | None,
) -> Iterator[tuple[str, Any, str | None]]:
    """The named engine, then the others by speed, each with why it cannot serve, or None."""
    known: dict[str, Any] = ENGINES if pruned is None else {"pruned": pruned, **ENGINES}
    if tolerance is not None and known.get("fused") is fused:
        known = {**known, "fused": fused.Fused(tolerance)}
    for name in [engine] * (engine != "auto") + [name for name in known if name != engine]:
        found = known[name]
        float32_only = name != "reference" and name != engine and dtype == torch.float64
        reason = FLOAT32_ONLY if float32_only else found.unavailable(device)
        if reason is None and name == "pruned" and pruned is not None and competition is not None:
            reason = pruned.lacks(competition)
        yield name, found, reason
