"""Standard errors of summaries cover, where those of single pixels do not add up to any; tolerances of trajectories."""

import math

import pytest
import torch
from conftest import noisy, smooth_images
from scipy.stats import binom, t

import patchscore as ps
from patchscore.sampling import step_tolerances

SURE = 1e-6
"""A statistical test fails by chance with this probability."""


@pytest.fixture(scope="module")
def bank():
    return ps.PatchBank(smooth_images(24, 1, 10, 9, 0), torch.arange(24) % 3)


def covered(errors, stderrs, degrees):
    """Of how many the 95% interval of Student's t holds the truth."""
    half = t.ppf(0.975, degrees)
    return sum(abs(error) <= half * stderr for error, stderr in zip(errors, stderrs, strict=True))


def test_the_error_of_an_images_mean_is_that_of_correlated_pixels(bank):
    """Whole images are drawn at high noise, so all pixels err together."""
    z, trials, replicates = noisy(bank, 8.0, 1, dtype=torch.float32), 30, 4
    truth = ps.EquivariantLocalScore(bank, 3).denoise(z, 8.0).mean().item()
    errors, stderrs, of_pixels = [], [], []
    for seed in range(trials):
        machine = ps.EquivariantLocalScore(bank, 3, budget=0.3, seed=seed)
        found = ps.replicated(lambda machine: machine.denoise(z, 8.0).mean(), machine, replicates)
        assert found.values.shape == (replicates,)
        errors.append(found.value.item() - truth)
        stderrs.append(found.stderr.item())
        stated = machine.estimate(z, 8.0).stderr
        of_pixels.append((stated.square().sum().sqrt() / stated.numel() / replicates**0.5).item())
    least = binom.ppf(SURE, trials, 0.95)
    assert covered(errors, stderrs, replicates - 1) >= least
    assert covered(errors, of_pixels, math.inf) < least


def test_a_summary_may_have_any_shape_and_any_depth(bank):
    machine = ps.Guided(ps.EquivariantLocalScore(bank, 3, budget=0.3), ps.EquivariantLocalScore(bank, 3), 1.5)
    made = ps.replicated(lambda machine: ps.sample(machine, n=1, labels=1, progress=False), machine, 2)
    assert made.value.shape == made.stderr.shape == (1, 1, 10, 9)
    assert made.stderr.max() > 0


def test_what_draws_nothing_is_asked_once(bank):
    asked = []
    found = ps.replicated(lambda machine: len(asked.append(machine) or asked), ps.IdealScore(bank), 4)
    assert (found.value, found.stderr, len(asked)) == (1, 0, 1)


@pytest.mark.parametrize(
    ("summary", "options", "error"),
    [
        (lambda machine: 1, {"denoiser": lambda z: z}, TypeError),
        (lambda machine: 1, {"replicates": 1}, ValueError),
        (lambda machine: "1", {}, TypeError),
        (lambda machine: torch.zeros(machine.pruned.seed % 5), {}, ValueError),
    ],
)
def test_replicates_name_what_they_do_not_take(bank, summary, options, error):
    given = {"denoiser": ps.EquivariantLocalScore(bank, 3, budget=0.3), "replicates": 3, **options}
    with pytest.raises(error, match=r"^(denoiser|replicates|summary): "):
        ps.replicated(summary, **given)


# Tolerances.


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun"])
def test_steps_share_a_tolerance(sampler):
    """With errors of those sizes in every denoised image, and J = 0, the last image is off by the tolerance."""
    ratios, draws, tolerance = [4.0, 2.0, 1.5, 0.5, 0.0], 20000, 0.1
    allowed = dict(zip(ratios, step_tolerances(ratios, sampler, tolerance), strict=False))
    generator = torch.Generator().manual_seed(0)
    errors: dict[float, torch.Tensor] = {}

    def denoise(z, sigma):
        # Both evaluations of a level share their draw here, as the shares take them to.
        errors.setdefault(sigma, torch.randn(draws, generator=generator) * allowed[sigma])
        return errors[sigma]

    run = {"ddim": ps.sampling.sample_ddim, "ddpm": ps.sampling.sample_ddpm, "heun": ps.sampling.sample_heun}[sampler]
    start, none = torch.zeros(draws), lambda: torch.zeros(draws)
    off = run(denoise, start, ratios, none, lambda *_: None)
    # Steps after it multiply what a step left by s (J = 0) or leave it alone (J = 1): the bound takes the latter.
    assert off.square().mean().sqrt() <= tolerance * (1 + 5 / (2 * draws) ** 0.5)
    assert off.square().mean().sqrt() > tolerance / 4


def test_a_tolerance_of_samples_is_kept_and_saves_pairs(bank, tmp_path):
    pytest.importorskip("faiss")
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", progress=False)
    options = {"n": 2, "steps": 10, "progress": False}
    exact = ps.sample(ps.EquivariantLocalScore(bank, 3), **options)
    machine = ps.EquivariantLocalScore(bank, 3, engine="pruned", index=index, budget=0.01)
    for tolerance in (0.1, 0.01):
        off = (ps.sample(machine, tolerance=tolerance, **options) - exact).square().mean((1, 2, 3)).sqrt()
        assert off.max() <= tolerance
    assert (ps.sample(ps.EquivariantLocalScore(bank, 3), tolerance=0.1, **options) == exact).all()


def test_tolerances_are_checked(bank):
    with pytest.raises(ValueError, match=r"^tolerance: takes a machine with an index"):
        ps.sample(ps.EquivariantLocalScore(bank, 3, budget=0.3), n=1, tolerance=0.1)
    with pytest.raises(ValueError, match=r"^tolerance: got 0"):
        ps.sample(ps.IdealScore(bank), n=1, tolerance=0)


def test_guidance_divides_a_tolerance(bank, tmp_path):
    pytest.importorskip("faiss")
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", progress=False)
    machine = ps.EquivariantLocalScore(bank, 3, engine="pruned", index=index, budget=0.01)
    guided = ps.Guided(machine, machine, 2.0)
    assert guided.within(0.3).cond.pruned.tolerance == pytest.approx(0.1)
    # Whatever asks it, and whatever it asks.
    (_, part), *_ = ps.Switch([(1.0, guided), (9.0, machine)]).within(0.3).parts
    assert part.cond.pruned.tolerance == pytest.approx(0.1)
    assert ps.Guided(guided, machine, -1.0).within(0.9).cond.cond.pruned.tolerance == pytest.approx(0.1)
    assert machine.pruned.tolerance is None
