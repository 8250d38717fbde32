"""Guided and Switch: denoisers made of denoisers serve every machine, sampler and adapter like any other."""

import math

import pytest
import torch
from conftest import MACHINES, machine_named, noisy, smooth_images
from hypothesis import given, settings
from hypothesis import strategies as st

import patchscore as ps
from patchscore.sampling import SAMPLERS


@settings(max_examples=20, deadline=None)
@given(
    scale=st.floats(-3, 10),
    sigma=st.floats(0.05, 20),
    labels=st.lists(st.sampled_from([0, 1, "two", None]), min_size=1, max_size=4),
    name=st.sampled_from(MACHINES),
)
def test_guided_extends_the_step_from_unconditional_to_conditional(scale, sigma, labels, name):
    bank = ps.PatchBank(smooth_images(9, 1, 6, 5), torch.arange(9) % 3, ("zero", "one", "two"))
    machine = machine_named(name, bank, 3)
    z = noisy(bank, sigma, batch=len(labels))
    cond, uncond = machine.denoise(z, sigma, labels), machine.denoise(z, sigma)
    guided = ps.Guided(machine, machine, scale).denoise(z, sigma, labels)
    assert torch.allclose(guided, (1 - scale) * uncond + scale * cond, atol=1e-9)
    for item, label in enumerate(labels):
        if label is None:
            assert torch.allclose(guided[item], uncond[item])


def test_scale_0_is_unconditional_and_1_conditional(bank):
    machine, z = ps.LocalScore(bank, 3), noisy(bank, 0.5, batch=2)
    assert torch.allclose(ps.Guided(machine, machine, 0).denoise(z, 0.5, "red"), machine.denoise(z, 0.5))
    assert torch.allclose(ps.Guided(machine, machine, 1).denoise(z, 0.5, "red"), machine.denoise(z, 0.5, "red"))


def test_guided_makes_one_call_per_half(bank):
    calls = []

    class Counted(ps.IdealScore):
        def estimate(self, z, sigma, labels=None):
            calls.append((len(z), labels))
            return super().estimate(z, sigma, labels)

    ps.Guided(Counted(bank), Counted(bank), 2.0).denoise(noisy(bank, 1.0, batch=3), 1.0, [0, 1, 2])
    assert calls == [(3, [0, 1, 2]), (3, None)]


def test_guided_estimates_bound_their_error_and_add_their_work(bank):
    class Rough(ps.IdealScore):
        """An engine that is off by a known amount."""

        def estimate(self, z, sigma, labels=None):
            exact = super().estimate(z, sigma, labels)
            return ps.Estimate(exact.mean, torch.full_like(exact.mean, 0.1), exact.ess, exact.pairs, "rough")

    z = noisy(bank, 0.8, batch=2)
    estimate = ps.Guided(Rough(bank), ps.LocalScore(bank, 3), 3.0).estimate(z, 0.8, [0, None])
    cond, uncond = ps.IdealScore(bank).estimate(z, 0.8, [0, None]), ps.LocalScore(bank, 3).estimate(z, 0.8)
    assert torch.allclose(estimate.stderr, torch.tensor(0.3, dtype=torch.float64))
    assert torch.equal(estimate.ess, torch.minimum(cond.ess, uncond.ess))
    assert estimate.pairs == cond.pairs + uncond.pairs
    assert estimate.engine == f"rough + {uncond.engine}"
    assert torch.equal(estimate.mean, ps.Guided(Rough(bank), ps.LocalScore(bank, 3), 3.0).denoise(z, 0.8, [0, None]))


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("name", MACHINES)
def test_guided_samples_with_every_machine_and_sampler(name, sampler, bank):
    machine = machine_named(name, bank, 3)
    guided = ps.Guided(machine, machine, 1.0)
    options = dict(n=3, steps=4, sampler=sampler, labels=["red", None, "blue"], dtype=torch.float64)
    assert torch.allclose(ps.sample(guided, **options), ps.sample(machine, **options), atol=1e-6)
    stronger = ps.Guided(machine, machine, 3.0)
    images = ps.sample(stronger, **options)
    assert images.abs().max() <= 1
    assert torch.allclose(images[2:], ps.sample(stronger, **{**options, "n": 1}, first=2), atol=1e-6)


def test_guidance_moves_samples_away_from_what_all_classes_share(bank):
    """The stronger, the likelier their class: here the difference of log-densities at the end of a common start."""
    score, z = ps.GaussianScore(bank), noisy(bank, 3.0, batch=4)

    def towards(scale):
        guided = ps.Guided(score, score, scale).denoise(z, 3.0, "red")
        return ((guided - score.denoise(z, 3.0)) * (score.denoise(z, 3.0, "red") - score.denoise(z, 3.0))).sum()

    assert 0 == towards(0) < towards(1) < towards(2) < towards(4)


