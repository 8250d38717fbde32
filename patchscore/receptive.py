"""The input pixels that an output pixel depends on: rows of the Jacobian of the denoiser, and their width.

A vector-Jacobian product with a unit vector is a row of the Jacobian. Output pixels whose windows do not meet have rows
without a common input pixel, so one product serves them all (Curtis, Powell & Reid 1974, "On the estimation of sparse
Jacobian matrices").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .denoiser import Denoiser, Labels, ScoreMachine, check_noisy, labels_per_item

FEWEST = 4
"""Output pixels along each axis where windows are so wide that fewer fit side by side."""


def sensitivity(
    denoiser: Denoiser, z: Tensor, sigma: float | Tensor, pixel: tuple[int, int], labels: Labels = None
) -> Tensor:
    """The input pixels that an output pixel depends on: rows of the Jacobian, dD_c[i, j] / dz_c'[y, x].

    Args:
        denoiser: one that has `vjp`.
        z: [B, C, H, W] noisy images.
        sigma: a number, or [B].
        pixel: (i, j), the row and column of the output pixel.
        labels: as in `Denoiser.estimate`.

    Returns:
        [B, C, C, H, W]: the output's channel, then the input's channel, row and column. At a local machine it is 0
        outside the k x k window around the pixel.

    Raises:
        ValueError: a pixel outside the image; as of `Denoiser.vjp`.
    """
    z = check_noisy(z, denoiser.shape, any_size=denoiser.any_size)
    try:
        i, j = pixel
    except (TypeError, ValueError):
        raise TypeError(f"pixel: got {pixel!r}, takes (row, column)") from None
    i = checks.integer("pixel", i, at_least=0, at_most=z.shape[2] - 1)
    j = checks.integer("pixel", j, at_least=0, at_most=z.shape[3] - 1)
    rows = []
    for channel in range(z.shape[1]):
        unit = torch.zeros_like(z)
        unit[:, channel, i, j] = 1
        rows.append(denoiser.vjp(z, sigma, unit, labels))
    return torch.stack(rows, 1)


@dataclass(frozen=True)
class ReceptiveFields:
    """How strongly R x S output pixels of B images depend on the input pixels around them.

    Attributes:
        rows: R rows of output pixels.
        cols: S columns of output pixels.
        maps: [B, R, S, k, k] the norm over channels of dD[i, j] / dz[y, x], in a window centred at (i, j); 0 outside
            the image. Where whole images compete, k is 2 max(H, W) - 1.
        sigma: the noise level.
        patch_size: of the machine at that level; None where whole images compete.
        circular: whether windows wrap around the image.
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    maps: Tensor
    sigma: float
    patch_size: int | None
    circular: bool = False

    @property
    def relative(self) -> Tensor:
        """[B, R, S, k, k] the maps relative to the largest value of each, in [0, 1]."""
        return self.maps / self.maps.amax((3, 4), keepdim=True).clamp(min=torch.finfo(self.maps.dtype).tiny)

    @property
    def widths(self) -> Tensor:
        """[B, R, S] the width of each map a, sqrt((sum a)^2 / sum a^2), in pixels.

        A pixel that depends equally on w x w pixels has width w, at most k. One that depends on none, because all
        windows with weight have the same value, has 0. (sum a)^2 / sum a^2 is Kish's effective sample size of the input
        pixels.
        """
        a = self.maps.double().flatten(3)
        return (a.sum(3).square() / a.square().sum(3)).sqrt().nan_to_num(nan=0.0)

    @property
    def apart(self) -> tuple[list[int], list[int]]:
        """The most of `rows` and of `cols`, by their position in these, whose windows have no pixel in common."""
        k = self.maps.shape[-1]
        rows, cols = (max(_side_by_side(axis, k, None), key=len) for axis in (self.rows, self.cols))
        return rows, cols

    def __repr__(self) -> str:
        """The number of output pixels and images, and the median width, in a line."""
        batch, rows, cols = self.maps.shape[:3]
        size = "whole images" if self.patch_size is None else f"patch size {self.patch_size}"
        shown = f"{rows} x {cols} pixels of {batch} depend on {self.widths.median().item():.3g} pixels across"
        return f"ReceptiveFields({shown}, sigma {self.sigma:.3g}, {size})"


def receptive_fields(denoiser: Denoiser, z: Tensor, sigma: float, labels: Labels = None) -> ReceptiveFields:
    """How strongly output pixels all over the image depend on the input pixels around them.

    As many output pixels as windows fit side by side, or 4 x 4 where fewer fit. In the first case it takes one
    vector-Jacobian product a channel.

    Args:
        denoiser: one that has `vjp`. For machines with a patch size the maps end at the window.
        z: [B, C, H, W] noisy images.
        sigma: noise level, a number.
        labels: as in `Denoiser.estimate`.

    Raises:
        ValueError: as of `Denoiser.vjp`.
    """
    z = check_noisy(z, denoiser.shape, any_size=denoiser.any_size, who=type(denoiser).__name__)
    level = checks.number("sigma", sigma)
    classes = labels_per_item(labels, len(z))
    channels, height, width = z.shape[1:]
    size = denoiser.patch_size_at(level) if isinstance(denoiser, ScoreMachine) else None
    k = 2 * max(height, width) - 1 if size is None else size
    circular = size is not None and getattr(denoiser, "padding_mode", None) == "circular"
    rows, cols = _spread(height, k), _spread(width, k)
    maps = z.new_zeros((len(z), len(rows), len(cols), k, k))
    parts = [
        (some, others)
        for some in _side_by_side(rows, k, height if circular else None)
        for others in _side_by_side(cols, k, width if circular else None)
    ]
    units = z.new_zeros((len(parts), channels, channels, height, width))
    for part, (some, others) in enumerate(parts):
        for channel in range(channels):
            units[part, channel, channel, [[rows[a]] for a in some], [cols[b] for b in others]] = 1
    for item, label in enumerate(classes):
        products = denoiser.vjp(z[item].expand(len(parts) * channels, -1, -1, -1), level, units.flatten(0, 1), label)
        norm = products.unflatten(0, (len(parts), channels)).square().sum((1, 2)).sqrt()
        around = F.pad(norm[:, None], (k // 2,) * 4, mode="circular" if circular else "constant")
        for (some, others), of in zip(parts, around[:, 0], strict=True):
            for a in some:
                for b in others:
                    maps[item, a, b] = of[rows[a] : rows[a] + k, cols[b] : cols[b] + k]
    return ReceptiveFields(tuple(rows), tuple(cols), maps, level, size, circular)


def _spread(length: int, k: int) -> list[int]:
    """Coordinates spread evenly over an axis, at least k apart also around its ends, or FEWEST."""
    count = max(length // k, min(FEWEST, length))
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def _side_by_side(at: Sequence[int], k: int, period: int | None) -> list[list[int]]:
    """The positions of coordinates, in lists of those at least k apart; with a period, also around the ends."""

    def apart(a: int, b: int) -> bool:
        distance = abs(at[a] - at[b])
        return (distance if period is None else min(distance, period - distance)) >= k

    lists: list[list[int]] = []
    for place in range(len(at)):
        fits = next((one for one in lists if all(apart(place, other) for other in one)), None)
        if fits is None:
            lists.append([place])
        else:
            fits.append(place)
    return lists
