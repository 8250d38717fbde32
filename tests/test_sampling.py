"""Samplers: the published loop, the published algorithms, and images that depend on their own number alone."""

import itertools
import math

import pytest
import torch
from conftest import smooth_images

import patchscore as ps
from patchscore import noise
from patchscore.sampling import SAMPLERS, image_generator


class Gaussian(ps.Denoiser):
    """The optimal denoiser of N(0, scale^2), whose probability flow is known: z(sigma) is proportional to
    sqrt(scale^2 + sigma^2)."""

    shape = (1, 4, 4)
    scale = 0.3

    def denoise(self, z, sigma, labels=None):
        return z * self.scale**2 / (self.scale**2 + sigma**2)

    def estimate(self, z, sigma, labels=None):
        raise NotImplementedError


def published_loop(machine, x, labels):
    """DDIM as published, in x_t = alpha x_0 + sigma eps: 20 cosine steps, from step 19 down to step 1."""

    def level(j):
        beta = 1 - math.cos(j / 20 / 1.008 * math.pi / 2) ** 2
        return math.sqrt(1 - beta), math.sqrt(beta)

    for j in range(19, 0, -1):
        alpha, sigma = level(j)
        alpha_next, sigma_next = level(j - 1)
        eps = machine.eps(x, alpha, sigma, labels)
        x0 = (x - sigma * eps) / alpha
        x = alpha_next * x0 + sigma_next * eps
    return x


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_ddim_is_the_published_loop(padding_mode):
    bank = ps.PatchBank(smooth_images(12, 3, 16, 16), torch.arange(12) % 2)
    sizes = [min(k, 15) for k in ps.ScaleTable.published(f"cifar10-resnet-{padding_mode}").sizes]
    table = ps.ScaleTable(noise.cosine(20).ratios[:-1].flip(0).tolist(), sizes)
    machine = ps.EquivariantLocalScore(bank, table, padding_mode)
    images = ps.sample(machine, n=2, labels=[0, 1], seed=5, dtype=torch.float64)
    start = torch.stack(
        [torch.randn(3, 16, 16, generator=image_generator(5, i), dtype=torch.float64) for i in range(2)]
    )
    expected = published_loop(machine, start, [0, 1]).clamp(-1, 1)
    assert (images - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_samplers_follow_the_probability_flow_at_their_order(sampler, order):
    start = torch.stack([torch.randn(1, 4, 4, generator=image_generator(0, 0), dtype=torch.float64)])
    errors = []
    for steps in (20, 40, 80):
        levels = noise.karras(steps, sigma_min=1e-4, sigma_max=3.0)
        images = ps.sample(Gaussian(), 1, schedule=levels, sampler=sampler, dtype=torch.float64)
        exact = 3.0 * start * Gaussian.scale / math.sqrt(Gaussian.scale**2 + 3.0**2)
        errors.append((images - exact).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 2**order * 0.8


def test_ddpm_draws_from_the_denoisers_distribution():
    images = ps.sample(Gaussian(), 400, steps=400, schedule="karras", sampler="ddpm", batch_size=400)
    assert images.std().item() == pytest.approx(Gaussian.scale, rel=0.05)
    assert images.mean().abs() < 0.02


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("schedule", sorted(noise.SCHEDULES))
def test_an_image_depends_on_seed_and_number_alone(sampler, schedule, bank):
    machine = ps.EquivariantLocalScore(bank, 3)
    options = dict(steps=4, schedule=schedule, sampler=sampler, labels=["red", "blue"], seed=-3)
    together = ps.sample(machine, 5, **options)
    assert torch.equal(together, ps.sample(machine, 5, **options))
    assert torch.allclose(together, ps.sample(machine, 5, batch_size=2, **options), atol=1e-5)
    assert torch.allclose(together[3:], ps.sample(machine, 2, first=3, **options), atol=1e-5)
    assert together.shape == (5, 3, 12, 10)
    assert together.abs().max() <= 1
    assert not torch.allclose(together, ps.sample(machine, 5, **{**options, "seed": 4}), atol=1e-2)


def test_labels_are_taken_in_turn(bank):
    machine = ps.IdealScore(bank)
    images = ps.sample(machine, 6, labels=[0, 1, 2])
    for i, image in enumerate(images):
        of_class = bank.select(i % 3).chunk(0, 99)
        assert (of_class - image).abs().amax((1, 2, 3)).min() < 1e-3


def test_the_ideal_machine_only_remembers(bank):
    images = ps.sample(ps.IdealScore(bank), 4)
    train = bank.chunk(0, len(bank))
    assert ((images[:, None] - train[None]).abs().amax((2, 3, 4)).amin(1) < 1e-3).all()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_callback_sees_every_step_and_last_the_images(sampler, bank):
    steps = []
    images = ps.sample(ps.LocalScore(bank, 3), 3, steps=6, sampler=sampler, batch_size=2, callback=steps.append)
    assert [(s.index, s.images) for s in steps] == [(i, r) for r in (range(2), range(2, 3)) for i in range(5)]
    levels = noise.cosine(6)
    for step in steps:
        assert step.of == 5
        assert (step.alpha, step.sigma) == (levels.alphas[step.index].item(), levels.sigmas[step.index].item())
        assert step.x.shape == step.x0.shape == (len(step.images), 3, 12, 10)
    first = torch.stack(
        [torch.randn(3, 12, 10, generator=image_generator(0, i), dtype=torch.float64) for i in range(2)]
    )
    assert torch.allclose(steps[0].x, first.float(), atol=1e-5)
    assert torch.equal(torch.cat([s.x0 for s in steps if s.index == 4]), images)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, "n: got 0"),
        ({"n": 1.5}, TypeError, r"n: got 1\.5"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"first": -1}, ValueError, "first: got -1"),
        ({"seed": "x"}, TypeError, "seed: got 'x'"),
        ({"denoiser": None}, TypeError, "denoiser: got NoneType"),
        ({"device": "abacus"}, ValueError, "device: 'abacus'"),
        ({"sampler": ["ddim"]}, TypeError, "sampler: got"),
        ({"schedule": ["cosine"]}, TypeError, "schedule: got"),
        ({"sampler": "plms"}, ValueError, "sampler: got 'plms'"),
        ({"schedule": "sine"}, ValueError, "schedule: got 'sine'"),
        ({"steps": 1}, ValueError, "steps: got 1"),
        ({"labels": []}, ValueError, "labels: got an empty list"),
        ({"labels": [9]}, ValueError, "unknown label 9"),
        ({"dtype": torch.float16}, ValueError, r"dtype: got torch\.float16"),
    ],
)
def test_bad_arguments_are_named(options, error, message, bank):
    with pytest.raises(error, match=message):
        ps.sample(**{"denoiser": ps.LocalScore(bank, 3), **options})


