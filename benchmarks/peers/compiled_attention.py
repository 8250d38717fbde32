"""Softmax of a matrix product, written out and given to torch.compile, over chunks of materialised windows."""

from __future__ import annotations

import torch

from .gemm import CHUNK, chunks, merged
from .rows import images_of, query_rows, window_rows


def _part(q, p, bias, v):
    """(maximum, sum of weights, weighted values) over a chunk of windows."""
    logits = q @ p.T + bias
    top = logits.amax(1, keepdim=True)
    weights = (logits - top).exp()
    return top, weights.sum(1, keepdim=True), weights @ v


def prepare(z, sigma, train, k):
    p, v = window_rows(train, k)
    q, bias = query_rows(z, k) / sigma**2, p.square().sum(1) / (-2 * sigma**2)
    compiled = torch.compile(_part, dynamic=False)
    size = CHUNK[z.device.type]
    # One shape, one compilation: the last chunk is filled up with windows of weight 0.
    missing = -len(p) % size if len(p) > size else 0
    p, v = (torch.cat([x, x[:1].expand(missing, -1)]) for x in (p, v))
    bias = torch.cat([bias, bias.new_full((missing,), -torch.inf)])

    def work():
        return images_of(merged(compiled(q, p[part], bias[part], v[part]) for part in chunks(len(p), size)), z)

    return work


def unavailable(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "it is for cuda"
