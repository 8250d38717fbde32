"""Samples beside training images: definitions in plain loops, known values, one pass for blocks of any size."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import smooth_images

import patchscore as ps
from patchscore import fidelity
from patchscore.cli import main
from patchscore.fidelity import frechet_distance, sliced_wasserstein


def balls(x, y, precision_k, density_k):
    """Precision, recall, density, coverage of samples x [n, d] for y [N, d], as the two papers define them."""

    def distance(a, b):
        return math.sqrt(sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)))

    def radii(points, k):
        return [
            sorted(distance(point, other) for j, other in enumerate(points) if j != i)[k - 1]
            for i, point in enumerate(points)
        ]

    of_x, of_y, of_ball = radii(x, precision_k), radii(y, precision_k), radii(y, density_k)
    precision = [any(distance(p, q) <= of_y[j] for j, q in enumerate(y)) for p in x]
    recall = [any(distance(p, q) <= of_x[i] for i, p in enumerate(x)) for q in y]
    inside = [[distance(p, q) < of_ball[j] or distance(p, q) == 0 for p in x] for j, q in enumerate(y)]
    density = sum(map(sum, inside)) / (density_k * len(x))
    return np.mean(precision), np.mean(recall), density, np.mean([any(row) for row in inside])


def figures(found):
    return found.precision, found.recall, found.density, found.coverage


def gaussian(n, d, seed, mean=0.0, scale=0.2):
    return (mean + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)


def as_images(points):
    return points.reshape(len(points), 1, 1, -1)


def evaluated(x, y, **options):
    options = {"patch_sizes": (1,), "patches": 500, "directions": 8, "progress": False, **options}
    return ps.evaluate_samples(as_images(x), ps.PatchBank(as_images(y)), **options)


@pytest.mark.parametrize(("n", "count", "precision_k", "density_k"), [(23, 40, 3, 5), (41, 17, 1, 2), (7, 9, 5, 6)])
@pytest.mark.parametrize("memory_limit", [100, 20_000, 2**28])
def test_blocks_of_any_size_count_what_the_definitions_say(n, count, precision_k, density_k, memory_limit):
    x, y = gaussian(n, 6, 0, 0.05), gaussian(count, 6, 1)
    x[:4] = y[3:7]
    found = evaluated(x, y, precision_k=precision_k, density_k=density_k, memory_limit=memory_limit)
    assert figures(found) == pytest.approx(balls(x.double(), y.double(), precision_k, density_k), abs=1e-12)
    apart = torch.cdist(x.double(), y.double())
    assert torch.equal(found.nearest, apart.argmin(1))
    assert torch.allclose(found.distance, apart.min(1).values / math.sqrt(6), atol=1e-6)


def test_a_set_beside_itself_is_perfect_and_all_copies():
    bank = ps.PatchBank(smooth_images(40, 3, 5, 6))
    found = ps.evaluate_samples(bank, bank, progress=False, memory_limit=5000)
    assert figures(found) == (1, 1, 1, 1)
    assert found.memorised == 1
    assert found.nearer_than_usual == 1
    assert found.distance.max() == 0
    assert found.patch_wasserstein[3] < 3 * found.patch_wasserstein_reference[3]


def test_sets_that_lie_apart_share_nothing():
    found = evaluated(gaussian(30, 8, 0, 0.7, 0.05), gaussian(30, 8, 1, -0.7, 0.05))
    assert figures(found) == (0, 0, 0, 0)
    assert found.memorised == 0
    assert found.nearer_than_usual == 0


def test_one_mode_of_two_is_precise_and_recalls_half():
    y = torch.cat([gaussian(200, 4, 0, -0.7, 0.05), gaussian(200, 4, 1, 0.7, 0.05)])
    found = evaluated(gaussian(200, 4, 2, 0.7, 0.05), y)
    assert found.precision > 0.9
    assert 0.4 < found.recall <= 0.5
    assert 0.4 < found.coverage <= 0.5


def test_density_of_the_same_distribution_is_one_on_average():
    """Naeem et al. 2020: E density = 1; of 800 samples in each set the spread over seeds is about 0.02."""
    densities = [evaluated(gaussian(800, 3, 2 * s), gaussian(800, 3, 2 * s + 1)).density for s in range(4)]
    assert abs(np.mean(densities) - 1) < 0.1


def test_coverage_of_the_same_distribution_is_that_of_the_lemma():
    """Naeem et al. 2020, Lemma 2: E coverage = 1 - (N - 1)...(N - k) / ((M + N - 1)...(M + N - k))."""
    n, k = 600, 5
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    found = np.mean([evaluated(gaussian(n, 3, 2 * s), gaussian(n, 3, 2 * s + 1)).coverage for s in range(4)])
    assert abs(found - expected) < 0.02  # four standard deviations: sqrt(0.03 / 2400) and neighbours that are shared


def test_new_samples_are_no_copies_and_half_are_nearer_than_usual():
    found = [evaluated(gaussian(600, 3, 2 * s), gaussian(600, 3, 2 * s + 1)) for s in range(4)]
    # In few dimensions the nearest of many is near by chance: the ratio of distances is below 1/3 with 3^-3.
    assert abs(np.mean([of.memorised for of in found]) - 1 / 27) < 0.015
    assert abs(np.mean([of.nearer_than_usual for of in found]) - 0.5) < 0.05


def test_copies_among_new_samples_are_counted():
    bank = ps.PatchBank(smooth_images(30, 1, 8, 8))
    samples = torch.cat([bank.chunk(0, 6) + 0.001, ps.PatchBank(smooth_images(14, 1, 8, 8, seed=9)).chunk(0, 14)])
    found = ps.evaluate_samples(samples.clamp(-1, 1), bank, progress=False)
    assert found.memorised == 6 / 20
    assert found.nearest[:6].tolist() == list(range(6))
    assert found.distance[:6].numpy() == pytest.approx(0.001, rel=0.05)


# Patches.


def naive_sliced(a, b, directions=1000):
    """Sliced W_2 of two equally large samples of vectors: direction by direction, the sorted projections in pairs."""
    generator = torch.Generator().manual_seed(5)
    total = 0.0
    for _ in range(directions):
        onto = torch.randn(a.shape[1], generator=generator)
        onto /= onto.norm()
        pairs = zip(sorted((a @ onto).tolist()), sorted((b @ onto).tolist()), strict=True)
        total += np.mean([(p - q) ** 2 for p, q in pairs])
    return math.sqrt(total / directions)


def test_whole_images_as_patches_have_the_distance_of_the_definition():
    """Patches as large as the images have one place, and every image gives its share of them."""
    a, b = (smooth_images(20, 2, 3, 3, seed=s).float() / 127.5 - 1 for s in (1, 2))
    found = ps.evaluate_samples(
        a, ps.PatchBank(b * 0.5), patch_sizes=(3,), patches=100, directions=3000, progress=False
    )
    # Over directions of d = 18 the squared distance spreads by sqrt(2 / d) of itself: 0.6% of the root.
    assert found.patch_wasserstein[3] == pytest.approx(naive_sliced(a.flatten(1), b.flatten(1) * 0.5), rel=0.025)


def test_single_pixels_have_the_distance_in_one_dimension():
    a, b = (torch.rand(30, 1, 1, 1, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    found = ps.evaluate_samples(a, ps.PatchBank(-b), patch_sizes=(1, 3), patches=60, directions=2, progress=False)
    paired = (a.flatten().sort().values - (-b).flatten().sort().values).square().mean().sqrt()
    assert found.patch_wasserstein == {1: pytest.approx(paired.item(), rel=1e-6)}  # 3 x 3 do not fit


def test_gaussians_have_the_closed_form_distance():
    """W_2^2 = (m - n)^2 + (s - t)^2 in one dimension; over directions of d the mean of (theta m)^2 is |m|^2 / d."""
    d, count = 12, 6000
    generator = torch.Generator().manual_seed(0)
    onto = torch.randn(d, 200, generator=generator)
    onto /= onto.norm(dim=0)
    shift = torch.linspace(-1, 1, d)
    a = torch.randn(count, d, generator=generator) @ onto
    b = (shift + 1.5 * torch.randn(count, d, generator=generator)) @ onto
    expected = math.sqrt(shift.square().sum().item() / d + 0.5**2)
    assert sliced_wasserstein(a.T.sort().values, b.T.sort().values) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("k", [1, 3])
def test_a_shift_of_all_pixels_is_its_size_times_the_mean_projection(k):
    """Patches shifted by s in every pixel: W_2 of a direction is |s sum(theta)|, whose mean square is s^2."""
    images = 0.3 * ps.PatchBank(smooth_images(60, 1, 8, 8)).chunk(0, 60)
    found = ps.evaluate_samples(
        images + 0.25, ps.PatchBank(images), patch_sizes=(k,), patches=4000, directions=300, progress=False
    )
    assert found.patch_wasserstein[k] == pytest.approx(0.25, rel=0.15)
    assert found.patch_wasserstein_reference[k] < 0.08


def test_patches_are_of_every_image_alike_and_of_places_drawn_uniformly():
    """The value of a pixel tells its image and its place."""
    images = (torch.arange(8.0)[:, None] * 20 + torch.arange(20.0)).reshape(8, 1, 4, 5) / 160
    drawn = fidelity._projections(fidelity._Images("samples", images), range(8), 1, 16_000, 1, 0)
    counts = torch.bincount((drawn.abs() * 160).round().long().flatten())
    assert (counts.reshape(8, 20).sum(1) == 2000).all()
    assert (counts - 100).abs().max() < 5 * 10  # a binomial count of 100 spreads by 10
    odd = fidelity._projections(fidelity._Images("samples", images), range(1, 8, 2), 1, 400, 1, 0)
    assert set(((odd.abs() * 160).round() // 20).flatten().tolist()) == {1, 3, 5, 7}


# Features.


def test_features_of_a_function_or_given_are_the_same():
    x, y = gaussian(30, 6, 0), gaussian(40, 6, 1)

    def halves(images):
        return images.flatten(1)[:, :3] * 2

    by_function = evaluated(x, y, features=halves)
    given = evaluated(x, y, features=((x[:, :3] * 2).numpy(), (y[:, :3] * 2)))
    assert figures(by_function) == figures(given)
    assert by_function.distance.numpy() == pytest.approx(
        torch.cdist(x[:, :3] * 2, y[:, :3] * 2).min(1).values, abs=1e-5
    )
    assert by_function.frechet == pytest.approx(given.frechet, rel=1e-5)
    assert by_function.settings["features"] == "halves"


def test_frechet_distance_has_its_closed_forms():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    s, t = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    mean = torch.arange(5.0, dtype=torch.float64)
    a, b = (turn * of.square() @ turn.T for of in (s, t))
    expected = mean.square().sum() + (s - t).square().sum()
    assert frechet_distance(mean, a, torch.zeros(5, dtype=torch.float64), b) == pytest.approx(expected.item(), rel=1e-9)
    from scipy.linalg import sqrtm

    other = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    other = other @ other.T
    plain = mean.square().sum() + a.trace() + other.trace() - 2 * np.trace(sqrtm((a @ other).numpy()).real)
    assert frechet_distance(mean, a, 0 * mean, other) == pytest.approx(plain.item(), rel=1e-7)


def test_moments_are_those_of_the_whole_set():
    points = gaussian(300, 7, 0)
    mean, covariance = fidelity._moments(fidelity._Vectors(points, 300, 7))
    assert np.allclose(mean, points.double().mean(0))
    assert np.allclose(covariance, np.cov(points.double().numpy(), rowvar=False))


def test_inception_is_asked_for_8_bit_colour_or_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"FID needs torch-fidelity .*: pip install torch-fidelity"):
        ps.inception_features()

    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            assert features_list == ["2048"]
            assert feature_extractor_weights_path == str(tmp_path / "weights")

        def forward(self, x):
            assert x.dtype == torch.uint8
            assert x.shape[1:] == (3, 4, 4)
            return (x.flatten(1)[:, ::5].float(),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    with pytest.raises(ValueError, match=r"weights: no such file; FID needs Inception's weights, weights-inception"):
        ps.inception_features(tmp_path / "weights")
    (tmp_path / "weights").touch()
    bank = ps.PatchBank(smooth_images(12, 1, 4, 4))
    found = ps.evaluate_samples(bank, bank, ps.inception_features(tmp_path / "weights"), progress=False)
    assert found.frechet == pytest.approx(0, abs=1e-6)
    assert found.settings["features"] == "inception"


# What is taken.


@pytest.mark.parametrize(
    ("samples", "options", "error", "message"),
    [
        (torch.zeros(2, 1, 4, 5), {}, ValueError, "samples: got 1 x 4 x 5 images, the training images are 1 x 4 x 4"),
        (torch.zeros(0, 1, 4, 4), {}, ValueError, "samples: got none"),
        (torch.zeros(2, 4, 4), {}, TypeError, r"samples: got \[2, 4, 4\], takes a PatchBank or an array"),
        (torch.full((2, 1, 4, 4), 7.0), {}, ValueError, "samples: values from 7 to 7, takes"),
        (torch.full((2, 1, 4, 4), torch.nan), {}, ValueError, "values from nan"),
        (torch.zeros(2, 1, 4, 4), {"precision_k": 0}, ValueError, "precision_k: got 0"),
        (torch.zeros(2, 1, 4, 4), {"features": 3}, TypeError, "features: got int"),
        (
            torch.zeros(2, 1, 4, 4),
            {"features": (np.zeros((2, 3)), np.zeros((5, 3)))},
            ValueError,
            r"takes an array \[6",
        ),
        (torch.zeros(2, 1, 4, 4), {"features": (np.zeros((2, 3)), np.zeros((6, 4)))}, ValueError, "widths 3 and 4"),
        (torch.zeros(2, 1, 4, 4), {"features": lambda x: x[:1]}, ValueError, "2 images gave"),
        (
            torch.zeros(2, 1, 4, 4),
            {"features": (np.full((2, 3), np.nan), np.zeros((6, 3)))},
            ValueError,
            "features: got NaN",
        ),
    ],
)
def test_bad_arguments_are_named(samples, options, error, message):
    with pytest.raises(error, match=message):
        ps.evaluate_samples(samples, ps.PatchBank(smooth_images(6, 1, 4, 4)), progress=False, **options)


def test_one_image_beside_one_is_told_without_radii():
    one = ps.PatchBank(smooth_images(1, 1, 4, 4))
    found = ps.evaluate_samples(one, one, progress=False)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert math.isnan(found.memorised)


def test_a_mapped_file_is_read_block_by_block(tmp_path, monkeypatch):
    images = ps.PatchBank(smooth_images(50, 1, 6, 6)).chunk(0, 50).numpy()
    np.save(tmp_path / "samples.npy", images)
    mapped = np.load(tmp_path / "samples.npy", mmap_mode="r")
    bank = ps.PatchBank(smooth_images(20, 1, 6, 6, seed=2))
    taken = []
    inner = fidelity._Images.block
    monkeypatch.setattr(
        fidelity._Images, "block", lambda self, a, b: taken.append((self.name, b - a)) or inner(self, a, b)
    )
    few = ps.evaluate_samples(mapped, bank, progress=False, memory_limit=5000, patch_sizes=())
    assert max(count for name, count in taken if name == "samples") < 10
    assert figures(few) == figures(ps.evaluate_samples(images, bank, progress=False))


# The command.


def invoke(*words):
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.fixture
def run(tmp_path):
    np.savez(tmp_path / "bank.npz", images=smooth_images(12, 1, 8, 8).numpy(), labels=np.arange(12) % 2)
    words = ["sample", tmp_path / "bank.npz", "--table", 3, "--steps", 3, "-n", 9, "--format", "zip"]
    assert invoke(*words, "--out", tmp_path / "out").exit_code == 0
    return tmp_path / "out"


def test_evaluate_prints_a_table_and_writes_json(run, tmp_path):
    done = invoke("evaluate", run, tmp_path / "bank.npz", "--patch-sizes", "3,5")
    assert done.exit_code == 0, done.output
    record = json.loads((run / "evaluation.json").read_text())
    assert record["format"] == "patchscore-evaluation"
    assert (record["samples"], record["reference"]) == (9, 12)
    assert len(record["nearest"]) == len(record["distance"]) == 9
    bank = ps.PatchBank.open(tmp_path / "bank.npz")
    found = ps.evaluate_samples(np.load(run / "samples.npy"), bank, patch_sizes=(3, 5), progress=False)
    assert record["figures"] == pytest.approx(found.figures())
    for name, value in found.figures().items():
        assert f"{value:.4f}" in done.output, name
    assert f"{found.patch_wasserstein_reference[5]:.4f} between halves" in done.output
    assert repr(found).startswith("Fidelity(9 samples, 12 training images: precision ")
    # --overwrite clears it with what else the run wrote.
    again = invoke("sample", tmp_path / "bank.npz", "--table", 5, "--steps", 3, "-n", 1, "--out", run, "--overwrite")
    assert again.exit_code == 0
    assert not (run / "evaluation.json").exists()


def test_evaluate_takes_any_source_and_given_features(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_features.py").write_text("def means(x):\n    return x.mean(3).flatten(1)\n")
    bank = ps.PatchBank.open("bank.npz")
    np.save("a.npy", np.load(run / "samples.npy").mean(3).reshape(9, -1))
    np.save("b.npy", bank.chunk(0, 12).mean(3).flatten(1).numpy())
    results = []
    for more in (
        ["--features", "own_features:means"],
        ["--sample-features", "a.npy", "--reference-features", "b.npy"],
    ):
        done = invoke("evaluate", run, "bank.npz", "--out", "e.json", *more)
        assert done.exit_code == 0, done.output
        results.append(json.loads((tmp_path / "e.json").read_text())["figures"])
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert "frechet" in results[0]
    done = invoke("evaluate", run / "samples.zip", "bank.npz")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "evaluation.json").read_text())["samples"] == 9


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "nothing"], "--features: got 'nothing', takes pixels, inception or module:function"),
        (["--features", "nowhere:f"], "--features: nowhere:f: No module named 'nowhere'"),
        (["--sample-features", "a.npy"], "--sample-features: takes --reference-features beside it"),
        (["--weights", "w"], "--weights: takes --features inception"),
        (["--patch-sizes", "x"], "--patch-sizes: got 'x'"),
        (["--memory-limit", "0"], "--memory-limit: got 0"),
        (["--size", "4"], "samples: got 1 x 8 x 8 images, the training images are 1 x 4 x 4"),
    ],
)
def test_what_evaluate_does_not_take_is_one_line(run, tmp_path, more, message):
    done = invoke("evaluate", run, tmp_path / "bank.npz", *more)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_of_another_size_or_without_images_is_named(tmp_path, run):
    (run / "batches.jsonl").unlink()
    assert "the run has no images yet" in invoke("evaluate", run, tmp_path / "bank.npz").stderr
    (run / "run.json").write_text((run / "run.json").read_text().replace("cosine", "linear"))
    assert "not a usable run" in invoke("evaluate", run, tmp_path / "bank.npz").stderr
