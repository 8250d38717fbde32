"""MixedBank: windows of images of several sizes compete as the definition says, in every machine that takes them."""

import itertools
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import smooth_images
from PIL import Image
from test_canvas import canvas, distance2, meets

import patchscore as ps
from patchscore.cli import main

SIZES = ((9, 10), (14, 8), (9, 10), (8, 8))
ENGINES = ["reference", "sliding"]


def photos(channels=2, sizes=SIZES):
    return [smooth_images(1, channels, *size, seed=i)[0] for i, size in enumerate(sizes)]


def windows(z, bank, k, padding_mode, i, j):
    """Every window that competes at a pixel of z [C, H, W]: (|q - p|^2, image, row, column), by plain loops."""
    _, height, width = z.shape
    r = k // 2
    for number in range(len(bank)):
        image = bank.image(number, torch.float64).numpy()
        rows, cols = image.shape[1:]
        for a, b in itertools.product(range(rows), range(cols)):
            if padding_mode == "circular":
                competes = r <= a < rows - r and r <= b < cols - r
            else:
                competes = meets(i, height, a, rows, k) and meets(j, width, b, cols, k)
            if competes:
                yield distance2(z, image, i, j, a, b, k, padding_mode), number, a, b


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("size", [(13, 17), (9, 10)])
def test_windows_of_images_of_all_sizes_compete(size, padding_mode, engine):
    bank = ps.MixedBank(photos())
    machine = ps.EquivariantLocalScore(bank, 5, padding_mode, engine)
    z, sigma = canvas(2, size), 0.4
    found, own = machine.estimate(z, sigma), z[0].numpy()
    explained = ps.explain(machine, z, sigma, top=3)
    tolerance = 1e-9 if engine == "reference" else 1e-3
    for i, j in ((0, 0), (1, size[1] - 1), (size[0] // 2, size[1] // 2), (size[0] - 1, 3)):
        listed = sorted(windows(own, bank, 5, padding_mode, i, j))
        weights = np.array([math.exp((listed[0][0] - apart) / (2 * sigma**2)) for apart, *_ in listed])
        values = np.array([bank.image(n, torch.float64)[:, a, b].numpy() for _, n, a, b in listed])
        assert np.abs(found.mean[0, :, i, j].numpy() - weights @ values / weights.sum()).max() < tolerance
        assert float(found.ess[0, i, j]) == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-2)
        for t in range(3):
            named = [int(part[0, t, i, j]) for part in (explained.image, explained.row, explained.col)]
            assert explained.weight[0, t, i, j] == pytest.approx(weights[t] / weights.sum(), rel=1e-3)
            assert [n for apart, *n in listed if apart == pytest.approx(listed[t][0])].count(named) == 1
    assert torch.allclose(explained.mean, found.mean, atol=tolerance)
    assert torch.allclose(explained.effective, found.ess, rtol=1e-2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_products_with_the_jacobian_are_differences(padding_mode, engine):
    bank = ps.MixedBank(photos())
    exact = ps.EquivariantLocalScore(bank, 5, padding_mode, "reference")
    machine = ps.EquivariantLocalScore(bank, 5, padding_mode, engine)
    z, t, u = (canvas(2, (13, 17), seed=seed) for seed in range(3))
    difference = (exact.denoise(z + 1e-5 * t, 0.5) - exact.denoise(z - 1e-5 * t, 0.5)) / 2e-5
    dtype, tolerance = (torch.float64, 1e-6) if engine == "reference" else (torch.float32, 1e-3)
    forwards, backwards = (getattr(machine, n)(z.to(dtype), 0.5, x.to(dtype)) for n, x in (("jvp", t), ("vjp", u)))
    assert (forwards - difference).abs().max() < tolerance * difference.abs().max()
    assert float((backwards * t).sum()) == pytest.approx(float((difference * u).sum()), rel=100 * tolerance)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_patch_average_over_images_of_all_sizes(padding_mode, engine):
    bank, size, k, sigma = ps.MixedBank(photos()), (9, 7), 3, 0.4
    padded = [np.pad(bank.image(n, torch.float64).numpy(), ((0, 0), (1, 1), (1, 1))) for n in range(len(bank))]
    z = canvas(2, size, dtype=torch.float64 if engine == "reference" else torch.float32)
    sums, counts = np.zeros((2, *size)), np.zeros(size)
    for i, j in itertools.product(*map(range, size)):
        listed = list(windows(z[0].double().numpy(), bank, k, padding_mode, i, j))
        nearest = min(apart for apart, *_ in listed)
        weights = np.array([math.exp((nearest - apart) / (2 * sigma**2)) for apart, *_ in listed])
        for u, v in itertools.product((-1, 0, 1), repeat=2):
            y, x = i + u, j + v
            if padding_mode == "circular":
                y, x = y % size[0], x % size[1]
            if 0 <= y < size[0] and 0 <= x < size[1]:
                values = [padded[n][:, a + u + 1, b + v + 1] for _, n, a, b in listed]
                sums[:, y, x] += weights @ np.array(values) / weights.sum()
                counts[y, x] += 1
    machine = ps.PatchAverage(bank, k, padding_mode, engine)
    found = machine.estimate(z, sigma)
    assert np.abs(found.mean[0].numpy() - sums / counts).max() < (1e-9 if engine == "reference" else 1e-4)
    assert found.engine == engine
    assert ps.sample(machine, 1, 10, size=(9, 14), progress=False).shape == (1, 2, 9, 14)


def test_one_size_is_the_bank_and_the_order_does_not_matter():
    images, labels = smooth_images(5, 1, 9, 9), [0, 1, 0, 1, 1]
    plain, mixed = ps.PatchBank(images, labels), ps.MixedBank(list(images), labels)
    z = canvas(1, (9, 9), 2, dtype=torch.float32)
    for padding_mode in ("zeros", "circular"):
        a, b = (ps.EquivariantLocalScore(bank, 3, padding_mode) for bank in (plain, mixed))
        assert torch.equal(a.denoise(z, 0.4, [1, None]), b.denoise(z, 0.4, [1, None]))
    assert mixed.labels.tolist() == labels
    listed = photos(1)
    one, other = ps.MixedBank(listed), ps.MixedBank(listed[::-1])
    assert one.sizes == [(9, 10), (14, 8), (8, 8)]
    assert [numbers.tolist() for numbers in one.numbers] == [[0, 2], [1], [3]]
    assert one.fingerprint != other.fingerprint == ps.MixedBank(listed[::-1]).fingerprint
    a, b = (ps.EquivariantLocalScore(bank, 5, engine="reference").denoise(z, 0.4) for bank in (one, other))
    assert torch.allclose(a, b, atol=1e-6)


def test_a_class_is_summed_over_its_own_images():
    listed, labels = photos(1), [0, 1, 1, 0]
    bank = ps.MixedBank(listed, labels, ("a", "b"))
    machine = ps.EquivariantLocalScore(bank, 3, engine="reference")
    z = canvas(1, (11, 12), 2)
    alone = ps.EquivariantLocalScore(ps.MixedBank(listed[1:3]), 3, engine="reference").denoise(z[:1], 0.4)
    assert torch.allclose(machine.denoise(z, 0.4, ["b", None])[:1], alone, atol=1e-9)
    # Corners have two windows, one of each image.
    assert set(ps.explain(machine, z, 0.4, "b").image.unique().tolist()) == {-1, 1, 2}
    with pytest.raises(ValueError, match=r"labels: unknown label 'c'; this bank has 0 \(a\), 1 \(b\)"):
        machine.denoise(z, 0.4, "c")


def test_mirrored_images_compete_too():
    listed = photos(1)
    machine = ps.EquivariantLocalScore(ps.MixedBank(listed), 3, engine="reference")
    both = ps.EquivariantLocalScore(ps.MixedBank([*listed, *(x.flip(2) for x in listed)]), 3, engine="reference")
    z = canvas(1, (11, 12))
    assert torch.allclose(ps.Symmetric(machine, "flip").denoise(z, 0.4), both.denoise(z, 0.4), atol=1e-9)


def test_moments_samples_and_a_budget():
    """A sample of the images of every size states an error that the true one keeps to."""
    listed = [*smooth_images(60, 1, 9, 9), *smooth_images(50, 1, 8, 11, seed=3)]
    bank = ps.MixedBank(listed)
    exact, sampled = (ps.EquivariantLocalScore(bank, 3, budget=budget) for budget in (None, 0.3))
    z = canvas(1, (12, 14), dtype=torch.float32)
    found, whole = sampled.estimate(z, 1.0), exact.estimate(z, 1.0, moments=True)
    assert "pruned" in found.engine
    assert found.pairs < whole.pairs / 2
    assert 0 < (found.mean - whole.mean).square().mean().sqrt() < 3 * found.stderr.square().mean().sqrt()
    assert (whole.variance > 0).all()
    assert ps.sample(exact, 1, 10, progress=False).shape == (1, 1, 9, 9)


def test_banks_with_indexes_pool(tmp_path):
    bank = ps.MixedBank([*smooth_images(150, 1, 12, 12), *smooth_images(100, 1, 10, 14, seed=3)])
    machines = []
    for i, part in enumerate(bank.banks):
        index = ps.PatchIndex.build(part, 5, tmp_path / str(i), progress=False)
        machines.append(ps.EquivariantLocalScore(part, 5, engine="pruned", index=index, budget=0.1))
    z = canvas(1, (16, 18), dtype=torch.float32)
    found, exact = ps.Pooled(machines).estimate(z, 1.0), ps.EquivariantLocalScore(bank, 5).denoise(z, 1.0)
    assert "pruned" in found.engine
    assert 0 < (found.mean - exact).square().mean().sqrt() < 3 * found.stderr.square().mean().sqrt()


def test_values_of_any_range_have_one_scale():
    listed = [3 * image.float() / 127.5 - 4 for image in photos(4)]
    bank = ps.MixedBank(listed, value_range="data")
    assert {part.scale for part in bank.banks} == {bank.scale}
    assert torch.allclose(bank.image(1), listed[1], atol=1e-5)
    machine = ps.EquivariantLocalScore(bank, 3, engine="sliding")
    unit = ps.EquivariantLocalScore(ps.MixedBank([image / bank.scale for image in listed]), 3, engine="sliding")
    z, t = (canvas(4, (11, 11), dtype=torch.float32, seed=seed) for seed in (0, 1))
    assert torch.allclose(
        machine.denoise(z, 2.0), bank.scale * unit.denoise(z / bank.scale, 2.0 / bank.scale), atol=1e-5
    )
    expected = unit.jvp(z / bank.scale, 2.0 / bank.scale, t)
    assert torch.allclose(machine.jvp(z, 2.0, t), expected, atol=1e-4)


def test_a_folder_of_photographs_as_they_are(tmp_path):
    folder = tmp_path / "photos"
    for i, (height, width) in enumerate([(10, 12), (12, 10), (10, 12)]):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = smooth_images(1, 3, height, width, seed=i)[0].numpy().transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.png")
    Image.fromarray(smooth_images(1, 1, 9, 9)[0, 0].numpy()).save(folder / "a" / "gray.png")
    bank = ps.MixedBank.open(folder)
    assert repr(bank) == "MixedBank(4 images, 3 channels, 3 sizes: 10 x 12, 9 x 9, 12 x 10, uint8, 2 classes)"
    assert bank.labels.tolist() == [0, 0, 0, 1]
    assert bank.class_names == ("a", "b")
    assert torch.equal(bank.banks[2].images[0], smooth_images(1, 3, 12, 10, seed=1)[0])
    machine = ps.EquivariantLocalScore(bank, 5)
    assert ps.sample(machine, 1, 10, size=(16, 16), labels="b", progress=False).isfinite().all()
    assert len(ps.MixedBank.open(folder, limit=2)) == 2
    assert ps.MixedBank.open(folder, channels=1).shape[0] == 1


def test_the_command_takes_a_folder_of_several_sizes(tmp_path):
    """As it is without --size; with it, as ever. What takes one size says so."""
    for i, size in enumerate([(12, 16), (14, 11), (12, 16)]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(smooth_images(1, 1, *size, seed=i)[0, 0].numpy()).save(tmp_path / "photos" / f"{i}.png")

    def run(*options):
        given = ["sample", tmp_path / "photos", "--steps", "10", "-n", "1", "--out", tmp_path / "out", *options]
        return CliRunner().invoke(main, list(map(str, given)))

    done = run("--size-out", "13x20", "--table", "5")
    assert done.exit_code == 0, done.output
    machine = ps.EquivariantLocalScore(ps.MixedBank.open(tmp_path / "photos"), 5)
    expected = ps.sample(machine, 1, 10, size=(13, 20), progress=False)
    assert np.abs(np.load(tmp_path / "out" / "samples.npy") - expected.numpy()).max() < 1e-5
    assert "nothing left to make" in run("--size-out", "13x20", "--table", "5").output
    explained = CliRunner().invoke(main, ["explain", str(tmp_path / "out")])
    assert "made of images of several sizes, which are not drawn here" in explained.output
    fitted = run("--overwrite", "--size-out", "13x20")
    assert fitted.exit_code == 0, fitted.output
    assert "fitted to these images (3 images held out of 3" in fitted.output
    assert np.load(tmp_path / "out" / "samples.npy").shape == (1, 1, 13, 20)
    # What is made may be smaller than what patches were fitted to.
    small = run("--overwrite", "--size-out", "5x20")
    assert small.exit_code == 0, small.output
    for options, message in (
        (
            ["--machine", "ls"],
            "--machine: the images have 2 sizes, such as 12 x 16 and 14 x 11; it takes images of one",
        ),
        (["--index", "x", "--budget", "0.1"], "--index: the images have 2 sizes"),
        (["--table", "5", "--size-out", "3x20"], "--size-out: a canvas of 3 x 20 is smaller than the patch size 5"),
        (["--table", "13"], "--table: a canvas of 12 x 16 is smaller than the patch size 13"),
    ):
        refused = run("--overwrite", *options)
        assert refused.exit_code == 2
        assert message in refused.output.splitlines()[-1]
    assert run("--overwrite", "--size", "12", "--table", "5").exit_code == 0


BANK = ps.MixedBank(photos())
BAD = [
    (lambda: ps.MixedBank([]), ValueError, "images: got none, takes one or more"),
    (lambda: ps.MixedBank("photos"), TypeError, "images: got str, takes a list of arrays"),
    (lambda: ps.MixedBank(["a.png"]), TypeError, "images: got str among them, takes arrays or tensors"),
    (lambda: ps.MixedBank([np.zeros((4, 4))]), ValueError, r"images: image 0 has shape \[4, 4\], takes \[C, H, W\]"),
    (lambda: ps.MixedBank([*photos(2), *photos(1)]), ValueError, "images: image 4 has 1 channels, the first has 2"),
    (lambda: ps.MixedBank(photos(), [0, 1]), ValueError, "labels: got 2, takes one for each of 4 images"),
    (lambda: ps.MixedBank([np.full((1, 9, 9), np.nan)], value_range="data"), ValueError, "images: NaN or infinite"),
    (lambda: BANK.image(4), ValueError, "image: got 4, takes numbers from 0 to 3"),
    (lambda: ps.IdealScore(BANK), TypeError, "bank: got a MixedBank, IdealScore takes a PatchBank, whose images have"),
    (lambda: ps.LocalScore(BANK, 3), TypeError, "bank: got a MixedBank, LocalScore takes a PatchBank"),
    (lambda: ps.GaussianScore(BANK), TypeError, "bank: got MixedBank, takes a PatchBank"),
    (lambda: ps.ScaleTable.fit(BANK), TypeError, "bank: got MixedBank, takes a PatchBank"),
    (lambda: ps.PatchIndex.build(BANK, 3, "x"), TypeError, "bank: got MixedBank, takes a PatchBank"),
    (lambda: ps.Sharded(ps.EquivariantLocalScore(BANK, 3)), TypeError, "machine: is over a MixedBank, takes one over"),
    (lambda: ps.shard(BANK), TypeError, "bank: got MixedBank, takes a PatchBank"),
    (
        lambda: ps.EquivariantLocalScore(BANK, 11, "circular"),
        ValueError,
        "patch_size: 11 does not fit in 8 x 8 images",
    ),
    (
        lambda: ps.EquivariantLocalScore(BANK, 9).denoise(canvas(2, (12, 12)), 1.0),
        ValueError,
        "z: patch size 9 does not fit in the bank's .* images",
    ),
    (
        lambda: ps.EquivariantLocalScore(BANK, 3, index=object(), budget=0.1),
        ValueError,
        "index: takes images of one size; pool a machine with an index for each of MixedBank.banks",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_what_takes_one_size_refuses_by_name(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
