"""Conditioned: the posterior mean given a measurement, exact for a Gaussian, and restorations that come nearer."""

import pytest
import torch
from conftest import noisy, smooth_images

import patchscore as ps
from patchscore.conditioned import blurring, conjugate_gradients, downsampling, masking


@pytest.fixture(scope="module")
def small():
    """Thirty gray images of 8 x 8."""
    return ps.PatchBank(smooth_images(30, 1, 8, 8))


def matrix(operator, shape):
    """The operator as [measurement, pixels]."""
    unit = torch.eye(shape[0] * shape[1] * shape[2], dtype=torch.float64).view(-1, *shape)
    return operator(unit).flatten(1).T


OPERATORS = {
    "masking": masking(torch.arange(64).view(8, 8) % 3 > 0),
    "downsampling": downsampling(4),
    "blurring": blurring(1.0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_full_covariance_is_exact_for_a_gaussian(name, small):
    # x_0 ~ N(mu, Sigma), z = x_0 + sigma eps, y = A x_0 + n: the posterior mean by the normal equations.
    operator, gaussian, sigma, noise = OPERATORS[name], ps.GaussianScore(small), 0.8, 0.1
    images = small.chunk(0, 30, torch.float64).flatten(1)
    mu, covariance = images.mean(0), torch.cov(images.T, correction=0)
    a, z = matrix(operator, small.shape), noisy(small, sigma)
    y = operator(small.chunk(3, 4, torch.float64))
    observed = torch.cat([torch.eye(64, dtype=torch.float64), a])
    spread = torch.cat([torch.full((64,), sigma**2), torch.full((len(a),), noise**2)]).double().diag()
    gain = covariance @ observed.T @ torch.linalg.inv(observed @ covariance @ observed.T + spread)
    expected = mu + gain @ (torch.cat([z.flatten(), y.flatten()]) - observed @ mu)
    found = ps.Conditioned(gaussian, operator, y, noise, covariance="full").denoise(z, sigma)
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-3)


def test_diagonal_covariance_is_the_kalman_update_by_matrices(small):
    machine = ps.EquivariantLocalScore(small, 3, engine="reference")
    operator, z = OPERATORS["downsampling"], noisy(small, 0.5)
    y = operator(small.chunk(3, 4, torch.float64))
    est, a = machine.estimate(z, 0.5, moments=True), matrix(operator, small.shape)
    residual, noise = y.flatten() - a @ est.mean.flatten(), 0.1**2 * torch.eye(len(a), dtype=torch.float64)
    variance = est.variance.flatten().diag()
    step = variance @ a.T @ torch.linalg.solve(noise + a @ variance @ a.T, residual)
    found = ps.Conditioned(machine, operator, y, 0.1).denoise(z, 0.5)
    torch.testing.assert_close(found, est.mean + step.view_as(z), rtol=0, atol=1e-4)
    # By row sums of the Jacobian, and back through it.
    rows = (0.5**2 * machine.jvp(z, 0.5, torch.ones_like(z))).flatten().clamp(min=0).diag()
    along = (a.T @ torch.linalg.solve(noise + a @ rows @ a.T, residual)).view_as(z)
    found = ps.Conditioned(machine, operator, y, 0.1, "rows").denoise(z, 0.5)
    torch.testing.assert_close(found, est.mean + 0.5**2 * machine.vjp(z, 0.5, along), rtol=0, atol=1e-4)


def test_residual_covariance_steps_along_the_gradient_of_the_residual(small):
    machine = ps.EquivariantLocalScore(small, 3, engine="reference")
    operator, z = OPERATORS["blurring"], noisy(small, 0.5)
    y = operator(small.chunk(3, 4, torch.float64))
    x = z.clone().requires_grad_()
    loss = (y - operator(ps.Differentiable(machine).denoise(x, 0.5))).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    step = ps.Conditioned(machine, operator, y, 0.01, "residual").denoise(z, 0.5) - machine.denoise(z, 0.5)
    torch.testing.assert_close(step, -(0.5**2) * gradient / (2 * loss.detach() / y.numel()))


@pytest.mark.parametrize("name", OPERATORS)
def test_restored_images_are_nearer_than_unconditioned_samples_and_keep_the_measurement(name, small):
    # The image is one of the bank's, so that it is there to be found.
    machine, operator = ps.EquivariantLocalScore(small, 5, engine="reference"), OPERATORS[name]
    truth = small.chunk(7, 8)
    y = operator(truth)
    options = {"n": 4, "steps": 15, "sampler": "ddpm", "seed": 1, "progress": False}
    free = ps.sample(machine, **options)
    restored = ps.sample(ps.Conditioned(machine, operator, y, 0.05), **options)
    assert (operator(restored) - y).square().mean() < 0.5 * (operator(free) - y).square().mean()
    assert (restored - truth).square().mean() < (free - truth).square().mean()


def test_each_image_may_have_its_own_measurement(small):
    machine, operator = ps.GaussianScore(small), OPERATORS["masking"]
    z, y = noisy(small, 0.5, batch=2), operator(small.chunk(4, 6, torch.float64))
    both = ps.Conditioned(machine, operator, y, 0.1).denoise(z, 0.5)
    alone = ps.Conditioned(machine, operator, y[1:], 0.1).denoise(z[1:], 0.5)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"^measurement: got 2 for a batch of 3"):
        ps.Conditioned(machine, operator, y, 0.1).denoise(noisy(small, 0.5, batch=3), 0.5)


def test_conjugate_gradients_solve():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    matrices = root @ root.mT + 0.1 * torch.eye(6, dtype=torch.float64)
    target = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    target[1] = 0
    found = conjugate_gradients(lambda x: (matrices @ x[..., None])[..., 0], target)
    torch.testing.assert_close((matrices @ found[..., None])[..., 0], target, rtol=0, atol=1e-3)
    assert not found[1].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"denoiser": 3}, TypeError, "denoiser: got int"),
        ({"operator": 3}, TypeError, "operator: got int"),
        ({"measurement": [1.0]}, TypeError, "measurement: got list"),
        ({"measurement": torch.full((1, 1, 8, 8), torch.nan)}, ValueError, "measurement: NaN"),
        ({"measurement": torch.zeros(1, 1, 4, 4)}, ValueError, "operator: makes [1, 8, 8] of an image"),
        ({"operator": masking(torch.ones(7, 7))}, ValueError, "operator: does not take images [1, 1, 8, 8]"),
        ({"operator": lambda x: x + 1}, ValueError, "operator: takes a linear one"),
        ({"noise": 0.0}, ValueError, "noise: got 0.0"),
        ({"covariance": "none"}, ValueError, "covariance: got 'none'"),
    ],
)
def test_bad_input_is_named(change, error, message, small):
    arguments = {
        "denoiser": ps.GaussianScore(small),
        "operator": OPERATORS["masking"],
        "measurement": torch.zeros(1, 1, 8, 8),
        "noise": 0.1,
    } | change
    with pytest.raises(error) as caught:
        ps.Conditioned(**arguments)
    assert str(caught.value).startswith(message)


def test_a_conditioned_denoiser_has_no_moments(small):
    conditioned = ps.Conditioned(ps.GaussianScore(small), OPERATORS["masking"], torch.zeros(1, 1, 8, 8), 0.1)
    with pytest.raises(ValueError, match=r"^moments: a conditioned"):
        conditioned.estimate(torch.zeros(1, 1, 8, 8), 0.5, moments=True)
