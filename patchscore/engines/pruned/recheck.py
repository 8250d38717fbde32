"""The second look of the Triton half of `pruned`: windows that weigh most, as they are in the images.

The same as lists_recheck.h has for the CPU: a sample of what the scan met is compared pixel by pixel, neighbouring
pixels propose heavy windows to each other, and exact weights take the place of the scan's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...index import IndexedSize
from ...posterior import PosteriorSum
from ..autotune import started
from .device_index import Cells, Queries, kernels

ROUNDS = 2
"""How often pixels propose windows to the four beside them (PatchMatch)."""

PROPOSED = 8
"""Windows that a pixel proposes, the nearest of those that are sure to be in its sample."""

MARGIN_BITS = 0.25
"""What is proposed, and by so much heavier than the lightest that are sure to be in the sample, has been scanned if and
only if it is there: the scan's weights are rounded."""

EQUAL = 2e-6
"""Equal windows are stored once: two whose squared distances differ by no more than this share are the same."""


def axes_block(axes: int) -> int:
    """BA of `propose_kernel`."""
    return max(16, 1 << (axes - 1).bit_length())


def proposal_warps(block: int) -> int:
    """Of `propose_kernel`: four run out of registers where there are many axes."""
    return 4 if block <= 128 else 8


def correction_warps(block: int) -> int:
    """Of `correct_kernel`, for `block` windows."""
    return max(1, block // 128)


class Sample(NamedTuple):
    """Windows of every query that are compared pixel by pixel, [Q, R]; log-weights in bits.

    place: where centres lie, pixels of all images in a row; weight: fp32, by the scan, with all equal ones; repeats:
    fp32, bits of how many those are; stands_for: fp64, bits of how many a scanned window stands for; met: fp64, one
    over the chance to be in the sample, 0 of what is not in it; distance: fp64, squared; values: [Q, R, C] fp32;
    threshold: [Q, 1] fp64, what is heavier is in the sample if it was scanned.
    """

    place: Tensor
    weight: Tensor
    repeats: Tensor
    stands_for: Tensor
    met: Tensor
    distance: Tensor
    values: Tensor
    threshold: Tensor


@dataclass(frozen=True)
class Recheck:
    """The second look of a scan; sigma is the noise that it weighs by, `sharp` the one that counts in the end.

    images: [N, C, H, W] as stored, on the device; axes: how many the scan compares; shape: of the noisy images.
    """

    images: Tensor
    part: IndexedSize
    cells: Cells
    axes: int
    sigma: float
    sharp: float
    shape: torch.Size

    @property
    def device(self) -> torch.device:
        return self.images.device

    def look(self, queries: Queries, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of windows [Q, R], ids as in the index: their places, squared distances and values, as in `Sample`."""
        _, _, height, width = self.images.shape
        row0, col0, high, wide, _ = queries.geometry[:, :, None].unbind(1)
        position = window % (high * wide)
        place = (window // (high * wide) * height + row0 + position // wide) * width + col0 + position % wide
        distance, values, constants = self._room(*window.shape)
        started(
            kernels().distance_kernel, (len(window), -(-window.shape[1] // 16)), queries.windows, self.images, place,
            distance, values, BD=64, num_warps=4, **constants,
        )  # fmt: skip
        return place, distance, values

    def _room(self, n: int, windows: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """For distances and values of windows of n queries, and what both kernels that find them are told."""
        _, channels, height, width = self.images.shape
        distance = torch.empty(n, windows, dtype=torch.float64, device=self.device)
        values = torch.empty(n, windows, channels, device=self.device)
        sizes = {"R": windows, "C": channels, "H": height, "W": width, "SIZE": self.part.k}
        return distance, values, {**sizes, "BYTES": self.images.dtype == torch.uint8, "BR": 16}

    # What neighbours propose.

    def propose(self, queries: Queries, sums: PosteriorSum, sample: Sample) -> tuple[PosteriorSum, Sample]:
        """Sums and samples with the heavy windows that neighbours propose.

        Images are smooth, so a window that is heavy at a pixel is, moved along, likely heavy at the next (PatchMatch,
        Barnes et al. 2009). The interior and edges propose to each other, for a window's place is that of its centre.
        """
        height, width = (size + 2 for size in self.shape[2:])
        numbers = torch.full((self.shape[0] * height * width,), len(queries), device=self.device)
        numbers = numbers.scatter(0, queries.pixel, torch.arange(len(queries), device=self.device))
        beside = torch.stack([numbers[queries.pixel + step] for step in (1, -1, width, -width)], 1)
        for _ in range(ROUNDS):
            sums, sample = self._listen(queries, beside, sums, sample)
        return sums, sample

    def _offered(self, sample: Sample) -> Tensor:
        """[Q + 1, PROPOSED] places of the windows that weigh most in a query's sample; -1 where there are fewer, and of
        no query."""
        sure = (sample.met > 0) & (sample.weight - sample.repeats >= sample.threshold)
        distance = sample.distance.masked_fill(~sure, torch.inf)
        nearest, at = distance.topk(min(PROPOSED, distance.shape[1]), 1, largest=False)
        place = sample.place.gather(1, at).masked_fill(nearest.isinf(), -1)
        return functional.pad(place, (0, PROPOSED - place.shape[1], 0, 1), value=-1)

    def _listen(
        self, queries: Queries, beside: Tensor, sums: PosteriorSum, sample: Sample
    ) -> tuple[PosteriorSum, Sample]:
        """A round of proposals.

        What is proposed is taken for certain, for itself alone, and the rest is estimated without it: whatever else it
        stood for is taken out of the sums; or it is added to them, where it is heavier than the sample's threshold and
        yet not in the sample, and so was not scanned. A lighter one that is in the sample by chance loses its factor
        too: a bias, but smaller than the spread it saves.
        """
        offers = 4 * PROPOSED
        distance, values, constants = self._room(len(queries), offers)
        place = torch.empty(distance.shape, dtype=torch.int64, device=self.device)
        weight = torch.empty(distance.shape, device=self.device)
        block = axes_block(self.axes)
        started(
            kernels().propose_kernel, (len(queries), offers // 16), queries.windows, self.images,
            self._offered(sample), beside, queries.geometry, queries.q.half(), self.cells.centre, self.cells.axes,
            place, distance, values, weight, math.log2(math.e) / self.sigma**2, A=self.axes, RANK=self.part.rank,
            BA=block, BD=16, num_warps=proposal_warps(block), **constants,
        )  # fmt: skip
        distance, order = distance.sort(dim=1, stable=True)
        place, weight = place.gather(1, order), weight.gather(1, order)
        values = values.gather(1, order[..., None].expand_as(values))
        apart = EQUAL * distance
        fresh = functional.pad(distance.diff(dim=1) > apart[:, 1:], (1, 0), value=True)
        there, heavy = distance < torch.inf, weight >= sample.threshold + MARGIN_BITS

        # Those in the sample already.
        size = sample.distance.shape[1]
        drawn, owner = sample.distance.masked_fill(sample.met == 0, torch.inf).sort(dim=1, stable=True)
        at = torch.searchsorted(drawn, distance - apart).clamp(max=size - 1)
        known = there & (drawn.gather(1, at) <= distance + apart)
        at = owner.gather(1, at).masked_fill(~known, size)
        certain = torch.zeros(len(queries), size + 1, dtype=torch.bool, device=self.device).scatter(1, at, True)[:, :-1]
        # The sum is no less than that of the windows that were met.
        alone = torch.exp2(torch.where(sample.met > 0, sample.weight - sums.m, -torch.inf))
        excess = torch.where(certain, alone * (torch.exp2(sample.stands_for) - 1), 0.0)
        excess = excess.masked_fill(sums.s - excess.sum(1, keepdim=True) < 0.5 * alone.sum(1, keepdim=True), 0.0)
        certain = certain & (excess > 0)
        new = there & heavy & fresh & ~known

        none = torch.zeros_like(weight)
        sample = Sample(
            torch.cat([sample.place, place], 1),
            torch.cat([sample.weight, weight], 1),
            torch.cat([sample.repeats, none], 1),
            torch.cat([sample.stands_for.masked_fill(certain, 0.0), none], 1),
            torch.cat([sample.met.masked_fill(certain, 1.0), new], 1),
            torch.cat([sample.distance, distance], 1),
            torch.cat([sample.values, values], 1),
            sample.threshold,
        )
        added = torch.where(new, weight, -torch.inf).double()
        m = torch.maximum(sums.m, added.amax(1, keepdim=True))
        fade = torch.exp2((sums.m - m).nan_to_num(nan=0.0))
        change = torch.cat([-excess * fade, torch.exp2((added - m).nan_to_num(nan=-torch.inf))], 1)
        own = torch.exp2(torch.where(change != 0, sample.weight - sample.repeats - m, -torch.inf))
        assert sums.vv is not None
        assert sums.vs is not None
        assert sums.ss is not None
        sums = PosteriorSum(
            m=m,
            s=sums.s * fade + change.sum(1, keepdim=True),
            v=sums.v * fade + (change[..., None] * sample.values).sum(1),
            s2=sums.s2 * fade**2 + (change * own).sum(1, keepdim=True),
            vv=sums.vv * fade**2,
            vs=sums.vs * fade**2,
            ss=sums.ss * fade**2,
            pairs=sums.pairs,
        )
        return sums, sample

    def correct(self, sums: PosteriorSum, sample: Sample) -> PosteriorSum:
        """Puts right what features leave out; sums as the rest of the package has them, m in nats."""
        assert sums.vv is not None
        assert sums.vs is not None
        assert sums.ss is not None
        (n, windows), c = sample.met.shape, sums.v.shape[1]
        own = sample.distance * (-math.log2(math.e) / (2 * self.sharp**2))
        found = torch.cat([sums.m, sums.s, sums.s2, sample.threshold, sums.v], 1)
        result = torch.empty(n, 2 + 2 * c, dtype=torch.float64, device=self.device)
        block = max(16, 1 << (windows - 1).bit_length())
        started(
            kernels().correct_kernel, (n,), sample.weight, sample.repeats, sample.stands_for, sample.met, own,
            sample.values, found, result, (self.sigma / self.sharp) ** 2, R=windows, C=c, BR=block,
            GUIDED=self.sharp >= self.sigma, num_warps=correction_warps(block),
        )  # fmt: skip
        log_shift, s2, shift, error = result.split([1, 1, c, c], 1)
        return PosteriorSum(
            m=(sums.m + log_shift) * math.log(2),
            s=sums.s,
            v=sums.v + shift * sums.s,
            s2=s2,
            vv=sums.vv + 2 * shift * sums.vs + shift**2 * sums.ss + error * sums.s**2,
            vs=sums.vs + shift * sums.ss,
            ss=sums.ss,
            pairs=sums.pairs,
        )
