"""Windows of several banks and mirrored windows compete together, as in one bank that holds them all."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import MACHINES, machine_named, noisy, smooth_images
from test_canvas import canvas, distance2, meets

import patchscore as ps


def test_banks_of_several_sizes_are_the_definition():
    """Plain loops over the windows of every image, each in its own size."""
    banks = [ps.PatchBank(smooth_images(2, 2, 9, 10)), ps.PatchBank(smooth_images(1, 2, 14, 8, seed=5))]
    for padding_mode in ("zeros", "circular"):
        machine = ps.Pooled([ps.EquivariantLocalScore(bank, 5, padding_mode, engine="reference") for bank in banks])
        z = canvas(2, (13, 17))
        found = machine.estimate(z, 0.4)
        for i, j in ((0, 0), (1, 8), (6, 16), (6, 8), (12, 3)):
            logits, values = [], []
            for bank in banks:
                _, height, width = bank.shape
                for image in bank.chunk(0, len(bank), torch.float64).numpy():
                    for a, b in itertools.product(range(height), range(width)):
                        if padding_mode == "circular":
                            competes = 2 <= a < height - 2 and 2 <= b < width - 2
                        else:
                            competes = meets(i, 13, a, height, 5) and meets(j, 17, b, width, 5)
                        if competes:
                            logits.append(-distance2(z[0].numpy(), image, i, j, a, b, 5, padding_mode) / (2 * 0.4**2))
                            values.append(image[:, a, b])
            weights = np.array([math.exp(logit - max(logits)) for logit in logits])
            assert np.abs(found.mean[0, :, i, j].numpy() - weights @ np.array(values) / weights.sum()).max() < 1e-9
            assert float(found.ess[0, i, j]) == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-6)


def test_parts_of_a_bank_pooled_are_the_bank():
    images, labels = smooth_images(9, 1, 11, 9), torch.arange(9) % 3
    whole = ps.EquivariantLocalScore(ps.PatchBank(images, labels), 3, engine="reference")
    parts = [ps.PatchBank(images[:4], labels[:4]), ps.PatchBank(images[4:], labels[4:])]
    pooled = ps.Pooled([ps.EquivariantLocalScore(part, 3, engine="reference") for part in parts])
    z = noisy(whole.bank, 0.5, batch=3)
    for given in (None, [0, 1, None]):
        a, b = whole.estimate(z, 0.5, given, moments=True), pooled.estimate(z, 0.5, given, moments=True)
        assert torch.allclose(a.mean, b.mean, atol=1e-9)
        assert torch.allclose(a.variance, b.variance, atol=1e-9)
        assert a.pairs == b.pairs
    assert ps.sample(pooled, 1, 10, size=(12, 14), progress=False).shape == (1, 1, 12, 14)


def test_a_class_that_only_one_bank_has():
    banks = [
        ps.PatchBank(smooth_images(2, 1, 9, 9), [0, 0], ("a", "b")),
        ps.PatchBank(smooth_images(2, 1, 8, 12), [1, 1], ("a", "b")),
    ]
    pooled = ps.Pooled([ps.EquivariantLocalScore(bank, 3) for bank in banks])
    z = canvas(1, (9, 9), 2)
    alone = ps.EquivariantLocalScore(banks[1], 3).denoise(z[1:], 0.5)
    assert torch.allclose(pooled.denoise(z, 0.5, ["a", "b"])[1:], alone, atol=1e-9)
    with pytest.raises(ValueError, match="labels: unknown label 'c'"):
        pooled.denoise(z, 0.5, "c")


@pytest.mark.parametrize("engine", ["reference", "sliding"])
@pytest.mark.parametrize("symmetry", ["flip", "rotations", "all"])
@pytest.mark.parametrize("name", MACHINES)
def test_symmetric_is_the_machine_of_the_bank_that_holds_them(name, symmetry, engine):
    images = smooth_images(3, 2, 9, 9)
    turned = [images.rot90(turns, (2, 3)) for turns in range(1 if symmetry == "flip" else 4)]
    if symmetry != "rotations":
        turned += [each.flip(3) for each in turned]
    larger = machine_named(name, ps.PatchBank(torch.cat(turned)), 5, engine=engine)
    found = ps.Symmetric(machine_named(name, ps.PatchBank(images), 5, engine=engine), symmetry)
    for sigma in (0.2, 2.0):
        z = noisy(larger.bank, sigma, batch=2)
        a, b = larger.estimate(z, sigma), found.estimate(z, sigma)
        assert torch.allclose(a.mean, b.mean, atol=1e-9 if engine == "reference" else 1e-3)
        assert torch.allclose(a.ess, b.ess, rtol=1e-5 if engine == "reference" else 1e-2)
        assert a.pairs == b.pairs


@pytest.mark.parametrize(("padding_mode", "symmetry"), [("zeros", "flip"), ("circular", "all")])
def test_an_index_serves_mirrored_windows_within_its_stated_error(padding_mode, symmetry, tmp_path):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    bank = ps.PatchBank(smooth_images(60, 1, 18, 18))
    index = ps.PatchIndex.build(bank, 3, tmp_path / "index", progress=False)
    options = {"engine": "pruned", "index": index, "budget": 0.03}
    sampled = ps.Symmetric(ps.EquivariantLocalScore(bank, 3, padding_mode, **options), symmetry)
    truth = ps.Symmetric(ps.EquivariantLocalScore(bank, 3, padding_mode), symmetry)
    for size, sigma in (((18, 18), 1.0), ((20, 25), 1.5)):
        z = canvas(1, size)
        found, exact = sampled.estimate(z, sigma), truth.estimate(z, sigma)
        assert "pruned" in found.engine
        assert found.pairs < exact.pairs / 2
        error = (found.mean - exact.mean).abs()
        assert error.max() > 0
        assert (error <= 5 * found.stderr + 1e-4).double().mean() > 0.99
        assert error.square().mean() < 2 * found.stderr.square().mean()
    # Orientations have draws of their own, even of a z that is its own mirror image.
    assert len({machine.pruned.seed for machine in sampled.turned}) == len(sampled.turned)
    assert sampled.redrawn(1).turned[0].pruned.seed != sampled.turned[0].pruned.seed
    assert sampled.within(0.05).turned[1].pruned.tolerance == 0.05
    z = canvas(1, (18, 18))
    assert torch.equal(sampled.following().denoise(z, 1.0), sampled.denoise(z, 1.0))  # nothing to remember at first


def test_turned_images_that_are_not_square_compete_as_they_stand():
    """A bank of both orientations, which no single bank can hold, is a pool of two."""
    images = smooth_images(2, 1, 8, 12)
    banks = [ps.PatchBank(images), ps.PatchBank(images.rot90(1, (2, 3)).contiguous())]
    z = canvas(1, (14, 11))
    half = ps.Pooled([ps.EquivariantLocalScore(bank, 3, "circular", engine="reference") for bank in banks])
    whole = ps.Symmetric(half, "flip")
    machine = ps.EquivariantLocalScore(banks[0], 3, "circular", engine="reference")
    turned = [(z, 0), (z.rot90(1, (2, 3)), 1)]
    assert ps.Symmetric(machine, "all").denoise(turned[0][0], 0.3).shape == z.shape
    # Flips of both orientations and their half turns are all eight.
    eight = ps.Symmetric(ps.Pooled([*half.machines]), "all").estimate(z, 0.3)
    assert torch.allclose(ps.Symmetric(machine, "all").denoise(z, 0.3), eight.mean, atol=1e-9)
    assert whole.estimate(z, 0.3).pairs * 4 == eight.pairs


BANK = ps.PatchBank(smooth_images(2, 1, 9, 8))
ELS = ps.EquivariantLocalScore(BANK, 3)
BAD = [
    (lambda: ps.Pooled([]), ValueError, "machines: got none"),
    (lambda: ps.Pooled([ps.LocalScore(BANK, 3)]), TypeError, "machines: got LocalScore, takes EquivariantLocalScore"),
    (lambda: ps.Pooled([ELS, ps.EquivariantLocalScore(BANK, 5)]), ValueError, "machines: got patch_size 3 and 5"),
    (lambda: ps.Symmetric(ELS, "mirror"), ValueError, "symmetry: got 'mirror', takes 'flip', 'rotations', 'all'"),
    (lambda: ps.Symmetric(ps.LocalScore(BANK, 3), "all"), ValueError, "symmetry: got .all., and turned 9 x 8 images"),
    (lambda: ps.Symmetric(ps.GaussianScore(BANK)), TypeError, "machine: got GaussianScore, takes one that sums"),
    (lambda: ps.explain(ps.Symmetric(ELS), canvas(1, (9, 8)), 1.0), ValueError, "machine: Symmetric sums over several"),
    (lambda: ps.Symmetric(ELS).vjp(canvas(1, (9, 8)), 1.0, canvas(1, (9, 8))), ValueError, "Symmetric has no gradient"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_what_cannot_be_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
