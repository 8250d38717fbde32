"""Materialised windows, as rows: what attention, matrix products and KeOps multiply."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def query_rows(z: torch.Tensor, k: int) -> torch.Tensor:
    """Windows of z as rows [B H W, d]."""
    return F.unfold(F.pad(z, (k // 2,) * 4, mode="circular"), k).transpose(1, 2).flatten(0, 1).contiguous()


def window_rows(train: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Competing windows and their centres: [M, d], [M, C]."""
    r = k // 2
    windows = F.unfold(train, k).transpose(1, 2).flatten(0, 1)
    centres = train[:, :, r : train.shape[2] - r, r : train.shape[3] - r].flatten(2).transpose(1, 2).flatten(0, 1)
    return windows.contiguous(), centres.contiguous()


def with_bias(
    z: torch.Tensor, sigma: float, train: torch.Tensor, k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries over sigma^2 with a one, windows with -|p|^2 / (2 sigma^2), values filled up to the same width.

    So that q.k is the log-weight without a constant. The width is a multiple of 8, which attention kernels want.
    """
    p, v = window_rows(train, k)
    q = query_rows(z, k) / sigma**2
    width = -(-(p.shape[1] + 1) // 8) * 8
    keys = torch.cat([p, p.square().sum(1, keepdim=True) / (-2 * sigma**2)], 1)
    queries = torch.cat([q, torch.ones_like(q[:, :1])], 1)
    wide = (F.pad(queries, (0, width - queries.shape[1])), F.pad(keys, (0, width - keys.shape[1])))
    q, p, v = (x.to(dtype)[None, None] for x in (*wide, F.pad(v, (0, width - v.shape[1]))))
    return q, p, v


def images_of(rows: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """[B H W, C or more] as [B, C, H, W]."""
    batch, channels, height, width = z.shape
    return rows[:, :channels].unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
