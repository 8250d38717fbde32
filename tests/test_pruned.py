"""Engine pruned: its parts against the definition in naive.py, its error bars against exact sums, its promises."""

import copy
import dataclasses
import itertools
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import noisy, smooth_images
from plain_pruned import plain_kernels

import patchscore as ps
from patchscore import native
from patchscore.engines.pruned import cpu, engine, gpu, images, naive
from patchscore.engines.pruned.policy import POLICY
from patchscore.engines.pruned.request import BYTE, KNOWN, Request, draw_key, encoded
from patchscore.posterior import PosteriorSum

pytest.importorskip("faiss")
if native.missing:
    pytest.skip("the C++ extension was not built", allow_module_level=True)

ROOT = Path(__file__).parent.parent
SURE = 1e-6
"""A statistical test fails by chance with this probability, for each of its comparisons."""

LARGEST_Z = NormalDist().inv_cdf(1 - SURE / 2)


def bank_of(channels=3, count=24, height=14, width=12, seed=0, dtype=torch.uint8):
    return ps.PatchBank(smooth_images(count, channels, height, width, seed, dtype), torch.arange(count) % 3)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Banks with their indices, built once."""
    made = {}

    def get(channels=3, dtype=torch.uint8):
        if (channels, dtype) not in made:
            bank = bank_of(channels, dtype=dtype)
            index = ps.PatchIndex.build(bank, [1, 3, 5, 9], tmp_path_factory.mktemp("index"), progress=False)
            made[channels, dtype] = bank, index
        return made[channels, dtype]

    return get


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A bank in which a small share of windows is still many."""
    bank = bank_of(3, count=80, height=18, width=18)
    return bank, ps.PatchIndex.build(bank, [3, 9], tmp_path_factory.mktemp("index"), progress=False)


def latents_of(channels, sizes, folder):
    """Floats in units of their own, and their index."""
    images_ = 3 * smooth_images(80, channels, 18, 18, dtype=torch.float32)
    bank = ps.PatchBank(images_, torch.arange(80) % 3, value_range="data")
    return bank, ps.PatchIndex.build(bank, sizes, folder, progress=False)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Six channels: windows are read from the images."""
    return latents_of(6, [3, 5], tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """Three channels: at k = 3 the windows lie in tiles of floats."""
    return latents_of(3, [3], tmp_path_factory.mktemp("index"))


@pytest.fixture(params=["larger", "latents", "tiled"])
def either(request):
    """A bank of bytes or of floats, and its index."""
    return request.getfixturevalue(request.param)


def pruned(bank, index, k=3, padding_mode="zeros", **options):
    if "tolerance" not in options:
        options.setdefault("budget", 0.1)
    return ps.EquivariantLocalScore(bank, k, padding_mode, engine="pruned", index=index, **options)


def exact(bank, k=3, padding_mode="zeros"):
    return ps.EquivariantLocalScore(bank, k, padding_mode, engine="sliding")


def rms(x):
    return x.square().mean().sqrt().item()


def request_of(machine, z, sigma, **changes):
    """What the engine asks its backend for the interior of one image, in units of the bank's scale."""
    z, sigma = z / machine.bank.scale, sigma / machine.bank.scale
    part, competition = machine.pruned.index.at(machine.patch_size), machine.competition(machine.patch_size)
    (group,) = (g for g in competition.groups if not g.rows.locked and not g.cols.locked)
    windows = engine._windows(z, part.k, competition.padding_mode, group)
    columns = len(group.cols.queries)
    request = Request(part, windows, sigma, None, len(part.ids), machine.pruned.budget, 1, columns)
    return dataclasses.replace(request, **changes), group


def inside(x, group):
    rows, cols = group.rows.queries, group.cols.queries
    return x[:, rows.start : rows.stop, cols.start : cols.stop].permute(1, 2, 0).flatten(0, 1)


def proportion_at_least(hits, draws, promised):
    """Whether so many hits can come from a probability of `promised`: P(X <= hits) > SURE (Clopper & Pearson)."""
    logs = [
        math.lgamma(draws + 1) - math.lgamma(i + 1) - math.lgamma(draws - i + 1)
        + i * math.log(promised) + (draws - i) * math.log1p(-promised)
        for i in range(hits + 1)
    ]  # fmt: skip
    return sum(map(math.exp, logs)) > SURE


def z_of_t(t, degrees):
    """A normal quantile as unlikely as Student's t (Wallace 1959)."""
    return (8 * degrees + 1) / (8 * degrees + 3) * math.sqrt(degrees * math.log1p(t * t / degrees))


# The deterministic parts against the definition.


@pytest.mark.parametrize("sigma", [0.02, 0.3, 5.0])
def test_tables_hold_the_expected_log_weights(indexed, sigma):
    bank, index = indexed()
    part = index.at(5)
    features, rest = part.project(noisy(bank, sigma)[:, :, 2:7, 2:7].float())
    dims = len(part.centre)
    table = cpu.table(part.cells, sigma, dims).double()
    f = features[0].double()
    columns = torch.cat([f.square(), f, rest.double(), torch.ones(1)])
    found = (table * columns[:, None]).sum(2).permute(1, 0, 2).flatten(1)[:, : len(part.cells.size)]
    for got, wanted in zip(found, naive.expected_log_weights(f, rest[0], part.cells, sigma, dims), strict=True):
        scale = (table.abs() * columns.abs()[:, None]).sum(2).amax().item()
        assert (got / np.log2(np.e) - wanted).abs().max() < 1e-6 * scale


def test_expected_weights_are_those_of_gaussian_strata():
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.tensor([[0.3, -0.2]]), torch.tensor([[0.5, 0.1]])
    strata = naive.Strata(torch.tensor([1]), mean, spread.square(), torch.tensor([0.4]), mean, mean)
    windows = torch.cat([mean, torch.zeros(1, 2)], 1) + torch.randn(10**6, 4, generator=generator) * torch.cat(
        [spread, torch.full((1, 2), 0.2**0.5)], 1
    )
    query, sigma = torch.tensor([0.1, 0.2, 0.3, 0.1]), 0.7
    w = torch.exp(-(query - windows).double().square().sum(1) / (2 * sigma**2))
    first, second = naive.expected_log_weights(query[:2], query[2:].square().sum(), strata, sigma, 4)
    for sample, expected in ((w, first), (w.square(), second)):
        z = (sample.mean() - expected.exp()) / (sample.std() / 1000)
        assert abs(z.item()) < LARGEST_Z


def test_allocation_spends_the_budget_and_follows_neyman():
    generator = torch.Generator().manual_seed(0)
    size = torch.randint(1, 500, (200,), generator=generator).double()
    first = torch.randn(200, generator=generator).double() - 3
    sure, chance = naive.size_measures(size, first, 2 * first + 0.5)
    for budget in (100.0, 5000.0):
        windows = naive.allocation(size, sure, chance, budget)
        assert windows.sum().item() == pytest.approx(budget, rel=1e-6)
        free = (windows > naive.TILE * 1.001) & (windows < size)
        ratio = windows[free] / sure[free]
        assert len(ratio) == 0 or ratio.max() / ratio.min() < 1 + 1e-9


@pytest.mark.parametrize("k", [1, 3, 5, 9])
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [*itertools.product((1, 3, 4, 6), [torch.uint8]), *itertools.product((1, 4, 5, 16), [torch.float32])],
)
def test_a_scan_of_every_window_gives_the_exact_numbers(indexed, channels, dtype, k):
    bank, index = indexed(channels, dtype)
    for padding_mode, sigma in (("zeros", 0.02), ("circular", 0.1), ("circular", 0.5), ("zeros", 5.0)):
        z = noisy(bank, sigma, 1, dtype=torch.float32)
        truth = exact(bank, k, padding_mode).estimate(z, sigma)
        machine = pruned(bank, index, k, padding_mode)
        request, group = request_of(machine, z[0], sigma, budget=None)
        found = cpu.scan(request, POLICY).sums
        # A query is rounded to 1/128 of a byte, an error of at most 1/256: it moves a log-weight by that, times the
        # distance of the two windows, over sigma^2; by twice as much between two windows. (A coarser unit is taken
        # for queries beyond the range of pixels.)
        unit, bound = 0.0, 1e-4 if sigma >= 0.05 else 1e-3  # of float32, as the exact engines promise
        if dtype == torch.uint8:
            bound = 1e-4
            unit = 2.0 ** -(1 + encoded(request.windows, torch.uint8, 1.0).shift.double()) / 2 / BYTE
        part = index.at(k)
        # No window is nearer than s lets it be: its log-weight is at least log(s / N).
        nearest = (2 * sigma**2 * (math.log(len(part.ids)) - found.m - found.s.log()).clamp(min=0)[:, 0]).sqrt()
        moved = 2 * unit * (request.windows[0].numel() ** 0.5) * (nearest + 4 * sigma) / sigma**2
        error = (found.mean - inside(truth.mean[0], group)).abs().amax(1)
        assert (error <= bound + 2 * moved).all()
        assert not found.stderr.any()
        assert found.pairs == len(request.windows) * len(part.ids)


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_instruction_sets_agree(either, level, monkeypatch):
    if level not in native.native.simd_levels():
        pytest.skip(f"this machine has no {level}")
    bank, index = either
    z = noisy(bank, 0.7, 1, dtype=torch.float32)
    request, _ = request_of(pruned(bank, index), z[0], 0.7, budget=None)
    widest = cpu.scan(request, POLICY).sums
    monkeypatch.setenv("PATCHSCORE_SIMD", level)
    found = cpu.scan(request, POLICY).sums
    assert (found.mean - widest.mean).abs().max() < 1e-5
    assert (found.s.log() + found.m - widest.s.log() - widest.m).abs().max() < 1e-4


