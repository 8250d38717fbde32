"""Products with the Jacobian of a denoiser, against autograd through a plain implementation."""

import math

import pytest
import torch
from conftest import MACHINES, machine_named, noisy, smooth_images

import patchscore as ps
from patchscore.adapters.k_diffusion import PatchScoreDenoiser


def plain(machine, z, sigma, k):
    """D(z) in differentiable torch, pixel by pixel, every window of the bank materialised."""
    train = machine.bank.chunk(0, len(machine.bank), torch.float64)
    if k is None:
        distance = (z.flatten(1)[:, None] - train.flatten(1)).square().sum(-1)
        weights = (-distance / (2 * sigma**2)).softmax(1)
        return (weights @ train.flatten(1)).view_as(z)
    r, competition = k // 2, machine.competition(k)
    wrap = competition.padding_mode == "circular"
    padded = torch.nn.functional.pad(z, (r,) * 4, mode="circular" if wrap else "constant")
    known = torch.nn.functional.pad(train, (r,) * 4)
    rows = []
    for i in range(z.shape[2]):
        row = []
        for j in range(z.shape[3]):
            (group,) = [g for g in competition.groups if i in g.rows.queries and j in g.cols.queries]
            places = [
                (a, b)
                for a in ([i] if group.rows.locked else group.rows.windows)
                for b in ([j] if group.cols.locked else group.cols.windows)
            ]
            windows = torch.stack([known[:, :, a : a + k, b : b + k] for a, b in places]).flatten(0, 1).flatten(1)
            values = torch.stack([train[:, :, a, b] for a, b in places]).flatten(0, 1)
            query = padded[:, :, i : i + k, j : j + k].flatten(1)
            weights = (-(query[:, None] - windows).square().sum(-1) / (2 * sigma**2)).softmax(1)
            row.append(weights @ values)
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


CASES = [
    ("ideal", None),
    ("local", 3),
    ("local", 9),
    *((f"els-{mode}", k) for mode in ("zeros", "circular") for k in (1, 3, 5)),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "k"), CASES)
