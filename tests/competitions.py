"""What tests of the exact engines share: competitions by name, and what it means that two sums are the same."""

import torch

from patchscore.windows import Axis, Competition, Group

LIMIT = 2**30
"""Bytes of working memory."""


def circular(k, height, width):
    r = k // 2
    rows, cols = range(r, height - r), range(r, width - r)
    return Competition(k, "circular", (Group(Axis(range(height), rows), Axis(range(width), cols)),))


def broken_axes(k, size):
    r = k // 2
    if k >= size:
        return [Axis(range(size))]
    interior = Axis(range(r, size - r), range(r, size - r))
    return [interior] if r == 0 else [Axis(range(r)), interior, Axis(range(size - r, size))]


def broken(k, height, width):
    groups = [Group(rows, cols) for rows in broken_axes(k, height) for cols in broken_axes(k, width)]
    return Competition(k, "zeros", tuple(groups))


def local(k, height, width):
    return Competition(k, "zeros", (Group(Axis(range(height)), Axis(range(width))),))


def assert_same(got, expected, tolerance):
    assert torch.isfinite(got.mean).all()
    assert (got.mean - expected.mean).abs().max() <= tolerance
    # Effective sample sizes and log-evidence are sums of the same weights.
    torch.testing.assert_close(got.ess, expected.ess, rtol=2e-2, atol=1e-3)
    evidence, expected_evidence = got.m + got.s.log(), expected.m + expected.s.log()
    torch.testing.assert_close(evidence, expected_evidence, rtol=1e-5, atol=2e-3)
