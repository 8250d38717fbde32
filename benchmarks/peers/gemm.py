"""Chunked matrix product and online softmax over materialised windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .rows import images_of, query_rows, window_rows

CHUNK = {"cpu": 1024, "cuda": 65536}
"""Windows of a product: on the CPU the logits stay in the cache."""


def prepare(z, sigma, train, k):
    p, v = window_rows(train, k)
    q, bias = query_rows(z, k) / sigma**2, p.square().sum(1) / (-2 * sigma**2)

    def work():
        parts = chunks(len(p), CHUNK[z.device.type])
        return images_of(online_softmax((torch.addmm(bias[a], q, p[a].T), v[a]) for a in parts), z)

    return work


def chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def online_softmax(logits_and_values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """[Q, C] from chunks of logits [Q, M], which are overwritten, and values [M, C]."""

    def parts():
        for logits, values in logits_and_values:
            top = logits.amax(1, keepdim=True)
            weights = logits.sub_(top).exp_()
            yield top, weights.sum(1, keepdim=True), weights @ values

    return merged(parts())


def merged(parts: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The mean over parts, each (maximum, sum of weights, weighted values)."""
    m = s = total = None
    for top, weight, values in parts:
        if m is None:
            m, s, total = top, weight, values
            continue
        new = torch.maximum(m, top)
        old, here = (m - new).exp(), (top - new).exp()
        m, s, total = new, s * old + weight * here, total * old + values * here
    return total / s
