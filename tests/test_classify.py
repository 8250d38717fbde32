"""classify: the diffusion-classifier rule, for any denoiser, with noise shared between classes."""

import math

import pytest
import torch
from conftest import MACHINES, machine_named, smooth_images

import patchscore as ps
from patchscore.sampling import image_generator


def two_worlds(n=30, seed=0):
    """Bright images with a dark left half, and the same with a dark right half: two classes anyone can tell."""
    images = smooth_images(n, 1, 8, 8, seed=seed, dtype=torch.float32) * 0.3 + 0.5
    labels = torch.arange(n) % 2
    images[labels == 0, :, :, :4] -= 0.8
    images[labels == 1, :, :, 4:] -= 0.8
    return images.clamp(-1, 1), labels


def test_errors_are_the_published_rule(bank):
    """Written out: eps - eps_c over shared draws, its squares summed over pixels, averaged; softmax of minus that."""
    machine, sigmas, draws, seed = ps.LocalScore(bank, 3), [0.4, 1.5], 2, 11
    images = bank.chunk(0, 3, torch.float64)
    found = ps.classify(machine, images, sigmas, draws=draws, seed=seed)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for i in range(3):
        generator = image_generator(seed, i)
        for sigma in sigmas * draws:
            eps = torch.randn(bank.shape, generator=generator, dtype=torch.float64)[None]
            z = images[i : i + 1] + sigma * eps
            for c in range(3):
                eps_c = (z - machine.denoise(z, sigma, c)) / sigma
                expected[i, c] += (eps - eps_c).square().sum() / (len(sigmas) * draws)
    assert torch.allclose(found.errors, expected, rtol=1e-9)
    assert torch.allclose(found.posterior, torch.softmax(-expected, 1))
    assert torch.equal(found.labels, expected.argmin(1))
    assert found.classes == (0, 1, 2)


@pytest.mark.parametrize("name", [*MACHINES, "gaussian"])
def test_every_machine_tells_classes_apart(name):
    bank = ps.PatchBank(*two_worlds())
    machine = ps.GaussianScore(bank) if name == "gaussian" else machine_named(name, bank, 5)
    images, labels = two_worlds(20, seed=1)
    found = ps.classify(machine, images, [0.3, 1.0])
    assert (found.labels == labels).float().mean() > (0.5 if name == "els-circular" else 0.9)
    assert torch.allclose(found.posterior.sum(1), torch.ones(20, dtype=torch.float64))


def test_the_same_seed_gives_the_same_posterior_whatever_the_batch(bank):
    machine, images = ps.LocalScore(bank, 3), bank.chunk(0, 7, torch.float64)
    found = ps.classify(machine, images, 0.8, seed=3)
    assert torch.equal(found.errors, ps.classify(machine, images, 0.8, seed=3).errors)
    assert torch.allclose(found.errors, ps.classify(machine, images, 0.8, seed=3, batch_size=2).errors, rtol=1e-9)
    assert torch.equal(
        found.errors, ps.classify(machine, images, torch.tensor(0.8, dtype=torch.float64), seed=3).errors
    )
    assert torch.allclose(found.errors[:2], ps.classify(machine, images[:2], [0.8], seed=3).errors, rtol=1e-9)
    assert not torch.allclose(found.errors, ps.classify(machine, images, 0.8, seed=4).errors, rtol=1e-3)


def test_classes_are_compared_in_the_order_asked_for(bank):
    images = bank.chunk(0, 4)
    every = ps.classify(ps.LocalScore(bank, 3), images, 0.8)
    some = ps.classify(ps.LocalScore(bank, 3), images, 0.8, classes=["blue", 0])
    assert some.classes == (2, 0)
    assert torch.allclose(some.errors, every.errors[:, [2, 0]])
    assert set(some.labels.tolist()) <= {0, 2}


def test_denoisers_of_denoisers_classify(bank):
    images, ideal = bank.chunk(0, 6), ps.IdealScore(bank)
    switch = ps.Switch([(1.0, ideal), (math.inf, ps.GaussianScore(bank))])
    found = ps.classify(switch, images, [0.5, 2.0])
    assert torch.equal(found.labels, torch.arange(6) % 3)  # they are in the bank
    assert ps.classify(ps.Guided(ideal, ideal, 1.0), images, 0.5).labels.tolist() == found.labels.tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sigmas": []}, ValueError, r"sigmas: got \[\]"),
        ({"sigmas": [1.0, -1.0]}, ValueError, r"sigmas: got \[1\.0, -1\.0\]"),
        ({"sigmas": "low"}, TypeError, "sigmas: got 'low'"),
        ({"sigmas": None}, TypeError, "sigmas: got None"),
        ({"draws": 0}, ValueError, "draws: got 0"),
        ({"draws": 1.5}, TypeError, r"draws: got 1\.5"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"seed": None}, TypeError, "seed: got None"),
        ({"classes": [1]}, ValueError, r"classes: got \[1\], takes two or more"),
        ({"classes": [1, 1]}, ValueError, "two or more different"),
        ({"classes": [1, 8]}, ValueError, "unknown label 8"),
        ({"images": torch.zeros(2, 1, 12, 10)}, ValueError, r"images: got shape \[2, 1, 12, 10\], takes \[B, 3, 12"),
        ({"images": torch.full((1, 3, 12, 10), math.inf)}, ValueError, "images: NaN or infinite"),
        ({"images": torch.full((1, 3, 12, 10), 255.0)}, ValueError, r"images: values from 255 to 255, takes \[-1, 1\]"),
        ({"images": torch.zeros(2, 3, 12, 10, dtype=torch.uint8)}, TypeError, r"images: got torch\.uint8"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message, bank):
    with pytest.raises(error, match=message):
        ps.classify(**{"denoiser": ps.LocalScore(bank, 3), "images": bank.chunk(0, 2), "sigmas": 1.0, **arguments})


def test_a_bank_without_labels_is_named():
    machine = ps.IdealScore(ps.PatchBank(smooth_images(3, 1, 4, 4)))
    with pytest.raises(ValueError, match=r"denoiser: IdealScore.* has no labelled bank"):
        ps.classify(machine, torch.zeros(1, 1, 4, 4), 1.0)