# The random parts, by statistics.


def naive_estimates(part, window, sigma, budget, draws, known=0, policy=POLICY):
    """Estimates of one query by the definition, which knows the heaviest windows, and the exact mean."""
    windows = part.pixels(part.ids[:])
    weights = -(windows - window).double().square().flatten(1).sum(1) / (2 * sigma**2)
    reference = weights.max()
    weights = (weights - reference).exp()
    r = part.k // 2
    values = windows[:, :, r, r]
    features, rest = part.project(window[None])
    first, second = naive.expected_log_weights(features[0], rest[0], part.cells, sigma, len(part.centre))
    moments = first - reference, second - 2 * reference
    generator = torch.Generator().manual_seed(0)
    heavy = weights.argsort(descending=True)[:known].tolist()
    found = [
        naive.estimate(weights, values, part.cells, moments, budget, generator, policy, heavy) for _ in range(draws)
    ]
    return found, (weights[:, None] * values).sum(0) / weights.sum(), weights.sum()


UNTRIMMED = dataclasses.replace(POLICY, trimming=0.0)

ANYWHERE = dataclasses.replace(POLICY, reach=math.inf)
"""Queries far from the bank are sampled, too."""

ONCE = dataclasses.replace(UNTRIMMED, unknown=1e9, misfit=1e9)
"""No pixel is sampled again: what decides that is the sample itself, which biases the sums that are kept."""


# The contract: what the definition and the scan both promise, for one pixel and many draws.


def drawn_by_definition(request, draws, policy, known):
    budget = request.competing * request.budget
    found, mean, total = naive_estimates(request.part, request.windows[0], request.sigma, budget, draws, known, policy)
    return [(x.s / total, x.mean, x.stderr, x.s**2 / x.s2) for x in found], mean


def drawn_by_scan(request, draws, policy, known, scan=cpu.scan):
    policy = dataclasses.replace(policy, known=known)
    whole = cpu.scan(dataclasses.replace(request, budget=None), policy).sums
    found = []
    for seed in range(draws):
        x = scan(dataclasses.replace(request, key=1000 + seed), policy).sums
        found.append(((x.s.log() + x.m - whole.s.log() - whole.m).exp()[0, 0], x.mean[0], x.stderr[0], x.ess[0, 0]))
    return found, whole.mean[0]


def drawn_by_gpu(request, draws, policy, known):
    """With kernels in plain torch, as test_pruned_gpu.py holds Triton's to these."""
    with plain_kernels():
        return drawn_by_scan(request, draws, policy, known, gpu.scan)


BACKENDS = {"definition": drawn_by_definition, "scan": drawn_by_scan, "gpu": drawn_by_gpu}


