"""The machines against the definition: who competes, with what weight, at every border and noise level."""

import itertools

import numpy as np
import pytest
import torch
from conftest import MACHINES, machine_named, noisy, smooth_images
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive import denoise_pixel

import patchscore as ps

SIGMAS = (0.005, 0.05, 0.3, 1.0, 4.0, 100.0)


def few_pixels(height, width, k):
    """Corners, edges on both sides of where the rule changes, and interior."""
    r = k // 2
    rows = {0, height - 1, min(r, height - 1), min(max(r - 1, 0), height - 1), height // 2}
    cols = {0, width - 1, min(r, width - 1), max(width - r - 1, 0), width // 2}
    return [(i, j) for n, (i, j) in enumerate(itertools.product(sorted(rows), sorted(cols))) if n % 3 == 0]


def largest_difference(machine_name, bank, k, sigma, dtype=torch.float64):
    """Worst difference of mean and of relative ess from the plain loops, over a few pixels of one image."""
    z = noisy(bank, sigma)
    estimate = machine_named(machine_name, bank, k, engine="reference").estimate(z.to(dtype), sigma)
    train = bank.chunk(0, len(bank), torch.float64).numpy()
    worst = worst_ess = 0.0
    for i, j in few_pixels(*bank.shape[1:], k):
        mean, ess, _ = denoise_pixel(z[0].numpy(), sigma, train, machine_name, k, i, j)
        worst = max(worst, np.abs(estimate.mean[0, :, i, j].double().numpy() - mean).max())
        worst_ess = max(worst_ess, abs(float(estimate.ess[0, i, j]) / ess - 1))
    return worst, worst_ess


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "k"), [("ideal", 0), *itertools.product([name for name in MACHINES if name != "ideal"], [3, 5, 9, 13, 17])]
)
def test_denoise_is_the_definition(name, k, channels):
    bank = ps.PatchBank(smooth_images(3, channels, 19, 18))
    for sigma in SIGMAS:
        worst, worst_ess = largest_difference(name, bank, k, sigma)
        assert worst < 1e-9
        assert worst_ess < 1e-6


@pytest.mark.parametrize("name", MACHINES)
def test_float32_keeps_the_promised_digits(name):
    bank = ps.PatchBank(smooth_images(3, 3, 14, 11))
    for sigma in SIGMAS:
        worst, _ = largest_difference(name, bank, 5, sigma, torch.float32)
        assert worst < (1e-4 if sigma >= 0.05 else 1e-3)


@pytest.mark.parametrize(("height", "width", "k"), [(7, 7, 7), (7, 9, 7), (6, 9, 7), (5, 5, 9), (9, 4, 5), (8, 8, 7)])
def test_windows_as_wide_as_the_image(height, width, k):
    bank = ps.PatchBank(smooth_images(4, 2, height, width))
    names = ("local", "els-zeros") + (("els-circular",) if k <= min(height, width) else ())
    for name, sigma in itertools.product(names, (0.05, 2.0)):
        assert largest_difference(name, bank, k, sigma)[0] < 1e-9


