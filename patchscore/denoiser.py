"""Denoiser: the interface of everything that estimates x_0 from z = x_0 + sigma eps, and what all of them share.

`Estimate` is what a call returns. `ScoreMachine` is the denoiser that sums over a bank: it checks its input, splits a
batch by class and patch size, and has engines take the sums. machines.py decides which windows compete.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import checks, engines
from .bank import PatchBank
from .mixed import MixedBank
from .posterior import PosteriorSum, accumulator_dtype
from .scales import ScaleTable
from .windows import Competition

Labels: TypeAlias = int | str | Sequence[int | str | None] | Tensor | None

DEFAULT_MEMORY_LIMIT = 2 * 2**30


@dataclass(frozen=True)
class Estimate:
    """A denoised batch with its standard error, effective sample size and cost.

    Attributes:
        mean: [B, C, H, W] the denoised images D(z).
        stderr: [B, C, H, W] standard error of `mean`: of sampling, from `pruned`; zero where every window was summed.
        ess: [B, H, W] effective sample size of each pixel, (sum w)^2 / sum w^2.
        pairs: number of (query pixel, window) pairs that were evaluated.
        engine: the engine that served; several, joined by "and", where groups of pixels or patch sizes differ.
        variance: [B, C, H, W] posterior variance of each pixel value, with moments=True.
        entropy: [B, H, W] entropy of each pixel's weights over the competing windows, in nats, with moments=True.
        variance_stderr: [B, C, H, W] standard error of `variance`, as `stderr`; None without it.
        entropy_stderr: [B, H, W] standard error of `entropy`, likewise.
    """

    mean: Tensor
    stderr: Tensor
    ess: Tensor
    pairs: int
    engine: str
    variance: Tensor | None = None
    entropy: Tensor | None = None
    variance_stderr: Tensor | None = None
    entropy_stderr: Tensor | None = None

    def __repr__(self) -> str:
        """Shapes and ranges in a line, not the numbers of every pixel."""
        errors, low, high = self.stderr.max().item(), self.ess.min().item(), self.ess.max().item()
        counted = f"stderr to {errors:.2g}, ess {low:.3g} to {high:.3g}, {self.pairs:,} pairs by {self.engine}"
        return f"Estimate({' x '.join(map(str, self.mean.shape))}, {counted})"


class Denoiser(ABC):
    """Anything that estimates x_0 from z = x_0 + sigma eps: the interface samplers and adapters take.

    Results carry no autograd graph; `Differentiable` wraps a denoiser so that they do.
    """

    differentiable = False
    """Whether results carry a graph."""

    shape: tuple[int, int, int]
    """(C, H, W) of the images it denoises."""

    any_size: bool = False
    """Whether it also denoises images of every other height and width."""

    def check_size(self, size: tuple[int, int], sigmas: Sequence[float], name: str = "size") -> None:
        """ValueError, beginning with `name`, where images of (height, width) are not denoised at these noise levels."""
        own = tuple(self.shape[1:])
        if size != own and not self.any_size:
            got, makes = (" x ".join(map(str, sides)) for sides in (size, own))
            raise ValueError(f"{name}: got {got}, {type(self).__name__} makes images of {makes} alone")

    @abstractmethod
    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        """The denoised images with their effective sample sizes and errors.

        Args:
            z: [B, C, H, W] noisy images z = x_0 + sigma eps, on any device; of any H and W where `any_size`.
            sigma: noise level in units of pixel values, which lie in [-1, 1] or the bank's range: a number, or [B].
            labels: one class for all items, or one for each ([B]; None among them means every class).
            moments: whether the estimate has `variance` and `entropy` too (docs/method.md).

        Raises:
            ValueError: wrong shape, NaN or infinite pixels, sigma not positive and finite, unknown label; moments of a
                denoiser that is not a posterior mean.
            TypeError: an argument of the wrong type.
        """

    def denoise(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """`estimate(...).mean`: [B, C, H, W] on z's device, float64 if z is, else float32."""
        return self.estimate(z, sigma, labels).mean

    def divergence(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """The divergence of D at z, sum_i dD_i / dz_i: [B] float64, exact and without random probes.

        It is the sum of the posterior variances over sigma^2, as the value of a window is its centre pixel
        (docs/method.md). Arguments and errors as of `estimate`.
        """
        return self.with_divergence(z, sigma, labels)[1]

    def with_divergence(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> tuple[Tensor, Tensor]:
        """`denoise` and `divergence` from one evaluation: [B, C, H, W] and [B] float64."""
        found = self.estimate(z, sigma, labels, moments=True)
        assert found.variance is not None
        levels = check_sigma(sigma, len(z)).to(z.device, accumulator_dtype(z.device))
        return found.mean, found.variance.flatten(1).to(levels).sum(1) / levels**2

    def vjp(self, z: Tensor, sigma: float | Tensor, u: Tensor, labels: Labels = None) -> Tensor:
        """J^T u with J = dD / dz, the Jacobian of `denoise` at z: a vector-Jacobian product.

        Args:
            z: [B, C, H, W] noisy images.
            sigma: a number, or [B].
            u: [B, C, H, W], one for each image.
            labels: as in `estimate`.

        Returns:
            [B, C, H, W] on z's device, float64 if z is, else float32.

        Raises:
            ValueError: as `estimate`; u of another shape than z; a denoiser without a Jacobian.
        """
        raise ValueError(f"denoiser: {type(self).__name__} has no Jacobian")

    def jvp(self, z: Tensor, sigma: float | Tensor, t: Tensor, labels: Labels = None) -> Tensor:
        """J t, a Jacobian-vector product: how D moves as z moves by t. Arguments and results as of `vjp`."""
        raise ValueError(f"denoiser: {type(self).__name__} has no Jacobian")

    def redrawn(self, draw: int) -> Denoiser:
        """The same denoiser with random draws of its own for each number `draw`; itself where it draws nothing."""
        return self.with_parts(lambda part: part.redrawn(draw))

    def within(self, tolerance: float) -> Denoiser:
        """The same denoiser, whose pixels have an rms standard error of at most `tolerance`; itself where it is exact.

        Raises:
            ValueError: a machine samples whole images (no index), for which no budget can be found.
        """
        return self.with_parts(lambda part: part.within(tolerance))

    def following(self) -> Denoiser:
        """The same denoiser for the noise levels of one batch, from high to low: it may start from what it found at the
        level before. Itself where it remembers nothing, as whatever takes all windows does."""
        return self.with_parts(lambda part: part.following())

    def with_parts(self, change: Callable[[Denoiser], Denoiser]) -> Denoiser:
        """The same denoiser with each denoiser that it asks changed; itself where none is."""
        return self

    def graph(self) -> torch.autograd.grad_mode.set_grad_enabled:
        """A context in which results carry a graph, where the caller wants one and the denoiser has one."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable)

    def score(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """grad log p_t(x) = (alpha D(x / alpha) - x) / sigma^2 at x = alpha x_0 + sigma eps; levels: numbers or [B]."""
        with self.graph():
            alpha, sigma = _per_item(alpha, x, "alpha"), _per_item(sigma, x, "sigma")
            return (alpha * self._denoise_scaled(x, alpha, sigma, labels) - x) / sigma**2

    def eps(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """The predicted noise (x - alpha D(x / alpha)) / sigma at x = alpha x_0 + sigma eps; levels: numbers or [B]."""
        with self.graph():
            alpha, sigma = _per_item(alpha, x, "alpha"), _per_item(sigma, x, "sigma")
            return (x - alpha * self._denoise_scaled(x, alpha, sigma, labels)) / sigma

    def _denoise_scaled(self, x: Tensor, alpha: Tensor, sigma: Tensor, labels: Labels) -> Tensor:
        return self.denoise(x / alpha, (sigma / alpha).flatten(), labels)


class ScoreMachine(Denoiser):
    """A denoiser that sums over a bank: checks its input, splits the batch by class and patch size, asks an engine."""

    mixed_sizes = False
    """Whether it takes a MixedBank."""

    def __init__(
        self,
        bank: PatchBank | MixedBank,
        patch_size: int | ScaleTable | None,
        engine: str,
        memory_limit: int,
        pruned: engines.Pruned | None = None,
        tolerance: float | None = None,
    ):
        if not isinstance(bank, PatchBank):
            who = type(self).__name__
            if not isinstance(bank, MixedBank):
                raise TypeError(f"bank: got {type(bank).__name__}, takes a PatchBank")
            if not self.mixed_sizes:
                raise TypeError(f"bank: got a MixedBank, {who} takes a PatchBank, whose images have one size")
        self.bank: Any = bank
        self.shape = bank.shape
        self.patch_size = patch_size
        if engine == "pruned" and pruned is None:
            raise ValueError('engine: "pruned" takes a budget, or an index and a tolerance')
        self.engine = checks.one_of("engine", engine, ["auto", *engines.NAMES] + ["pruned"] * (pruned is not None))
        self.memory_limit = checks.integer("memory_limit", memory_limit, at_least=1)
        self.pruned = pruned
        """The engine that samples, where the machine was given a budget or an index."""
        self.tolerance = tolerance
        """What `fused`, which rounds, may add to the error of a denoised pixel; None: its default."""
        self.engines = engines.available(pruned, None if tolerance is None else tolerance / bank.scale)
        """What serves, in order of preference."""

    @abstractmethod
    def competition(self, k: int | None) -> Competition:
        """Which windows compete at which pixel, at patch size k."""

    def patch_size_at(self, sigma: float) -> int | None:
        """The patch size used at noise level `sigma`; None where whole images compete."""
        return self.patch_size(sigma) if isinstance(self.patch_size, ScaleTable) else self.patch_size

    def engine_on(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        """The name of the engine that serves images of `dtype` on `device`."""
        return engines.chosen(self.engines, self.engine, checks.device(device), dtype).name

    def explain_choice(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        """Which engine serves images of `dtype` on `device`, and why not those before it, a line each."""
        return engines.explain_choice(self.engines, self.engine, checks.device(device), dtype)

    def denoise(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        if type(self).estimate is not ScoreMachine.estimate:  # a subclass with an estimate of its own
            return self.estimate(z, sigma, labels).mean
        return self.estimate(z, sigma, labels, ess=False).mean

    @torch.no_grad()
    def estimate(
        self, z: Tensor, sigma: float | Tensor, labels: Labels = None, ess: bool = True, *, moments: bool = False
    ) -> Estimate:
        """As of `Denoiser`; with ess=False the effective sample size is left out (NaN), which saves a GPU some work.

        Moments come from the engines `reference`, `sliding` and `pruned`; where another would serve, these do.
        """
        z = check_noisy(z, self.shape, any_size=self.any_size, who=type(self).__name__)
        sigmas = check_sigma(sigma, len(z))
        classes = self.label_ids(labels, len(z))
        sizes = [self.patch_size_at(level) for level in sigmas.tolist()]

        mean, stderr, pairs, names = torch.empty_like(z), torch.zeros_like(z), 0, set()
        effective = z.new_full((len(z), *z.shape[2:]), torch.nan)
        of_pixels = {"variance": 1, "entropy": 0, "variance_stderr": 1, "entropy_stderr": 0} if moments else {}
        found = {name: torch.empty_like(z if channels else effective) for name, channels in of_pixels.items()}
        for (label, k), items in alike(list(zip(classes, sizes, strict=True))):
            some = z[items]
            total, served = self.sums_of(label, some, sigmas[items], k, ess, moments)
            mean[items] = total.mean.to(z.device, z.dtype)
            stderr[items] = total.stderr.to(z.device, z.dtype)
            if ess:
                effective[items] = total.ess[:, 0].to(z.device, z.dtype).expand(len(some), *z.shape[2:])
            pairs += total.pairs or 0
            for name, channels in of_pixels.items():
                of_all = getattr(total, name).to(z.device, z.dtype)
                found[name][items] = of_all if channels else of_all[:, 0].expand(len(some), *z.shape[2:])
            names.update(served)
        return Estimate(mean, stderr, effective, pairs, " and ".join(sorted(names)), **found)

    def label_ids(self, labels: Labels, batch: int) -> list[int | None]:
        """The label number of every item, None for all classes; ValueError for one that no image has."""
        return check_labels(labels, self.bank, batch)

    def sums_of(
        self, label: int | None, z: Tensor, sigmas: Tensor, k: int | None, ess: bool = True, moments: bool = False
    ) -> tuple[PosteriorSum, list[str]]:
        """`sums` over the images of a class, or all for None."""
        return self.sums(z, sigmas, self.bank.of_class(label), k, ess, moments)

    def sums(
        self, z: Tensor, sigmas: Tensor, bank: PatchBank, k: int | None, ess: bool = True, moments: bool = False
    ) -> tuple[PosteriorSum, list[str]]:
        """The sums of items that share a class and a patch size, with the pairs they took, and the engines' names."""
        serving, competition = (self.engines, self.engine), self.competition(k)
        return engines.serve(*serving, z, sigmas, bank, competition, self.memory_limit, ess, moments)

    def vjp(self, z: Tensor, sigma: float | Tensor, u: Tensor, labels: Labels = None) -> Tensor:
        return self._product(True, z, sigma, u, labels)

    def jvp(self, z: Tensor, sigma: float | Tensor, t: Tensor, labels: Labels = None) -> Tensor:
        return self._product(False, z, sigma, t, labels)

    @torch.no_grad()
    def _product(self, transposed: bool, z: Tensor, sigma: float | Tensor, direction: Tensor, labels: Labels) -> Tensor:
        z = check_noisy(z, self.shape, any_size=self.any_size, who=type(self).__name__)
        direction = check_direction(direction, z, "u" if transposed else "t")
        sigmas = check_sigma(sigma, len(z))
        classes = self.label_ids(labels, len(z))
        sizes = [self.patch_size_at(level) for level in sigmas.tolist()]
        product = torch.empty_like(z)
        for (label, k), items in alike(list(zip(classes, sizes, strict=True))):
            product[items] = self.product_of(label, transposed, z[items], sigmas[items], direction[items], k)
        return product

    def product_of(
        self, label: int | None, transposed: bool, z: Tensor, sigmas: Tensor, direction: Tensor, k: int | None
    ) -> Tensor:
        """`product` over the images of a class, or all for None."""
        return self.product(transposed, z, sigmas, direction, self.bank.of_class(label), k)

    def product(
        self,
        transposed: bool,
        z: Tensor,
        sigmas: Tensor,
        direction: Tensor,
        bank: PatchBank,
        k: int | None,
        combine: engines.Combine | None = None,
    ) -> Tensor:
        """J^T direction (transposed) or J direction of items that share a class and a patch size.

        Where `bank` is a part, its addend of that: `combine` makes the whole's sums of the part's.
        """
        serving, competition = (self.engines, self.engine), self.competition(k)
        return engines.serve_product(
            *serving, transposed, z, sigmas, direction, bank, competition, self.memory_limit, combine
        )

    def held(self, label: int | None) -> PatchBank | None:
        """The images of a class, or all for None, that this process sums over; None where it has none of them."""
        return self.bank.of_class(label)

    def exact_sums_of(
        self, label: int | None, z: Tensor, sigmas: Tensor, competitions: Sequence[Competition]
    ) -> list[PosteriorSum]:
        """`exact_sums` over the images of a class, or all for None."""
        return self.exact_sums(z, sigmas, self.bank.of_class(label), competitions)

    def exact_sums(
        self, z: Tensor, sigmas: Tensor, bank: PatchBank, competitions: Sequence[Competition]
    ) -> list[PosteriorSum]:
        """Exact sums of several competitions over (a class of) the bank, whatever the machine samples from."""
        exact = self.exactly()
        return engines.serve_each(exact.engines, exact.engine, z, sigmas, bank, competitions, self.memory_limit)

    def redrawn(self, draw: int) -> ScoreMachine:
        if self.pruned is None:
            return self
        return self._sampling(seed=int(np.random.SeedSequence([self.pruned.seed, draw]).generate_state(1)[0]))

    def within(self, tolerance: float) -> ScoreMachine:
        if self.pruned is None:
            return self
        if self.pruned.index is None:
            raise ValueError("tolerance: takes a machine with an index, or one that sums over all windows")
        return self._sampling(budget=None, tolerance=tolerance / self.bank.scale)

    def following(self) -> ScoreMachine:
        if self.pruned is None or self.pruned.index is None:
            return self
        return self._sampling(memory=engines.Memory())

    def _sampling(self, **options: Any) -> ScoreMachine:
        """The same machine, with other options of its engine `pruned`."""
        assert self.pruned is not None
        same, pruned = copy.copy(self), copy.copy(self.pruned)
        vars(pruned).update(options)
        same.pruned = pruned
        same.engines = tuple(pruned if engine is self.pruned else engine for engine in self.engines)
        return same

    def exactly(self) -> ScoreMachine:
        """The same machine, summing over all windows where this one samples."""
        same = copy.copy(self)
        same.pruned, same.engines = None, tuple(engine for engine in self.engines if engine.exact)
        same.engine = self.engine if self.engine in engines.NAMES else "auto"
        return same

    def __repr__(self) -> str:
        options = {name: getattr(self, name, None) for name in ("patch_size", "padding_mode", "engine")}
        listed = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"{type(self).__name__}({self.bank!r}{listed})"


Key = TypeVar("Key", bound=Hashable)


def alike(keys: Sequence[Key]) -> list[tuple[Key, slice | list[int]]]:
    """The items of a batch that share a key, such as their class, which are served together.

    Items in a row come as a slice: a list would be copied to the device, and the host wait for it.
    """
    numbers: dict[Key, list[int]] = {}
    for item, key in enumerate(keys):
        numbers.setdefault(key, []).append(item)
    rows = [(key, found, range(found[0], found[-1] + 1)) for key, found in numbers.items()]
    return [(key, slice(row.start, row.stop) if len(row) == len(found) else found) for key, found, row in rows]


def check_noisy(
    z: Tensor, shape: tuple[int, int, int], name: str = "z", any_size: bool = False, who: str = ""
) -> Tensor:
    """z as float32, or float64 where it is; `who` takes images of `shape`, with `any_size` only as many channels."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        got = str(z.dtype) if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"{name}: got {got}, takes a floating point tensor [B, C, H, W]")
    fits = z.ndim == 4 and (
        z.shape[1] == shape[0] and 0 not in z.shape[2:] if any_size else tuple(z.shape[1:]) == shape
    )
    if not fits:
        takes = f"[B, {shape[0]}, H, W]" if any_size else f"[B, {shape[0]}, {shape[1]}, {shape[2]}]"
        raise ValueError(f"{name}: got shape {list(z.shape)}, {who and who + ' '}takes {takes} as the bank's")
    # Of pixels that a CUDA graph records nothing is known yet.
    if not _recording(z.device) and not torch.isfinite(z).all():
        raise ValueError(f"{name}: NaN or infinite pixels")
    return z if z.dtype == torch.float64 else z.to(torch.float32)


def check_direction(direction: Tensor, z: Tensor, name: str) -> Tensor:
    """What is multiplied by the Jacobian at z, in z's precision and on its device."""
    if not isinstance(direction, Tensor) or not direction.is_floating_point():
        got = str(direction.dtype) if isinstance(direction, Tensor) else type(direction).__name__
        raise TypeError(f"{name}: got {got}, takes a floating point tensor {list(z.shape)}")
    if direction.shape != z.shape:
        raise ValueError(f"{name}: got shape {list(direction.shape)}, takes {list(z.shape)} as z")
    if not torch.isfinite(direction).all():
        raise ValueError(f"{name}: NaN or infinite values")
    return direction.to(z)


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


def check_labels(labels: Labels, bank: PatchBank | MixedBank, batch: int) -> list[int | None]:
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