def test_ddpm_optimal_draws_what_a_gaussian_prior_asks_for():
    # Of a Gaussian prior every reverse step is Gaussian: with the posterior variance any few steps sample it exactly.
    class WithVariance(Gaussian):
        def estimate(self, z, sigma, labels=None, *, moments=False):
            variance = self.scale**2 * sigma**2 / (self.scale**2 + sigma**2)
            zeros = torch.zeros_like(z)
            return ps.Estimate(self.denoise(z, sigma), zeros, zeros[:, 0], 0, "test", torch.full_like(z, variance))

    levels = noise.karras(4, sigma_min=0.01, sigma_max=50.0)
    n = 400
    draws = {
        sampler: ps.sample(WithVariance(), n, schedule=levels, sampler=sampler, batch_size=n, progress=False)
        for sampler in ("ddpm", "ddpm-optimal")
    }
    # 6400 values: the standard deviation is known to 1 / sqrt(2 * 6400), here five times that.
    assert abs(draws["ddpm-optimal"].std().item() / 0.3 - 1) < 5 / math.sqrt(2 * n * 16)
    assert draws["ddpm"].std().item() < 0.9 * 0.3


def test_ddpm_optimal_needs_moments():
    bank = ps.PatchBank(smooth_images(4, 1, 6, 6))
    els = ps.EquivariantLocalScore(bank, 3)
    images = ps.sample(els, 2, steps=4, sampler="ddpm-optimal", progress=False)
    assert images.isfinite().all()
    with pytest.raises(ValueError, match=r"^moments: a guided denoiser"):
        ps.sample(ps.Guided(els, els, 2.0), 1, steps=4, sampler="ddpm-optimal", progress=False)
