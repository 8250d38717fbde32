"""Checks of arguments. An error is one line that names the argument, what it got and what it takes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

RANGE_TOLERANCE = 1e-3
"""How far a float pixel may lie outside [-1, 1]: room for interpolation and rounding, not for another convention."""


def integer(name: str, value: Any, at_least: int | None = None, at_most: int | None = None) -> int:
    """`value` as an int; any integer type but bool."""
    takes = "an integer" + (f" from {at_least}" if at_least is not None else "")
    takes += f" to {at_most}" if at_most is not None else ""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: got {value!r}, takes {takes}")
    if (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        raise ValueError(f"{name}: got {number}, takes {takes}")
    return number


def number(name: str, value: Any, takes: str = "a number") -> float:
    """`value` as a float; any single number, but not bool or text."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {value!r}, takes {takes}") from None


def odd(name: str, value: Any) -> int:
    """`value` as an odd int from 1."""
    number = integer(name, value)
    if number < 1 or number % 2 == 0:
        raise ValueError(f"{name}: got {number}, takes an odd integer from 1")
    return number


def one_of(name: str, value: Any, options: Iterable[str]) -> str:
    """`value`, if it is one of these words."""
    known = list(options)
    if not isinstance(value, str) or value not in known:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name}: got {value!r}, takes {', '.join(map(repr, known))}")
    return value


def device(value: Any) -> torch.device:
    """`value` as a device that can hold numbers here."""
    try:
        found = torch.device(value)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"device: {value!r} cannot be used here: {' '.join(str(error).split('.')[0].split())}"
        ) from None
    return found
