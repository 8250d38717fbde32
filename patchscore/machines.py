"""The score machines of Kamb & Ganguli (arXiv 2412.20292): which training windows compete at which pixel.

All three denoise by the same rule, Bayes' under the prior "one of the competing windows, each as likely":

    D(z)[i, j] = sum_a w_a v_a,    w_a = exp(-|q - p_a|^2 / (2 sigma^2)) / sum_b exp(-|q - p_b|^2 / (2 sigma^2))

with z = x_0 + sigma eps the noisy image, q its k x k window at pixel (i, j), p_a the competing training windows and v_a
their centre pixels. They differ in who competes: whole images (ideal), windows at the same place (local), windows from
everywhere (equivariant local). A machine decides that and nothing else; engines take the sums.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import checks, engines
from .bank import PatchBank
from .index import PatchIndex
from .posterior import PosteriorSum
from .scales import ScaleTable
from .windows import WHOLE_IMAGE, Axis, Competition, Group

Labels: TypeAlias = int | str | Sequence[int | str | None] | Tensor | None

DEFAULT_MEMORY_LIMIT = 2 * 2**30


@dataclass(frozen=True)
class Estimate:
    """A denoised batch and how it was come by.

    mean:   [B, C, H, W] the denoised images D(z).
    stderr: [B, C, H, W] standard error of `mean`; zero from engines that sum over every competing window. From `pruned`
            it covers sampling and the axes that features leave out.
    ess:    [B, H, W] effective number of windows behind each pixel, (sum w)^2 / sum w^2.
    pairs:  how many (query pixel, window) pairs were evaluated.
    engine: the engine that served, or those of several patch sizes.
    """

    mean: Tensor
    stderr: Tensor
    ess: Tensor
    pairs: int
    engine: str


class Denoiser(ABC):
    """Anything that estimates x_0 from z = x_0 + sigma eps: the interface samplers and adapters take.

    Nothing here is differentiable: results carry no autograd graph.
    """

    shape: tuple[int, int, int]
    """(C, H, W) of the images it denoises."""

    @abstractmethod
    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Estimate:
        """The denoised images with their effective sample sizes and errors.

        Args:
            z: [B, C, H, W] noisy images z = x_0 + sigma eps, on any device.
            sigma: noise level in units of pixel values ([-1, 1] is two wide): a number, or [B].
            labels: one class for all items, or one for each ([B]; None among them means every class).

        Raises:
            ValueError: wrong shape, NaN or infinite pixels, sigma not positive and finite, unknown label.
            TypeError: an argument of a type that is not taken.
        """

    def denoise(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """`estimate(...).mean`: [B, C, H, W] on z's device, float64 if z is, else float32."""
        return self.estimate(z, sigma, labels).mean

    @torch.no_grad()
    def score(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """grad log p_t(x) = (alpha D(x / alpha) - x) / sigma^2 at x = alpha x_0 + sigma eps; levels: numbers or [B]."""
        alpha, sigma = _per_item(alpha, x, "alpha"), _per_item(sigma, x, "sigma")
        return (alpha * self._denoise_scaled(x, alpha, sigma, labels) - x) / sigma**2

    @torch.no_grad()
    def eps(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """The predicted noise (x - alpha D(x / alpha)) / sigma at x = alpha x_0 + sigma eps; levels: numbers or [B]."""
        alpha, sigma = _per_item(alpha, x, "alpha"), _per_item(sigma, x, "sigma")
        return (x - alpha * self._denoise_scaled(x, alpha, sigma, labels)) / sigma

    def _denoise_scaled(self, x: Tensor, alpha: Tensor, sigma: Tensor, labels: Labels) -> Tensor:
        return self.denoise(x / alpha, (sigma / alpha).flatten(), labels)


class ScoreMachine(Denoiser):
    """A denoiser that sums over a bank: checks its input, splits the batch by class and patch size, asks an engine."""

    pruned: engines.Pruned | None = None
    """The engine that samples from an index, where the machine was given one."""

    tolerance: float | None = None
    """What an exact engine that rounds may add to the error of a pixel, where the machine was told."""

    def __init__(self, bank: PatchBank, patch_size: int | ScaleTable | None, engine: str, memory_limit: int):
        if not isinstance(bank, PatchBank):
            raise TypeError(f"bank: got {type(bank).__name__}, takes a PatchBank")
        self.bank = bank
        self.shape = bank.shape
        self.patch_size = patch_size
        if engine == "pruned" and self.pruned is None:
            raise ValueError('engine: "pruned" takes an index and a budget or a tolerance')
        self.engine = checks.one_of("engine", engine, ["auto", *engines.ENGINES] + ["pruned"] * bool(self.pruned))
        self.memory_limit = checks.integer("memory_limit", memory_limit, at_least=1)

    @abstractmethod
    def competition(self, k: int | None) -> Competition:
        """Which windows compete at which pixel, at patch size k."""

    def patch_size_at(self, sigma: float) -> int | None:
        """The patch size used at noise level `sigma`; None where whole images compete."""
        return self.patch_size(sigma) if isinstance(self.patch_size, ScaleTable) else self.patch_size

    def engine_on(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        """The name of the engine that serves images of `dtype` on `device`."""
        return engines.choose(self.engine, checks.device(device), dtype, self.pruned)[0]

    def explain_choice(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        """Which engine serves images of `dtype` on `device`, and why not those before it, a line each."""
        return engines.explain_choice(self.engine, checks.device(device), dtype, self.pruned)

    @torch.no_grad()
    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Estimate:
        z = check_noisy(z, self.shape)
        sigmas = check_sigma(sigma, len(z))
        classes = check_labels(labels, self.bank, len(z))

        # Items that share a class and a patch size are served together.
        parts: dict[tuple[int | None, int | None], list[int]] = {}
        for item, (label, level) in enumerate(zip(classes, sigmas.tolist(), strict=True)):
            parts.setdefault((label, self.patch_size_at(level)), []).append(item)

        mean, stderr, pairs, names = torch.empty_like(z), torch.zeros_like(z), 0, set()
        ess = z.new_empty(len(z), *z.shape[2:])
        for (label, k), numbers in parts.items():
            # Items in a row as a slice: a list would be copied to the device, and the host wait for it.
            row = range(numbers[0], numbers[-1] + 1)
            items = slice(row.start, row.stop) if len(row) == len(numbers) else numbers
            bank = self.bank if label is None else self.bank.select(label)
            competition = self.competition(k)
            name, engine = engines.choose(self.engine, z.device, z.dtype, self.pruned, competition, self.tolerance)
            total: PosteriorSum = engine.posterior_sum(z[items], sigmas[items], bank, competition, self.memory_limit)
            mean[items] = total.mean.to(z.device, z.dtype)
            stderr[items] = total.stderr.to(z.device, z.dtype)
            ess[items] = total.ess[:, 0].to(z.device, z.dtype).expand(len(numbers), *z.shape[2:])
            every = len(numbers) * len(bank) * competition.pairs_per_image
            pairs += every if total.pairs is None else total.pairs
            names.add(name)
        return Estimate(mean, stderr, ess, pairs, " and ".join(sorted(names)))

    def __repr__(self) -> str:
        options = {name: getattr(self, name, None) for name in ("patch_size", "padding_mode", "engine")}
        listed = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"{type(self).__name__}({self.bank!r}{listed})"


class IdealScore(ScoreMachine):
    """Whole training images compete: the exact score of the training set, which can only give training images back.

    D(z) = sum_n w_n x_n with w_n proportional to exp(-|z - x_n|^2 / (2 sigma^2)); one weight an image, for all pixels.
    Kamb & Ganguli 2024, section 3 ("ideal score machine").

    Args:
        bank: the training images.
        engine: "auto" or an engine's name.
        memory_limit: bytes of working memory beyond the bank.
    """

    def __init__(self, bank: PatchBank, engine: str = "auto", memory_limit: int = DEFAULT_MEMORY_LIMIT):
        super().__init__(bank, None, engine, memory_limit)

    def competition(self, k: int | None) -> Competition:
        return WHOLE_IMAGE


class LocalScore(ScoreMachine):
    """The windows at the same pixel of every training image compete: local, but tied to the place.

    Windows reach over the border into zeros, in z and in the training images alike. With k >= 2 max(H, W) - 1 every
    window holds the whole image and this is `IdealScore`. Kamb & Ganguli 2024, section 3 ("local score machine").

    Args:
        bank: the training images.
        patch_size: k, odd; or a ScaleTable from noise level to k.
        engine: "auto" or an engine's name.
        memory_limit: bytes of working memory beyond the bank.
    """

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | ScaleTable,
        engine: str = "auto",
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ):
        super().__init__(bank, _check_patch_size(patch_size), engine, memory_limit)

    def competition(self, k: int | None) -> Competition:
        _, height, width = self.shape
        return Competition(
            patch_size=_widest(k, height, width),
            padding_mode="zeros",
            groups=(Group(Axis(range(height)), Axis(range(width))),),
        )


class EquivariantLocalScore(ScoreMachine):
    """Windows from every position compete: local and translation-equivariant, free to recombine what they know.

    padding_mode="circular": z wraps around; at each pixel all windows compete that lie fully inside a training image.
    padding_mode="zeros": equivariance is broken at the border, as zero padding breaks it in a network. Along each axis
    a coordinate closer than r = k // 2 to a border competes only with the same coordinate of the training images, any
    other with all interior ones; so corners are locked to their place, edges slide along the edge, the interior slides
    both ways. Where k >= H nothing slides, and this is `LocalScore`. Kamb & Ganguli 2024, section 3 ("equivariant local
    score machine") and its boundary-broken form.

    Args:
        bank: the training images.
        patch_size: k, odd; or a ScaleTable from noise level to k.
        padding_mode: "zeros" or "circular", as in the network it stands for.
        engine: "auto" or an engine's name.
        memory_limit: bytes of working memory beyond the bank.
        index: a PatchIndex of `bank`. With `budget` or `tolerance` the engine `pruned` then evaluates a part of the
            windows and says how wrong it may be (`Estimate.stderr`); sizes it lacks are served exactly.
        budget: the share of (pixel, window) pairs to evaluate, in (0, 1], such as 0.01.
        tolerance: with an index, instead of a budget: the rms standard error that pixels may have; a pilot finds the
            budget for it. Without an index: how far a pixel may be from float64's where the engine `fused` serves, 1e-3
            by default; the other exact engines are closer than that anyway.
        seed: of the sample of windows; the same seed gives the same numbers.
    """

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | ScaleTable,
        padding_mode: str = "zeros",
        engine: str = "auto",
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
        index: PatchIndex | None = None,
        budget: float | None = None,
        tolerance: float | None = None,
        seed: int = 0,
    ):
        self.pruned = _check_pruned(bank, index, budget, tolerance, seed)
        self.tolerance = tolerance if index is None else None
        super().__init__(bank, _check_patch_size(patch_size), engine, memory_limit)
        self.padding_mode = checks.one_of("padding_mode", padding_mode, ("zeros", "circular"))
        _, height, width = self.shape
        largest = max(patch_size.sizes) if isinstance(patch_size, ScaleTable) else int(patch_size)
        if padding_mode == "circular" and largest > min(height, width):
            raise ValueError(
                f'patch_size: {largest} does not fit in {height} x {width} images, and with padding_mode="circular" '
                "windows must lie fully inside"
            )

    def competition(self, k: int | None) -> Competition:
        _, height, width = self.shape
        k = _widest(k, height, width)
        if self.padding_mode == "circular":
            inside = Group(
                Axis(range(height), windows=_interior(height, k)),
                Axis(range(width), windows=_interior(width, k)),
            )
            return Competition(k, "circular", (inside,))
        groups = (Group(rows, cols) for rows in _broken_axis(height, k) for cols in _broken_axis(width, k))
        return Competition(k, "zeros", tuple(groups))


def _interior(length: int, k: int) -> range:
    """Coordinates whose window of size k lies inside an axis of this length."""
    return range(k // 2, length - k // 2)


def _broken_axis(length: int, k: int) -> list[Axis]:
    """An axis with equivariance broken at the border: near edge locked, interior free, far edge locked."""
    interior = _interior(length, k)
    if len(interior) <= 1:
        return [Axis(range(length))]
    parts = [Axis(range(interior.start)), Axis(interior, windows=interior), Axis(range(interior.stop, length))]
    return [part for part in parts if len(part.queries)]


def _widest(k: int | None, height: int, width: int) -> int:
    """k, cut to the size at which a window holds the whole image from every pixel; beyond it nothing changes."""
    assert k is not None
    return min(k, 2 * max(height, width) - 1)


def _check_patch_size(patch_size: int | ScaleTable) -> int | ScaleTable:
    return patch_size if isinstance(patch_size, ScaleTable) else checks.odd("patch_size", patch_size)


def _check_pruned(
    bank: PatchBank, index: PatchIndex | None, budget: float | None, tolerance: float | None, seed: int
) -> engines.Pruned | None:
    if tolerance is not None and not 0 < checks.number("tolerance", tolerance) < math.inf:
        raise ValueError(f"tolerance: got {tolerance}, takes a positive error of pixels in [-1, 1]")
    if index is None:
        if budget is not None:
            raise ValueError("budget: takes an index; PatchIndex.build makes one")
        return None
    if not isinstance(index, PatchIndex):
        raise TypeError(f"index: got {type(index).__name__}, takes a PatchIndex")
    if index.bank.fingerprint != bank.fingerprint:
        raise ValueError(f"index: of bank {index.bank.fingerprint[:16]}, but this bank is {bank.fingerprint[:16]}")
    if (budget is None) == (tolerance is None):
        raise ValueError("budget, tolerance: an index takes one of the two")
    if budget is not None and not 0 < checks.number("budget", budget) <= 1:
        raise ValueError(f"budget: got {budget}, takes a share of pairs in (0, 1]")
    if index.bank is not bank:
        # The same images, held otherwise: selections are lists of places in the bank they are from.
        index = PatchIndex(index.path, bank, index.meta)
    return engines.Pruned(index, budget, tolerance, checks.integer("seed", seed, at_least=0))


def check_noisy(z: Tensor, shape: tuple[int, int, int], name: str = "z") -> Tensor:
    if not isinstance(z, Tensor) or not z.is_floating_point():
        got = str(z.dtype) if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"{name}: got {got}, takes a floating point tensor [B, C, H, W]")
    if z.ndim != 4 or tuple(z.shape[1:]) != shape:
        takes = f"[B, {shape[0]}, {shape[1]}, {shape[2]}]"
        raise ValueError(f"{name}: got shape {list(z.shape)}, takes {takes} as the bank's")
    # Of pixels that a CUDA graph records nothing is known yet.
    if not _recording(z.device) and not torch.isfinite(z).all():
        raise ValueError(f"{name}: NaN or infinite pixels")
    return z if z.dtype == torch.float64 else z.to(torch.float32)


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_sigma(sigma: float | Tensor, batch: int) -> Tensor:
    """[B] float64 on the CPU, where patch sizes are looked up."""
    sigmas = _as_numbers("sigma", sigma).detach().to("cpu", torch.float64)
    if sigmas.ndim > 1 or (sigmas.ndim == 1 and len(sigmas) not in (1, batch)):
        raise ValueError(f"sigma: got shape {list(sigmas.shape)}, takes a number or [{batch}]")
    sigmas = sigmas.expand(batch)
    bad = [value for value in sigmas.tolist() if not (value > 0 and math.isfinite(value))]
    if bad:
        raise ValueError(f"sigma: got {bad[0]}, takes positive finite numbers")
    # Below this the nearest window has all the weight, and squares would underflow.
    return sigmas.clamp(min=1e-9)


def listed_labels(labels: Labels) -> list[int | str | None] | None:
    """Labels as a list, None where there is one for all."""
    if labels is None or isinstance(labels, (int, str)):
        return None
    if isinstance(labels, Tensor) and labels.is_floating_point():
        raise TypeError(f"labels: got a tensor of {labels.dtype}, takes integers")
    try:
        listed = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    except TypeError:
        raise TypeError(f"labels: got {labels!r}, takes a label or one for each item") from None
    return listed if isinstance(listed, list) else None


def labels_per_item(labels: Labels, batch: int) -> list[int | str | None]:
    """One label for each item, from one for all or one for each."""
    listed = listed_labels(labels)
    if listed is None:
        return [labels] * batch  # type: ignore[list-item]
    if len(listed) != batch:
        raise ValueError(f"labels: got {len(listed)} for a batch of {batch}")
    return listed


def check_labels(labels: Labels, bank: PatchBank, batch: int) -> list[int | None]:
    """`labels_per_item` as label numbers that occur in the bank."""
    return [None if label is None else bank.label_ids([label])[0] for label in labels_per_item(labels, batch)]


def _as_numbers(name: str, value: Any) -> Tensor:
    """A number or several as a real tensor, in float64 where they were no tensor."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        numbers = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name}: got {value!r}, takes a number or one for each item") from None
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"{name}: got {numbers.dtype}, takes a number or one for each item")
    return numbers


def _per_item(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    """A number or [B] as [B or 1, 1, 1, 1] beside x."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: got {got}, takes a floating point tensor [B, C, H, W]")
    value = _as_numbers(name, value).to(x.device, x.dtype)
    if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(x))):
        raise ValueError(f"{name}: got shape {list(value.shape)}, takes a number or [{len(x)}]")
    if not (torch.isfinite(value) & (value > 0)).all():
        raise ValueError(f"{name}: got {value.tolist()}, takes positive finite numbers")
    return value.reshape(-1, 1, 1, 1)