@given(
    n=st.integers(1, 4),
    channels=st.sampled_from([1, 2, 3, 4, 5]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    k=st.integers(0, 5).map(lambda r: 2 * r + 1),
    sigma=st.floats(0.005, 200),
    name=st.sampled_from(MACHINES),
)
@settings(max_examples=60, deadline=None)
def test_denoise_is_the_definition_at_any_shape(n, channels, height, width, k, sigma, name):
    assume(channels <= 4 or width > 4)  # a PatchBank takes the others for channels last and refuses them
    bank = ps.PatchBank(smooth_images(n, channels, height, width))
    if name == "els-circular" and k > min(height, width):
        with pytest.raises(ValueError, match="patch_size"):
            machine_named(name, bank, k)
    else:
        assert largest_difference(name, bank, k, sigma)[0] < 1e-8


@pytest.mark.parametrize("name", MACHINES)
def test_pairs_counts_the_competitors(name, bank):
    z = noisy(bank, 1.0)
    train = bank.chunk(0, len(bank), torch.float64).numpy()
    pixels = [(0, 0)] if name == "ideal" else list(itertools.product(range(12), range(10)))
    counted = sum(denoise_pixel(z[0].numpy(), 1.0, train[:1], name, 5, i, j)[2] for i, j in pixels)
    assert machine_named(name, bank, 5, engine="reference").estimate(z, 1.0).pairs == counted * len(bank)


@pytest.mark.parametrize("name", MACHINES)
def test_denoise_is_the_nearest_windows_value_as_sigma_vanishes(name, bank):
    z = noisy(bank, 0.3)
    train = bank.chunk(0, len(bank), torch.float64).numpy()
    for sigma in (1e-3, 1e-6):
        denoised = machine_named(name, bank, 3, engine="reference").denoise(z, sigma)
        for i, j in few_pixels(12, 10, 3):
            # At vanishing noise the definition is an argmin; the plain loops find it without underflow.
            nearest, _, _ = denoise_pixel(z[0].numpy(), 1e-3, train, name, 3, i, j)
            assert np.abs(denoised[0, :, i, j].numpy() - nearest).max() < 1e-9


def test_denoise_is_the_mean_of_competitors_as_sigma_grows(bank):
    z = noisy(bank, 1.0)
    images = bank.chunk(0, len(bank), torch.float64)
    mean = images.mean(0)
    assert (ps.IdealScore(bank).denoise(z, 1e6)[0] - mean).abs().max() < 1e-6
    assert (ps.LocalScore(bank, 5).denoise(z, 1e6)[0] - mean).abs().max() < 1e-6
    inside = images[:, :, 2:-2, 2:-2].mean((0, 2, 3))[:, None, None]
    assert (ps.EquivariantLocalScore(bank, 5, "circular").denoise(z, 1e6)[0] - inside).abs().max() < 1e-6
    broken = ps.EquivariantLocalScore(bank, 5, "zeros").denoise(z, 1e6)[0]
    assert (broken[:, 2:-2, 2:-2] - inside).abs().max() < 1e-6
    assert (broken[:, 0, 0] - mean[:, 0, 0]).abs().max() < 1e-6
    assert (broken[:, 0, 2:-2] - images[:, :, 0, 2:-2].mean((0, 2))[:, None]).abs().max() < 1e-6


def test_local_with_the_widest_window_is_ideal(bank):
    z = noisy(bank, 2.0, batch=3)
    ideal = ps.IdealScore(bank).estimate(z, 2.0)
    for k in (23, 99):
        local = ps.LocalScore(bank, k).estimate(z, 2.0)
        assert (local.mean - ideal.mean).abs().max() < 1e-9
        assert (local.ess - ideal.ess).abs().max() < 1e-6
    assert (ps.EquivariantLocalScore(bank, 23).denoise(z, 2.0) - ideal.mean).abs().max() < 1e-9


def test_circular_score_moves_with_its_input(bank):
    machine = ps.EquivariantLocalScore(bank, 5, "circular")
    z = noisy(bank, 0.5)
    moved = machine.denoise(z.roll((3, -2), (2, 3)), 0.5)
    assert (moved - machine.denoise(z, 0.5).roll((3, -2), (2, 3))).abs().max() < 1e-9


@pytest.mark.parametrize("name", MACHINES)
def test_each_item_has_its_own_sigma_and_label(name, bank):
    machine = machine_named(name, bank, 3, engine="reference")
    z = noisy(bank, 0.5, batch=5)
    sigma, labels = torch.tensor([0.02, 0.5, 3.0, 0.5, 40.0]), [0, "green", None, 1, 2]
    together = machine.estimate(z, sigma, labels)
    alone = [machine.estimate(z[i : i + 1], float(sigma[i]), labels[i]) for i in range(5)]
    assert (together.mean - torch.cat([e.mean for e in alone])).abs().max() < 1e-9
    assert together.pairs == sum(e.pairs for e in alone)
    selected = machine_named(name, ps.PatchBank(bank.images[bank.labels == 1]), 3)
    assert (selected.denoise(z[1:2], 0.5) - together.mean[1:2]).abs().max() < 1e-9


@pytest.mark.parametrize("name", MACHINES)
def test_memory_limit_cuts_the_work_and_not_the_result(name, bank):
    z = noisy(bank, 0.5, batch=3)
    whole = machine_named(name, bank, 5, engine="reference").denoise(z, 0.5)
    for limit in (400_000, 4_000_000):
        cut = machine_named(name, bank, 5, engine="reference", memory_limit=limit).denoise(z, 0.5)
        assert (cut - whole).abs().max() < 1e-10
    if name != "ideal":
        with pytest.raises(ValueError, match="memory_limit"):
            machine_named(name, bank, 5, engine="reference", memory_limit=1000).denoise(z, 0.5)


def test_estimate_says_what_it_is(bank):
    estimate = ps.EquivariantLocalScore(bank, 3, engine="reference").estimate(noisy(bank, 1.0, 2), 1.0)
    assert estimate.engine == "reference"
    assert estimate.mean.shape == estimate.stderr.shape == (2, 3, 12, 10)
    assert not estimate.stderr.any()
    assert estimate.ess.shape == (2, 12, 10)
    assert (estimate.ess >= 1 - 1e-9).all()


def test_denoise_keeps_the_inputs_precision(bank):
    machine = ps.LocalScore(bank, 3)
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ):
        assert machine.denoise(noisy(bank, 1.0).to(dtype), 1.0).dtype == expected


