"""A bank's images on a GPU, one copy for all engines that read them there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

RESIDENT_SHARE = 0.5
"""Of the device's free memory: a larger bank is streamed."""

copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of a bank's images by device, as long as the bank's own live."""


def on_device(images: Tensor, device: torch.device) -> Tensor | None:
    """The images there, copied once; None if they would fill too much of its memory."""
    if images.device == device:
        return images
    kept = copies.setdefault(images, {})
    if device not in kept:
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes > RESIDENT_SHARE * free:
            return None
        kept[device] = images.to(device)
    return kept[device]
