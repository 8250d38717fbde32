"""The engines, which compute posterior sums. base.py defines the interface and chooses among them."""

from __future__ import annotations

from .base import (
    Combine,
    Engine,
    EngineError,
    candidates,
    chosen,
    explain_choice,
    serve,
    serve_each,
    serve_product,
    serve_window_sums,
)
from .fused.launch import Fused
from .pruned.engine import Pruned
from .pruned.memory import Memory
from .reference import Reference
from .sliding.cpu import SlidingCpu
from .sliding.cuda import SlidingCuda

EXACT: tuple[Engine, ...] = (Fused(), SlidingCuda(), SlidingCpu(), Reference())
"""The exact engines, the fastest first: "auto" takes the first that can serve."""

NAMES = tuple(dict.fromkeys(engine.name for engine in EXACT))
"""What `engine=` takes besides "auto" and, with an index, "pruned"."""


def available(pruned: Pruned | None = None, tolerance: float | None = None) -> tuple[Engine, ...]:
    """The engines of a machine in order of preference: `pruned` where it has an index, then the exact ones.

    `tolerance` is the largest error that the rounding of `fused` may cause in a denoised pixel.
    """
    exact = EXACT if tolerance is None else (Fused(tolerance), *EXACT[1:])
    return exact if pruned is None else (pruned, *exact)


__all__ = [
    "EXACT",
    "NAMES",
    "Combine",
    "Engine",
    "EngineError",
    "Memory",
    "Pruned",
    "SlidingCpu",
    "SlidingCuda",
    "available",
    "candidates",
    "chosen",
    "explain_choice",
    "serve",
    "serve_each",
    "serve_product",
    "serve_window_sums",
]