def pixel_of(larger, folder, sigma, pixel, budget):
    bank, _ = larger
    index = ps.PatchIndex.build(bank, 3, folder / "i", cells=96, progress=False)
    z = noisy(bank, sigma, dtype=torch.float32)
    request, _ = request_of(pruned(bank, index, budget=budget), z[0], sigma)
    return dataclasses.replace(request, windows=request.windows[pixel : pixel + 1], columns=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", [0, 8])
@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_the_sum_of_weights_is_unbiased(larger, tmp_path, backend, known, sigma):
    request = pixel_of(larger, tmp_path, sigma, 70, 0.02)
    found, _ = BACKENDS[backend](request, 60, UNTRIMMED, known)
    s = torch.stack([x[0] for x in found])
    t = (s.mean() - 1) / (s.std() / len(s) ** 0.5).clamp(min=1e-6)
    assert z_of_t(abs(t.item()), len(s) - 1) < LARGEST_Z


@pytest.mark.parametrize(
    ("which", "sigma", "policy"),
    [
        ("larger", 0.5, UNTRIMMED),
        ("larger", 3.0, UNTRIMMED),
        ("latents", 3.0, ONCE),
        ("tiled", 0.5, ONCE),
        ("tiled", 3.0, ONCE),
    ],
)
def test_the_engine_is_unbiased(request, which, sigma, policy):
    bank, index = request.getfixturevalue(which)
    sigma = sigma * bank.scale
    z = noisy(bank, sigma, dtype=torch.float32)
    request, _ = request_of(pruned(bank, index, budget=0.02), z[0], sigma)
    whole = cpu.scan(dataclasses.replace(request, budget=None), POLICY).sums
    seeds = [cpu.scan(dataclasses.replace(request, key=1000 + seed), policy).sums for seed in range(50)]
    s = torch.stack([(x.s.log() + x.m - whole.s.log() - whole.m).exp() for x in seeds])[..., 0]
    scores = (s.mean(0) - 1) / (s.std(0) / len(s) ** 0.5).clamp(min=1e-6)
    assert z_of_t(scores.abs().max().item(), len(s) - 1) < NormalDist().inv_cdf(1 - SURE / 2 / s.shape[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sigma", [0.5, 1.5, 6.0])
def test_the_standard_error_of_a_pixel_covers(larger, tmp_path, backend, sigma):
    hits, draws = {1: 0, 2: 0, 3: 0}, 0
    for pixel in (18, 133):
        request = pixel_of(larger, tmp_path / str(pixel), sigma, pixel, 0.05)
        found, truth = BACKENDS[backend](request, 40, POLICY, 8)
        for _, mean, stderr, _ in found:
            # Channels share their draws.
            away = ((mean - truth).abs() / stderr.clamp(min=1e-4)).amax().item()
            for times in hits:
                hits[times] += away <= times
            draws += 1
    # The largest of three correlated errors: what independent normal ones promise, and 1 / 2 / 3 of 63 / 93 / 98.5%.
    for times, promised in ((1, 0.63**3), (2, 0.93**3), (3, 0.985**3)):
        assert proportion_at_least(hits[times], draws, promised), (times, hits[times] / draws)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 6.0])
def test_an_estimate_is_a_convex_combination(larger, tmp_path, backend, sigma):
    request = pixel_of(larger, tmp_path, sigma, 70, 0.01)
    values = request.part.pixels(request.part.ids)[:, :, 1, 1]
    for _, mean, stderr, ess in BACKENDS[backend](request, 20, ANYWHERE, 8)[0]:
        assert (values.amin(0) - 1e-6 <= mean).all()
        assert (mean <= values.amax(0) + 1e-6).all()
        assert ess >= 1 - 1e-6
        assert stderr.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", [0, 8])
def test_of_all_windows_nothing_is_left_to_chance(larger, tmp_path, backend, known):
    request = pixel_of(larger, tmp_path, 1.0, 70, 1.0)
    found, truth = BACKENDS[backend](request, 3, POLICY, known)
    for s, mean, stderr, _ in found:
        assert abs(s - 1) < 1e-6
        assert ((mean - truth).abs() < 1e-6).all()
        assert not stderr.any()


def test_what_is_beyond_a_share_of_the_sum_is_trimmed():
    """Of 16 windows evaluated each is at most a quarter of the sum, or itself; values go with their weights."""
    s, v, s2 = torch.tensor(100.0).double(), torch.tensor([55.0, -20.0]).double(), torch.tensor(500.0).double()
    heavy = [(9.0, 3.0, torch.tensor([1.0, 1.0]).double()), (70.0, 2.0, torch.tensor([0.5, -0.5]).double())]
    trimmed = naive.trimmed(s, v, s2, heavy, 16, POLICY)
    # The others add up to 30, so 70 becomes 10, a quarter of 40; 9 is less than a quarter of that.
    assert trimmed[0] == 40
    assert trimmed[1].tolist() == [25.0, 10.0]
    assert trimmed[2] == 380  # a window of weight 2 stands for 5 like it, no longer for 35
    assert naive.trimmed(s, v, s2, [(70.0, 30.0, heavy[1][2])], 16, POLICY)[0] == 60  # what was found counts
    assert naive.trimmed(s, v, s2, heavy, 16, UNTRIMMED)[0] == s


def test_variances_are_drawn_to_the_mean_of_the_image():
    generator, close = torch.Generator().manual_seed(0), partial(torch.testing.assert_close, atol=1e-12, rtol=1e-9)
    draw = partial(torch.rand, generator=generator, dtype=torch.float64)
    s, v = 10 * draw(50, 1) + 1, draw(50, 3)
    ss, noise, mean = draw(50, 1), 0.1 * draw(50, 3), v / s
    vs = mean * ss + noise / 10
    vv = 2 * mean * vs - mean**2 * ss + noise  # the variance of the ratio is noise / s^2
    sums = PosteriorSum(s.log(), s, v, s**2, vv, vs, ss, v2=v**2, sl=s, qq=0.1 * draw(50, 3), ee=draw(50, 1))
    fits = torch.arange(50) % 7 != 3
    got = naive.pooled(sums, fits, 0.25)
    for name in ("stderr", "variance_stderr", "entropy_stderr"):
        before, after = getattr(sums, name).square(), getattr(got, name).square()
        close(after, 0.75 * before + 0.25 * before[fits].mean(0))
    close(got.ss / s**2, 0.75 * ss / s**2 + 0.25 * (ss / s**2)[fits].mean(0))
    close(got.mean, sums.mean)
    assert naive.pooled(sums, torch.zeros_like(fits), 0.25) is sums


@pytest.mark.parametrize("which", ["larger", "latents"])
def test_trimmed_weights_are_those_of_the_definition(request, which, tmp_path):
    """The sums of the scan and of the definition have one distribution, trimmed as they are."""
    bank, _ = request.getfixturevalue(which)
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", cells=96, progress=False)
    sigma, pixel, draws = 0.5 * bank.scale, 18, 120
    z = noisy(bank, sigma, dtype=torch.float32)
    policy = dataclasses.replace(POLICY, known=0, pilot=0.0, opened_from=1e-9, unknown=1e9, misfit=1e9)
    request, _ = request_of(pruned(bank, index, budget=0.02), z[0], sigma)
    request = dataclasses.replace(request, windows=request.windows[pixel : pixel + 1], columns=0)
    whole = cpu.scan(dataclasses.replace(request, budget=None), policy).sums
    found, _, total = naive_estimates(
        index.at(3), request.windows[0], request.sigma, 0.02 * request.competing, draws, policy=policy
    )
    by_definition = torch.stack([x.s for x in found]) / total
    seeds = [cpu.scan(dataclasses.replace(request, key=1000 + seed), policy).sums for seed in range(draws)]
    scanned = torch.stack([(x.s.log() + x.m - whole.s.log() - whole.m).exp() for x in seeds]).flatten()
    z = (by_definition.mean() - scanned.mean()) / ((by_definition.var() + scanned.var()) / draws).sqrt()
    assert abs(z.item()) < LARGEST_Z
    means = torch.stack([x.mean for x in found]), torch.stack([x.mean[0] for x in seeds])
    z = (means[0].mean(0) - means[1].mean(0)) / ((means[0].var(0) + means[1].var(0)) / draws).sqrt()
    assert z.abs().max() < LARGEST_Z
    untrimmed = [
        cpu.scan(dataclasses.replace(request, key=1000 + seed), dataclasses.replace(policy, trimming=0.0)).sums
        for seed in range(draws)
    ]
    logs = [x.s.log() + x.m for x in untrimmed], [x.s.log() + x.m for x in seeds]
    assert all(a >= b - 1e-9 for a, b in zip(*logs, strict=True))
    assert any(a > b + 1e-3 for a, b in zip(*logs, strict=True))


def test_whole_images_are_drawn_where_weights_are_flat(tmp_path, monkeypatch):
    """With an index too; pixels of the interior are covered, and so is a tolerance, without a look at any cell."""
    bank = bank_of(1, count=400, height=11, width=11)
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", progress=False)
    sigma, draws = 10.0, 12
    z = noisy(bank, sigma, 1, dtype=torch.float32)
    scans = []
    monkeypatch.setattr(cpu, "scan", lambda request, policy: scans.append(request))
    truth = exact(bank).denoise(z, sigma)
    seeds = [pruned(bank, index, budget=0.01, seed=seed).estimate(z, sigma) for seed in range(draws)]
    assert not scans
    assert all(found.pairs < exact(bank).estimate(z, sigma).pairs / 2 for found in seeds)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    # Pixels of one draw err together: a draw counts once, by its mean.
    away = torch.stack([(found.mean - truth)[inner].mean() for found in seeds])
    largest = torch.stack([found.stderr[inner].amax() for found in seeds])
    assert proportion_at_least(int((away.abs() <= 2 * largest).sum()), draws, 0.95)
    assert away.abs().max() > 0
    for tolerance in (0.05, 0.02):
        found = pruned(bank, index, tolerance=tolerance).estimate(z, sigma)
        assert rms(found.stderr[inner]) <= tolerance
    assert not scans
    assert pruned(bank, index, budget=0.01).estimate(z, 0.5).engine == "pruned and sliding"
    assert scans


def test_auto_takes_exact_sums_where_they_are_faster(larger, tmp_path):
    """Of few windows, for large budgets; a machine that names its engine gets it."""
    bank, index = larger
    z = noisy(bank, 0.5, dtype=torch.float32)
    machine = ps.EquivariantLocalScore(bank, 3, index=index, budget=0.01)
    found = machine.estimate(z, 0.5)
    assert found.engine == "sliding"
    assert torch.equal(found.mean, exact(bank).denoise(z, 0.5))
    assert "pruned" in pruned(bank, index, budget=0.01).estimate(z, 0.5).engine
    (group,) = (g for g in machine.competition(3).groups if not g.rows.locked and not g.cols.locked)
    alone = machine.competition(3).only((group,))
    sliding = next(engine for engine in machine.engines if engine.name == "sliding" and engine.runs_on(z.device))

    def seconds(engine, count):
        # Of a bank of so many images: only its length is asked for.
        return engine.seconds(z, torch.ones(1), range(count), alone)

    sampling = engine.Pruned(index, 0.001, None, 0)
    assert seconds(sampling, 100) > seconds(sliding, 100)
    assert seconds(sampling, 100_000) < seconds(sliding, 100_000)
    # A tolerance takes at least what its search begins with.
    begun, within = engine.Pruned(index, POLICY.pilot_budget, None, 0), engine.Pruned(index, None, 0.1, 0)
    assert seconds(within, 100_000) == seconds(begun, 100_000)


def test_trimming_lowers_the_error_where_few_windows_decide(larger):
    bank, index = larger
    z = noisy(bank, 0.5, dtype=torch.float32)
    request, _ = request_of(pruned(bank, index, budget=0.02), z[0], 0.5)
    truth = cpu.scan(dataclasses.replace(request, budget=None), POLICY).sums.mean
    error, bias = {}, {}
    for policy in (POLICY, UNTRIMMED):
        found = [cpu.scan(dataclasses.replace(request, key=seed), policy).sums for seed in range(20)]
        away = torch.stack([x.mean for x in found]) - truth
        stated = torch.stack([x.stderr for x in found])
        error[policy], bias[policy] = rms(away), rms(away.mean(0)) / rms(stated)
    assert error[POLICY] < error[UNTRIMMED]
    # What 20 draws of unbiased estimates leave is 1 / sqrt(20) of an error; the bias is a part of what is stated.
    assert bias[POLICY] < 1


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5])
def test_a_trimmed_weight_leaves_an_effective_sample_size_of_one_or_more(larger, sigma):
    bank, index = larger
    z = noisy(bank, sigma, dtype=torch.float32)
    request, _ = request_of(pruned(bank, index, budget=0.005), z[0], sigma)
    for known in (0, POLICY.known):
        policy = dataclasses.replace(ANYWHERE, known=known)
        found = [cpu.scan(dataclasses.replace(request, key=seed), policy).sums for seed in range(10)]
        assert min(x.ess.min() for x in found) >= 1 - 1e-6


