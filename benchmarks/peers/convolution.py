"""The published formulation: training windows are the filters of a convolution over z, then an online softmax."""

from __future__ import annotations

from torch.nn import functional as F

from .gemm import chunks, online_softmax
from .rows import images_of, window_rows

CHUNK = {"cpu": 1024, "cuda": 16384}
"""Filters of a convolution."""


def prepare(z, sigma, train, k):
    p, v = window_rows(train, k)
    padded = F.pad(z, (k // 2,) * 4, mode="circular") / sigma**2
    bias, filters = p.square().sum(1) / (-2 * sigma**2), p.reshape(-1, z.shape[1], k, k)

    def logits(part):
        return F.conv2d(padded, filters[part], bias[part]).flatten(2).transpose(1, 2).flatten(0, 1).contiguous()

    def work():
        parts = chunks(len(p), CHUNK[z.device.type])
        return images_of(online_softmax((logits(part), v[part]) for part in parts), z)

    return work
