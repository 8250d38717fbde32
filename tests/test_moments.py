"""Posterior variance and entropy: their definition, the engines that take them, and the denoisers that have them."""

import math
import statistics
import warnings

import naive
import pytest
import torch
from competitions import LIMIT, assert_same_moments, broken, circular, local
from conftest import MACHINES, machine_named, noisy, smooth_images

import patchscore as ps
from patchscore.engines import base, reference
from patchscore.engines.pruned import images
from patchscore.engines.sliding.cpu import SlidingCpu, native
from patchscore.posterior import PosteriorSum, merge
from patchscore.windows import WHOLE_IMAGE

needs_native = pytest.mark.skipif(native is None, reason="the C++ extension was not built")


def of_pixel(z, sigma, train, machine, k, i, j):
    """(variance [C], entropy) of one pixel, by plain loops over its competing windows."""
    logits, values = [], []
    for image, a, b in naive.competitors(train, machine, k, i, j):
        if machine == "ideal":
            distance = ((z - image) ** 2).sum()
        else:
            distance = naive.window_distance(z, image, i, j, a, b, k, wrap=machine == "els-circular")
        logits.append(-distance / (2 * sigma**2))
        values.append(image[:, a, b])
    weights = [math.exp(logit - max(logits)) for logit in logits]
    weights = [w / math.fsum(weights) for w in weights]
    mean = sum(w * v for w, v in zip(weights, values, strict=True))
    variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
    return variance, -math.fsum(w * math.log(w) for w in weights if w > 0)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("sigma", [0.1, 0.8])
def test_moments_are_the_definition(name, sigma, bank):
    z = noisy(bank, sigma)
    est = machine_named(name, bank, 5, engine="reference").estimate(z, sigma, moments=True)
    train = bank.chunk(0, len(bank), torch.float64).numpy()
    for i, j in ((0, 0), (1, 6), (5, 5), (11, 9)):
        variance, entropy = of_pixel(z[0].numpy(), sigma, train, name, 5, i, j)
        torch.testing.assert_close(est.variance[0, :, i, j], torch.from_numpy(variance), rtol=1e-9, atol=1e-12)
        assert est.entropy[0, i, j].item() == pytest.approx(entropy, rel=1e-9, abs=1e-12)


def compare_moments(bank, competition, sigma, seed=1):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x0 = bank.chunk(0, 1).expand(len(sigma), -1, -1, -1)
    z = x0 + sigma.float()[:, None, None, None] * torch.randn(x0.shape, generator=generator)
    got = SlidingCpu().posterior_sum(z, sigma, bank, competition, LIMIT, moments=True)
    plain = SlidingCpu().posterior_sum(z, sigma, bank, competition, LIMIT)
    expected = reference.Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT, moments=True)
    torch.testing.assert_close(got.mean, plain.mean, rtol=0, atol=1e-5)
    assert_same_moments(got, expected, z, sigma)


@needs_native
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [1, 3, 7, 11])
@pytest.mark.parametrize("kind", [circular, broken, local])
def test_sliding_takes_the_references_moments(kind, k, channels):
    height, width = (11, 14) if channels % 2 else (13, 11)
    compare_moments(ps.PatchBank(smooth_images(19, channels, height, width)), kind(k, height, width), [0.05, 0.3, 2.0])


@needs_native
@pytest.mark.parametrize("simd", [] if native is None else native.simd_levels())
@pytest.mark.parametrize("kind", [circular, broken])
def test_every_instruction_set_takes_the_references_moments(simd, kind, monkeypatch):
    monkeypatch.setenv("PATCHSCORE_SIMD", simd)
    compare_moments(ps.PatchBank(smooth_images(19, 3, 13, 11)), kind(5, 13, 11), [0.02, 0.3, 50.0])
    # Few images are cut into tiles, some of whose windows do not exist.
    compare_moments(ps.PatchBank(smooth_images(2, 1, 13, 11)), kind(5, 13, 11), [0.02, 0.3, 50.0])
    compare_moments(ps.PatchBank(smooth_images(20, 3, 13, 11)), WHOLE_IMAGE, [0.2, 1.0])


@needs_native
def test_moments_far_from_every_window_and_at_sizes_served_in_float64():
    bank = ps.PatchBank(smooth_images(19, 3, 16, 16))
    compare_moments(bank, local(29, 16, 16), [1.0])
    # Distances of thousands of nats, which float32 cannot hold: some pixels are summed again in float64.
    sigma, competition = torch.tensor([0.02], dtype=torch.float64), circular(3, 16, 16)
    z = torch.full((1, 3, 16, 16), 3.0)
    got = SlidingCpu().posterior_sum(z, sigma, bank, competition, LIMIT, moments=True)
    expected = reference.Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT, moments=True)
    torch.testing.assert_close(got.variance, expected.variance, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MACHINES)