@pytest.mark.parametrize("k", [3, 9])
@pytest.mark.parametrize("sigma", [0.5, 1.5, 6.0])
def test_the_standard_error_covers(larger, k, sigma):
    bank, index = larger
    z = noisy(bank, sigma, 1, dtype=torch.float32)
    truth = exact(bank, k).denoise(z, sigma)
    inner = truth.new_zeros(truth.shape, dtype=torch.bool)
    inner[:, :, k // 2 : -(k // 2), k // 2 : -(k // 2)] = True
    hits, draws = {1: 0, 2: 0, 3: 0}, 0
    for seed in range(30):
        found = pruned(bank, index, k, budget=0.03, seed=seed).estimate(z, sigma)
        sampled = inner & (found.stderr > 0)
        error = (found.mean - truth).abs()[sampled]
        for times in hits:
            hits[times] += int((error <= times * found.stderr[sampled] + 1e-4).sum())
        draws += len(error)
    # Pixels of one image share draws: a seed counts as one draw for 16 of its pixels.
    for times, promised in ((1, 0.63), (2, 0.93), (3, 0.985)):
        assert draws == 0 or proportion_at_least(hits[times] // 16, draws // 16, promised), (times, hits[times] / draws)


def test_the_error_falls_with_the_budget(larger):
    """At a noise level at which few pixels are unlike the bank: these are summed exactly, at any budget."""
    bank, index = larger
    z = noisy(bank, 2.0, 2, dtype=torch.float32)
    truth = exact(bank).denoise(z, 2.0)
    estimates = [pruned(bank, index, budget=budget).estimate(z, 2.0) for budget in (0.01, 0.05, 0.19)]
    errors = [rms(e.mean - truth) for e in estimates]
    assert errors[0] > errors[1] > errors[2]
    assert estimates[0].pairs < estimates[1].pairs < estimates[2].pairs


# Any z: the errors that cannot be known are not stated small.


def foreign(kind, bank, sigma):
    generator = torch.Generator().manual_seed(3)
    eps = torch.randn(1, *bank.shape, generator=generator)
    if kind == "noise":
        return 5 * eps
    if kind == "constant":
        return 0.9 + sigma * eps
    i, j = torch.meshgrid(torch.arange(bank.shape[1]), torch.arange(bank.shape[2]), indexing="ij")
    return ((i + j) % 2 * 2.0 - 1).expand(1, *bank.shape) + sigma * eps


def test_cells_evaluated_whole_are_no_misfit(tmp_path):
    """They may hold far less than their moments let expect: that is then known, and nothing is left to doubt."""
    generator = torch.Generator().manual_seed(0)
    level = torch.where(torch.arange(60) < 6, -0.5, 0.5).view(-1, 1, 1, 1)
    images = level + 0.1 * torch.randn(60, 1, 12, 12, generator=generator).sign()
    bank = ps.PatchBank(((images + 1) * 127.5).round().clamp(0, 255).byte())
    index = ps.PatchIndex.build(bank, [3], tmp_path, cells=16, progress=False)
    machine = pruned(bank, index, budget=0.15)
    # At the middle of the small group, from which its windows lie three standard deviations away, all of them.
    request, _ = request_of(machine, torch.full((1, 12, 12), -0.5), 0.05)
    part, windows, count = request.part, len(request.part.ids), len(request.windows)
    features, rest = part.project(request.windows[:1])
    first, _ = naive.expected_log_weights(features[0], rest[0], part.cells, 0.05, 9)
    expected = (first + part.cells.size.double().log()).logsumexp(0).item()
    assert expected - native_weights(request)[0].logsumexp(0).item() > 1.5 * POLICY.misfit * math.log(2)
    found = cpu.scan(request, ANYWHERE)
    assert found is not None
    assert found.fits.all()
    assert found.sums.pairs < 0.25 * windows * count


@pytest.mark.parametrize("budget", [1e-3, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["noise", "constant", "checkerboard"])
def test_no_error_of_a_tenth_is_silent_for_foreign_images(larger, kind, budget):
    bank, index = larger
    for k, sigma in itertools.product((3, 9), (0.02, 0.1, 0.5, 2.0)):
        z = foreign(kind, bank, sigma)
        truth = exact(bank, k).denoise(z, sigma)
        found = pruned(bank, index, k, budget=budget).estimate(z, sigma)
        error = (found.mean - truth).abs()
        assert not ((error > 0.1) & (found.stderr < 0.02)).any()
        beyond = int((error > 5 * found.stderr + 1e-3).sum())
        assert beyond <= 0.01 * error.numel()


@pytest.mark.parametrize("budget", [1.0, 0.2, 0.02, 1e-4])
@pytest.mark.parametrize("sigma", [1e-6, 1e-4, 0.01, 0.1, 1.0, 10.0, 100.0, 1e4])
def test_estimates_are_convex_combinations_and_never_nan(indexed, budget, sigma):
    bank, index = indexed()
    low, high = bank.chunk(0, len(bank)).aminmax()
    for padding_mode, labels in (("zeros", None), ("circular", 1)):
        z = noisy(bank, sigma, dtype=torch.float32)
        found = pruned(bank, index, 5, padding_mode, budget=budget).estimate(z, sigma, labels)
        for part in (found.mean, found.stderr, found.ess):
            assert torch.isfinite(part).all()
        assert found.mean.min() >= low - 1e-5
        assert found.mean.max() <= high + 1e-5
        assert found.ess.min() > 1 - 1e-5
        assert (found.stderr >= 0).all()


def test_small_classes_stay_in_range(tmp_path):
    # Fault 2: a bank of 100, two classes of a few images, sigma 2; means left [-1, 1] by a factor of 21.
    images_ = smooth_images(30, 1, 16, 16)
    bank = ps.PatchBank(images_, torch.arange(30) % 10)
    index = ps.PatchIndex.build(bank, [3, 5], tmp_path / "i", progress=False)
    for seed, k in itertools.product(range(6), (3, 5)):
        z = bank.chunk(0, 2) + 2 * torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
        found = pruned(bank, index, k, budget=0.05).estimate(z, 2.0, [0, 1])
        assert found.mean.abs().max() <= 1 + 1e-5
        assert found.ess.min() > 1 - 1e-5


def test_an_outlier_in_the_bank_is_not_silently_missed(tmp_path):
    images_ = smooth_images(60, 3, 16, 16)
    images_[7] = torch.randint(256, images_[7].shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    bank = ps.PatchBank(images_)
    index = ps.PatchIndex.build(bank, 5, tmp_path / "i", progress=False)
    silent = 0
    for seed, budget in itertools.product(range(5), (0.003, 0.03)):
        z = bank.chunk(7, 8) + 0.1 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        truth = exact(bank, 5).denoise(z, 0.1)
        found = pruned(bank, index, 5, budget=budget).estimate(z, 0.1)
        silent += int((((found.mean - truth).abs() > 0.1) & (found.stderr < 0.02)).sum())
    assert silent == 0


@pytest.mark.parametrize("sigma", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("tolerance", [0.003, 0.02, 0.05])
def test_a_tolerance_is_met(larger, sigma, tolerance):
    bank, index = larger
    z = noisy(bank, sigma, 2, dtype=torch.float32)
    truth = exact(bank).estimate(z, sigma)
    estimate = pruned(bank, index, tolerance=tolerance).estimate(z, sigma)
    assert rms(estimate.stderr) <= tolerance
    assert rms(estimate.mean - truth.mean) < 1.5 * tolerance


# Exact where exact is cheaper.


@pytest.mark.parametrize("budget", [0.2, 1.0])
def test_large_budgets_are_served_exactly(indexed, budget):
    bank, index = indexed()
    z = noisy(bank, 0.5, dtype=torch.float32)
    found = pruned(bank, index, budget=budget).estimate(z, 0.5)
    assert torch.equal(found.mean, exact(bank).denoise(z, 0.5))
    assert not found.stderr.any()
    assert found.engine == "sliding"


def test_edges_are_exact_and_the_interior_has_an_error(larger):
    bank, index = larger
    z = noisy(bank, 4.0, dtype=torch.float32)
    found = pruned(bank, index, 9, budget=0.02).estimate(z, 4.0)
    truth = exact(bank, 9).denoise(z, 4.0)
    edges = torch.ones(18, 18, dtype=torch.bool)
    edges[4:-4, 4:-4] = False
    assert (found.mean - truth)[..., edges].abs().max() < 1e-5  # groups are walked one by one
    assert not found.stderr[..., edges].any()
    assert found.stderr[..., ~edges].any()


def test_classes_compete_from_one_index(larger):
    bank, index = larger
    z = noisy(bank, 1.0, 4, dtype=torch.float32)
    labels = [0, 1, None, 2]
    found = pruned(bank, index, budget=0.05).estimate(z, 1.0, labels)
    truth = exact(bank).denoise(z, 1.0, labels)
    assert ((found.mean - truth).abs() <= 5 * found.stderr + 1e-4).double().mean() > 0.999
    assert rms(found.mean - truth) < 0.1
    request, group = request_of(pruned(bank, index), z[0], 1.0, budget=None)
    allowed = (bank.labels == 1).to(torch.uint8)
    whole = cpu.scan(dataclasses.replace(request, allowed=allowed), POLICY).sums
    assert (whole.mean - inside(exact(bank).denoise(z[:1], 1.0, 1)[0], group)).abs().max() < 1e-4


def test_an_index_of_a_selection_serves_a_bank_of_the_same_images(tmp_path):
    whole = bank_of()
    chosen = whole.select([1, 2])
    apart = ps.PatchBank(whole.images[chosen.indices], chosen.labels)
    index = ps.PatchIndex.build(chosen, 3, tmp_path / "i", progress=False)
    z = noisy(apart, 0.3, 2, dtype=torch.float32)
    for label in (None, 1, 2):
        answers = [pruned(bank, index, budget=0.1).denoise(z, 0.3, label) for bank in (chosen, apart)]
        assert torch.equal(*answers)


# The same numbers again.


def test_the_seed_decides_and_nothing_else(larger):
    bank, index = larger
    z = noisy(bank, 1.0, 3, dtype=torch.float32)
    first = pruned(bank, index, budget=0.05, seed=3).estimate(z, 1.0)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = pruned(bank, index, budget=0.05, seed=3).estimate(z, 1.0)
            assert torch.equal(first.mean, again.mean)
            assert torch.equal(first.stderr, again.stderr)
            assert first.pairs == again.pairs
    finally:
        torch.set_num_threads(threads)
    machine = pruned(bank, index, budget=0.05, seed=3)
    alone = torch.cat([machine.denoise(z[i : i + 1], 1.0) for i in range(3)])
    assert torch.equal(alone, first.mean)
    assert torch.equal(machine.denoise(z[[2, 0]], 1.0), first.mean[[2, 0]])
    assert not torch.equal(first.mean, pruned(bank, index, budget=0.05, seed=4).denoise(z, 1.0))


def test_draws_of_two_images_are_independent(larger):
    bank, index = larger
    z = noisy(bank, 6.0, 1, dtype=torch.float32)
    z = torch.cat([z, z + 1e-3])
    truth = exact(bank).denoise(z, 6.0)
    errors = torch.stack([pruned(bank, index, budget=0.02, seed=s).denoise(z, 6.0) - truth for s in range(40)])
    one, two = errors[:, 0, :, 9, 9].flatten(), errors[:, 1, :, 9, 9].flatten()
    correlation = torch.corrcoef(torch.stack([one, two]))[0, 1].item()
    # Channels share their draws, so 40 independent pairs.
    assert abs(np.arctanh(correlation)) * 37**0.5 < LARGEST_Z


def test_another_process_gives_the_same_numbers(larger, tmp_path):
    bank, index = larger
    z = noisy(bank, 1.0, dtype=torch.float32)
    np.savez(tmp_path / "in.npz", images=bank.images.numpy(), labels=bank.labels.numpy(), z=z.numpy())
    code = """
import sys, numpy as np, torch, patchscore as ps
held = np.load(sys.argv[1])
bank = ps.PatchBank(held["images"], held["labels"])
index = ps.PatchIndex.open(sys.argv[2], bank)
machine = ps.EquivariantLocalScore(bank, 3, engine="pruned", index=index, budget=0.05, seed=5)
np.save(sys.argv[3], machine.denoise(torch.from_numpy(held["z"]), 1.0).numpy())
"""
    where = [str(tmp_path / "in.npz"), str(index.path), str(tmp_path / "out.npy")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, *where], check=True, env=environment, timeout=300)
    here = pruned(bank, index, budget=0.05, seed=5).denoise(z, 1.0)
    assert torch.equal(torch.from_numpy(np.load(where[2])), here)


# Without an index: a sample of images.


@pytest.mark.parametrize("machine", [ps.LocalScore, ps.EquivariantLocalScore])
def test_a_sample_of_images_covers(machine):
    bank = bank_of(3, count=400, height=10, width=10)
    for sigma in (1.0, 8.0):
        z = noisy(bank, sigma, 1, dtype=torch.float32)
        truth = machine(bank, 3).denoise(z, sigma)
        hits, draws, errors = 0, 0, []
        for seed in range(25):
            found = machine(bank, 3, budget=0.2, seed=seed).estimate(z, sigma)
            assert found.engine == "pruned"
            error = (found.mean - truth).abs()
            errors.append(rms(error) / rms(found.stderr))
            hits += int((error <= 2 * found.stderr).sum())
            draws += error.numel()
        # All pixels of a call share the images drawn: 8 draws a call.
        assert proportion_at_least(8 * 25 * hits // draws, 8 * 25, 0.9)
        assert 0.3 < np.median(errors) < 1.5


def test_a_sample_of_images_knows_when_one_image_decides():
    bank = bank_of(3, count=200, height=10, width=10)
    z = bank.chunk(0, 1) + 0.05 * torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    truth = ps.LocalScore(bank, 5).denoise(z, 0.05)
    for seed in range(5):
        found = ps.LocalScore(bank, 5, budget=0.05, seed=seed).estimate(z, 0.05)
        assert not (((found.mean - truth).abs() > 0.1) & (found.stderr < 0.02)).any()


def test_the_whole_bank_in_groups_has_no_error():
    bank = bank_of(3, count=32, height=8, width=8)
    z = noisy(bank, 1.0, dtype=torch.float32)
    sums = [
        ps.LocalScore(images.subset(bank, torch.arange(g, 32, 4)), 3).exact_sums(
            z, torch.tensor([1.0]).double(), images.subset(bank, torch.arange(g, 32, 4)),
            [ps.LocalScore(bank, 3).competition(3)],
        )[0]
        for g in range(4)
    ]  # fmt: skip
    found = images.combine(sums, 32, 32, images.pixel_moments(bank, torch.arange(32)))
    assert (found.mean - ps.LocalScore(bank, 3).denoise(z, 1.0)).abs().max() < 1e-5
    assert not found.stderr.any()


# Latents: floats of several channels, in units of their own.


def test_where_most_pixels_are_unknown_exact_sums_serve_at_once(larger, monkeypatch):
    """Sampled again and again they would take several times what exact sums do."""
    bank, index = larger
    z = torch.randn(1, *bank.shape, generator=torch.Generator().manual_seed(1))  # noise, unlike the bank
    machine = pruned(bank, index, budget=0.01)
    machine.pruned.policy = ANYWHERE  # far from the bank nothing would be sampled at all
    asked, scan = [], cpu.scan
    monkeypatch.setattr(cpu, "scan", lambda *given: asked.append(scan(*given)) or asked[-1])
    found = machine.estimate(z, 0.05)
    assert not asked[0].fits.all()
    # Budgets of 1%, 2%, 4% and 8%: the next would exceed 10%.
    count = asked[0].fits.numel()
    assert asked[0].sums.pairs < 0.16 * len(index.at(3).ids) * count
    assert torch.equal(found.mean, exact(bank).denoise(z, 0.05))
    assert not found.stderr.any()


@pytest.mark.parametrize("backend", [cpu, gpu], ids=["scan", "gpu"])
@pytest.mark.parametrize("kind", ["checkerboard", "noise"])
def test_far_from_the_bank_nothing_is_sampled(larger, monkeypatch, backend, kind):
    """There the moments of cells say nothing of their windows: errors of 0.3 would be stated as zero."""
    (bank, index), asked, scan = larger, [], backend.scan
    monkeypatch.setattr(cpu, "scan", lambda *given: asked.append(scan(*given)) or asked[-1])
    generator, sigma = torch.Generator().manual_seed(1), 0.1
    rows, cols = torch.meshgrid(*(torch.arange(size) for size in bank.shape[1:]), indexing="ij")
    foreign = (rows + cols) % 2 * 2.0 - 1 if kind == "checkerboard" else torch.randn(bank.shape, generator=generator)
    z = foreign + sigma * torch.randn(1, *bank.shape, generator=generator)
    for label, budget in ((None, 0.001), (0, 0.001), (0, 0.1), (None, 0.1)):
        with plain_kernels():
            found = pruned(bank, index, budget=budget).estimate(z, sigma, label)
        assert (found.mean - exact(bank).denoise(z, sigma, label)).abs().max() < 1e-6
        assert not found.stderr.any()
        if backend is gpu:
            assert asked[-1] is None
        else:
            assert not asked[-1].fits.any()
    if backend is cpu:  # the search for heavy windows, a quarter of the budget, and neighbours' proposals
        assert asked[-1].sums.pairs < 0.5 * 0.1 * len(index.at(3).ids) * len(asked[-1].fits)


def test_the_reach_of_moments_is_a_scatter_of_log_weights():
    """Of N windows about a centre, at the distance where their log-weights scatter by (2 log N)^(1/2)."""
    spread, sigma, windows = 0.03, 0.4, 10_000
    away = (-2 * sigma**2 * naive.least_log_weight(spread, sigma, windows)) ** 0.5
    cell = spread**0.5 * torch.randn(windows, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query = torch.zeros(25).double()
    query[0] = away
    # To first order in the windows' offsets: the second is a common factor and a far smaller scatter.
    scatter = ((cell * query).sum(1) / sigma**2).std().item()
    assert scatter == pytest.approx((2 * math.log(windows)) ** 0.5, rel=3 / (2 * windows) ** 0.5)


def test_rectangles_hold_every_marked_pixel_and_little_else():
    generator = torch.Generator().manual_seed(0)
    for share, apart in itertools.product((0.0, 0.02, 0.2, 1.0), (0, 3, 5, 20)):
        marked = torch.rand(26, 26, generator=generator) < share
        found = engine.rectangles(marked, apart)
        covered = torch.zeros(26, 26)
        for rows, cols in found:
            covered[rows.start : rows.stop, cols.start : cols.stop] += 1
        assert (covered[marked] == 1).all()
        assert covered.max() <= 1
    corners = torch.zeros(13, 9, dtype=torch.bool)
    corners[0, 0] = corners[1, 1] = corners[12, 8] = True
    assert sorted(engine.rectangles(corners, 5), key=str) == [(range(0, 2), range(0, 2)), (range(12, 13), range(8, 9))]


def test_pixels_unlike_the_bank_get_the_exact_sums(larger):
    """A bright square in an image of the bank: its pixels alone, and those whose patches it touches."""
    (bank, index), k = larger, 3
    z = noisy(bank, 1.0, dtype=torch.float32)
    z[..., 6:9, 6:9] += 8
    machine = pruned(bank, index, k, budget=0.02)
    request, group = request_of(machine, z[0], 1.0, key=draw_key(machine.pruned.seed, k, 1.0, z[0]))
    unlike = ~cpu.scan(request, POLICY).fits.view(len(group.rows.queries), len(group.cols.queries))
    assert unlike.any()
    assert not unlike.all()
    found, truth = machine.estimate(z, 1.0), exact(bank, k).estimate(z, 1.0)
    error, stderr = ((inside(x[0], group))[unlike.flatten()] for x in (found.mean - truth.mean, found.stderr))
    assert error.abs().max() < 1e-5
    assert not stderr.any()
    assert found.stderr.any()


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("sigma", [1.5, 5.0])
def test_the_standard_error_of_latents_covers(latents, k, sigma):
    bank, index = latents
    z = noisy(bank, sigma, 1, dtype=torch.float32)
    truth = exact(bank, k).denoise(z, sigma)
    hits, draws = {1: 0, 2: 0, 3: 0}, 0
    for seed in range(20):
        machine = pruned(bank, index, k, budget=0.03, seed=seed)
        machine.pruned.policy = dataclasses.replace(ANYWHERE, exact_pixels=0)  # or else exact sums serve
        found = machine.estimate(z, sigma)
        sampled = found.stderr > 0
        error = (found.mean - truth).abs()[sampled]
        for times in hits:
            hits[times] += int((error <= times * found.stderr[sampled] + 1e-4).sum())
        draws += len(error)
    assert draws > 0
    # Pixels of one image share draws, and channels those of a pixel: a seed counts as one draw for 32 of its values.
    for times, promised in ((1, 0.63), (2, 0.93), (3, 0.985)):
        assert proportion_at_least(hits[times] // 32, draws // 32, promised), (times, hits[times] / draws)


def test_latents_have_the_numbers_of_the_same_images_in_other_units(latents, tmp_path):
    """Divided by 4, exactly, with the noise: the same draws, and a tolerance, divided too."""
    bank, index = latents
    other = ps.PatchBank(bank.chunk(0, len(bank)) / 4, bank.labels, value_range="data")
    index4 = ps.PatchIndex.build(other, [3], tmp_path / "i", progress=False)
    z = noisy(bank, 5.0, 2, dtype=torch.float32)
    for labels, share in ((None, {"budget": 0.02}), ([0, 1], {"budget": 0.05}), (None, {"tolerance": 0.1})):
        share4 = {name: x / 4 if name == "tolerance" else x for name, x in share.items()}
        one = pruned(bank, index, **share).estimate(z, 5.0, labels)
        two = pruned(other, index4, **share4).estimate(z / 4, 1.25, labels)
        assert "pruned" in one.engine
        assert torch.equal(one.mean, 4 * two.mean)
        assert torch.equal(one.stderr, 4 * two.stderr)
    assert 0 < rms(one.stderr) <= 0.1
    again = pruned(bank, index, budget=0.5).within(0.1).estimate(z, 5.0)
    assert torch.equal(again.mean, one.mean)


def test_floats_in_the_range_of_pixels_give_what_their_bytes_give(larger, tmp_path):
    """Bytes and the floats that they stand for: the same cells, draws and known windows, up to rounding."""
    bank, index = larger
    floats = ps.PatchBank(bank.chunk(0, len(bank)), bank.labels)
    of_floats = ps.PatchIndex.build(floats, 3, tmp_path / "i", progress=False)
    z = noisy(bank, 0.7, dtype=torch.float32)
    one, two = (pruned(*of, budget=0.05).estimate(z, 0.7) for of in ((bank, index), (floats, of_floats)))
    # A tile more or less where an expected weight is rounded otherwise: far below what the sample leaves open.
    assert rms(one.mean - two.mean) < 0.1 * rms(one.stderr)
    assert rms(one.stderr - two.stderr) < 0.1 * rms(one.stderr)


def test_vanishing_noise_and_queries_far_away_give_exact_numbers(latents):
    bank, index = latents
    for sigma, at in ((1e-3, 1.0), (1.0, 1e3), (1.0, 1e10)):
        z = at * noisy(bank, sigma, dtype=torch.float32)
        found = pruned(bank, index, budget=0.02).estimate(z, sigma)
        assert torch.isfinite(found.mean).all()
        if at < 1e6:
            away = (found.mean - exact(bank).denoise(z, sigma)).abs()
            assert (away <= 5 * found.stderr + 1e-3 * bank.scale).double().mean() > 0.99


def test_a_damaged_tile_of_floats_gives_no_nan(tiled):
    bank, index = tiled
    z = noisy(bank, 2.0, 1, dtype=torch.float32)
    request, _ = request_of(pruned(bank, index), z[0], 2.0, budget=None)
    part = copy.copy(request.part)
    part.tiles = np.array(part.tiles)
    part.tiles[::7] = np.nan
    part.tiles[::11] = -np.inf
    found = cpu.scan(dataclasses.replace(request, part=part), POLICY).sums
    for name, sums in found.fields.items():
        assert torch.isfinite(sums).all(), name


# What it does not serve, and what it does not take.


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr("patchscore.engines.base._warned", set())


def test_a_size_the_index_lacks_is_served_exactly(indexed):
    bank, index = indexed()
    z = noisy(bank, 0.5, dtype=torch.float32)
    found = pruned(bank, index, 7).estimate(z, 0.5)
    assert found.engine == "sliding"
    assert torch.equal(found.mean, exact(bank, 7).denoise(z, 0.5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_what_an_index_cannot_compare_is_served_exactly_with_one_warning(tmp_path, unwarned, dtype):
    bank = ps.PatchBank(smooth_images(6, 17, 9, 9, dtype=dtype))
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", progress=False)
    z = noisy(bank, 0.5, dtype=torch.float32)
    machine = ps.EquivariantLocalScore(bank, 3, index=index, budget=0.1)
    with pytest.warns(RuntimeWarning, match="up to 16 channels, not 17"):
        assert machine.estimate(z, 0.5).engine == "sliding"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine.estimate(z, 0.5)


def test_float64_images_get_float64_digits(indexed):
    bank, index = indexed()
    found = ps.EquivariantLocalScore(bank, 3, index=index, budget=0.1).estimate(noisy(bank, 0.5), 0.5)
    assert found.engine == "reference"
    assert not found.stderr.any()


def test_the_choice_is_explained(indexed):
    bank, index = indexed()
    machine = ps.EquivariantLocalScore(bank, 3, index=index, budget=0.1)
    assert machine.engine_on() == "pruned"
    assert machine.explain_choice().startswith("pruned: serves")
    assert ps.EquivariantLocalScore(bank, 3, engine="sliding", index=index, budget=0.1).engine_on() == "sliding"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1.0}, "tolerance: got -1.0"),
        ({"budget": 0.0}, "budget: got 0.0"),
        ({"index": True}, "budget, tolerance: an index takes one of the two"),
        ({"index": True, "budget": 0.1, "tolerance": 0.1}, "an index takes one of the two"),
        ({"index": True, "budget": 1.5}, "budget: got 1.5"),
        ({"index": True, "budget": float("nan")}, "budget: got nan"),
        ({"index": True, "tolerance": float("inf")}, "tolerance: got inf"),
        ({"index": True, "budget": 0.1, "seed": -1}, "seed: got -1"),
        ({"engine": "pruned"}, '"pruned" takes a budget'),
    ],
)
def test_the_machine_names_what_it_does_not_take(indexed, options, message):
    bank, index = indexed()
    if options.get("index"):
        options = {**options, "index": index}
    with pytest.raises(ValueError, match=message):
        ps.EquivariantLocalScore(bank, 3, **options)


def test_another_banks_index_is_refused(indexed):
    _, index = indexed()
    other = bank_of(seed=5)
    with pytest.raises(ValueError, match=f"{index.bank.fingerprint[:16]}.*{other.fingerprint[:16]}"):
        ps.EquivariantLocalScore(other, 3, index=index, budget=0.1)
    with pytest.raises(TypeError, match="index: got str, takes a PatchIndex"):
        ps.EquivariantLocalScore(other, 3, index="cifar.index", budget=0.1)


# The border to C++.

SPOILT = {
    "a cell too few": {"sizes": lambda x: x[:-16].copy()},
    "half a parent": {"sizes": lambda x: x[:-8].copy()},
    "a negative size": {"sizes": lambda x: -x},
    "a huge size": {"sizes": lambda x: np.where(np.arange(len(x)) == 0, 2**62, x)},
    "sizes of int32": {"sizes": lambda x: x.astype(np.int32)},
    "windows too few": {"ids": lambda x: np.asarray(x[:-1])},
    "windows of other images": {"ids": lambda x: np.asarray(x) + 2**40, "tiles": lambda x: None},
    "negative windows": {"ids": lambda x: np.asarray(x) - 2**40, "tiles": lambda x: None},
    "tiles too few": {"tiles": lambda x: np.asarray(x[:-1])},
    "images of floats": {"images": lambda x: x.astype(np.float32)},
    "images of three axes": {"images": lambda x: x[0]},
    "an even patch size": {"patch_size": lambda x: 4},
    "a patch size beyond the images": {"patch_size": lambda x: 99},
    "another rank": {"features": lambda x: x[:, :-1].copy()},
    "features of fewer queries": {"rest": lambda x: x[:-1].copy()},
    "windows of another size": {"windows": lambda x: x[:, :-2].copy()},
    "windows of floats": {"windows": lambda x: x.astype(np.float32)},
    "a shift too large": {"shift": lambda x: x + 20},
    "a negative shift": {"shift": lambda x: x - 20},
    "parents of other cells": {"parents": lambda x: (x[0], x[1][:-1].copy(), *x[2:])},
    "values of one channel": {"children": lambda x: (*x[:2], x[2][:, :1].copy(), x[3])},
    "no budget": {"budget": lambda x: 0.0},
    "a budget of NaN": {"budget": lambda x: float("nan")},
    "budgets that do not grow": {"policy": lambda x: dataclasses.replace(x, further=1.0)},
    "more known windows than there is room for": {"policy": lambda x: dataclasses.replace(x, known=17)},
    "more cells than there is room for": {"policy": lambda x: dataclasses.replace(x, pilot_cells=257)},
    "a policy without constants": {"policy": lambda x: object()},
    "budgets that grow without end": {"largest_budget": lambda x: float("inf")},
    "a selection of other images": {"allowed": lambda x: np.ones(3, np.uint8)},
    "a short result": {"m": lambda x: x[:-1].copy()},
    "a result of float32": {"v": lambda x: x.astype(np.float32)},
    "an instruction set of another machine": {"simd": lambda x: "mmx"},
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_the_native_scan_refuses_what_does_not_fit(indexed, spoilt, monkeypatch):
    bank, index = indexed()
    found = {}

    class Recorder:
        def pruned_scan(self, **arguments):
            found.update(arguments)

    with monkeypatch.context() as patched:
        patched.setattr(cpu, "native", Recorder())
        cpu.scan(request_of(pruned(bank, index), noisy(bank, 0.5, dtype=torch.float32)[0], 0.5)[0], POLICY)
    native.native.pruned_scan(**found)
    changed = {name: change(found[name]) for name, change in SPOILT[spoilt].items()}
    with pytest.raises((ValueError, TypeError, AttributeError)):
        native.native.pruned_scan(**{**found, **changed})


# Moments: the posterior variance and the entropy, from the same sample.


MOMENTS = ("mean", "variance", "entropy")


def errors_of(found, name):
    return found.stderr if name == "mean" else getattr(found, f"{name}_stderr")


@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.uint8), (3, torch.uint8), (5, torch.float32)])
def test_a_scan_of_every_window_gives_the_exact_moments(indexed, channels, dtype):
    bank, index = indexed(channels, dtype)
    for k, padding_mode, sigma in ((3, "zeros", 0.02), (1, "circular", 0.1), (5, "circular", 0.5), (9, "zeros", 5.0)):
        z = noisy(bank, sigma, 1, dtype=torch.float32)
        truth = ps.EquivariantLocalScore(bank, k, padding_mode, engine="reference")
        truth = truth.estimate(z.double(), sigma, moments=True)
        request, group = request_of(pruned(bank, index, k, padding_mode), z[0], sigma, budget=None, moments=True)
        found = cpu.scan(request, POLICY).sums
        # How far rounding a query moves log-weights apart; see test_a_scan_of_every_window_gives_the_exact_numbers.
        unit, bound = 0.0, 1e-4 if sigma >= 0.05 else 1e-3
        if dtype == torch.uint8:
            bound = 1e-4
            unit = 2.0 ** -(1 + encoded(request.windows, torch.uint8, 1.0).shift.double()) / 2 / BYTE
        count = len(request.part.ids)
        nearest = (2 * sigma**2 * (math.log(count) - found.m - found.s.log()).clamp(min=0)[:, 0]).sqrt()
        moved = 2 * unit * (request.windows[0].numel() ** 0.5) * (nearest + 4 * sigma) / sigma**2
        # Weights that are off by a share d change a variance by at most as much, an entropy by d ln N.
        variance, entropy = inside(truth.variance[0], group), inside(truth.entropy, group)[:, 0]
        assert (
            (found.variance - variance).abs() <= (bound + 2 * moved)[:, None] * variance + 2**-23
        ).all()  # digits of float sums
        assert ((found.entropy[:, 0] - entropy).abs() <= bound + 2 * moved * math.log(count)).all()
        assert not found.variance_stderr.any()
        assert not found.entropy_stderr.any()


@pytest.mark.parametrize("k", [3, 9])
@pytest.mark.parametrize("sigma", [0.5, 1.5, 6.0])
def test_the_errors_of_moments_cover(larger, k, sigma):
    bank, index = larger
    z = noisy(bank, sigma, 1, dtype=torch.float32)
    truth = exact(bank, k).estimate(z, sigma, moments=True)
    r, hits, draws = k // 2, dict.fromkeys(MOMENTS, 0), dict.fromkeys(MOMENTS, 0)
    for seed in range(20):
        found = pruned(bank, index, k, budget=0.03, seed=seed).estimate(z, sigma, moments=True)
        assert "pruned" in found.engine
        for name in MOMENTS:
            away, stderr = (getattr(found, name) - getattr(truth, name)).abs(), errors_of(found, name)
            assert (away <= 1e-3 * (1 + getattr(truth, name).abs()))[stderr == 0].all()  # edges, and whole pixels
            away, stderr = away[..., r:-r, r:-r], stderr[..., r:-r, r:-r]
            hits[name] += int((away[stderr > 0] <= 2 * stderr[stderr > 0] + 1e-4).sum())
            draws[name] += int((stderr > 0).sum())
    for name in MOMENTS:  # as for the mean: a seed counts as one draw for 16 of its pixels
        assert proportion_at_least(hits[name] // 16, draws[name] // 16, 0.93), (name, hits[name] / max(1, draws[name]))


@pytest.mark.parametrize("scan", [cpu.scan, gpu.scan], ids=["scan", "gpu"])
def test_moments_of_the_scan_are_those_of_the_definition(larger, tmp_path, scan):
    """Estimates of both have the same mean, and so have their stated errors."""
    bank, _ = larger
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", cells=96, progress=False)
    policy = dataclasses.replace(POLICY, known=0, pilot=0.0, opened_from=1e-9, unknown=1e9, misfit=1e9)
    for sigma, pixel, draws in ((0.5, 18, 60), (2.0, 100, 60)):
        z = noisy(bank, sigma, dtype=torch.float32)
        request, _ = request_of(pruned(bank, index, budget=0.02), z[0], sigma, moments=True)
        request = dataclasses.replace(request, windows=request.windows[pixel : pixel + 1], columns=0)
        budget = 0.02 * request.competing
        defined, _, _ = naive_estimates(index.at(3), request.windows[0], sigma, budget, draws, policy=policy)
        with plain_kernels():
            scanned = [scan(dataclasses.replace(request, key=1000 + seed), policy).sums for seed in range(draws)]
        pairs = {
            "variance": ([x.variance for x in defined], [x.variance[0] for x in scanned]),
            "entropy": ([x.entropy[None] for x in defined], [x.entropy[0] for x in scanned]),
            "qq": ([(x.qq / x.s**2).log() for x in defined], [(x.qq / x.s**2).log()[0] for x in scanned]),
            "ee": ([(x.ee / x.s**2).log()[None] for x in defined], [(x.ee / x.s**2).log()[0] for x in scanned]),
        }
        for name, both in pairs.items():
            a, b = (torch.stack(list(some)) for some in both)
            spread = ((a.var(0) + b.var(0)) / len(a)).sqrt()
            assert ((a.mean(0) - b.mean(0)).abs() < LARGEST_Z * spread + 1e-9).all(), name


def test_expected_variances_are_those_of_normal_strata():
    """Of a stratum of normal values whose log-weights, as they count in E[w^2], are known: by a large sample."""
    generator = torch.Generator().manual_seed(0)
    value, spread, slope = 0.3, 0.4, 0.5
    v = value + spread * torch.randn(10**6, generator=generator, dtype=torch.float64)
    logs = -1 + slope * torch.randn(10**6, generator=generator, dtype=torch.float64)  # f(t) = -t + t^2 slope^2 / 2
    one = torch.ones(1, dtype=torch.float64)
    strata = naive.Strata(10**6 * one, one, one, one, value * one[None], (value**2 + spread**2) * one[None])
    mean, variance, log = torch.tensor([0.1]).double(), torch.tensor([0.2]).double(), torch.tensor(-0.7).double()
    moments = (-1 + slope**2 / 2) * one, (-2 + 2 * slope**2) * one
    found = naive.expected_variances(3 * one, strata, moments, mean, variance, log)
    squares = (2 * logs).exp()
    for wanted, sample, share in (
        (found.qq[0], ((v - mean).square() - variance).square(), torch.ones_like(v)),
        (found.ee, (1 + log - logs).square(), squares / squares.mean()),
    ):
        terms = 3 * sample * share
        assert abs(((terms.mean() - wanted) / (terms.std() / 1000)).item()) < LARGEST_Z


def test_moments_change_neither_sample_nor_mean(larger):
    bank, index = larger
    for sigma in (0.1, 0.7, 3.0):
        request, _ = request_of(pruned(bank, index, budget=0.03), noisy(bank, sigma, dtype=torch.float32)[0], sigma)
        plain = cpu.scan(request, POLICY).sums
        full = cpu.scan(dataclasses.replace(request, moments=True), POLICY).sums
        assert plain.v2 is None
        assert plain.pairs == full.pairs
        for name, x in plain.fields.items():
            assert torch.equal(x, full.fields[name]), name


def test_moments_are_finite_whatever_the_image(larger):
    bank, index = larger
    for kind, sigma, budget in itertools.product(("noise", "checkerboard"), (0.02, 0.5, 100.0), (1e-3, 0.1)):
        found = pruned(bank, index, 9, budget=budget).estimate(foreign(kind, bank, sigma), sigma, moments=True)
        for name in ("variance", "entropy", "variance_stderr", "entropy_stderr"):
            assert torch.isfinite(getattr(found, name)).all()
            assert (getattr(found, name) >= 0).all()
        assert (found.variance <= 1 + 1e-5).all()


# What is remembered along a trajectory.


def trajectory(bank, sigmas, batch=1, seed=0):
    """Noisy images of one trajectory: the same noise, at lower and lower levels."""
    clean = bank.images[:batch].float() / 127.5 - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return [clean + sigma * noise for sigma in sigmas]


def remembered_of(machine, item=0):
    (held,) = (held for (_, number), held in machine.pruned.memory._held.items() if number == item)
    return held


def test_heavy_windows_are_remembered_and_counted_surely(larger):
    bank, index = larger
    before, now = trajectory(bank, [0.4, 0.3])
    fresh, following = pruned(bank, index, budget=1e-3), pruned(bank, index, budget=1e-3).following()
    assert fresh.following() is not fresh
    assert exact(bank).following() is not None
    following.denoise(before, 0.4)
    request, group = request_of(fresh, now[0], 0.3)
    weights = native_weights(request)
    nearest = weights.topk(5, dim=1).indices
    share = []
    for machine in (fresh, following):
        ids = torch.full((len(request.windows), KNOWN), -1)
        if machine is following:
            ids = remembered_of(following).recall(request.part, group)
        asked = dataclasses.replace(request, remembered=ids.clone())
        met = cpu.scan(asked, POLICY).remembered
        assert torch.equal(asked.remembered, ids)  # another scan of the request starts from the same
        known = torch.tensor(request.part.ids)[nearest]
        share.append((known[:, :, None] == met[:, None]).any(2).float().mean().item())
    # Of the five heaviest windows of each pixel.
    assert share[1] > share[0]


def native_weights(request):
    """[Q, windows of the part] log-weights, in the order of its ids."""
    windows = request.part.pixels(request.part.ids).flatten(1).double()
    return -(torch.cdist(request.windows.flatten(1).double(), windows) ** 2) / (2 * request.sigma**2)


def test_what_is_remembered_leaves_the_estimate_unbiased(larger):
    bank, index = larger
    before, now = trajectory(bank, [1.2, 1.0])
    truth, policy, draws = exact(bank).denoise(now, 1.0), dataclasses.replace(POLICY, trimming=0.0), 60
    errors = []
    for seed in range(draws):
        machine = pruned(bank, index, budget=0.02, seed=seed).following()
        machine.pruned.policy = policy
        machine.denoise(before, 1.2)
        assert (remembered_of(machine)._centres >= 0).any()
        errors.append((machine.denoise(now, 1.0) - truth)[..., 4:-4, 4:-4].mean().item())
    errors = torch.tensor(errors, dtype=torch.float64)
    # A ratio's bias is of the order of the squared error of one pixel, and pixels' errors are the larger ones.
    z = z_of_t(abs(errors.mean() / (errors.std() / draws**0.5)).item(), draws - 1)
    assert z < LARGEST_Z


def test_following_costs_no_determinism(larger):
    bank, index = larger
    levels = [1.0, 0.7, 0.45]
    steps = trajectory(bank, levels, batch=3)
    together = pruned(bank, index, budget=0.01).following()
    found = [together.denoise(z, sigma) for z, sigma in zip(steps, levels, strict=True)]
    for i in range(3):
        alone = pruned(bank, index, budget=0.01).following()
        for z, sigma, of_all in zip(steps, levels, found, strict=True):
            assert torch.equal(alone.denoise(z[i : i + 1], sigma)[0], of_all[i])
    assert torch.equal(found[0], pruned(bank, index, budget=0.01).denoise(steps[0], 1.0))
    assert not torch.equal(found[-1], pruned(bank, index, budget=0.01).denoise(steps[-1], 0.45))


def test_another_image_is_not_taken_for_the_next_step(larger):
    bank, index = larger
    (z,) = trajectory(bank, [0.5])
    others = [z[:, :, :17], z + 0.9 * torch.randn(z.shape, generator=torch.Generator().manual_seed(5))]
    machine = pruned(bank, index, budget=0.01).following()
    machine.denoise(z, 0.5)
    assert torch.equal(machine.denoise(others[1], 0.5), pruned(bank, index, budget=0.01).denoise(others[1], 0.5))
    held = machine.pruned.memory
    assert (held.of(bank, 0, others[1][0], 0.5)._centres >= 0).any()
    assert (held.of(bank, 0, others[0][0], 0.5)._centres == -1).all()


def test_a_smaller_patch_size_takes_over_what_a_larger_one_found(larger):
    bank, index = larger
    before, now = trajectory(bank, [0.6, 0.5])
    table = ps.ScaleTable([0.5, 0.6], [3, 9])
    assert (table(0.6), table(0.5)) == (9, 3)
    machine = pruned(bank, index, k=table, budget=0.01).following()
    machine.denoise(before, 0.6)
    part, competition = index.at(3), machine.competition(3)
    (group,) = (g for g in competition.groups if not g.rows.locked and not g.cols.locked)
    ids = remembered_of(machine).recall(part, group)
    grid = ids.view(len(group.rows.queries), len(group.cols.queries), -1)
    assert (grid[3:-3, 3:-3, 0] >= 0).all()  # pixels that lie in the interior at k = 9
    image, row, col = part.windows_of(ids[ids >= 0].numpy())
    assert int(image.max()) < len(bank)
    assert set(row.tolist()) <= set(range(4, 14))
    assert set(col.tolist()) <= set(range(4, 14))
    assert machine.denoise(now, 0.5).isfinite().all()


def test_a_tolerance_begins_at_the_budget_found_before(larger, monkeypatch):
    bank, index = larger
    levels = [1.0, 0.8]
    steps = trajectory(bank, levels)
    machine = pruned(bank, index, tolerance=0.06).following()
    budgets = []
    scan = cpu.scan
    monkeypatch.setattr(cpu, "scan", lambda request, policy: budgets.append(request.budget) or scan(request, policy))
    machine.denoise(steps[0], 1.0)
    found = remembered_of(machine).budget
    assert found is not None
    assert found > 2 * POLICY.pilot_budget
    assert budgets[0] == POLICY.pilot_budget
    budgets.clear()
    estimate = machine.estimate(steps[1], 0.8)
    assert budgets[0] == found / 2
    assert rms(estimate.stderr) <= 0.06


@pytest.mark.parametrize("labels", [None, [0, 1]])
def test_sampling_follows_its_trajectories(larger, labels):
    bank, index = larger
    options = dict(n=2, steps=4, progress=False, labels=labels)
    machine = pruned(bank, index, budget=0.01)
    images = ps.sample(machine, **options)
    followed = ps.sample(machine, batch_size=1, **options)
    assert torch.equal(images, followed)
    monkey = pruned(bank, index, budget=0.01)
    monkey.following = lambda: monkey
    assert not torch.equal(images, ps.sample(monkey, **options))
    assert machine.pruned.memory is None


def test_what_an_index_stores_changes_no_number(larger, tmp_path):
    bank, kept = larger
    z = noisy(bank, 3.0, dtype=torch.float32)
    for store, at_3, at_9 in (("none", False, False), ("small", True, False), ("all", True, True)):
        index = ps.PatchIndex.build(bank, [3, 9], tmp_path / store, progress=False, store=store)
        assert (index.at(3).tiles is not None, index.at(9).tiles is not None) == (at_3, at_9)
        for k in (3, 9):
            found, expected = (pruned(bank, of, k, budget=0.05).estimate(z, 3.0) for of in (index, kept))
            assert found.stderr.max() > 0
            assert torch.equal(found.mean, expected.mean)
            assert torch.equal(found.stderr, expected.stderr)
    with pytest.raises(ValueError, match="store: got 'some', takes"):
        ps.PatchIndex.build(bank, 3, tmp_path / "other", progress=False, store="some")
