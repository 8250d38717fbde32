"""GaussianScore: the posterior mean of a Gaussian, its probability flow, and samplers that start with it."""

import itertools
import math

import pytest
import torch
from conftest import MACHINES, machine_named, noisy, smooth_images
from hypothesis import given, settings
from hypothesis import strategies as st

import patchscore as ps
from patchscore import gaussian, noise
from patchscore.sampling import image_generator


def dense_gaussian(bank, label=None):
    """mu and Sigma as plain arrays."""
    chosen = bank if label is None else bank.select(label)
    x = chosen.chunk(0, len(chosen), torch.float64).flatten(1)
    return x.mean(0), torch.cov(x.T, correction=0).reshape(x.shape[1], -1)


def dense_denoise(z, sigma, mean, covariance):
    """D(z) = mu + Sigma (Sigma + sigma^2)^-1 (z - mu), by a linear solve."""
    total = covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
    return (mean + (covariance @ torch.linalg.solve(total, (z.double().flatten(1) - mean).T)).T).view(z.shape)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 90),
    channels=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    sigma=st.floats(0.005, 100),
    uint8=st.booleans(),
)
def test_denoise_is_the_posterior_mean_of_the_banks_gaussian(n, channels, height, width, sigma, uint8):
    """With more images than pixels and with fewer."""
    bank = ps.PatchBank(smooth_images(n, channels, height, width, dtype=torch.uint8 if uint8 else torch.float32))
    z = noisy(bank, sigma, batch=min(n, 2))
    expected = dense_denoise(z, sigma, *dense_gaussian(bank))
    assert (ps.GaussianScore(bank).denoise(z, sigma) - expected).abs().max() < 1e-6
    assert (ps.GaussianScore(bank).denoise(z.float(), sigma) - expected).abs().max() < 1e-4 * max(1, sigma)


def test_items_have_their_own_sigma_and_class(bank):
    score = ps.GaussianScore(bank)
    sigmas, labels = torch.tensor([0.1, 0.7, 3.0]), ["red", None, 2]
    z = noisy(bank, 0.5, batch=3)
    denoised = score.denoise(z, sigmas, labels)
    for i, label in enumerate(labels):
        expected = dense_denoise(z[i : i + 1], sigmas[i].double().item(), *dense_gaussian(bank, label))
        assert (denoised[i] - expected[0]).abs().max() < 1e-6


def test_dtypes_follow_the_input(bank):
    score = ps.GaussianScore(bank)
    z = noisy(bank, 0.5)
    assert score.denoise(z, 0.5).dtype == torch.float64
    assert score.denoise(z.half(), 0.5).dtype == torch.float32
    assert (score.denoise(z, 0.5) - score.denoise(z.float(), 0.5)).abs().max() < 1e-5


def test_ess_counts_the_training_images_behind_the_mean(bank):
    """D(z) = sum_n w_n x_n with the weights of the docstring: they give the mean, and their effective number is ess."""
    z, sigma = noisy(bank, 0.4, batch=2), 0.4
    estimate = ps.GaussianScore(bank).estimate(z, sigma)
    x = bank.chunk(0, len(bank), torch.float64).flatten(1)
    mean, covariance = dense_gaussian(bank)
    a = torch.linalg.solve(covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64), (z.flatten(1) - mean).T)
    weights = (1 + (x - mean) @ a) / len(x)  # [N, B]
    assert torch.allclose(estimate.mean.flatten(1), weights.T @ x, atol=1e-8)
    expected = weights.sum(0) ** 2 / (weights**2).sum(0)
    assert torch.allclose(estimate.ess, expected[:, None, None].expand(2, 12, 10), rtol=1e-6)
    assert estimate.stderr.abs().max() == 0
    assert (estimate.pairs, estimate.engine) == (0, "closed-form")


def test_the_limits_are_the_mean_and_the_nearest_image_in_the_span(bank):
    score = ps.GaussianScore(bank)
    z = noisy(bank, 0.3)
    assert (score.denoise(z, 1e6) - bank.chunk(0, 20, torch.float64).mean(0)).abs().max() < 1e-6
    assert (score.denoise(bank.chunk(3, 4, torch.float64), 1e-4) - bank.chunk(3, 4, torch.float64)).abs().max() < 1e-3