def test_variance_is_the_derivative_of_the_mean_by_its_own_pixel(name, bank):
    # dD_i / dz_i = Var_i / sigma^2, the diagonal of the Jacobian, here by central differences.
    sigma, step, machine = 0.5, 1e-4, machine_named(name, bank, 5, engine="reference")
    z = noisy(bank, sigma)
    variance = machine.estimate(z, sigma, moments=True).variance
    for place in ((0, 0, 0, 0), (0, 1, 5, 5), (0, 2, 11, 3)):
        up, down = z.clone(), z.clone()
        up[place] += step
        down[place] -= step
        slope = (machine.denoise(up, sigma)[place] - machine.denoise(down, sigma)[place]) / (2 * step)
        assert variance[place].item() / sigma**2 == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_limits_of_the_moments(bank):
    machine = ps.EquivariantLocalScore(bank, 3, padding_mode="circular", engine="reference")
    far = machine.estimate(noisy(bank, 1e4), 1e4, moments=True)
    count = 20 * 10 * 8
    assert torch.allclose(far.entropy, torch.full_like(far.entropy, math.log(count)), rtol=1e-5)
    centres = bank.chunk(0, 20, torch.float64)[:, :, 1:-1, 1:-1]
    expected = centres.var((0, 2, 3), correction=0)[None, :, None, None].expand_as(far.variance)
    torch.testing.assert_close(far.variance, expected, rtol=1e-4, atol=0)
    near = machine.estimate(bank.chunk(0, 1, torch.float64), 1e-4, moments=True)
    assert near.variance[:, :, 2:-2, 2:-2].max() < 1e-9


def test_moments_are_off_by_default_and_change_no_mean(bank):
    machine, z = ps.EquivariantLocalScore(bank, 5, engine="reference"), noisy(bank, 0.3)
    plain, full = machine.estimate(z, 0.3), machine.estimate(z, 0.3, moments=True)
    assert plain.variance is None
    assert plain.entropy is None
    assert torch.equal(plain.mean, full.mean)


def test_a_merged_sum_has_the_moments_of_the_whole():
    generator = torch.Generator().manual_seed(3)
    logits = 30 * torch.randn(40, generator=generator, dtype=torch.float64)
    values = torch.randn(40, 3, generator=generator, dtype=torch.float64)

    def direct(part, shift):
        m = logits[part].max() + shift
        w = torch.exp(logits[part] - m)
        first = (m, w.sum(), w @ values[part], (w**2).sum())
        second = {"v2": w @ values[part] ** 2, "sl": (w * (logits[part] - m)).sum()}
        return PosteriorSum(
            *(x.reshape(1, -1, 1, 1) for x in first), **{n: x.reshape(1, -1, 1, 1) for n, x in second.items()}
        )

    whole = direct(slice(None), 0.0)
    parts = merge(direct(slice(0, 9), 2.0), direct(slice(9, None), -1.0))
    for total in (parts, merge(PosteriorSum.empty((1, 3, 1, 1), "cpu", moments=True), parts)):
        torch.testing.assert_close(total.variance, whole.variance, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(total.entropy, whole.entropy, rtol=1e-9, atol=1e-9)
    empty = PosteriorSum.empty((1, 3, 1, 1), "cpu", moments=True)
    assert not merge(empty, empty).sl.isnan().any()


def test_the_gaussians_moments_are_closed_form(bank):
    gaussian, sigma = ps.GaussianScore(bank), 0.7
    est = gaussian.estimate(noisy(bank, sigma, batch=2), sigma, moments=True)
    images = bank.chunk(0, 20, torch.float64).flatten(1)
    covariance = torch.cov(images.T, correction=0)
    posterior = sigma**2 * covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(360, dtype=torch.float64))
    expected = posterior.diagonal().view(3, 12, 10)
    torch.testing.assert_close(est.variance, expected.expand(2, -1, -1, -1), rtol=1e-8, atol=1e-12)
    at = [channel * 120 + 57 for channel in range(3)]
    entropy = torch.logdet(2 * math.pi * math.e * posterior[at][:, at]) / 2
    assert est.entropy[1, 5, 7].item() == pytest.approx(entropy.item(), rel=1e-8)


