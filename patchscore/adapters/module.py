"""DenoiserModule: a denoiser as a torch module, which libraries use like a network.

Libraries query the device and dtype of a network, and move it. An adapter is therefore a torch module whose only state
is an empty buffer that records device and dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, Labels


class DenoiserModule(nn.Module):
    """Base class of the adapters.

    `.to(dtype)` sets the precision of the arithmetic, as for a network: float64 (slower), and float32 for every other
    dtype. Results have the dtype of the noisy images.
    """

    _placement: Tensor

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        if not isinstance(denoiser, Denoiser):
            raise TypeError(f"denoiser: got {type(denoiser).__name__}, takes a machine or another denoiser")
        self.denoiser = denoiser
        self.register_buffer("_placement", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self._placement.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels of the bank behind the denoiser; empty where there are none."""
        return tuple(getattr(getattr(self.denoiser, "bank", None), "classes", ()))

    def check_images(self, x: Any, name: str) -> None:
        """Raises unless x is a floating point tensor [B, C, H, W] of images shaped like the bank's.

        Nor may it require grad where the denoiser's results carry no autograd graph: a gradient through them would
        silently lack this part.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: got {got}, takes a floating point tensor [B, C, H, W]")
        own = tuple(self.denoiser.shape)
        fits = x.ndim == 4 and (x.shape[1] == own[0] if self.denoiser.any_size else tuple(x.shape[1:]) == own)
        if not fits:
            has = " x ".join(map(str, self.denoiser.shape))
            raise ValueError(f"{name}: the sampler gives {list(x.shape)}, the denoiser's bank has {has} images")
        if x.requires_grad and torch.is_grad_enabled() and not self.denoiser.differentiable:
            raise ValueError(
                f"{name}: requires grad, and this denoiser has no gradient; wrap it in patchscore.Differentiable, or "
                "use torch.no_grad() or detach"
            )

    def labels_from(self, class_labels: Any) -> Labels:
        """Labels, or one-hot rows [B, number of classes] over `classes`; a row of zeros means every class."""
        if not (isinstance(class_labels, Tensor) and class_labels.ndim == 2):
            return class_labels
        rows = class_labels.detach().cpu()
        if rows.shape[1] != len(self.classes):
            raise ValueError(
                f"class_labels: got one-hot rows over {rows.shape[1]} classes, the bank has {len(self.classes)}"
            )
        if not (((rows == 0) | (rows == 1)).all() and (rows.sum(1) <= 1).all()):
            raise ValueError("class_labels: got rows that are not one-hot, takes a single 1 or all zeros")
        return [self.classes[int(row.argmax())] if row.any() else None for row in rows]
