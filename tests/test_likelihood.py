"""Divergences and log-likelihoods against closed forms and direct sums."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import machine_named, noisy, smooth_images

import patchscore as ps
from patchscore import likelihood
from patchscore.cli import main
from patchscore.likelihood import dequantised


@pytest.fixture(scope="module")
def small():
    """Six gray images of 6 x 5."""
    return ps.PatchBank(smooth_images(6, 1, 6, 5), torch.arange(6) % 2)


def mixture_density(z, images, sigma):
    """ln of the mean of the Gaussians of width sigma around the images, [B]."""
    squared = (z.flatten(1)[:, None] - images.flatten(1)[None]).square().sum(-1)
    logits = -squared / (2 * sigma**2)
    dimensions = z[0].numel()
    return logits.logsumexp(1) - math.log(len(images)) - dimensions * math.log(sigma * math.sqrt(2 * math.pi))


def jacobian(machine, z, sigma, label=None, step=1e-4):
    """[d, d] derivatives of D at one z, by central differences."""
    probes = step * torch.eye(z.numel(), dtype=torch.float64).view(-1, *z.shape[1:])
    both = [machine.denoise(z + sign * probes, sigma, label).flatten(1) for sign in (1, -1)]
    return ((both[0] - both[1]) / (2 * step)).T


@pytest.mark.parametrize("name", ["ideal", "local", "els-circular", "els-zeros"])
def test_divergence_is_the_trace_of_the_jacobian(name, small):
    machine, z = machine_named(name, small, 3, engine="reference"), noisy(small, 0.6)
    trace = jacobian(machine, z, 0.6).trace().item()
    assert machine.divergence(z, 0.6).item() == pytest.approx(trace, rel=1e-5)


def test_divergence_of_combinations_is_the_trace_of_theirs(small):
    els, gaussian = machine_named("els-zeros", small, 3, engine="reference"), ps.GaussianScore(small)
    guided, switch = ps.Guided(els, els, 2.5), ps.Switch([(1.0, els), (math.inf, gaussian)])
    z = noisy(small, 0.6)
    trace = jacobian(guided, z, 0.6, 1).trace().item()
    assert guided.divergence(z, 0.6, [1]).item() == pytest.approx(trace, rel=1e-5)
    both = switch.divergence(z.expand(2, -1, -1, -1), torch.tensor([0.6, 3.0]))
    expected = [els.divergence(z, 0.6).item(), jacobian(gaussian, z, 3.0).trace().item()]
    torch.testing.assert_close(both, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_gaussians_log_density_is_torchs(bank):
    gaussian, sigma = ps.GaussianScore(bank), 0.4
    z = noisy(bank, sigma, batch=3)
    images = bank.chunk(0, 20, torch.float64).flatten(1)
    covariance = torch.cov(images.T, correction=0) + sigma**2 * torch.eye(360, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(images.mean(0), covariance).log_prob(z.flatten(1))
    torch.testing.assert_close(gaussian.log_density(z, sigma), expected, rtol=1e-10, atol=1e-8)


def errors_by_steps(denoiser, z, exact, **options):
    """Largest error in nats a dimension at 12, 25 and 50 steps, with the likelihoods."""
    found = {}
    for steps in (12, 25, 50):
        result = ps.log_likelihood(denoiser, z, steps=steps, dtype=torch.float64, progress=False, **options)
        found[steps] = ((result.nats - exact).abs().max().item() / z[0].numel(), result)
    return found


def test_log_likelihood_of_the_gaussian_is_its_closed_form(bank):
    gaussian = ps.GaussianScore(bank)
    z = noisy(bank, 0.3, batch=2)
    found = errors_by_steps(gaussian, z, gaussian.log_density(z, 0.1), sigma_min=0.1, sigma_max=60.0, gaussian=gaussian)
    errors = [error for error, _ in found.values()]
    assert errors[2] < 1e-3
    assert errors == sorted(errors, reverse=True)


def test_log_likelihood_of_the_ideal_machine_is_that_of_the_mixture(small):
    # At sigma_max the mixture is the Gaussian of the same mean and covariance, up to terms of third order in 1 / sigma.
    machine, z = ps.IdealScore(small, engine="reference"), noisy(small, 0.3, batch=4)
    exact = mixture_density(z, small.chunk(0, 6, torch.float64), 0.3)
    options = {"sigma_min": 0.3, "sigma_max": 60.0, "gaussian": ps.GaussianScore(small)}
    found = errors_by_steps(machine, z, exact, **options)
    errors = [error for error, _ in found.values()]
    assert errors[2] < 1e-3
    assert errors == sorted(errors, reverse=True)
    for _, result in found.values():  # what is stated covers what is true, here within a factor of two
        assert (2 * result.error + 1e-5 >= (result.nats - exact).abs()).all()


def test_white_noise_is_the_density_at_sigma_max_without_a_gaussian(small):
    machine, z = ps.IdealScore(small, engine="reference"), noisy(small, 0.5, batch=2)
    exact = mixture_density(z, small.chunk(0, 6, torch.float64), 0.5)
    found = ps.log_likelihood(machine, z, sigma_min=0.5, steps=100, dtype=torch.float64, progress=False)
    assert ((found.nats - exact).abs() / 30).max() < 1e-3


def test_log_likelihood_conditions_on_the_class(small):
    machine, z = ps.IdealScore(small, engine="reference"), noisy(small, 0.4, batch=4)
    options = {"sigma_min": 0.4, "steps": 50, "dtype": torch.float64, "progress": False}
    found = ps.log_likelihood(machine, z, [0, 1], batch_size=3, gaussian=ps.GaussianScore(small), **options)
    images = small.chunk(0, 6, torch.float64)
    exact = torch.cat([mixture_density(z[i : i + 1], images[i % 2 :: 2], 0.4) for i in range(4)])
    assert ((found.nats - exact).abs() / 30).max() < 1e-3


def test_latents_are_the_noise_that_the_flow_makes_the_images_from(small):
    machine, z = ps.IdealScore(small, engine="reference"), noisy(small, 0.4, batch=2)
    found = ps.log_likelihood(machine, z, sigma_min=0.4, sigma_max=20.0, steps=60, dtype=torch.float64, progress=False)
    levels = [20.0 * (0.4 / 20.0) ** (i / 400) for i in range(401)]
    back = found.latents
    for sigma, below in pairwise(levels):
        x0 = machine.denoise(back, sigma)
        back = x0 + below / sigma * (back - x0)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-2)


def test_a_tolerance_takes_the_steps_it_needs(small, monkeypatch):
    machine, z = ps.IdealScore(small, engine="reference"), noisy(small, 0.3, batch=2)
    options = {"sigma_min": 0.3, "dtype": torch.float64, "progress": False, "gaussian": ps.GaussianScore(small)}
    found = ps.log_likelihood(machine, z, steps=6, tolerance=1e-3, **options)
    assert found.steps > 6
    assert (found.error / 30).max() <= 1e-3
    assert ((found.nats - mixture_density(z, small.chunk(0, 6, torch.float64), 0.3)).abs() / 30).max() < 2e-3
    monkeypatch.setattr(likelihood, "MOST_STEPS", 30)
    with pytest.raises(ValueError, match=r"^tolerance: got 1e-300, 20 steps leave"):
        ps.log_likelihood(machine, z, steps=10, tolerance=1e-300, **options)


def test_eight_bits_are_spread_over_their_width_and_counted_as_bits(small):
    images = small.images[:2]
    x = dequantised(images, seed=3)
    assert ((x + 1) * 127.5 - images).abs().max() <= 0.5
    assert torch.equal(x, dequantised(images, seed=3))
    assert not torch.equal(x, dequantised(images, seed=4))
    assert torch.equal(x[1:], dequantised(images, seed=3)[1:])
    machine = ps.GaussianScore(small)
    found = ps.log_likelihood(machine, images, sigma_min=0.1, steps=20, seed=3, progress=False)
    # A density of 127.5 a pixel value is one value for certain: no bits.
    expected = -(found.nats / 30 - math.log(127.5)) / math.log(2)
    torch.testing.assert_close(found.bits_per_dim, expected)
    assert found.bits_per_dim_error.shape == (2,)
    assert repr(found).startswith("LogLikelihood(2 images, ")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"denoiser": None}, TypeError, "denoiser: got NoneType"),
        ({"images": torch.zeros(2, 1, 5, 6)}, ValueError, "images: got shape"),
        ({"images": torch.zeros(2, 1, 6, 5, dtype=torch.int64)}, TypeError, "images: got torch.int64"),
        ({"images": torch.zeros(0, 1, 6, 5)}, ValueError, "images: got none"),
        ({"sigma_min": 0.0}, ValueError, "sigma_min, sigma_max: got 0"),
        ({"sigma_max": 0.001}, ValueError, "sigma_min, sigma_max: got 0.002"),
        ({"steps": 1}, ValueError, "steps: got 1"),
        ({"tolerance": -1.0}, ValueError, "tolerance: got -1"),
        ({"dtype": torch.float16}, ValueError, "dtype: got torch.float16"),
        ({"labels": 7}, ValueError, "labels: unknown label 7"),
    ],
)
def test_bad_input_is_named(change, error, message, small):
    arguments = {"denoiser": ps.GaussianScore(small), "images": torch.zeros(2, 1, 6, 5), "progress": False} | change
    with pytest.raises(error) as caught:
        ps.log_likelihood(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_network_has_no_divergence(small):
    with pytest.raises(ValueError, match=r"^moments: a network"):
        ps.log_likelihood(ps.NetworkDenoiser(lambda x, level: x, small.shape), torch.zeros(1, 1, 6, 5))


def run(*arguments):
    return CliRunner().invoke(main, ["likelihood", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def sources(tmp_path):
    """Twenty training images and four others of two classes, as .npz files."""
    images = smooth_images(24, 3, 9, 9)
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 24))):
        np.savez(tmp_path / f"{name}.npz", images=images[part].numpy(), labels=(np.arange(24) % 2)[part])
    return tmp_path / "train.npz", tmp_path / "test.npz"


@pytest.mark.filterwarnings("ignore:the published patch sizes")
def test_the_command_says_what_the_library_does(sources, tmp_path):
    out = tmp_path / "bits.json"
    options = ("--machine", "ideal", "--labels", "own", "--sigma-min", 0.2, "--steps", 6, "-n", 3, "--out", out)
    found = run(*sources, *options)
    assert found.exit_code == 0, found.output
    train, test = (ps.PatchBank.open(source) for source in sources)
    expected = ps.log_likelihood(ps.IdealScore(train), test.images[:3], [0, 1, 0], sigma_min=0.2, steps=6)
    record = json.loads(out.read_text())
    assert record["bits_per_dim"] == pytest.approx(expected.bits_per_dim.tolist())
    assert record["nats_error"] == pytest.approx(expected.error.tolist(), rel=1e-3, abs=1e-3)
    assert f"{expected.bits_per_dim.mean().item():.4g} bits a dimension" in found.output
    assert run(*sources, "--table", 3, "--steps", 2, "-n", 1).exit_code == 0
    assert run(*sources, "--machine", "gaussian", "--steps", 2).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 1), "steps: got 1"),
        (("-n", 0), "-n: got 0"),
        (("--sigma-min", 100), "sigma_min, sigma_max: got 100"),
        (("--machine", "ls", "--padding-mode", "circular"), "--padding-mode: got circular"),
    ],
)
def test_the_command_names_bad_input_in_a_line(options, message, sources):
    found = run(*sources, "--table", 3, *options)
    assert found.exit_code == 2
    (line,) = [line for line in found.output.splitlines() if line.startswith("patchscore: error")]
    assert message in line


def test_the_command_refuses_images_of_another_size(sources, tmp_path):
    np.savez(tmp_path / "wide.npz", images=smooth_images(4, 3, 9, 12).numpy())
    found = run(sources[0], tmp_path / "wide.npz")
    assert found.exit_code == 2
    assert "IMAGES: got 3 x 9 x 12 images, SOURCE has 3 x 9 x 9; --size resizes both" in found.output
    found = run(sources[0], sources[1], "--labels", "own", "--machine", "ideal", "--steps", 2)
    assert found.exit_code == 0, found.output


def test_a_denoiser_that_samples_states_the_error_of_its_draws():
    bank = ps.PatchBank(smooth_images(120, 1, 8, 7))
    x = bank.chunk(100, 102)
    options = {"sigma_min": 0.5, "sigma_max": 4.0, "steps": 2, "progress": False}
    exact = ps.log_likelihood(ps.LocalScore(bank, 3), x, **options)
    assert not exact.sampling_error.any()
    errors = []
    for budget in (0.25, 0.75):
        found = ps.log_likelihood(ps.LocalScore(bank, 3, budget=budget), x, replicates=6, **options)
        # Student's t with 5 degrees of freedom leaves 12 with a probability below 1e-4.
        assert ((found.nats - exact.nats).abs() < 12 * found.sampling_error).all()
        torch.testing.assert_close(
            found.bits_per_dim_sampling_error, found.sampling_error / 56 / math.log(2), rtol=1e-12, atol=0
        )
        errors.append(found.sampling_error.mean().item())
    assert errors[1] < errors[0]  # by sqrt((1 - f) / f) they fall to a third
    assert exact.nats.shape == found.nats.shape
    with pytest.raises(ValueError, match=r"^replicates: got 1"):
        ps.log_likelihood(ps.LocalScore(bank, 3), x, replicates=1)


def test_draws_are_renewed_through_every_wrapper():
    bank = ps.PatchBank(smooth_images(60, 1, 8, 7), torch.arange(60) % 2)
    sampling, exact = ps.LocalScore(bank, 3, budget=0.2), ps.LocalScore(bank, 3)
    z = bank.chunk(0, 1)
    for wrap in (
        lambda one: one,
        ps.Differentiable,
        lambda one: ps.Guided(one, one, 2.0),
        lambda one: ps.Switch([(1.0, one), (math.inf, exact)]),
    ):
        drawing, still = wrap(sampling), wrap(exact)
        assert still.redrawn(1) is still
        first, again, other = (drawing.redrawn(draw).denoise(z, 0.8, [0]) for draw in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    els = ps.EquivariantLocalScore(bank, 3, budget=0.2)
    pooled = ps.Pooled([els, ps.EquivariantLocalScore(bank, 3)])
    assert not torch.equal(pooled.redrawn(1).denoise(z, 0.8), pooled.redrawn(2).denoise(z, 0.8))