@pytest.mark.parametrize("n", [40, 200])
def test_low_rank_keeps_the_leading_axes(n):
    bank = ps.PatchBank(smooth_images(n, 3, 9, 8))
    full, low = gaussian.principal_axes(bank), gaussian.principal_axes(bank, rank=6)
    assert low.basis.shape == (216, 6)
    assert torch.allclose(low.variances, full.variances[:6], rtol=2e-3)
    assert torch.allclose(low.basis.T @ low.basis, torch.eye(6, dtype=torch.float64), atol=1e-10)
    captured = (low.basis.T @ full.basis[:, :6]).square().sum()
    assert captured > 6 * 0.99
    again = gaussian.principal_axes(bank, rank=6)
    assert torch.equal(low.basis, again.basis)
    # Asking for more than there is gives all there is.
    z = noisy(bank, 0.5)
    assert torch.equal(ps.GaussianScore(bank, rank=999).denoise(z, 0.5), ps.GaussianScore(bank).denoise(z, 0.5))


def test_large_images_take_a_low_rank_within_the_memory_limit():
    bank = ps.PatchBank(smooth_images(60, 3, 64, 64))
    z = noisy(bank, 1.0)
    assert ps.GaussianScore(bank, rank=8, memory_limit=16 << 20).denoise(z, 1.0).isfinite().all()
    with pytest.raises(ValueError, match=r"memory_limit: .* 3 x 64 x 64.* give a smaller rank"):
        ps.GaussianScore(bank, memory_limit=1 << 20).denoise(z, 1.0)


def test_each_class_is_decomposed_once(bank, monkeypatch):
    score, calls = ps.GaussianScore(bank), []
    decompose = gaussian.principal_axes
    monkeypatch.setattr(gaussian, "principal_axes", lambda *args: calls.append(len(args[0])) or decompose(*args))
    for _ in range(3):
        score.denoise(noisy(bank, 1.0, batch=4), 1.0, ["red", 1, None, 0])
    assert sorted(calls) == [7, 7, 20]


def test_score_and_eps_speak_the_other_convention(bank):
    score, (alpha, sigma) = ps.GaussianScore(bank), (0.6, 0.8)
    x = alpha * noisy(bank, sigma / alpha)
    mean, covariance = dense_gaussian(bank)
    total = alpha**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
    expected = -torch.linalg.solve(total, (x.flatten(1) - alpha * mean).T).T.view(x.shape)
    assert (score.score(x, alpha, sigma) - expected).abs().max() < 1e-8
    assert (score.eps(x, alpha, sigma) + sigma * expected).abs().max() < 1e-8


# The flow.


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("labels", [None, ["red", None, "blue"]])
def test_flow_is_the_limit_of_fine_steps(bank, rank, labels):
    """Heun's method on dz/dsigma = (z - D(z)) / sigma, on all axes and in the null space, at its order."""
    score = ps.GaussianScore(bank, rank=rank)
    z = noisy(bank, 5.0, batch=3)
    exact = score.flow(z, 5.0, 0.5, labels)
    errors = []
    for steps in (40, 80, 160):
        sigmas = torch.logspace(math.log10(5.0), math.log10(0.5), steps + 1, dtype=torch.float64).tolist()
        walked = z
        for a, b in itertools.pairwise(sigmas):
            slope = (walked - score.denoise(walked, a, labels)) / a
            ahead = walked + (b - a) * slope
            walked = walked + (b - a) * (slope + (ahead - score.denoise(ahead, b, labels)) / b) / 2
        errors.append((walked - exact).abs().max().item())
    assert errors[0] / errors[1] > 3.5
    assert errors[1] / errors[2] > 3.5
    assert errors[2] < 1e-3


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
def test_flow_composes_and_returns(sigmas):
    bank = ps.PatchBank(smooth_images(9, 1, 5, 4))
    score, z = ps.GaussianScore(bank), noisy(bank, sigmas[0], batch=2)
    a, b, c = sigmas
    assert torch.allclose(score.flow(score.flow(z, a, b), b, c), score.flow(z, a, c), rtol=1e-8, atol=1e-8)
    assert torch.allclose(score.flow(score.flow(z, a, b), b, a), z, rtol=1e-8, atol=1e-8)


