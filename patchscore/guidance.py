"""Combinations of denoisers: classifier-free guidance, and a switch by noise level.

Both are denoisers themselves, so every sampler and adapter accepts them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import checks
from .denoiser import (
    Denoiser,
    Estimate,
    Labels,
    check_direction,
    check_noisy,
    check_sigma,
    labels_per_item,
)


class Guided(Denoiser):
    """Classifier-free guidance: D = D_uncond + scale (D_cond - D_uncond) (Ho & Salimans 2022, equation 6).

    Scale 0 is `uncond` and scale 1 is `cond`; larger scales extrapolate, and values may then leave [-1, 1]. Each call
    evaluates `cond` with the labels and `uncond` without. An image whose label is None is not conditioned and therefore
    not guided. Both may be the same machine: `Guided(els, els, 2.0)`.

    In `estimate`, stderr is the bound |scale| stderr_cond + |1 - scale| stderr_uncond, ess is the smaller of the two,
    and pairs is the sum. It is the posterior mean under no prior, so it has a divergence but no moments.

    Args:
        cond: the conditional denoiser.
        uncond: the unconditional denoiser, of images of the same shape.
        scale: guidance scale, any finite number.

    Raises:
        TypeError: not a denoiser, or a scale that is not a number.
        ValueError: denoisers of different shapes, a scale that is not finite.
    """

    def __init__(self, cond: Denoiser, uncond: Denoiser, scale: float):
        for name, denoiser in (("cond", cond), ("uncond", uncond)):
            _check_denoiser(name, denoiser)
        if tuple(cond.shape) != tuple(uncond.shape):
            raise ValueError(f"cond, uncond: got denoisers of {_size(cond)} and of {_size(uncond)} images")
        scale = checks.number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale: got {scale}, takes a finite number")
        self.cond = cond
        self.uncond = uncond
        self.scale = scale
        self.shape = cond.shape
        self.any_size = cond.any_size and uncond.any_size
        self.bank = getattr(cond, "bank", None)

    def with_parts(self, change: Callable[[Denoiser], Denoiser]) -> Guided:
        cond, uncond = change(self.cond), change(self.uncond)
        return self if cond is self.cond and uncond is self.uncond else Guided(cond, uncond, self.scale)

    def within(self, tolerance: float) -> Guided:
        share = tolerance / (abs(self.scale) + abs(1 - self.scale))  # errors add up as stderr says
        return self.with_parts(lambda part: part.within(share))

    def denoise(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        return self._extend(self.cond.denoise(z, sigma, labels), self.uncond.denoise(z, sigma))

    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        if moments:
            raise ValueError("moments: a guided denoiser is no posterior mean; ask cond and uncond for theirs")
        cond, uncond = self.cond.estimate(z, sigma, labels), self.uncond.estimate(z, sigma)
        return Estimate(
            mean=self._extend(cond.mean, uncond.mean),
            stderr=abs(self.scale) * cond.stderr + abs(1 - self.scale) * uncond.stderr,
            ess=torch.minimum(cond.ess, uncond.ess),
            pairs=cond.pairs + uncond.pairs,
            engine=_joined([cond.engine, uncond.engine]),
        )

    def with_divergence(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> tuple[Tensor, Tensor]:
        cond, uncond = self.cond.with_divergence(z, sigma, labels), self.uncond.with_divergence(z, sigma)
        return self._extend(cond[0], uncond[0]), self._extend(cond[1], uncond[1])

    def vjp(self, z: Tensor, sigma: float | Tensor, u: Tensor, labels: Labels = None) -> Tensor:
        return self._extend(self.cond.vjp(z, sigma, u, labels), self.uncond.vjp(z, sigma, u))

    def jvp(self, z: Tensor, sigma: float | Tensor, t: Tensor, labels: Labels = None) -> Tensor:
        return self._extend(self.cond.jvp(z, sigma, t, labels), self.uncond.jvp(z, sigma, t))

    def _extend(self, cond: Tensor, uncond: Tensor) -> Tensor:
        return uncond + self.scale * (cond - uncond)

    def __repr__(self) -> str:
        return f"Guided({self.cond!r}, {self.uncond!r}, scale={self.scale})"


class Switch(Denoiser):
    """Chooses a denoiser by noise level: each serves the levels from the previous sigma_max to its own.

    `Switch([(2.0, els), (math.inf, GaussianScore(bank))])` is `els` at sigma <= 2 and the Gaussian above. A batch is
    split by the noise levels of its images, with one call for each denoiser that is needed.

    Args:
        parts: (sigma_max, denoiser) pairs with ascending sigma_max; the last may be inf.

    Raises:
        TypeError: not such pairs.
        ValueError: no part, sigma_max not positive and ascending, denoisers of different shapes; when denoising, a
            sigma above the last sigma_max.
    """

    def __init__(self, parts: Sequence[tuple[float, Denoiser]]):
        self.parts = [_check_part(part) for part in parts]
        if not self.parts:
            raise ValueError("parts: got none, takes one or more (sigma_max, denoiser)")
        limits = [limit for limit, _ in self.parts]
        if not all(limit > 0 for limit in limits) or limits != sorted(set(limits)):
            raise ValueError(f"parts: got sigma_max {limits}, takes positive, strictly ascending numbers")
        first = self.parts[0][1]
        for _, denoiser in self.parts:
            if tuple(denoiser.shape) != tuple(first.shape):
                raise ValueError(f"parts: got denoisers of {_size(first)} and of {_size(denoiser)} images")
        self.shape = first.shape
        self.any_size = all(denoiser.any_size for _, denoiser in self.parts)
        self.bank = getattr(first, "bank", None)

    def with_parts(self, change: Callable[[Denoiser], Denoiser]) -> Switch:
        parts = [(limit, change(denoiser)) for limit, denoiser in self.parts]
        same = all(new is old for (_, new), (_, old) in zip(parts, self.parts, strict=True))
        return self if same else Switch(parts)

    def denoise(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        served = [
            (items, denoiser.denoise(z[items], level, part_labels))
            for denoiser, items, level, part_labels in self._split(z, sigma, labels)
        ]
        return _assembled(served, len(z))

    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        # Only a denoiser that is asked for moments has to know of them.
        options = {"moments": True} if moments else {}
        served = [
            (items, denoiser.estimate(z[items], level, part_labels, **options))
            for denoiser, items, level, part_labels in self._split(z, sigma, labels)
        ]
        names = ("variance", "entropy", "variance_stderr", "entropy_stderr") if moments else ()
        return Estimate(
            mean=_assembled([(items, part.mean) for items, part in served], len(z)),
            stderr=_assembled([(items, part.stderr) for items, part in served], len(z)),
            ess=_assembled([(items, part.ess) for items, part in served], len(z)),
            pairs=sum(part.pairs for _, part in served),
            engine=_joined([part.engine for _, part in served]),
            **{name: _assembled([(items, getattr(part, name)) for items, part in served], len(z)) for name in names},
        )

    def with_divergence(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> tuple[Tensor, Tensor]:
        served = [
            (items, denoiser.with_divergence(z[items], level, part_labels))
            for denoiser, items, level, part_labels in self._split(z, sigma, labels)
        ]
        means, divergences = ([(items, part[i]) for items, part in served] for i in (0, 1))
        return _assembled(means, len(z)), _assembled(divergences, len(z))

    def vjp(self, z: Tensor, sigma: float | Tensor, u: Tensor, labels: Labels = None) -> Tensor:
        u = check_direction(u, check_noisy(z, self.shape, any_size=self.any_size), "u")
        served = [
            (items, denoiser.vjp(z[items], level, u[items], part_labels))
            for denoiser, items, level, part_labels in self._split(z, sigma, labels)
        ]
        return _assembled(served, len(z))

    def jvp(self, z: Tensor, sigma: float | Tensor, t: Tensor, labels: Labels = None) -> Tensor:
        t = check_direction(t, check_noisy(z, self.shape, any_size=self.any_size), "t")
        served = [
            (items, denoiser.jvp(z[items], level, t[items], part_labels))
            for denoiser, items, level, part_labels in self._split(z, sigma, labels)
        ]
        return _assembled(served, len(z))

    def _split(
        self, z: Tensor, sigma: float | Tensor, labels: Labels
    ) -> Iterator[tuple[Denoiser, list[int], Tensor, list[int | str | None]]]:
        """The denoisers that are needed, each with its items, their noise levels and their labels."""
        z = check_noisy(z, self.shape, any_size=self.any_size, who=type(self).__name__)
        sigmas = check_sigma(sigma, len(z))
        listed = labels_per_item(labels, len(z))
        limits = [limit for limit, _ in self.parts]
        serving = [bisect.bisect_left(limits, level) for level in sigmas.tolist()]
        if max(serving, default=0) == len(limits):
            raise ValueError(f"sigma: got {sigmas.max():.6g}, above the last sigma_max {limits[-1]:g}")
        for part in sorted(set(serving)):
            items = [item for item, number in enumerate(serving) if number == part]
            yield self.parts[part][1], items, sigmas[items], [listed[item] for item in items]

    def __repr__(self) -> str:
        return f"Switch({', '.join(f'up to {limit:g}: {denoiser!r}' for limit, denoiser in self.parts)})"


def _assembled(served: list[tuple[list[int], Tensor]], batch: int) -> Tensor:
    """[B, ...] from parts that each hold some of the items."""
    whole = served[0][1].new_empty(batch, *served[0][1].shape[1:])
    for items, part in served:
        whole[items] = part
    return whole


def _joined(engines: Sequence[str]) -> str:
    return " + ".join(dict.fromkeys(engines))


def _check_denoiser(name: str, denoiser: Denoiser) -> None:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"{name}: got {type(denoiser).__name__}, takes a denoiser")


def _check_part(part: tuple[float, Denoiser]) -> tuple[float, Denoiser]:
    try:
        limit, denoiser = part
        limit = float(limit)
    except (TypeError, ValueError):
        raise TypeError(f"parts: got {part!r}, takes (sigma_max, denoiser) pairs") from None
    _check_denoiser("parts", denoiser)
    return limit, denoiser


def _size(denoiser: Denoiser) -> str:
    return " x ".join(map(str, denoiser.shape))
