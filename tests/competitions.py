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


def assert_same_moments(got, expected, z, sigma, around_z=False):
    """Moments against those of `reference` in float64: 1e-4 of the divergence, or float32's rounding of each pixel's
    share.

    A pixel's variance counts against that of the noise, as it does in the divergence. Where squares are summed around
    the pixel of z (`around_z`) and all windows that weigh are far from it, their rounding counts by the square of that
    distance.
    """
    noise2 = (sigma**2)[:, None, None, None]
    far2 = (expected.mean - z.double().clamp(-1, 1)).square() if around_z else torch.zeros_like(expected.mean)
    rounding = 2.0**-23 * (noise2 + far2)
    difference = ((got.variance - expected.variance) / noise2).flatten(1).sum(1).abs()
    divergence = (expected.variance / noise2).flatten(1).sum(1)
    assert (difference <= 1e-4 * divergence + (rounding / noise2).flatten(1).sum(1)).all()
    scale = expected.variance + noise2.clamp(max=0.1)
    assert ((got.variance - expected.variance).abs() <= 1e-4 * scale + (2 * rounding if around_z else 0)).all()
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-4, atol=2e-4)
