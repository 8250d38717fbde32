"""Posterior sums between ranks: what `merge_all` makes of them, in few bytes. Ranks are threads here."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch

from patchscore.distributed import Ranks
from patchscore.distributed.wire import added, sum_of
from patchscore.posterior import PosteriorSum, merge_all

ONE_STEP = 100_000
"""Bytes that a rank of eight may send for an image of 32 x 32 in colour, as issue 23 promises."""


class Together:
    """What threads that meet at an exchange have brought."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.brought = [None] * size


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank that is a thread, and what it has sent to others."""

    together: Together = None
    sent: list = field(default_factory=list)

    def exchange(self, x):
        self.sent.append(x[1:].numel() * x.element_size())
        self.together.brought[self.rank] = x.clone()
        self.together.barrier.wait()
        found = torch.stack([brought[self.rank] for brought in self.together.brought])
        self.together.barrier.wait()
        return found


def everywhere(function, parts):
    """function(part, ranks) on each rank, and the bytes that a rank sent."""
    together = Together(len(parts))
    ranks = [ThreadRanks(number, len(parts), together=together) for number in range(len(parts))]
    with ThreadPoolExecutor(len(parts)) as threads:
        found = list(threads.map(function, parts, ranks))
    return found, max(sum(rank.sent) for rank in ranks)


def sums(shape, seed, windows=50, m=0.0, sampled=False, moments=False, whole=False):
    """Sums over random windows, whose log-weights lie around m."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = shape
    pixels = (1, 1) if whole else (height, width)

    def rand(*size):
        return torch.rand(size, generator=generator, dtype=torch.float64)

    logs, values = m - 5 * rand(windows, batch, 1, *pixels), 2 * rand(windows, *shape) - 1
    top = logs.amax(0)
    w = (logs - top).exp()
    found = PosteriorSum(top, w.sum(0), (w * values).sum(0), w.square().sum(0), pairs=windows)
    if moments:
        found = replace(found, v2=(w * values**2).sum(0), sl=(w * (logs - top)).sum(0))
    if sampled:  # as if every window had been drawn with probability 1/4
        found = replace(found, vv=3 * (w * values).square().sum(0), vs=3 * (w**2 * values).sum(0))
        found = replace(found, ss=3 * w.square().sum(0))
    if sampled and moments:
        found = replace(found, qq=rand(*shape), ee=rand(batch, 1, *pixels))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 1, 3, 3), (3, 5, 1, 2)])
@pytest.mark.parametrize("options", [{}, {"moments": True}, {"sampled": True}, {"sampled": True, "moments": True}])
def test_sums_of_ranks_are_merged(size, shape, options):
    parts = [sums(shape, rank, m=3.0 * rank, **options) for rank in range(size)]
    expected = merge_all(parts)
    sampled = "sampled" in options
    found, _ = everywhere(lambda part, ranks: added(part, ranks, sampled=sampled), parts)
    for total in found:
        assert all(torch.equal(x, found[0].fields[name]) for name, x in total.fields.items())
        assert total.fields.keys() == expected.fields.keys()
        assert total.pairs == expected.pairs
    total = found[0]
    # Two roundings of v and two of s, each of 2^-24.
    assert (total.mean - expected.mean).abs().max() <= 4 * 2**-24
    assert torch.allclose(total.ess, expected.ess, rtol=8 * 2**-24, atol=0)
    assert torch.allclose(total.stderr, expected.stderr, rtol=2**-9, atol=1e-9)
    if "moments" in options:
        assert torch.allclose(total.variance, expected.variance, rtol=1e-6, atol=1e-12)
        assert (total.entropy - expected.entropy).abs().max() <= 1e-5
        assert torch.allclose(total.variance_stderr, expected.variance_stderr, rtol=2**-9)


def test_whole_images_have_one_weight_for_all_pixels():
    parts = [sums((2, 3, 4, 5), rank, whole=True) for rank in range(3)]
    found, _ = everywhere(added, parts)
    expected = merge_all(parts)
    assert found[0].s.shape == (2, 1, 1, 1)
    assert (found[0].mean - expected.mean).abs().max() <= 4 * 2**-24


def test_small_variances_and_errors_are_told_beside_large_means():
    part = sums((1, 3, 2, 2), 0, sampled=True, moments=True)
    # Values 0.9 + 1e-5 v: second moments and covariances of such by their definitions.
    far, small = 0.9, 1e-5
    moved = replace(
        part,
        v=far * part.s + small * part.v,
        v2=far**2 * part.s + 2 * far * small * part.v + small**2 * part.v2,
        vs=far * part.ss + small * part.vs,
        vv=far**2 * part.ss + 2 * far * small * part.vs + small**2 * part.vv,
    )
    found, _ = everywhere(lambda part, ranks: added(part, ranks, sampled=True), [moved, moved])
    expected = merge_all([part, part])
    # The float32 mean is wrong by 6e-8, which is a part of 1e-2 of the standard deviation, and squared is 1e-4 of it.
    assert torch.allclose(found[0].variance, small**2 * expected.variance, rtol=1e-3)
    assert torch.allclose(found[0].stderr, small * expected.stderr, rtol=0.05)


@pytest.mark.parametrize("m", [-1e12, -1e9, 1e5])
def test_any_log_weight_survives(m):
    parts = [sums((1, 3, 3, 3), rank, m=m) for rank in range(4)]
    found, _ = everywhere(added, parts)
    assert (found[0].mean - merge_all(parts).mean).abs().max() <= 4 * 2**-24


def test_ranks_without_windows_add_nothing():
    shape = (1, 3, 3, 3)
    nothing = PosteriorSum.empty(shape, "cpu").with_pairs(0)
    part = sums(shape, 0)
    found, _ = everywhere(added, [nothing, part, nothing])
    assert (found[0].mean - part.mean).abs().max() <= 4 * 2**-24
    assert found[0].pairs == part.pairs
    found, _ = everywhere(added, [nothing, nothing])
    assert torch.isneginf(found[0].m).all()
    assert not found[0].s.any()


def test_fine_sums_are_right_to_nine_bits_more():
    parts = [sums((1, 3, 5, 5), rank) for rank in range(3)]
    found, _ = everywhere(lambda part, ranks: added(part, ranks, ess=False, fine=True), parts)
    assert (found[0].mean - merge_all(parts).mean).abs().max() <= 4 * 2**-33
    assert found[0].s2.isnan().all()


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5), (1, 1)])
def test_tensors_add_up(shape):
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    found, _ = everywhere(sum_of, parts)
    assert torch.equal(found[0], torch.stack(parts).double().sum(0).float())


def test_a_step_of_eight_ranks_sends_less_than_promised():
    shape = (1, 3, 32, 32)
    exact, sampled = ([sums(shape, rank, 3, sampled=sampled) for rank in range(8)] for sampled in (False, True))
    asked = {
        "mean": everywhere(lambda part, ranks: added(part, ranks, ess=False), exact),
        "with ess": everywhere(added, exact),
        "with standard errors": everywhere(lambda part, ranks: added(part, ranks, sampled=True), sampled),
        "product": everywhere(lambda part, ranks: added(part, ranks, ess=False, fine=True), exact),
    }
    sent = {name: count for name, (_, count) in asked.items()}
    sent["product"] += everywhere(sum_of, [torch.zeros(shape)] * 8)[1]
    assert max(sent.values()) <= ONE_STEP, sent
    assert sent["mean"] <= 0.5 * ONE_STEP
