"""WrappedScore: the equivariant local score of a network that pads circularly and was trained with that padding.

To such a network a training image has no border: it learns the windows that reach over one border and go on at the
opposite one as it learns all others. Among the local and equivariant functions on a torus (Kamb & Ganguli 2024, arXiv
2412.20292, section 3) the least squared error is therefore that of the posterior mean over all H W windows of every
image; in their machine only windows inside an image compete.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bank import PatchBank
from ..denoiser import DEFAULT_MEMORY_LIMIT, Denoiser, Estimate, Labels, alike, check_labels, check_noisy, check_sigma
from ..machines import EquivariantLocalScore
from ..scales import ScaleTable


class WrappedScore(Denoiser):
    """D(z)[i, j] = sum_a w_a v_a over all H W windows of every training image, with z and the images on a torus.

    w_a is proportional to exp(-|q - p_a|^2 / (2 sigma^2)), of k x k windows. It takes 1 / (1 - (k - 1) / H)^2 times as
    long as `EquivariantLocalScore` with padding_mode="circular", and a copy of the bank that is k - 1 pixels larger.

    Args:
        bank: the training images.
        patch_size: k, odd, at most the image size; or a ScaleTable from noise level to k.
        engine: "auto" or an engine's name.
        memory_limit: bytes of working memory beyond the bank.

    Raises:
        TypeError: an argument of a type that is not taken.
        ValueError: an argument outside what is listed.
    """

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | ScaleTable,
        engine: str = "auto",
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ):
        checked = EquivariantLocalScore(bank, patch_size, "circular", engine, memory_limit)
        if not isinstance(bank, PatchBank):
            raise TypeError(f"bank: got {type(bank).__name__}, takes a PatchBank")
        self.bank = bank
        self.shape = bank.shape
        self.patch_size = patch_size
        self.engine, self.memory_limit = checked.engine, checked.memory_limit

    @torch.no_grad()
    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        z = check_noisy(z, self.shape, who="WrappedScore")
        sigmas = check_sigma(sigma, len(z))
        classes = check_labels(labels, self.bank, len(z))
        size = self.patch_size
        sizes = [size(level) if isinstance(size, ScaleTable) else int(size) for level in sigmas.tolist()]
        found = {name: torch.empty_like(z) for name in ("mean", *(("variance",) if moments else ()))}
        found |= {name: z.new_empty(len(z), *z.shape[2:]) for name in ("ess", *(("entropy",) if moments else ()))}
        pairs, names = 0, set()
        for (label, k), items in alike(list(zip(classes, sizes, strict=True))):
            # With a margin of k // 2, every window of the torus lies inside.
            bank = self.bank.of_class(label).wrapped(k // 2)
            machine = EquivariantLocalScore(bank, k, "circular", self.engine, self.memory_limit)
            part = machine.estimate(z[items], sigmas[items], moments=moments)
            for name, of_all in found.items():
                of_all[items] = getattr(part, name)
            pairs += part.pairs
            names.add(part.engine)
        return Estimate(stderr=torch.zeros_like(z), pairs=pairs, engine=" and ".join(sorted(names)), **found)

    def __repr__(self) -> str:
        return f"WrappedScore({self.bank!r}, patch_size={self.patch_size!r})"