def test_a_switch_has_its_parts_moments(bank):
    els, gaussian = ps.EquivariantLocalScore(bank, 3, engine="reference"), ps.GaussianScore(bank)
    z, sigmas = noisy(bank, 1.0, batch=2), torch.tensor([0.5, 5.0])
    est = ps.Switch([(1.0, els), (math.inf, gaussian)]).estimate(z, sigmas, moments=True)
    assert torch.equal(est.variance[0], els.estimate(z[:1], 0.5, moments=True).variance[0])
    assert torch.equal(est.entropy[1], gaussian.estimate(z[1:], 5.0, moments=True).entropy[0])


def test_denoisers_without_moments_say_so(bank):
    els = ps.EquivariantLocalScore(bank, 3)
    with pytest.raises(ValueError, match=r"^moments: a guided denoiser"):
        ps.Guided(els, els, 2.0).estimate(noisy(bank, 1.0), 1.0, moments=True)
    network = ps.NetworkDenoiser(lambda x, level: x, bank.shape)
    with pytest.raises(ValueError, match=r"^moments: a network"):
        network.estimate(noisy(bank, 1.0), 1.0, moments=True)


def test_an_engine_without_moments_leaves_them_to_the_next_and_says_so_where_it_was_named(bank, monkeypatch):
    class Sketch(reference.Reference):
        name = "sketch"
        moments = False

    monkeypatch.setattr(base, "_warned", set())
    machine = ps.EquivariantLocalScore(bank, 3)
    machine.engines = (Sketch(), reference.Reference())
    z = noisy(bank, 0.5)
    assert machine.estimate(z, 0.5).engine == "sketch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.estimate(z, 0.5, moments=True).engine == "reference"
    machine.engine = "sketch"
    with pytest.warns(RuntimeWarning, match="'sketch' cannot serve: it takes no moments"):
        assert machine.estimate(z, 0.5, moments=True).engine == "reference"


# Without an index: a sample of images.


@needs_native
@pytest.mark.parametrize("machine", [ps.LocalScore, ps.EquivariantLocalScore])
@pytest.mark.parametrize("sigma", [1.0, 8.0])
def test_sampled_moments_are_within_their_errors(machine, sigma):
    bank = ps.PatchBank(smooth_images(400, 3, 8, 8))
    z = noisy(bank, sigma, dtype=torch.float32)
    whole = machine(bank, 3).estimate(z, sigma, moments=True)
    assert not whole.variance_stderr.any()
    assert not whole.entropy_stderr.any()
    for name in ("variance", "entropy"):
        ratios, within = [], []
        for seed in range(20):
            found = machine(bank, 3, budget=0.2, seed=seed).estimate(z, sigma, moments=True)
            assert found.engine == "pruned"
            error, stderr = getattr(found, name) - getattr(whole, name), getattr(found, f"{name}_stderr")
            ratios.append((error.square().mean().sqrt() / stderr.square().mean().sqrt()).item())
            within.append((error.abs() <= 2 * stderr).double().mean().item())
        # The bounds of the mean's errors (test_pruned.py): pixels of a call share the images drawn. Entropies of few
        # windows have long tails.
        assert 0.3 < statistics.median(ratios) < 1.5
        assert statistics.mean(within) > (0.85 if name == "variance" else 0.6)


@needs_native
def test_sampled_moments_of_the_whole_bank_are_exact():
    bank = ps.PatchBank(smooth_images(32, 3, 8, 8))
    z, competition = noisy(bank, 1.0, dtype=torch.float32), ps.LocalScore(bank, 3).competition(3)
    level = torch.ones(1, dtype=torch.float64)
    parts = [
        SlidingCpu().posterior_sum(
            z, level, images.subset(bank, torch.arange(g, 32, 4)), competition, LIMIT, moments=True
        )
        for g in range(4)
    ]
    found = images.combine(parts, 32, 32, images.pixel_moments(bank, torch.arange(32)))
    expected = reference.Reference().posterior_sum(z.double(), level, bank, competition, LIMIT, moments=True)
    assert_same_moments(found, expected, z, level)
    assert not found.variance_stderr.any()
    assert not found.entropy_stderr.any()
    # Errors stay what they are when images are cut into blocks, merged, and in another unit.
    half = images.combine(parts[:2], 16, 32, images.pixel_moments(bank, torch.arange(16)))
    merged = merge(PosteriorSum.empty(z.shape, "cpu", sampled=True, moments=True), half)
    torch.testing.assert_close(merged.variance_stderr, half.variance_stderr)
    torch.testing.assert_close(merged.entropy_stderr, half.entropy_stderr)
    torch.testing.assert_close(half.scaled(3.0).qq.sqrt(), 9 * half.qq.sqrt())
