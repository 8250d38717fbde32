"""PosteriorSum: a sum that can be split anywhere and put together in any order."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscore.posterior import PosteriorSum, merge, merge_all


def direct(logits, values, shift=0.0):
    """The sum over all given windows, [M] logits and [M, C] values, relative to the largest logit + shift."""
    m = logits.max() + shift
    w = torch.exp(logits - m)
    as_image = [m, w.sum(), w @ values, (w**2).sum()]
    return PosteriorSum(*(x.reshape(1, -1, 1, 1) for x in as_image))


def assert_same(a, b):
    assert torch.allclose(a.mean, b.mean, atol=1e-12, rtol=1e-9)
    assert torch.allclose(a.ess, b.ess, rtol=1e-9)
    assert torch.allclose(a.m + a.s.log(), b.m + b.s.log(), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 30.0, 800.0]), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_a_sum_split_anywhere_merges_to_the_whole(seed, spread, count):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, generator=generator, dtype=torch.float64) - 500
    values = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    first, second = sorted(torch.randint(1, count, (2,), generator=generator).tolist())
    cuts = [slice(0, first), slice(first, second), slice(second, count)]
    # References need not be the maximum: engines rescale rarely.
    parts = [
        direct(logits[c], values[c], shift)
        for c, shift in zip(cuts, (0.0, 3.0, -2.0), strict=True)
        if logits[c].numel()
    ]
    whole = direct(logits, values)
    assert_same(merge_all(parts), whole)
    assert_same(merge_all(parts[::-1]), whole)
    assert_same(merge(parts[0], merge_all([*parts[1:], PosteriorSum.empty((1, 3, 1, 1), "cpu")])), whole)


def test_the_empty_sum_is_neutral():
    empty = PosteriorSum.empty((2, 3, 4, 5), "cpu")
    both = merge(empty, empty)
    assert torch.isneginf(both.m).all()
    assert not both.s.any()
    assert not torch.isnan(both.v).any()


def test_a_part_of_vanishing_weight_changes_nothing():
    near, far = direct(torch.tensor([-1.0]), torch.ones(1, 1)), direct(torch.tensor([-5000.0]), -torch.ones(1, 1))
    assert merge(near, far).mean.item() == merge(far, near).mean.item() == 1.0


def test_add_merges_a_block_in_place():
    total = PosteriorSum.empty((2, 1, 3, 3), "cpu")
    part = direct(torch.tensor([0.0, -1.0], dtype=torch.float64), torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    for _ in range(2):
        total.add_(part, slice(1, 2), slice(0, 1), slice(2, 3))
    assert total.mean[1, 0, 0, 2].item() == pytest.approx(part.mean.item())
    assert total.s[1, 0, 0, 2].item() == pytest.approx(2 * part.s.item())
    assert total.s.count_nonzero() == 1


def sampled(seed):
    """A random partial sum of two pixels with a sampling covariance."""
    g = torch.Generator().manual_seed(seed)
    one, three = (2, 1, 1, 1), (2, 3, 1, 1)
    m, s = 5 * torch.randn(one, generator=g, dtype=torch.float64), 1 + torch.rand(one, generator=g, dtype=torch.float64)
    v, vs = (s * torch.rand(three, generator=g, dtype=torch.float64) for _ in range(2))
    return PosteriorSum(m, s, v, s / 2, vv=1 + v.square(), vs=vs / 9, ss=s / 3, pairs=7)


@pytest.mark.parametrize("exact", [None, 0, 1, 2])
def test_sums_with_a_sampling_covariance_merge_in_any_order(exact):
    parts = [sampled(seed) for seed in range(3)]
    if exact is not None:
        parts[exact] = replace(parts[exact], vv=None, vs=None, ss=None)
    a, b, c = parts
    for other in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, a), b)):
        assert_same(other, merge_all(parts))
        assert torch.allclose(other.stderr, merge_all(parts).stderr, rtol=1e-9)
        assert other.pairs == 21
    empty = PosteriorSum.empty((2, 3, 1, 1), "cpu", sampled=True)
    assert torch.allclose(merge(empty, a).stderr, a.stderr)


def test_the_standard_error_is_that_of_a_ratio():
    """Two of five windows drawn at random, each standing for 2.5: variances and covariance by hand."""
    w, value = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.tensor([-0.2, 0.6], dtype=torch.float64)
    both = torch.stack([w * value, w])
    # N^2 (1 - n/N) / n times the sample covariance.
    covariance = 25 * (1 - 2 / 5) / 2 * torch.cov(both)
    (s, v), m = (2.5 * both.sum(1)).flip(0), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    as_image = [x.reshape(1, 1, 1, 1) for x in (s, v, s, covariance[0, 0], covariance[0, 1], covariance[1, 1])]
    found = PosteriorSum(m, *as_image)
    mean = (w @ value / w.sum()).item()
    # The same from the residuals w (v - mean), whose sum has the variance of the ratio's numerator.
    residual = w * (value - mean)
    by_hand = (25 * (1 - 2 / 5) / 2 * residual.var()).sqrt() / (2.5 * w.sum())
    assert found.mean.item() == pytest.approx(mean)
    assert found.stderr.item() == pytest.approx(by_hand.item())
    # It does not depend on the reference.
    shifted = PosteriorSum(m - 3, *(x * f for x, f in zip(as_image, [20.0] * 3 + [400.0] * 3, strict=True)))
    assert shifted.stderr.item() == pytest.approx(by_hand.item())


def test_the_standard_error_never_exceeds_the_range_of_pixels():
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for variance in (1e30, torch.inf):
        assert PosteriorSum(one, one, one, one, vv=one * variance, vs=one * 0, ss=one).stderr.item() == 2
    assert not PosteriorSum(one, one, one, one).stderr.any()