def test_switch_sends_each_item_where_its_sigma_belongs(bank):
    low, middle, high = ps.LocalScore(bank, 3), ps.IdealScore(bank), ps.GaussianScore(bank)
    switch = ps.Switch([(0.5, low), (2, middle), (math.inf, high)])
    sigmas, labels = torch.tensor([3.0, 0.1, 2.0, 0.5, 100.0]), [0, "red", None, 2, 1]
    z = noisy(bank, 0.5, batch=5)
    denoised, estimate = switch.denoise(z, sigmas, labels), switch.estimate(z, sigmas, labels)
    for i, serving in enumerate([high, low, middle, low, high]):
        part = slice(i, i + 1)
        expected = serving.estimate(z[part], sigmas[part], labels[part])
        assert torch.allclose(denoised[part], expected.mean, atol=1e-9)
        assert torch.allclose(estimate.ess[part], expected.ess)
    assert torch.equal(estimate.mean, denoised)
    assert estimate.stderr.abs().max() == 0
    assert estimate.pairs == sum(
        m.estimate(z[:1], 1.0, label).pairs for m, label in ((low, 0), (low, 2), (middle, None))
    )


def test_switch_calls_only_who_is_needed(bank):
    class Silent(ps.IdealScore):
        def estimate(self, z, sigma, labels=None):
            raise AssertionError

    switch = ps.Switch([(1.0, ps.IdealScore(bank)), (math.inf, Silent(bank))])
    assert switch.denoise(noisy(bank, 1.0, batch=2), 1.0).shape == (2, 3, 12, 10)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_switch_samples_like_its_parts(sampler, bank):
    machine = ps.LocalScore(bank, 3)
    options = dict(n=2, steps=5, sampler=sampler, labels=[0, 1], dtype=torch.float64)
    same = ps.Switch([(1.0, machine), (math.inf, machine)])
    assert torch.equal(ps.sample(same, **options), ps.sample(machine, **options))
    blend = ps.Switch([(1.0, machine), (math.inf, ps.GaussianScore(bank))])
    assert not torch.allclose(ps.sample(blend, **options), ps.sample(machine, **options), atol=1e-3)


def test_denoisers_of_denoisers_nest(bank):
    machine, score = ps.LocalScore(bank, 3), ps.GaussianScore(bank)
    nested = ps.Guided(ps.Switch([(1.0, machine), (math.inf, score)]), score, 2.0)
    z, sigmas = noisy(bank, 1.0, batch=2), torch.tensor([0.5, 4.0])
    cond = torch.cat([machine.denoise(z[:1], 0.5, 1), score.denoise(z[1:], 4.0, 1)])
    assert torch.allclose(nested.denoise(z, sigmas, 1), 2 * cond - score.denoise(z, sigmas))
    assert nested.bank is bank
    assert ps.sample(nested, 2, steps=4, labels=[0, 1], sigma_max=3.0).shape == (2, 3, 12, 10)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: ps.Guided(m, m, "2"), TypeError, "scale: got '2'"),
        (lambda m: ps.Guided(m, m, True), TypeError, "scale: got True"),
        (lambda m: ps.Guided(m, m, math.nan), ValueError, "scale: got nan"),
        (lambda m: ps.Guided(m, 3, 2.0), TypeError, "uncond: got int, takes a denoiser"),
        (lambda m: ps.Guided(None, m, 2.0), TypeError, "cond: got NoneType"),
        (lambda m: ps.Switch([]), ValueError, "parts: got none"),
        (lambda m: ps.Switch([m]), TypeError, "parts: got LocalScore.*takes \\(sigma_max, denoiser\\) pairs"),
        (lambda m: ps.Switch([("low", m)]), TypeError, "parts: got .*takes \\(sigma_max, denoiser\\) pairs"),
        (lambda m: ps.Switch([(1.0, "m")]), TypeError, "parts: got str, takes a denoiser"),
        (lambda m: ps.Switch([(2.0, m), (1.0, m)]), ValueError, r"sigma_max \[2\.0, 1\.0\], takes positive, strictly"),
        (lambda m: ps.Switch([(1.0, m), (1.0, m)]), ValueError, "strictly ascending"),
        (lambda m: ps.Switch([(0.0, m)]), ValueError, "takes positive"),
        (lambda m: ps.Switch([(math.nan, m)]), ValueError, "takes positive"),
    ],
)
def test_bad_arguments_are_named(make, error, message, bank):
    with pytest.raises(error, match=message):
        make(ps.LocalScore(bank, 3))


def test_denoisers_of_different_images_are_named(bank):
    other = ps.IdealScore(ps.PatchBank(smooth_images(3, 1, 8, 8)))
    with pytest.raises(ValueError, match="cond, uncond: got denoisers of 3 x 12 x 10 and of 1 x 8 x 8 images"):
        ps.Guided(ps.IdealScore(bank), other, 2.0)
    with pytest.raises(ValueError, match="parts: got denoisers of 3 x 12 x 10 and of 1 x 8 x 8 images"):
        ps.Switch([(1.0, ps.IdealScore(bank)), (2.0, other)])


def test_bad_input_is_named_by_denoisers_of_denoisers(bank):
    machine, z = ps.LocalScore(bank, 3), noisy(bank, 1.0)
    switch = ps.Switch([(1.0, machine), (2.0, machine)])
    with pytest.raises(ValueError, match="sigma: got 3, above the last sigma_max 2"):
        switch.denoise(z, 3.0)
    for denoiser in (switch, ps.Guided(machine, machine, 2.0)):
        with pytest.raises(ValueError, match="unknown label 9"):
            denoiser.denoise(z, 1.0, 9)
        with pytest.raises(ValueError, match="z: got shape"):
            denoiser.denoise(z[:, :1], 1.0)
        with pytest.raises(ValueError, match="sigma: got -1"):
            denoiser.denoise(z, -1.0)