def test_products_are_autograds_through_a_plain_implementation(name, k, channels):
    bank = ps.PatchBank(smooth_images(5, channels, 7, 6))
    machine = machine_named(name, bank, k, engine="reference")
    for sigma in (0.15, 0.8):
        z = noisy(bank, sigma, batch=2).requires_grad_()
        u, t = torch.randn(2, *z.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        denoised = plain(machine, z, sigma, k)
        torch.testing.assert_close(machine.denoise(z.detach(), sigma), denoised.detach(), rtol=0, atol=1e-9)
        (expected,) = torch.autograd.grad(denoised, z, u)
        torch.testing.assert_close(machine.vjp(z.detach(), sigma, u), expected, rtol=1e-5, atol=1e-8)
        _, expected = torch.autograd.functional.jvp(lambda z: plain(machine, z, sigma, k), z.detach(), t)  # noqa: B023
        torch.testing.assert_close(machine.jvp(z.detach(), sigma, t), expected, rtol=1e-5, atol=1e-8)


def denoisers(bank):
    els = ps.EquivariantLocalScore(bank, 5, engine="reference")
    gaussian = ps.GaussianScore(bank)
    return {
        **{name: machine_named(name, bank, 5, engine="reference") for name in MACHINES},
        "gaussian": gaussian,
        "guided": ps.Guided(els, gaussian, 1.7),
        "switch": ps.Switch([(0.4, els), (math.inf, gaussian)]),
        "differentiable": ps.Differentiable(els),
    }


@pytest.mark.parametrize("name", [*MACHINES, "gaussian", "guided", "switch", "differentiable"])
def test_vjp_is_the_dual_of_jvp(name, bank):
    denoiser = denoisers(bank)[name]
    z, sigma = noisy(bank, 0.5, batch=3), torch.tensor([0.2, 0.5, 1.5])
    u, t = torch.randn(2, *z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels = [0, None, 2]
    left = (denoiser.vjp(z, sigma, u, labels) * t).flatten(1).sum(1)
    right = (denoiser.jvp(z, sigma, t, labels) * u).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian", "guided", "switch"])
def test_products_are_slopes_of_the_denoiser(name, bank):
    denoiser, step = denoisers(bank)[name], 1e-5
    z, sigma = noisy(bank, 0.5, batch=2), torch.tensor([0.3, 0.9])
    t = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope = (denoiser.denoise(z + step * t, sigma, [0, 1]) - denoiser.denoise(z - step * t, sigma, [0, 1])) / (2 * step)
    torch.testing.assert_close(denoiser.jvp(z, sigma, t, [0, 1]), slope, rtol=1e-4, atol=1e-5)


def test_memory_limit_cuts_the_work_and_not_the_products(bank):
    z = noisy(bank, 0.5, batch=2)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for name in MACHINES:
        ample, small = (
            machine_named(name, bank, 5, engine="reference", memory_limit=limit) for limit in (2**30, 1_500_000)
        )
        torch.testing.assert_close(small.vjp(z, 0.5, direction), ample.vjp(z, 0.5, direction))
        torch.testing.assert_close(small.jvp(z, 0.5, direction), ample.jvp(z, 0.5, direction))


def test_a_differentiable_denoiser_carries_the_gradient(bank):
    machine = ps.EquivariantLocalScore(bank, 5, engine="reference")
    smooth = ps.Differentiable(machine)
    z = noisy(bank, 0.5, batch=2).requires_grad_()
    target = torch.zeros_like(z)
    x0 = smooth.denoise(z, 0.5, [0, 1])
    assert torch.equal(x0.detach(), machine.denoise(z.detach(), 0.5, [0, 1]))
    (gradient,) = torch.autograd.grad((x0 - target).square().sum(), z)
    expected = machine.vjp(z.detach(), 0.5, 2 * x0.detach(), [0, 1])
    torch.testing.assert_close(gradient, expected)
    assert not smooth.denoise(z.detach(), 0.5).requires_grad
    assert not smooth.estimate(z, 0.5).mean.requires_grad
    # score and eps are affine in D.
    (gradient,) = torch.autograd.grad(smooth.score(z, 0.8, 0.6).sum(), z)
    ones = torch.ones_like(z)
    torch.testing.assert_close(gradient, (machine.vjp(z.detach() / 0.8, 0.75, ones) - 1) / 0.36)
    (gradient,) = torch.autograd.grad(smooth.eps(z, 0.8, 0.6).sum(), z)
    torch.testing.assert_close(gradient, (1 - machine.vjp(z.detach() / 0.8, 0.75, ones)) / 0.6)


def test_forward_mode_is_jvp(bank):
    machine = ps.EquivariantLocalScore(bank, 5, engine="reference")
    z = noisy(bank, 0.5)
    t = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, t)
        moved = torch.autograd.forward_ad.unpack_dual(ps.Differentiable(machine).denoise(dual, 0.5)).tangent
    torch.testing.assert_close(moved, machine.jvp(z, 0.5, t))


def test_second_derivatives_and_derivatives_by_sigma_are_refused_by_name(bank):
    smooth = ps.Differentiable(ps.EquivariantLocalScore(bank, 3, engine="reference"))
    z = noisy(bank, 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(smooth.denoise(z, 0.5).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^Differentiable: has no second derivatives"):
        torch.autograd.grad(gradient.sum(), z)
    with pytest.raises(ValueError, match=r"^sigma: requires grad"):
        smooth.denoise(z, torch.tensor(0.5, requires_grad=True))
    with pytest.raises(TypeError, match=r"^denoiser: got int"):
        ps.Differentiable(3)


def test_k_diffusions_log_likelihood_sees_the_divergence(bank):
    # Its ode_fn: grad = autograd.grad((d * v).sum(), x), d_ll = (v * grad).sum(); with unit probes v the sum is exact.
    small = ps.PatchBank(smooth_images(6, 1, 5, 4))
    machine = ps.EquivariantLocalScore(small, 3, engine="reference")
    model = PatchScoreDenoiser(ps.Differentiable(machine)).to(torch.float64)
    z, sigma = noisy(small, 0.5), 0.5
    with torch.enable_grad():
        x = z.expand(20, -1, -1, -1).detach().requires_grad_()
        d = (x - model(x, sigma * x.new_ones(20))) / sigma
        probes = torch.eye(20, dtype=torch.float64).view_as(x)
        grad = torch.autograd.grad((d * probes).sum(), x)[0]
    found = (probes * grad).sum()
    assert found.item() == pytest.approx((20 - machine.divergence(z, sigma).item()) / sigma, rel=1e-9)


def test_a_diffusers_unet_carries_the_gradient(bank):
    adapter = pytest.importorskip("patchscore.adapters.diffusers", exc_type=ImportError)
    diffusers = pytest.importorskip("diffusers")
    machine, scheduler = ps.EquivariantLocalScore(bank, 3, engine="reference"), diffusers.DDIMScheduler()
    unet = adapter.PatchScoreUNet(ps.Differentiable(machine), scheduler).to(torch.float64)
    x = noisy(bank, 0.5).requires_grad_()
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(unet(x, 500).sample, x, u)
    kept = scheduler.alphas_cumprod[500].double()
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    # epsilon = (x - alpha D(x / alpha)) / sigma
    expected = (u - machine.vjp(x.detach() / alpha, (sigma / alpha).item(), u)) / sigma
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_the_plain_adapter_says_what_to_wrap(bank):
    model = PatchScoreDenoiser(ps.EquivariantLocalScore(bank, 3))
    with pytest.raises(ValueError, match=r"^x: requires grad.* wrap it in patchscore\.Differentiable"):
        model(noisy(bank, 0.5).requires_grad_(), 0.5)


@pytest.mark.parametrize(
    ("direction", "error", "message"),
    [
        (torch.zeros(1, 3, 10, 12), ValueError, r"^u: got shape \[1, 3, 10, 12\], takes \[1, 3, 12, 10\] as z"),
        (torch.zeros(1, 3, 12, 10, dtype=torch.int64), TypeError, r"^u: got torch.int64"),
        (torch.full((1, 3, 12, 10), torch.nan), ValueError, r"^u: NaN or infinite"),
        (2.0, TypeError, r"^u: got float"),
    ],
)
def test_bad_directions_are_named(direction, error, message, bank):
    for denoiser in (ps.EquivariantLocalScore(bank, 3, engine="reference"), ps.GaussianScore(bank)):
        with pytest.raises(error, match=message):
            denoiser.vjp(noisy(bank, 0.5), 0.5, direction)


def test_a_network_has_no_jacobian(bank):
    network = ps.NetworkDenoiser(lambda x, level: x, bank.shape)
    z = noisy(bank, 0.5)
    for product in (network.vjp, network.jvp):
        with pytest.raises(ValueError, match=r"^denoiser: NetworkDenoiser has no Jacobian"):
            product(z, 0.5, z)


@pytest.mark.parametrize(("padding_mode", "size"), [("zeros", (9, 13)), ("circular", (8, 11))])
def test_a_canvas_of_another_size_has_divergence_and_gradients(padding_mode, size):
    bank = ps.PatchBank(smooth_images(6, 1, 7, 6))
    machine = ps.EquivariantLocalScore(bank, 3, padding_mode=padding_mode, engine="reference")
    z = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, t = torch.randn(2, *z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope = (machine.denoise(z + 1e-5 * t, 0.6) - machine.denoise(z - 1e-5 * t, 0.6)) / 2e-5
    torch.testing.assert_close(machine.jvp(z, 0.6, t), slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close((machine.vjp(z, 0.6, u) * t).sum(), (u * slope).sum(), rtol=1e-5, atol=1e-7)
    probes = torch.eye(size[0] * size[1], dtype=torch.float64).view(-1, 1, *size)
    trace = (machine.jvp(z[:1].expand_as(probes), 0.6, probes) * probes).sum()
    torch.testing.assert_close(machine.divergence(z[:1], 0.6)[0], trace)
