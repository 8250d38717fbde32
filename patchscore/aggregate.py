"""PatchAverage: the aggregated machine, in which a pixel averages the posterior means of all windows that cover it.

`EquivariantLocalScore` keeps the centre pixel of every posterior-mean window. Patch methods of image restoration keep
all of it and average where windows overlap (non-local means: Buades et al. 2005; EPLL: Zoran & Weiss 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import PatchBank
from .denoiser import DEFAULT_MEMORY_LIMIT, Denoiser, Estimate, Labels, alike, check_labels, check_noisy, check_sigma
from .machines import EquivariantLocalScore
from .mixed import MixedBank
from .scales import ScaleTable


class PatchAverage(Denoiser):
    """The mean over all windows that cover a pixel of their posterior means at that pixel.

        D(z)[j] = (1 / n_j) sum over pixels i within r of j of sum_a w_ia p_a[j - i]

    with the windows p_a and weights w_ia of `EquivariantLocalScore` at pixel i: with padding_mode="circular" every
    window inside a training image competes at every pixel, windows wrap around z, and n_j = k^2; with "zeros" windows
    near a border keep their position, and n_j counts those whose centre lies in the image. With k = 1 it is the
    equivariant machine. It costs two passes over the pairs at any k, and, like that machine, takes images of any size.

    `estimate` has stderr 0, and the effective sample size of the window centred at each pixel. The value of a window is
    not its centre pixel alone, so there are no variances, and no Jacobian.

    Args:
        bank: the training images, a PatchBank or a MixedBank (three passes).
        patch_size: k, odd; or a ScaleTable from noise level to k.
        padding_mode: "zeros" or "circular".
        engine: "auto", "reference" or "sliding".
        memory_limit: bytes of working memory beyond the bank.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range; a circular window that does not fit in the images.
    """

    any_size = True

    def __init__(
        self,
        bank: PatchBank | MixedBank,
        patch_size: int | ScaleTable,
        padding_mode: str = "zeros",
        engine: str = "auto",
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ):
        self.machine = EquivariantLocalScore(bank, patch_size, padding_mode, engine, memory_limit)
        self.bank = bank
        self.shape = bank.shape
        self.padding_mode = padding_mode

    def check_size(self, size: tuple[int, int], sigmas: Sequence[float], name: str = "size") -> None:
        self.machine.check_size(size, sigmas, name)

    @torch.no_grad()
    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        if moments:
            raise ValueError("moments: PatchAverage has none, as its windows count with all of their pixels")
        machine = self.machine
        z = check_noisy(z, self.shape, any_size=True, who=type(self).__name__)
        sigmas = check_sigma(sigma, len(z))
        classes = check_labels(labels, self.bank, len(z))
        sizes = [machine.patch_size_at(level) for level in sigmas.tolist()]
        mean, ess, pairs, names = torch.empty_like(z), z.new_empty(len(z), *z.shape[2:]), 0, set()
        for (label, k), items in alike(list(zip(classes, sizes, strict=True))):
            assert k is not None
            total, sums, served = machine.window_sums(z[items], sigmas[items], self.bank.of_class(label), k)
            mean[items] = (sums / self._covering(k, z.shape[2], z.shape[3]).to(sums)).to(z.device, z.dtype)
            ess[items] = total.ess[:, 0].to(z.device, z.dtype)
            pairs += total.pairs or 0
            names.update(served)
        return Estimate(mean, torch.zeros_like(mean), ess, pairs, " and ".join(sorted(names)))

    def _covering(self, k: int, height: int, width: int) -> Tensor:
        """[H, W] n_j, how many windows cover a pixel."""
        if self.padding_mode == "circular":
            return torch.full((height, width), float(k * k), dtype=torch.float64)
        ones = F.pad(torch.ones(1, 1, height, width, dtype=torch.float64), (k // 2,) * 4)
        return F.avg_pool2d(ones, k, stride=1)[0, 0] * k * k

    def __repr__(self) -> str:
        return (
            f"PatchAverage({self.bank!r}, patch_size={self.machine.patch_size!r}, padding_mode={self.padding_mode!r})"
        )
