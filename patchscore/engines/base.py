"""What an engine is, and the one place where engines are chosen and fall back.

An engine takes posterior sums over the windows that compete and knows nothing of machines, schedules or noise
conventions: z = x_0 + sigma eps is all it sees. Engines never call each other. `serve` asks them in order of
preference, group of pixels by group; what one cannot serve goes to the next, and `reference`, the last, takes all.
Where engines know how long they will take (cost.py), "auto" prefers the fastest.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..bank import PatchBank
from ..posterior import PosteriorSum
from ..windows import Competition, Group, span

Combine = Callable[[PosteriorSum], PosteriorSum]
"""Turns the sums over one part of a bank into those over the whole bank, with the help of the other ranks."""


class EngineError(RuntimeError):
    """An engine found out during a call that it cannot serve here: its kernels do not compile. The next one serves."""


class Engine(ABC):
    """Takes posterior sums. `name` is what users call it by; two engines of one name serve different devices."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    """Whether it sums over every competing window."""
    float64: ClassVar[bool] = False
    """Whether its sums have float64 digits where z has."""
    moments: bool = False
    """Whether its posterior_sum takes moments=True."""
    gradients: ClassVar[bool] = False
    """Whether it has product and window_sums."""

    @abstractmethod
    def runs_on(self, device: torch.device) -> bool:
        """Whether it was written for this kind of device."""

    def unavailable(self, device: torch.device) -> str | None:
        """What is missing on this machine (a compiler, a library, a newer GPU), or None."""
        return None

    def lacks(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> str | None:
        """Why these sums are left to the next engine by design, or None. Asked of each group of pixels alone."""
        return None

    def seconds(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> float | None:
        """How long one group of pixels is expected to take, where a cost model knows the device, or None."""
        return None

    @abstractmethod
    def posterior_sum(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        ess: bool = True,
    ) -> PosteriorSum:
        """Sums over the competing windows of every pixel.

        Args:
            z: [B, C, H, W] noisy images z = x_0 + sigma eps, float32 or float64.
            sigma: [B] float64 on the CPU, positive.
            bank: the training images that compete.
            competition: which windows compete where.
            memory_limit: bytes of working memory beyond z, the bank, the result and what is kept between calls.
            ess: False where the effective sample size is not needed; s2 may then hold anything.

        An engine whose `moments` is True takes a further argument moments, False by default: whether the sums have
        v2 and sl.

        Returns:
            PosteriorSum with parts [B, 1 or C, H, W]; for whole images m, s and s2 are [B, 1, 1, 1].

        Raises:
            EngineError: the engine cannot serve on this machine after all; `unavailable` says so from then on.
            ValueError: `memory_limit` cannot hold the smallest piece of work.
        """

    def product(
        self,
        transposed: bool,
        z: Tensor,
        sigma: Tensor,
        direction: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None = None,
    ) -> Tensor:
        """J^T direction (transposed) or J direction, with J the Jacobian of the posterior mean at z: [B, C, H, W] as
        `direction`; other arguments as above.

        Where `bank` is one part of a bank, `combine` turns the part's sums into those of the whole bank; the result is
        then the part's addend of the product.
        """
        raise NotImplementedError(f"engine {self.name!r} takes no gradients")

    def window_sums(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None = None,
    ) -> tuple[PosteriorSum, Tensor]:
        """The posterior sums, and [B, C, H, W] the sum of the posterior-mean windows that cover a pixel, in float64.

        The competition is by windows. Where `bank` is one part of a bank, `combine` turns the part's sums into those of
        the whole bank; the result is then the sums of the whole, and the part's addend of the windows.
        """
        raise NotImplementedError(f"engine {self.name!r} takes no gradients")

    def first_pass(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None,
    ) -> PosteriorSum:
        """The sums that `product` and `window_sums` begin with: over the whole bank, where `bank` is a part."""
        total = self.posterior_sum(z, sigma, bank, competition, memory_limit)
        return total if combine is None else combine(total)

    def posterior_sums(
        self, z: Tensor, sigma: Tensor, bank: PatchBank, competitions: Sequence[Competition], memory_limit: int
    ) -> list[PosteriorSum]:
        """`posterior_sum` of several competitions, as calibration compares patch sizes; in one pass where it can."""
        return [self.posterior_sum(z, sigma, bank, competition, memory_limit) for competition in competitions]


# The choice.


def strict() -> bool:
    """Whether every fallback is an error: PATCHSCORE_STRICT=1, for tests and benchmarks on GPUs."""
    return os.environ.get("PATCHSCORE_STRICT", "0") not in ("", "0")


def candidates(
    engines: Sequence[Engine], named: str, device: torch.device, dtype: torch.dtype, needs: str | None = None
) -> Iterator[tuple[Engine, str | None, bool]]:
    """Engines in the order they are asked: (engine, why it cannot serve or None, whether that is worth a warning).

    The named one first; engines written for another device are left out unless named. float64 images need float64
    precision, and "auto" takes an engine that has it. `needs` is "moments" or "gradients", where not every engine will
    do.
    """
    # Of the halves of an engine the one for this device speaks.
    halves: dict[str, Engine] = {}
    for engine in engines:
        if engine.name not in halves or engine.runs_on(device):
            halves[engine.name] = engine
    ordered = sorted(halves.values(), key=lambda engine: engine.name != named)
    for engine in ordered:
        if not engine.runs_on(device):
            yield engine, f"it does not run on {device.type}", engine.name == named
        elif dtype == torch.float64 and not engine.float64 and engine.name != named:
            yield engine, "it computes in float32", False
        elif needs is not None and not getattr(engine, needs):
            # Whoever named it, or wanted no more than a sample, learns that an exact engine takes longer.
            yield engine, f"it takes no {needs}", engine.name == named or not engine.exact
        else:
            yield engine, engine.unavailable(device), True


def chosen(engines: Sequence[Engine], named: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """The first engine that can serve, for most groups of pixels."""
    return next(engine for engine, reason, _ in candidates(engines, named, device, dtype) if reason is None)


def explain_choice(engines: Sequence[Engine], named: str, device: torch.device, dtype: torch.dtype) -> str:
    """One line an engine: which one serves, and why not those before it."""
    lines: list[str] = []
    for engine, reason, _ in candidates(engines, named, device, dtype):
        if reason is None:
            why = "named" if engine.name == named else "the fastest that can"
            return "\n".join([*lines, f"{engine.name}: serves {str(dtype).removeprefix('torch.')} on {device} ({why})"])
        lines.append(f"{engine.name}: cannot serve, {reason}")
    raise AssertionError("engine reference always serves")


def serve(
    engines: Sequence[Engine],
    named: str,
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    competition: Competition,
    memory_limit: int,
    ess: bool = True,
    moments: bool = False,
) -> tuple[PosteriorSum, list[str]]:
    """The sums of every pixel, with the pairs they took, and the names of the engines that took them.

    Raises:
        ValueError: the bank's mapped file changed, before the call or meanwhile.
        RuntimeError: with PATCHSCORE_STRICT=1, an engine that would have served cannot.
    """
    bank.check_unchanged()
    if bank.scale != 1:  # engines sum in [-1, 1]; in units of the scale the posterior is the same
        z, sigma = z / bank.scale, sigma / bank.scale
        total, served = serve(engines, named, z, sigma, bank.unit, competition, memory_limit, ess, moments)
        return total.scaled(bank.scale), served
    asked = list(candidates(engines, named, z.device, z.dtype, "moments" if moments else None))
    options = {"ess": ess, "moments": True} if moments else {"ess": ess}
    parts: list[tuple[PosteriorSum, Competition]] = []
    names: list[str] = []
    found = _by_preference(asked, z, sigma, bank, competition) if named == "auto" else [(competition, asked)]
    for some, ordered in found:
        pending: Competition | None = some
        for engine, reason, worth_a_warning in ordered:
            if reason is not None:
                if worth_a_warning:
                    _warn(engine, reason)
                continue
            taken, left = _split(engine, z, sigma, bank, pending)
            if taken is None:
                continue
            try:
                sums = engine.posterior_sum(z, sigma, bank, taken, memory_limit, **options)
            except EngineError as error:
                _warn(engine, str(error))
                continue
            parts.append((sums, taken))
            names.append(engine.name)
            pending = left
            if pending is None:
                break
        assert pending is None, "engine reference always serves"
    bank.check_unchanged()
    total = _joined(parts, z, bank)
    every = len(z) * len(bank) * competition.pairs_per_image
    return total.with_pairs(every) if total.pairs is None else total, names


def serve_product(
    engines: Sequence[Engine],
    named: str,
    transposed: bool,
    z: Tensor,
    sigma: Tensor,
    direction: Tensor,
    bank: PatchBank,
    competition: Competition,
    memory_limit: int,
    combine: Combine | None = None,
) -> Tensor:
    """J^T direction (transposed) or J direction, as of `Engine.product`; `combine` has sums of `bank.unit`.

    Raises:
        ValueError: the bank's mapped file changed, before the call or meanwhile.
        RuntimeError: with PATCHSCORE_STRICT=1, an engine that would have served cannot.
    """
    # A Jacobian has no unit.
    z, sigma, unit = z / bank.scale, sigma / bank.scale, bank.unit

    def call(engine: Engine) -> Tensor:
        return engine.product(transposed, z, sigma, direction, unit, competition, memory_limit, combine)

    return _second_pass(engines, named, z, sigma, unit, competition, call)[0]


def serve_window_sums(
    engines: Sequence[Engine],
    named: str,
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    competition: Competition,
    memory_limit: int,
    combine: Combine | None = None,
) -> tuple[PosteriorSum, Tensor, str]:
    """`Engine.window_sums`, and the name of the engine; `combine` has sums of `bank.unit`. Errors as above."""
    z, sigma, unit = z / bank.scale, sigma / bank.scale, bank.unit

    def call(engine: Engine) -> tuple[PosteriorSum, Tensor]:
        return engine.window_sums(z, sigma, unit, competition, memory_limit, combine)

    (total, sums), name = _second_pass(engines, named, z, sigma, unit, competition, call)
    return total.scaled(bank.scale), sums * bank.scale, name


Found = TypeVar("Found")


def _second_pass(
    engines: Sequence[Engine],
    named: str,
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    competition: Competition,
    call: Callable[[Engine], Found],
) -> tuple[Found, str]:
    """What `call` has of the first engine that takes gradients of the whole competition, and its name."""
    bank.check_unchanged()
    for engine, reason, worth_a_warning in candidates(engines, named, z.device, z.dtype, "gradients"):
        if reason is not None:
            if worth_a_warning:
                _warn(engine, reason)
        elif engine.lacks(z, sigma, bank, competition) is None:
            try:
                found = call(engine)
            except EngineError as error:
                _warn(engine, str(error))
                continue
            bank.check_unchanged()
            return found, engine.name
    raise AssertionError("engine reference always serves")


Asked = tuple[Engine, str | None, bool]


def _by_preference(
    asked: list[Asked], z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition
) -> list[tuple[Competition, list[Asked]]]:
    """The competition in parts, each with the engines in the order they are asked.

    Those whose time is known are asked the fastest first, group of pixels by group; others keep their positions.
    """
    if not competition.groups:
        return [(competition, asked)]
    found: dict[tuple[int, ...], list[Group]] = {}
    for group in competition.groups:
        alone, expected = competition.only([group]), {}
        for i, (engine, reason, _) in enumerate(asked):
            if reason is None and engine.lacks(z, sigma, bank, alone) is None:
                seconds = engine.seconds(z, sigma, bank, alone)
                if seconds is None:
                    break
                expected[i] = seconds
        order = list(range(len(asked)))
        for place, i in zip(sorted(expected), sorted(expected, key=lambda i: expected[i]), strict=True):
            order[place] = i
        found.setdefault(tuple(order), []).append(group)
    return [(competition.only(groups), [asked[i] for i in order]) for order, groups in found.items()]


def serve_each(
    engines: Sequence[Engine],
    named: str,
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    competitions: Sequence[Competition],
    memory_limit: int,
) -> list[PosteriorSum]:
    """`serve` for several competitions, in one pass over the bank where one engine takes them all."""
    if bank.scale != 1:
        z, sigma = z / bank.scale, sigma / bank.scale
        totals = serve_each(engines, named, z, sigma, bank.unit, competitions, memory_limit)
        return [total.scaled(bank.scale) for total in totals]
    asked = list(candidates(engines, named, z.device, z.dtype))
    parts = [(one, asked) for one in competitions]
    if named == "auto":
        parts = [part for one in competitions for part in _by_preference(asked, z, sigma, bank, one)]
    first, *others = {next(engine for engine, reason, _ in ordered if reason is None) for _, ordered in parts}
    if not others and all(first.lacks(z, sigma, bank, competition) is None for competition in competitions):
        bank.check_unchanged()
        sums = first.posterior_sums(z, sigma, bank, competitions, memory_limit)
        bank.check_unchanged()
        return sums
    return [serve(engines, named, z, sigma, bank, one, memory_limit)[0] for one in competitions]


def _split(
    engine: Engine, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition | None
) -> tuple[Competition | None, Competition | None]:
    """The groups that the engine takes and those it leaves, each None where there are none."""
    assert competition is not None
    if not competition.groups:
        takes = engine.lacks(z, sigma, bank, competition) is None
        return (competition, None) if takes else (None, competition)
    taken = [group for group in competition.groups if engine.lacks(z, sigma, bank, competition.only([group])) is None]
    left = [group for group in competition.groups if group not in taken]
    return competition.only(taken) if taken else None, competition.only(left) if left else None


def _joined(parts: list[tuple[PosteriorSum, Competition]], z: Tensor, bank: PatchBank) -> PosteriorSum:
    """One sum from those of disjoint pixels."""
    if len(parts) == 1:
        return parts[0][0]
    sampled = any(sums.vv is not None for sums, _ in parts)
    moments = all(sums.v2 is not None for sums, _ in parts)
    total = PosteriorSum.empty(z.shape, parts[0][0].m.device, sampled, moments)
    pairs = 0
    for sums, taken in parts:
        pairs += len(z) * len(bank) * taken.pairs_per_image if sums.pairs is None else sums.pairs
        for group in taken.groups:
            rows, cols = span(group.rows.queries), span(group.cols.queries)
            total.add_(sums.block(slice(None), rows, cols).to(total.m.device), slice(None), rows, cols)
    return total.with_pairs(pairs)


_warned: set[tuple[str, str]] = set()


def _warn(engine: Engine, reason: str) -> None:
    """Warns once per process that an engine cannot serve; with PATCHSCORE_STRICT=1 it is an error."""
    message = f"engine {engine.name!r} cannot serve: {reason}"
    if strict():
        raise RuntimeError(f"{message} (PATCHSCORE_STRICT=1 forbids the next one)")
    if (engine.name, reason) not in _warned:
        _warned.add((engine.name, reason))
        warnings.warn(f"{message}; the next one does", RuntimeWarning, stacklevel=5)
