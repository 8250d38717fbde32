"""KeOps: sumsoftmaxweight over materialised windows, differences squared on the fly."""

from __future__ import annotations

import importlib.util

import torch

from .rows import images_of, query_rows, window_rows


def prepare(z, sigma, train, k):
    from pykeops.torch import Vi, Vj

    (p, v), q = window_rows(train, k), query_rows(z, k)

    def work():
        logits = -Vi(q).sqdist(Vj(p)) / (2 * sigma**2)
        return images_of(logits.sumsoftmaxweight(Vj(v), dim=1), z)

    return work


def unavailable(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("pykeops") else "KeOps is not installed"