@given(alpha=st.floats(0.05, 1), sigma=st.floats(0.05, 2))
@settings(max_examples=20, deadline=None)
def test_score_and_eps_are_the_denoiser_in_vp_convention(alpha, sigma):
    bank = ps.PatchBank(smooth_images(6, 1, 6, 6))
    machine = ps.LocalScore(bank, 3)
    x = alpha * noisy(bank, sigma / alpha)
    denoised = machine.denoise(x / alpha, sigma / alpha)
    score, eps = machine.score(x, alpha, sigma), machine.eps(x, alpha, sigma)
    assert torch.allclose(eps, -sigma * score, atol=1e-9)
    assert torch.allclose(alpha * denoised + sigma * eps, x, atol=1e-9)
    assert torch.allclose(x + sigma**2 * score, alpha * denoised, atol=1e-9)


def test_score_is_the_gradient_of_the_log_density():
    bank = ps.PatchBank(smooth_images(5, 1, 4, 4))
    images, alpha, sigma = bank.chunk(0, 5, torch.float64), 0.8, 0.6
    x = (alpha * noisy(bank, 1.0)).requires_grad_()
    log_density = torch.logsumexp(-(x - alpha * images).square().sum((1, 2, 3)) / (2 * sigma**2), 0)
    (gradient,) = torch.autograd.grad(log_density, x)
    assert (ps.IdealScore(bank).score(x.detach(), alpha, sigma) - gradient).abs().max() < 1e-9


def test_patch_size_follows_the_table(bank):
    table = ps.ScaleTable([0.1, 1.0, 10.0], [1, 3, 5])
    machine = ps.EquivariantLocalScore(bank, table, "circular")
    z = noisy(bank, 0.5, batch=3)
    denoised = machine.denoise(z, torch.tensor([0.05, 1.2, 50.0]))
    for item, (k, sigma) in enumerate([(1, 0.05), (3, 1.2), (5, 50.0)]):
        one = ps.EquivariantLocalScore(bank, k, "circular").denoise(z[item : item + 1], sigma)
        assert (denoised[item] - one[0]).abs().max() < 1e-6