def test_marginal_is_where_the_flow_arrives_from_infinite_noise(bank):
    score, white = ps.GaussianScore(bank), noisy(bank, 1.0, batch=2)
    sigma = torch.tensor([0.5, 2.0])
    far = score.flow(1e6 * white, 1e6, sigma, ["red", None])
    assert (far - score.marginal(white, sigma, ["red", None])).abs().max() < 1e-4


def test_marginal_has_the_gaussians_mean_and_covariance():
    bank = ps.PatchBank(smooth_images(30, 1, 3, 3))
    white = torch.randn(40_000, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = ps.GaussianScore(bank).marginal(white, 0.2).flatten(1)
    mean, covariance = dense_gaussian(bank)
    assert torch.allclose(drawn.mean(0), mean, atol=0.02)
    assert torch.allclose(torch.cov(drawn.T), covariance + 0.04 * torch.eye(9, dtype=torch.float64), atol=0.02)


# Samplers that start with it.


def start_noise(shape, n, seed=0):
    return torch.stack([torch.randn(shape, generator=image_generator(seed, i), dtype=torch.float64) for i in range(n)])


def test_the_jump_takes_a_gaussian_sampler_where_small_steps_would(bank):
    score = ps.GaussianScore(bank)
    fine = noise.karras(400, sigma_min=0.01, sigma_max=20.0)
    options = dict(n=2, labels=["red", None], schedule=fine, sampler="heun", dtype=torch.float64)
    walked = ps.sample(score, **options)
    jumped = ps.sample(score, gaussian_until=0.5, **options)
    assert (walked - jumped).abs().max() < 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun"])
def test_the_jump_lands_on_the_first_level_at_or_below_and_goes_on_from_there(bank, sampler):
    machine, score, steps = ps.LocalScore(bank, 3), ps.GaussianScore(bank), []
    levels = noise.cosine(12)
    until = 1.0
    at = next(i for i, ratio in enumerate(levels.ratios.tolist()) if ratio <= until)
    options = dict(n=3, labels=["red", "blue"], sampler=sampler, dtype=torch.float64, seed=4)
    images = ps.sample(machine, steps=12, gaussian_until=until, callback=steps.append, **options)
    z = start_noise(bank.shape, 3, seed=4) / levels.alphas[0]
    landed = score.flow(z, levels.ratios[0], levels.ratios[at], ["red", "blue", "red"])
    assert [step.index for step in steps] == list(range(len(levels) - at))
    assert {step.of for step in steps} == {len(levels) - at}
    assert steps[0].sigma == levels.sigmas[at].item()
    assert torch.allclose(steps[0].x, levels.alphas[at] * landed, atol=1e-9)
    assert torch.equal(images, steps[-1].x0)
    assert torch.equal(images, ps.sample(machine, steps=12, gaussian_until=until, gaussian=score, **options))
    one_by_one = ps.sample(machine, steps=12, gaussian_until=until, **{**options, "n": 1}, first=2)
    assert torch.allclose(one_by_one, images[2:], atol=1e-8)


def test_a_jump_of_nothing_changes_nothing(bank):
    machine = ps.LocalScore(bank, 3)
    assert torch.equal(ps.sample(machine, 2, steps=6, gaussian_until=1e3), ps.sample(machine, 2, steps=6))


def test_sigma_max_starts_from_the_gaussians_marginal(bank):
    machine, score, steps = ps.LocalScore(bank, 3), ps.GaussianScore(bank), []
    levels = noise.karras(10)
    at = next(i for i, ratio in enumerate(levels.ratios.tolist()) if ratio <= 3.0)
    options = dict(n=2, steps=10, schedule="karras", labels=[2, None], dtype=torch.float64)
    ps.sample(machine, sigma_max=3.0, callback=steps.append, **options)
    expected = score.marginal(start_noise(bank.shape, 2), levels.ratios[at], [2, None])
    assert torch.allclose(steps[0].x, expected, atol=1e-9)
    assert len(steps) == len(levels) - at


def test_sigma_max_and_the_jump_together_are_the_marginal_where_it_lands(bank):
    machine = ps.LocalScore(bank, 3)
    options = dict(n=2, steps=10, dtype=torch.float64)
    both = ps.sample(machine, sigma_max=5.0, gaussian_until=1.0, **options)
    assert torch.allclose(both, ps.sample(machine, sigma_max=1.0, **options), atol=1e-8)


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_starts_with_the_jump(name, bank):
    images = ps.sample(machine_named(name, bank, 3), 2, steps=6, gaussian_until=2.0, sigma_max=5.0)
    assert images.shape == (2, 3, 12, 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gaussian_until": 0}, ValueError, r"gaussian_until: got 0\.0, takes a positive number"),
        ({"gaussian_until": math.nan}, ValueError, "gaussian_until: got nan"),
        ({"gaussian_until": "1"}, TypeError, "gaussian_until: got '1'"),
        (
            {"gaussian_until": 0.001},
            ValueError,
            r"gaussian_until: got 0.001, below the schedule's last noise level 0\.",
        ),
        ({"sigma_max": -1.0}, ValueError, "sigma_max: got -1"),
        ({"sigma_max": 0.001}, ValueError, "sigma_max: got 0.001, below the schedule's last noise level"),
        ({"sigma_max": 1.0, "gaussian": "yes"}, TypeError, "gaussian: got str, takes a GaussianScore"),
        ({"gaussian_until": 1.0, "labels": [7]}, ValueError, "unknown label 7"),
    ],
)
def test_bad_starts_are_named(options, error, message, bank):
    with pytest.raises(error, match=message):
        ps.sample(ps.LocalScore(bank, 3), n=1, **options)


