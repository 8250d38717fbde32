"""The score machines of Kamb & Ganguli (arXiv 2412.20292): which training windows compete at which pixel.

All three denoise by the same rule, Bayes' under the prior "one of the competing windows, each as likely":

    D(z)[i, j] = sum_a w_a v_a,    w_a = exp(-|q - p_a|^2 / (2 sigma^2)) / sum_b exp(-|q - p_b|^2 / (2 sigma^2))

with z = x_0 + sigma eps the noisy image, q its k x k window at pixel (i, j), p_a the competing training windows and v_a
their centre pixels. They differ in which windows compete: whole images (ideal), windows at the same position (local),
windows from every position (equivariant local). A machine decides that and nothing else; engines take the sums.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import canvas, checks, engines
from .bank import PatchBank
from .denoiser import DEFAULT_MEMORY_LIMIT, Denoiser, Estimate, Labels, ScoreMachine
from .index import PatchIndex
from .mixed import MixedBank
from .posterior import PosteriorSum, merge_served
from .scales import ScaleTable
from .windows import WHOLE_IMAGE, Competition, equivariant_competition, local_competition, widest

# Denoiser, Estimate, Labels and ScoreMachine stood here in version 0.1.0.
__all__ = ["Denoiser", "EquivariantLocalScore", "Estimate", "IdealScore", "Labels", "LocalScore", "ScoreMachine"]


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
    """The windows at the same pixel of every training image compete: local, but not translation-equivariant.

    Windows reach over the border into zeros, in z and in the training images alike. With k >= 2 max(H, W) - 1 every
    window holds the whole image and this is `IdealScore`. Kamb & Ganguli 2024, section 3 ("local score machine").

    Args:
        bank: the training images.
        patch_size: k, odd; or a ScaleTable from noise level to k.
        engine: "auto" or an engine's name.
        memory_limit: bytes of working memory beyond the bank.
        budget: the fraction of training images to sum over, in (0, 1]; `Estimate.stderr` is the resulting standard
            error.
        seed: of the sample of images.
    """

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | ScaleTable,
        engine: str = "auto",
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
        budget: float | None = None,
        seed: int = 0,
    ):
        pruned = _check_pruned(bank, None, budget, None, seed)
        super().__init__(bank, _check_patch_size(patch_size), engine, memory_limit, pruned)

    def competition(self, k: int | None) -> Competition:
        assert k is not None
        return local_competition(*self.shape[1:], k)


class EquivariantLocalScore(ScoreMachine):
    """Windows from every position compete: local and translation-equivariant, so patches recombine freely.

    padding_mode="circular": z wraps around; at each pixel all windows compete that lie fully inside a training image.
    padding_mode="zeros": equivariance is broken at the border, as zero padding breaks it in a network. Along each axis
    a coordinate closer than r = k // 2 to a border competes only with the same coordinate of the training images, any
    other with all interior ones; so corner windows keep their position, edge windows slide along the edge, and interior
    windows slide both ways. Where k >= H nothing slides, and this is `LocalScore`. Kamb & Ganguli 2024, section 3
    ("equivariant local score machine") and its boundary-broken form.

    It denoises images of any height and width from k on, whatever the bank's: with "zeros", a pixel closer than r to a
    border competes with the windows that are as close to that border of their images. All engines serve all sizes.

    Over a MixedBank it is one machine over the windows of all images; k must fit in each of them. It then takes no
    index (pool machines with one each, `Pooled`).

    Args:
        bank: the training images, a PatchBank or a MixedBank.
        patch_size: k, odd; or a ScaleTable from noise level to k.
        padding_mode: "zeros" or "circular", as in the network that it models.
        engine: "auto" or an engine's name.
        memory_limit: bytes of working memory beyond the bank.
        index: a PatchIndex of `bank`. With `budget` or `tolerance` the engine `pruned` then evaluates a sample of the
            windows and gives its standard error (`Estimate.stderr`). Patch sizes that the index lacks are summed
            exactly and, with engine="auto" and a budget, so are sums for which an exact engine is expected to be
            faster.
        budget: the fraction of (pixel, window) pairs to evaluate, in (0, 1], such as 0.01; without an index, of
            training images that are drawn and summed whole.
        tolerance: with an index, instead of a budget: the rms standard error that pixels may have; a pilot finds the
            budget for it. Without an index: how far a pixel may be from float64's where the engine `fused` serves, 1e-3
            by default; the other exact engines are closer than that anyway, and serve where its half-precision weights
            cannot hold it (2^-12 min(8 sigma, 2)).
        seed: of the sample of windows; the same seed gives the same numbers.
    """

    any_size = True
    mixed_sizes = True

    def __init__(
        self,
        bank: PatchBank | MixedBank,
        patch_size: int | ScaleTable,
        padding_mode: str = "zeros",
        engine: str = "auto",
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
        index: PatchIndex | None = None,
        budget: float | None = None,
        tolerance: float | None = None,
        seed: int = 0,
    ):
        pruned = _check_pruned(bank, index, budget, tolerance, seed)
        rounding = tolerance if index is None else None
        super().__init__(bank, _check_patch_size(patch_size), engine, memory_limit, pruned, rounding)
        self.padding_mode = checks.one_of("padding_mode", padding_mode, ("zeros", "circular"))
        used = patch_size.sizes if isinstance(patch_size, ScaleTable) else [int(patch_size)]
        sides = bank.sizes if isinstance(bank, MixedBank) else [self.shape[1:]]
        height, width = (min(size[axis] for size in sides) for axis in (0, 1))
        sizes = {widest(k, height, width) for k in used}
        if index is not None and not sizes & set(index.patch_sizes):
            has, uses = (", ".join(map(str, sorted(some))) for some in (index.patch_sizes, sizes))
            warnings.warn(
                f"index: it has patch sizes {has}, the machine uses {uses}: all sums are exact",
                RuntimeWarning,
                stacklevel=2,
            )
        largest = max(used)
        if padding_mode == "circular" and largest > min(height, width):
            raise ValueError(
                f'patch_size: {largest} does not fit in {height} x {width} images, and with padding_mode="circular" '
                "windows must lie fully inside"
            )

    def check_size(self, size: tuple[int, int], sigmas: Sequence[float], name: str = "size") -> None:
        own = self.shape[1:]
        for k in {self.patch_size_at(sigma) for sigma in sigmas}:
            for bank in _parts(self.bank):
                if size != bank.shape[1:] or bank.shape[1:] != own:
                    canvas.check_canvas(size, bank.shape[1:], k or 1, self.padding_mode, name)

    def competition(self, k: int | None) -> Competition:
        assert k is not None
        return equivariant_competition(*self.shape[1:], k, self.padding_mode)

    def sums(
        self,
        z: Tensor,
        sigmas: Tensor,
        bank: PatchBank | MixedBank,
        k: int | None,
        ess: bool = True,
        moments: bool = False,
    ) -> tuple[PosteriorSum, list[str]]:
        assert k is not None
        found, memory = [], self.memory_limit
        for part in _parts(bank):
            some = (self.engines, self.engine, z, sigmas, part)
            if tuple(z.shape[1:]) == part.shape == self.shape:
                found.append(engines.serve(*some, self.competition(k), memory, ess, moments))
            else:
                found.append(canvas.posterior_sum(*some, k, self.padding_mode, memory, ess, moments))
        return found[0] if len(found) == 1 else merge_served(found)

    def product(
        self,
        transposed: bool,
        z: Tensor,
        sigmas: Tensor,
        direction: Tensor,
        bank: PatchBank | MixedBank,
        k: int | None,
        combine: engines.Combine | None = None,
    ) -> Tensor:
        assert k is not None
        if isinstance(bank, PatchBank) and tuple(z.shape[1:]) == bank.shape == self.shape:
            return super().product(transposed, z, sigmas, direction, bank, k, combine)
        serving, mode, memory = (self.engines, self.engine), self.padding_mode, self.memory_limit
        whole = self._sums_of_several(z, sigmas, bank, k)
        addends = [
            canvas.product(*serving, transposed, z, sigmas, direction, part, k, mode, memory, combine, whole)
            for part in _parts(bank)
        ]
        return torch.stack(addends).sum(0) if len(addends) > 1 else addends[0]

    def window_sums(
        self, z: Tensor, sigmas: Tensor, bank: PatchBank | MixedBank, k: int
    ) -> tuple[PosteriorSum, Tensor, list[str]]:
        """`engines.serve_window_sums` of items that share a patch size, of any height and width, with the pairs."""
        serving, mode, memory = (self.engines, self.engine), self.padding_mode, self.memory_limit
        if isinstance(bank, PatchBank) and tuple(z.shape[1:]) == bank.shape == self.shape:
            competition = self.competition(k)
            total, sums, name = engines.serve_window_sums(*serving, z, sigmas, bank, competition, memory)
            return total.with_pairs(2 * len(z) * len(bank) * competition.pairs_per_image), sums, [name]
        whole = self._sums_of_several(z, sigmas, bank, k)
        found = [canvas.window_sums(*serving, z, sigmas, part, k, mode, memory, whole) for part in _parts(bank)]
        total = found[0][0] if whole is None else whole
        sums = torch.stack([part for _, part, _ in found]).sum(0)
        pairs = sum(part.pairs or 0 for part, _, _ in found) + (0 if whole is None else whole.pairs or 0)
        return total.with_pairs(pairs), sums, [name for _, _, names in found for name in names]

    def _sums_of_several(self, z: Tensor, sigmas: Tensor, bank: PatchBank | MixedBank, k: int) -> PosteriorSum | None:
        """The sums over all banks of a MixedBank, which a second pass over each of them needs."""
        if len(_parts(bank)) == 1:
            return None
        return self.exactly().sums(z, sigmas, bank, k)[0]  # type: ignore[arg-type]


def _parts(bank: PatchBank | MixedBank) -> tuple[PatchBank, ...]:
    """The banks of one image size that a bank is made of."""
    return bank.banks if isinstance(bank, MixedBank) else (bank,)


def _check_patch_size(patch_size: int | ScaleTable) -> int | ScaleTable:
    return patch_size if isinstance(patch_size, ScaleTable) else checks.odd("patch_size", patch_size)


def _check_pruned(
    bank: PatchBank | MixedBank, index: PatchIndex | None, budget: float | None, tolerance: float | None, seed: int
) -> engines.Pruned | None:
    if tolerance is not None and not 0 < checks.number("tolerance", tolerance) < math.inf:
        raise ValueError(f"tolerance: got {tolerance}, takes a positive error of pixels")
    if budget is not None and not 0 < checks.number("budget", budget) <= 1:
        raise ValueError(f"budget: got {budget}, takes a fraction of pairs in (0, 1]")
    seed = checks.integer("seed", seed, at_least=0)
    if index is None and budget is None:
        return None
    if index is None:
        return engines.Pruned(None, budget, None, seed)
    if isinstance(bank, MixedBank):
        raise ValueError("index: takes images of one size; pool a machine with an index for each of MixedBank.banks")
    if not isinstance(index, PatchIndex):
        raise TypeError(f"index: got {type(index).__name__}, takes a PatchIndex")
    if index.bank.fingerprint != bank.fingerprint:
        raise ValueError(f"index: of bank {index.bank.fingerprint[:16]}, but this bank is {bank.fingerprint[:16]}")
    if (budget is None) == (tolerance is None):
        raise ValueError("budget, tolerance: an index takes one of the two")
    if index.bank is not bank:
        # The same images, held otherwise: selections are lists of places in the bank they are from.
        index = PatchIndex(index.path, bank, index.meta)
    # Engines sum images divided by the bank's scale, and so is what their pixels may be off by.
    return engines.Pruned(index, budget, None if tolerance is None else tolerance / bank.scale, seed)