BAD_CALLS = [
    (lambda z: {"z": z[0]}, ValueError, r"z: got shape \[3, 12, 10\]"),
    (lambda z: {"z": z[:, :1]}, ValueError, r"z: got shape \[2, 1, 12, 10\], .* takes \[B, 3, H, W\]"),
    (lambda z: {"z": z * float("nan")}, ValueError, "z: NaN or infinite"),
    (lambda z: {"z": (z * 100).long()}, TypeError, "z: got torch.int64"),
    (lambda z: {"z": z.numpy()}, TypeError, "z: got ndarray"),
    (lambda z: {"sigma": 0.0}, ValueError, r"sigma: got 0\.0"),
    (lambda z: {"sigma": -1}, ValueError, r"sigma: got -1\.0"),
    (lambda z: {"sigma": float("nan")}, ValueError, "sigma: got nan"),
    (lambda z: {"sigma": float("inf")}, ValueError, "sigma: got inf"),
    (lambda z: {"sigma": "1"}, TypeError, "sigma: got '1'"),
    (lambda z: {"sigma": torch.ones(3)}, ValueError, r"sigma: got shape \[3\], takes a number or \[2\]"),
    (lambda z: {"labels": 7}, ValueError, r"labels: unknown label 7; this bank has 0 \(red\)"),
    (lambda z: {"labels": "purple"}, ValueError, "labels: unknown label 'purple'"),
    (lambda z: {"labels": [0]}, ValueError, "labels: got 1 for a batch of 2"),
    (lambda z: {"labels": [0.5, 1]}, TypeError, r"labels: got 0\.5"),
    (lambda z: {"labels": 5.5}, TypeError, r"labels: got 5\.5"),
    (lambda z: {"sigma": [1.0, "a"]}, TypeError, "sigma: got"),
    (lambda z: {"sigma": 1j}, TypeError, "sigma: got 1j"),
    (lambda z: {"sigma": {}}, TypeError, "sigma: got {}"),
    (lambda z: {"sigma": 10**400}, TypeError, "sigma: got 1000"),
    (lambda z: {"labels": torch.ones(2)}, TypeError, "labels: got a tensor of torch.float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_input_is_named(change, error, message, bank):
    z = noisy(bank, 1.0, batch=2)
    arguments = {"z": z, "sigma": 1.0, "labels": None, **change(z)}
    with pytest.raises(error, match=message) as raised:
        ps.EquivariantLocalScore(bank, 3).denoise(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patch_size": 4}, ValueError, "patch_size: got 4"),
        ({"patch_size": 0}, ValueError, "patch_size: got 0"),
        ({"patch_size": -3}, ValueError, "patch_size: got -3"),
        ({"patch_size": 3.0}, TypeError, r"patch_size: got 3\.0"),
        ({"patch_size": True}, TypeError, "patch_size: got True"),
        ({"patch_size": 11, "padding_mode": "circular"}, ValueError, "patch_size: 11 does not fit in 12 x 10"),
        ({"padding_mode": "reflect"}, ValueError, "padding_mode: got 'reflect'"),
        ({"engine": "warp"}, ValueError, "engine: got 'warp'"),
        ({"memory_limit": 0}, ValueError, "memory_limit: got 0"),
        ({"memory_limit": 1.5}, TypeError, r"memory_limit: got 1\.5"),
        ({"bank": "photos"}, TypeError, "bank: got str"),
    ],
)
def test_a_machine_that_makes_no_sense_is_refused(options, error, message, bank):
    with pytest.raises(error, match=message):
        ps.EquivariantLocalScore(**{"bank": bank, "patch_size": 3, **options})


def test_any_integer_type_will_do(bank):
    machine = ps.LocalScore(bank, np.int64(3), memory_limit=np.int32(2**30))
    assert machine.denoise(noisy(bank, 1.0), np.float32(1.0), labels=np.int64(1)).shape == (1, 3, 12, 10)
    table = ps.ScaleTable(np.array([1.0, 2.0]), np.array([3, 5]))
    assert ps.LocalScore(bank, table).patch_size_at(2.0) == 5


def test_float32_sums_do_not_drift_over_many_windows():
    # One locked border pixel meets the windows of a whole tile: tens of thousands of equal weights in one sum.
    bank = ps.PatchBank(smooth_images(4000, 1, 6, 6))
    machine = ps.EquivariantLocalScore(bank, 3, engine="reference")
    z = noisy(bank, 11.0)
    assert (machine.denoise(z.float(), 11.0) - machine.denoise(z, 11.0)).abs().max() < 5e-6


def test_scores_carry_no_gradient_that_would_be_wrong(bank):
    machine = ps.LocalScore(bank, 3)
    x = noisy(bank, 1.0).requires_grad_()
    assert not any(result.requires_grad for result in (machine.score(x, 0.8, 0.6), machine.denoise(x, 1.0)))


def test_a_machine_prints_what_it_is(bank):
    printed = repr(ps.EquivariantLocalScore(bank, 3, "circular", engine="reference"))
    assert "patch_size=3, padding_mode='circular', engine='reference'" in printed


def test_labels_need_a_bank_that_has_them(bank):
    unlabelled = ps.PatchBank(bank.images)
    with pytest.raises(ValueError, match="this bank has no labels"):
        ps.IdealScore(unlabelled).denoise(noisy(bank, 1.0), 1.0, labels=0)


@given(
    exponent=st.floats(-300, 6),
    name=st.sampled_from(MACHINES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    engine=st.sampled_from(["auto", "reference"]),
)
@settings(max_examples=40, deadline=None)
def test_no_sigma_gives_nan(exponent, name, dtype, engine):
    bank = ps.PatchBank(smooth_images(5, 1, 6, 7))
    sigma = 10.0**exponent
    estimate = machine_named(name, bank, 3, engine=engine).estimate(noisy(bank, sigma, 2).to(dtype), sigma)
    assert torch.isfinite(estimate.mean).all()
    assert (estimate.mean.abs() <= 1 + 1e-5).all()
    assert (estimate.ess >= 1 - 1e-4).all()


@pytest.mark.parametrize("name", MACHINES)
def test_equal_windows_and_one_image_never_give_nan(name):
    flat = ps.PatchBank(torch.full((1, 1, 6, 6), 128, dtype=torch.uint8))
    for sigma in (1e-6, 1.0, 1e6):
        estimate = machine_named(name, flat, 3).estimate(torch.zeros(2, 1, 6, 6), sigma)
        assert torch.allclose(estimate.mean, torch.full_like(estimate.mean, 128 / 127.5 - 1), atol=1e-6)
        assert torch.isfinite(estimate.ess).all()
