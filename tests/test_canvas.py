"""Canvases: images of another size than the bank's, against plain loops over windows and against each other."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import smooth_images
from naive import inside, pixel

import patchscore as ps


def naive_pixel(z, sigma, train, k, padding_mode, i, j):
    """(mean [C], ess) of one pixel of a canvas z [C, H, W] by plain loops in float64; train [N, C, h, w]."""
    _, height, width = z.shape
    _, _, rows, cols = train.shape
    logits, values = [], []
    for image, a, b in itertools.product(train, range(rows), range(cols)):
        if padding_mode == "circular":
            competes = inside(a, rows, k) and inside(b, cols, k)
        else:
            competes = meets(i, height, a, rows, k) and meets(j, width, b, cols, k)
        if competes:
            logits.append(-distance2(z, image, i, j, a, b, k, padding_mode) / (2 * sigma**2))
            values.append(image[:, a, b])
    largest = max(logits)
    weights = np.array([math.exp(logit - largest) for logit in logits])
    return weights @ np.array(values) / weights.sum(), weights.sum() ** 2 / (weights**2).sum()


def meets(query, canvas, window, length, k):
    """The rule of one axis with zeros: as near to the same border, or both in the interior."""
    if query < k // 2:
        return window == query
    if canvas - 1 - query < k // 2:
        return length - 1 - window == canvas - 1 - query
    return inside(window, length, k)


def distance2(z, image, i, j, a, b, k, padding_mode):
    _, height, width = z.shape
    r, total = k // 2, 0.0
    for u, v in itertools.product(range(-r, r + 1), repeat=2):
        wraps = padding_mode == "circular"
        noisy = z[:, (i + u) % height, (j + v) % width] if wraps else pixel(z, i + u, j + v)
        total += float(((noisy - pixel(image, a + u, b + v)) ** 2).sum())
    return total


def canvas(channels, size, batch=1, seed=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=dtype)


def few_pixels(height, width, k):
    """Corners, both sides of where the rule changes, and where strips meet."""
    rows = {0, k // 2, height // 2, height - 1}
    cols = {max(k // 2 - 1, 0), width // 2, width - 1 - k // 2, width - 1}
    return [(i, j) for n, (i, j) in enumerate(itertools.product(sorted(rows), sorted(cols))) if n % 3 == 0]


@pytest.mark.parametrize("engine", ["reference", "sliding"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("size", "k"), [((25, 7), 5), ((9, 31), 3), ((5, 5), 5), ((8, 19), 7), ((30, 10), 1), ((9, 9), 9), ((22, 8), 7)]
)
def test_a_canvas_is_the_definition(size, k, padding_mode, engine):
    bank = ps.PatchBank(smooth_images(2, 2, 9, 10))
    machine = ps.EquivariantLocalScore(bank, k, padding_mode, engine)
    train = bank.chunk(0, len(bank), torch.float64).numpy()
    for sigma in (0.05, 0.7):
        z = canvas(2, size)
        estimate = machine.estimate(z, sigma)
        assert estimate.engine == engine
        for i, j in few_pixels(*size, k):
            mean, ess = naive_pixel(z[0].numpy(), sigma, train, k, padding_mode, i, j)
            # float64 of the reference; float32 distances of `sliding`, 1e-3 by its promise.
            tolerance = 1e-9 if engine == "reference" else 1e-3
            assert np.abs(estimate.mean[0, :, i, j].numpy() - mean).max() < tolerance
            assert float(estimate.ess[0, i, j]) == pytest.approx(ess, rel=1e-6 if engine == "reference" else 1e-2)


def test_an_axis_as_long_as_the_banks_takes_windows_that_reach_over_it():
    """Where only the width differs, rows are tied to their place once no window fits between the borders."""
    bank = ps.PatchBank(smooth_images(3, 1, 5, 12))
    z = canvas(1, (5, 20))
    mean = ps.EquivariantLocalScore(bank, 7, engine="reference").denoise(z, 0.4)
    train = bank.chunk(0, 3, torch.float64).numpy()
    for i, j in [(0, 0), (2, 9), (4, 19), (3, 3)]:
        logits, values = [], []
        for image, b in itertools.product(train, range(12)):
            if meets(j, 20, b, 12, 7):
                logits.append(-distance2(z[0].numpy(), image, i, j, i, b, 7, "zeros") / (2 * 0.4**2))
                values.append(image[0, i, b])
        weights = np.exp(np.array(logits) - max(logits))
        assert float(mean[0, 0, i, j]) == pytest.approx(float(weights @ values / weights.sum()), abs=1e-9)


@pytest.mark.parametrize("engine", ["reference", "sliding"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_canvas_of_the_banks_size_is_bitwise_the_engines_own(padding_mode, engine):
    """The crops are not asked where they are not needed: the numbers are those of `engines.serve`."""
    bank = ps.PatchBank(smooth_images(4, 3, 11, 9))
    machine = ps.EquivariantLocalScore(bank, 5, padding_mode, engine)
    z, sigma = canvas(3, (11, 9), 2, dtype=torch.float32), torch.full((2,), 0.3, dtype=torch.float64)
    total, _ = ps.engines.serve(machine.engines, engine, z, sigma, bank, machine.competition(5), 2**30)
    assert torch.equal(machine.denoise(z, 0.3), total.mean.to(torch.float32))


def test_the_interior_of_a_wrapped_canvas_knows_no_place():
    """Equivariance: to wrap z around by some pixels wraps what is denoised."""
    bank = ps.PatchBank(smooth_images(3, 1, 9, 9))
    machine = ps.EquivariantLocalScore(bank, 5, "circular", engine="reference")
    z = canvas(1, (17, 23))
    moved = machine.denoise(z.roll((4, 11), (2, 3)), 0.3)
    assert (moved - machine.denoise(z, 0.3).roll((4, 11), (2, 3))).abs().max() < 1e-9


def test_items_classes_and_levels_are_served_apart():
    bank = ps.PatchBank(smooth_images(6, 1, 9, 9), torch.arange(6) % 2)
    table = ps.ScaleTable([0.1, 1.0], [3, 5])
    machine = ps.EquivariantLocalScore(bank, table, engine="reference")
    z, sigmas, labels = canvas(1, (14, 20), 4), [0.1, 1.0, 0.1, 1.0], [0, 1, None, 1]
    together = machine.estimate(z, torch.tensor(sigmas, dtype=torch.float64), labels)
    for item in range(4):
        alone = machine.estimate(z[item : item + 1], sigmas[item], labels[item])
        assert (alone.mean[0] - together.mean[item]).abs().max() < 1e-9
    assert together.pairs == sum(machine.estimate(z[i : i + 1], sigmas[i], labels[i]).pairs for i in range(4))


def test_pairs_are_those_of_the_rule():
    """Interior pixels meet all interior windows, border pixels one coordinate of every image on that axis."""
    bank = ps.PatchBank(smooth_images(2, 1, 9, 10))
    found = ps.EquivariantLocalScore(bank, 5).estimate(canvas(1, (20, 15)), 0.5).pairs
    rows, cols = 4 + (20 - 4) * (9 - 4), 4 + (15 - 4) * (10 - 4)
    assert found == 2 * rows * cols


def test_memory_does_not_change_the_numbers():
    bank = ps.PatchBank(smooth_images(2, 1, 9, 9))
    z = canvas(1, (40, 33), dtype=torch.float32)
    machines = [ps.EquivariantLocalScore(bank, 3, engine="sliding", memory_limit=limit) for limit in (2**23, 2**31)]
    assert torch.equal(*(machine.denoise(z, 0.4) for machine in machines))


def test_an_index_serves_a_canvas_within_its_stated_error(tmp_path):
    bank = ps.PatchBank(smooth_images(200, 1, 12, 12))
    index = ps.PatchIndex.build(bank, 5, tmp_path / "index", progress=False)
    sampled = ps.EquivariantLocalScore(bank, 5, engine="pruned", index=index, budget=0.1)
    z = canvas(1, (20, 27), dtype=torch.float32)
    found, exact = sampled.estimate(z, 1.0), ps.EquivariantLocalScore(bank, 5).denoise(z, 1.0)
    assert "pruned" in found.engine
    apart, stated = (found.mean - exact).square().mean().sqrt(), found.stderr.square().mean().sqrt()
    assert 0 < apart < 3 * stated


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_canvas_is_explained_by_the_windows_of_the_definition(padding_mode):
    """The windows named are as far apart as their weights say, and the weights are all of the mass."""
    bank = ps.PatchBank(smooth_images(4, 2, 9, 10), torch.tensor([0, 1, 0, 1]))
    machine = ps.EquivariantLocalScore(bank, 5, padding_mode, engine="reference")
    z, train = canvas(2, (14, 21), 2), bank.chunk(0, 4, torch.float64).numpy()
    found = ps.explain(machine, z, 0.2, labels=[1, None], top=200)
    assert torch.allclose(found.mean, machine.denoise(z, 0.2, [1, None]), atol=1e-9)
    assert (found.share - 1).abs().max() < 1e-6
    for item, i, j in ((0, 0, 0), (0, 7, 9), (1, 13, 3), (1, 6, 20)):
        heaviest = [int(part[item, 0, i, j]) for part in (found.image, found.row, found.col)]
        second = [int(part[item, 1, i, j]) for part in (found.image, found.row, found.col)]
        weights, apart = found.weight[item, :2, i, j], []
        for image, a, b in (heaviest, second):
            if image >= 0:
                assert item == 1 or image in (1, 3)
                apart.append(distance2(z[item].numpy(), train[image], i, j, a, b, 5, padding_mode))
        if len(apart) == 2 and weights[1] > 1e-9:
            expected = math.exp((apart[0] - apart[1]) / (2 * 0.2**2))
            assert float(weights[1] / weights[0]) == pytest.approx(expected, rel=1e-6)
    one = ps.explain(machine, z, 0.2, top=3, pixel=(13, 3))
    assert torch.equal(one.image[1, :, 0, 0], found.image[1, :3, 13, 3])


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_sample_takes_a_size(sampler):
    bank = ps.PatchBank(smooth_images(3, 3, 9, 9))
    machine = ps.EquivariantLocalScore(bank, 3)
    images = ps.sample(machine, 2, steps=10, sampler=sampler, size=(12, 20), progress=False)
    assert images.shape == (2, 3, 12, 20)
    assert torch.equal(images[1:], ps.sample(machine, 1, 10, sampler=sampler, size=(12, 20), first=1, progress=False))
    own = ps.sample(machine, 1, 10, sampler=sampler, progress=False)
    assert torch.equal(own, ps.sample(machine, 1, 10, sampler=sampler, size=(9, 9), progress=False))


def test_combinations_take_the_sizes_of_their_parts():
    bank = ps.PatchBank(smooth_images(3, 1, 9, 9))
    els, z = ps.EquivariantLocalScore(bank, 3), canvas(1, (12, 20), 2)
    both = ps.Switch([(1.0, ps.Guided(els, els, 1.0)), (9.0, els)])
    assert both.any_size
    sigmas = torch.tensor([0.5, 2.0])
    assert (both.denoise(z, sigmas) - els.denoise(z, sigmas)).abs().max() < 1e-9
    with pytest.raises(ValueError, match=r"Switch takes \[B, 1, 9, 9\]"):
        ps.Switch([(1.0, els), (9.0, ps.GaussianScore(bank))]).denoise(z, 0.5)


@pytest.mark.parametrize("kind", ["IdealScore", "LocalScore", "GaussianScore"])
def test_machines_tied_to_places_refuse_by_name(kind):
    bank = ps.PatchBank(smooth_images(3, 1, 9, 9))
    machine = getattr(ps, kind)(bank, *([3] if kind == "LocalScore" else []))
    with pytest.raises(ValueError, match=rf"^z: got shape .* {kind} takes \[B, 1, 9, 9\] as the bank's$"):
        machine.denoise(canvas(1, (12, 12)), 0.5)
    with pytest.raises(ValueError, match=rf"^size: got 12 x 12, {kind} makes images of 9 x 9 alone$"):
        ps.sample(machine, 1, size=(12, 12), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (2, 40)}, "size: a canvas of 2 x 40 is smaller than the patch size 3"),
        ({"size": 12}, r"size: got 12, takes \(height, width\)"),
        ({"size": (12, 0)}, "size: got 0, takes an integer from 1"),
        ({"size": (12, 12), "sigma_max": 1.0}, "sigma_max, gaussian_until: take images of the bank's size"),
    ],
)
def test_sizes_that_cannot_be_made_are_named(arguments, message):
    machine = ps.EquivariantLocalScore(ps.PatchBank(smooth_images(3, 1, 9, 9)), 3)
    with pytest.raises((ValueError, TypeError), match=message):
        ps.sample(machine, 1, progress=False, **arguments)


def test_windows_that_do_not_fit_the_bank_are_named():
    machine = ps.EquivariantLocalScore(ps.PatchBank(smooth_images(3, 1, 9, 9)), 11)
    assert machine.denoise(canvas(1, (9, 9)), 1.0).shape == (1, 1, 9, 9)
    with pytest.raises(ValueError, match="patch size 11 does not fit in the bank's 9 x 9 images"):
        machine.denoise(canvas(1, (20, 20)), 1.0)