def test_a_gaussian_of_other_images_is_named(bank):
    other = ps.GaussianScore(ps.PatchBank(smooth_images(4, 1, 8, 8)))
    with pytest.raises(ValueError, match="gaussian: of 1 x 8 x 8 images, the denoiser's are 3 x 12 x 10"):
        ps.sample(ps.LocalScore(bank, 3), 1, sigma_max=1.0, gaussian=other)


def test_a_denoiser_without_a_bank_asks_for_the_gaussian(bank):
    class Bare(ps.Denoiser):
        shape = bank.shape

        def estimate(self, z, sigma, labels=None):
            return ps.IdealScore(bank).estimate(z, sigma, labels)

    with pytest.raises(ValueError, match="gaussian: Bare has no bank to take it from"):
        ps.sample(Bare(), 1, sigma_max=1.0)
    assert ps.sample(Bare(), 1, sigma_max=1.0, gaussian=ps.GaussianScore(bank)).shape == (1, 3, 12, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bank": 3}, TypeError, "bank: got int"),
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"rank": 2.0}, TypeError, r"rank: got 2\.0"),
        ({"memory_limit": 0}, ValueError, "memory_limit: got 0"),
        ({"memory_limit": "1G"}, TypeError, "memory_limit: got '1G'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message, bank):
    with pytest.raises(error, match=message):
        ps.GaussianScore(**{"bank": bank, **arguments})


@pytest.mark.parametrize(
    ("z", "sigma", "labels", "error", "message"),
    [
        (
            torch.zeros(1, 1, 12, 10),
            1.0,
            None,
            ValueError,
            r"z: got shape \[1, 1, 12, 10\], (GaussianScore )?takes \[B, 3, 12, 10\]",
        ),
        (torch.full((1, 3, 12, 10), math.nan), 1.0, None, ValueError, "z: NaN"),
        (torch.zeros(1, 3, 12, 10), 0.0, None, ValueError, r"sigma: got 0\.0"),
        (torch.zeros(1, 3, 12, 10), 1.0, "pink", ValueError, "unknown label 'pink'"),
        (torch.zeros(1, 3, 12, 10), 1.0, [0, 1], ValueError, "labels: got 2 for a batch of 1"),
    ],
)
def test_bad_input_is_named(z, sigma, labels, error, message, bank):
    score = ps.GaussianScore(bank)
    for call in (score.denoise, score.marginal, lambda z, sigma, labels: score.flow(z, 2.0, sigma, labels)):
        with pytest.raises(error, match=message):
            call(z, sigma, labels)
