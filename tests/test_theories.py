"""Each theory is what a plain loop over numbers makes of its definition, for every item's own noise level and class."""

import math

import numpy as np
import pytest
import torch
from conftest import noisy, smooth_images

import patchscore as ps
from patchscore.theories import (
    FilteredMeans,
    GaussianScore,
    GoldenSubset,
    NearestScore,
    PatchComposition,
    PcaLocality,
    SmoothedScore,
    WrappedScore,
    masks_of_heat,
    pspc_sizes,
    soft_squares,
)

TOLERANCE = 1e-4
"""What the exact theories promise, float32 input against float64 definitions."""


@pytest.fixture
def small():
    """14 colour images of 6 x 5 in two classes."""
    return ps.PatchBank(smooth_images(14, 2, 6, 5, seed=4), torch.arange(14) % 2, ("dog", "cat"))


def softmax(logits):
    weights = np.exp(np.asarray(logits) - max(logits))
    return weights / weights.sum()


# Plain definitions: z [C, H, W] and x [N, C, H, W] as float64 arrays.


def plain_nearest(z, sigma, x, scaling="preserving"):
    z = z / math.sqrt(1 + sigma**2) if scaling == "preserving" else z
    return min(x, key=lambda image: float(((z - image) ** 2).sum()))


def plain_ideal(z, sigma, x, neighbors=None):
    distances = [float(((z - image) ** 2).sum()) for image in x]
    kept = sorted(range(len(x)), key=lambda n: distances[n])[:neighbors]
    weights = softmax([-distances[n] / (2 * sigma**2) for n in kept])
    return sum(w * x[n] for w, n in zip(weights, kept, strict=True))


def plain_smoothed(z, sigma, x, std, noise, neighbors=None):
    means = [plain_ideal(z + std * math.sqrt(1 + sigma**2) * e, sigma, x, neighbors) for e in noise]
    return sum(means) / len(means)


def plain_wiener(z, sigma, x, ddof):
    flat = x.reshape(len(x), -1)
    covariance = np.cov(flat.T, ddof=ddof)
    gain = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(len(covariance)))
    mean = flat.mean(0)
    return (mean + gain @ (z.ravel() - mean)).reshape(z.shape)


def plain_mask(sigma, x, threshold):
    covariance = np.cov(x.reshape(len(x), -1).T, ddof=1)
    a = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(len(covariance)))
    for n in range(len(a)):
        if abs(a[n, n]) < 1e-6:
            a[n, n] = 1.0
    m = np.array([row / row[n] for n, row in enumerate(a)])
    return m if threshold == 0 else (np.abs(m) >= threshold * np.abs(m).max()).astype(float)


def plain_pca(z, sigma, x, threshold, temperature=1.0, batch_size=None, mask=None):
    mask = plain_mask(sigma, x, threshold) if mask is None else mask
    flat, q = x.reshape(len(x), -1), z.ravel()
    answers = []
    for start in range(0, len(x), batch_size or len(x)):
        batch = flat[start : start + (batch_size or len(x))]
        answer = np.empty(len(q))
        for m in range(len(q)):
            logits = [-sum(mask[n, m] * (q[n] - a[n]) ** 2 for n in range(len(q))) for a in batch]
            weights = softmax(np.array(logits) / (2 * sigma**2 * temperature))
            answer[m] = sum(w * a[m] for w, a in zip(weights, batch, strict=True))
        answers.append(answer)
    return (sum(answers) / len(answers)).reshape(z.shape)


def plain_composition(z, sigma, x, windows):
    """`windows`: lists of (i, j), a posterior mean each; the plain mean of those over a pixel."""
    total, count = np.zeros_like(z), np.zeros(z.shape[1:])
    for window in windows:
        logits = [-sum(((z[:, i, j] - a[:, i, j]) ** 2).sum() for i, j in window) / (2 * sigma**2) for a in x]
        weights = softmax(logits)
        for i, j in window:
            total[:, i, j] += sum(w * a[:, i, j] for w, a in zip(weights, x, strict=True))
            count[i, j] += 1
    return total / count


def squares(height, width, k):
    corners = [(a, b) for a in range(height - k + 1) for b in range(width - k + 1)]
    return [[(a + u, b + v) for u in range(k) for v in range(k)] for a, b in corners]


def plain_wrapped(z, sigma, x, k):
    """Every window of every image, on a torus."""
    _, height, width = z.shape
    offsets = [(u, v) for u in range(-(k // 2), k // 2 + 1) for v in range(-(k // 2), k // 2 + 1)]
    places = [(i, j) for i in range(height) for j in range(width)]

    def window(image, i, j):
        return np.array([image[:, (i + u) % height, (j + v) % width] for u, v in offsets])

    windows = np.array([window(image, i, j) for image in x for i, j in places])
    centres = np.array([image[:, i, j] for image in x for i, j in places])
    found = np.empty_like(z)
    for i, j in places:
        distances = ((windows - window(z, i, j)) ** 2).sum((1, 2))
        found[:, i, j] = softmax(-distances / (2 * sigma**2)) @ centres
    return found


def plain_filtered(z, sigma, x, precisions, responses):
    """A posterior mean for every filter, then the mean of these, weighted by the responses."""
    total, count = np.zeros_like(z), np.zeros(z.shape[1:])
    for precision, response in zip(precisions, responses, strict=True):
        weights = softmax([-(precision * (z - a) ** 2).sum() / (2 * sigma**2) for a in x])
        total += response * sum(w * a for w, a in zip(weights, x, strict=True))
        count += response
    return total / count


NOISE = torch.randn(3, 2, 6, 5, generator=torch.Generator().manual_seed(7))
MASKS = torch.rand(9, 6, 5, generator=torch.Generator().manual_seed(8)) < 0.4
MASKS[0, ~MASKS.any(0)] = True
FILTERS = torch.rand(7, 6, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
RESPONSES = torch.rand(7, 6, 5, generator=torch.Generator().manual_seed(10), dtype=torch.float64)

EXACT = {
    "filtered": (
        FilteredMeans,
        lambda z, s, x: plain_filtered(z, s, x, FILTERS.numpy(), RESPONSES.numpy()),
        {"precisions": FILTERS, "responses": RESPONSES},
    ),
    "filtered, mirror images": (
        FilteredMeans,
        lambda z, s, x: plain_filtered(
            z, s, np.concatenate([x, x[..., ::-1]]), *2 * [soft_squares((2, 6, 5), 3, 0.1)(s).numpy()]
        ),
        {"precisions": soft_squares((2, 6, 5), 3, 0.1), "flip": True},
    ),
    "wrapped": (WrappedScore, lambda z, s, x: plain_wrapped(z, s, x, 3), {"patch_size": 3}),
    "wrapped, nearly the whole image": (WrappedScore, lambda z, s, x: plain_wrapped(z, s, x, 5), {"patch_size": 5}),
    "nearest": (NearestScore, plain_nearest, {}),
    "nearest of z": (NearestScore, plain_nearest, {"scaling": "exploding"}),
    "smoothed": (
        SmoothedScore,
        lambda z, s, x: plain_smoothed(z, s, x, 0.2, NOISE.double().numpy()),
        {"std": 0.2, "noise": NOISE},
    ),
    "smoothed, neighbors": (
        SmoothedScore,
        lambda z, s, x: plain_smoothed(z, s, x, 0.2, NOISE.double().numpy(), 3),
        {"std": 0.2, "noise": NOISE, "neighbors": 3},
    ),
    "wiener": (GaussianScore, plain_wiener, {"ddof": 1}),
    "pspc gaussian": (GaussianScore, plain_wiener, {"ddof": 0}),
    "pca": (PcaLocality, lambda z, s, x: plain_pca(z, s, x, 0.005), {}),
    "pca, threshold": (PcaLocality, lambda z, s, x: plain_pca(z, s, x, 0.3), {"threshold": 0.3}),
    "pca, no threshold": (PcaLocality, lambda z, s, x: plain_pca(z, s, x, 0), {"threshold": 0}),
    "pca, batches": (
        PcaLocality,
        lambda z, s, x: plain_pca(z, s, x, 0.05, 2.0, 3),
        {"threshold": 0.05, "temperature": 2.0, "batch_size": 3},
    ),
    "squares": (PatchComposition, lambda z, s, x: plain_composition(z, s, x, squares(6, 5, 3)), {"patch_size": 3}),
    "even squares": (PatchComposition, lambda z, s, x: plain_composition(z, s, x, squares(6, 5, 2)), {"patch_size": 2}),
    "squares wider than the image": (
        PatchComposition,
        lambda z, s, x: plain_composition(z, s, x, squares(6, 5, 5)),
        {"patch_size": 32},
    ),
    "squares, mirrored": (
        PatchComposition,
        lambda z, s, x: plain_composition(z, s, np.concatenate([x, x[..., ::-1]]), squares(6, 5, 3)),
        {"patch_size": 3, "flip": True},
    ),
    "masks": (
        PatchComposition,
        lambda z, s, x: plain_composition(z, s, x, [np.argwhere(mask).tolist() for mask in MASKS.numpy()]),
        {"masks": MASKS},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_a_theory_is_its_definition_for_every_item(small, name, dtype):
    theory, plain, options = EXACT[name]
    sigmas, labels = torch.tensor([0.05, 0.4, 0.4, 3.0], dtype=torch.float64), [None, "dog", 1, None]
    z = (small.chunk(0, 4, torch.float64) + sigmas[:, None, None, None] * noisy(small, 1.0, 4, seed=2)).to(dtype)
    estimate = theory(small, **options).estimate(z, sigmas, labels)
    assert estimate.mean.dtype == dtype
    assert estimate.stderr.abs().max() == 0
    everything = small.chunk(0, 14, torch.float64).numpy()
    given = {key: value for key, value in options.items() if key in ("scaling", "ddof")}
    for i, label in enumerate((None, 0, 1, None)):
        x = everything if label is None else everything[small.labels.numpy() == label]
        expected = plain(z[i].double().numpy(), sigmas[i].item(), x, **given)
        assert np.abs(estimate.mean[i].double().numpy() - expected).max() < TOLERANCE
        assert estimate.ess[i].min() > 0
        windows = 30 if theory is WrappedScore else 2 if options.get("flip") else 1
        assert estimate.ess[i].max() <= len(x) * windows * (1 + 1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_an_item_does_not_depend_on_its_batch(small, name):
    theory, _, options = EXACT[name]
    machine = theory(small, **options)
    z, sigmas = noisy(small, 0.5, 3), torch.tensor([0.5, 0.5, 1.0])
    together = machine.denoise(z, sigmas)
    for i in range(3):
        torch.testing.assert_close(machine.denoise(z[i : i + 1], sigmas[i : i + 1]), together[i : i + 1])
    # Nor on how the bank is cut to fit the memory.
    tight = theory(small, **options, memory_limit=2**20)
    torch.testing.assert_close(tight.denoise(z, sigmas), together, atol=1e-9, rtol=0)


def test_the_wrapped_score_knows_no_border(small):
    """It moves with its input, does not mind where the training images begin, and has moments."""
    machine, z = WrappedScore(small, 5), noisy(small, 0.5, 2)
    shift = ((2, 3), (2, 3))
    found = machine.estimate(z, 0.5, moments=True)
    torch.testing.assert_close(machine.denoise(z.roll(*shift), 0.5), found.mean.roll(*shift))
    rolled = WrappedScore(ps.PatchBank(small.images.roll(*shift)), 5).estimate(z, 0.5, moments=True)
    torch.testing.assert_close(rolled.mean, found.mean)
    torch.testing.assert_close(rolled.variance, found.variance)
    # With one pixel there is no border to wrap around.
    alone = ps.EquivariantLocalScore(small, 1, "circular").denoise(z, 0.5)
    torch.testing.assert_close(WrappedScore(small, 1).denoise(z, 0.5), alone)
    table = ps.ScaleTable([0.1, 2.0], [1, 5])
    by_level = WrappedScore(small, table).denoise(z, torch.tensor([0.1, 2.0]))
    for i, (sigma, k) in enumerate(((0.1, 1), (2.0, 5))):
        torch.testing.assert_close(by_level[i : i + 1], WrappedScore(small, k).denoise(z[i : i + 1], sigma))
    assert small.wrapped(2).shape == (2, 10, 9)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 6.0])
def test_the_golden_subset_is_searched_in_three_steps(small, sigma):
    machine = GoldenSubset(small, k_min=2, k_max=5, low_res=3, threshold=0.1, seed=3)
    z = noisy(small, sigma, 3, seed=5)
    drawn, coarse, fine = machine.sizes(14, sigma)
    v = sigma / math.sqrt(1 + sigma**2)
    assert (drawn, coarse, fine) == (round(5 + 9 * (1 - v)), 5, round(5 - 3 * (1 - v)))
    # The draw is seen through a machine whose subset is all that was drawn.
    everything = small.chunk(0, 14, torch.float64)
    mask = plain_mask(sigma, everything.numpy(), 0.1)
    found = machine.denoise(z, sigma)
    chosen = drawn_by(machine, sigma, 14, drawn)
    x = everything[chosen]
    pooled = torch.nn.functional.adaptive_avg_pool2d
    for i in range(3):
        near = (pooled(x, 3) - pooled(z[i : i + 1], 3)).square().sum((1, 2, 3)).argsort()[:coarse]
        left = x[near][(x[near] - z[i]).square().sum((1, 2, 3)).argsort()[:fine]]
        expected = plain_pca(z[i].numpy(), sigma, left.numpy(), 0.1, mask=mask)
        assert np.abs(found[i].numpy() - expected).max() < TOLERANCE
    assert torch.equal(machine.denoise(z, sigma), found)
    torch.testing.assert_close(machine.denoise(z[2:], sigma), found[2:])


def drawn_by(machine, sigma, n, count):
    """The images that a golden subset draws, in the order of the bank."""
    entropy = [machine.seed, int(np.float64(sigma).view(np.uint64))]
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def test_a_golden_subset_of_everything_is_pca_locality(small):
    z, sigmas = noisy(small, 0.5, 3), torch.tensor([0.2, 0.5, 2.0])
    golden = GoldenSubset(small, k_min=14, k_max=14, threshold=0.05)
    torch.testing.assert_close(golden.denoise(z, sigmas), PcaLocality(small, 0.05).denoise(z, sigmas))


def test_draws_of_the_subset_are_uniform(small):
    counts = torch.zeros(14)
    for sigma in torch.linspace(1, 2, 600).tolist():
        counts[drawn_by(GoldenSubset(small), sigma, 14, 7)] += 1
    # 600 draws of half the images: 300 each, with a standard deviation of 12.2; five of them.
    assert (counts - 300).abs().max() < 62


def test_limits_of_the_noise(small):
    """Without noise every theory gives the image back that z is; in much noise the mean, or what it chose."""
    x = small.chunk(0, 1, torch.float64)
    # Entries of a mask without a threshold are negative too; every batch of images has an answer of its own.
    without = {"pca, no threshold", "pca, batches"}
    named = {name: of for name, of in EXACT.items() if of[0] is not SmoothedScore and name not in without}
    machines = [theory(small, **options) for theory, _, options in named.values()]
    for machine in (*machines, GoldenSubset(small, k_min=1, k_max=14), SmoothedScore(small, 0.0)):
        assert (machine.denoise(x, 0.01) - x).abs().max() < 0.02, machine
        assert machine.denoise(1e4 * noisy(small, 1.0), 1e4).isfinite().all(), machine
        assert machine.denoise(noisy(small, 1.0), 1e-9).isfinite().all(), machine


def test_smoothing_draws_from_the_seed_and_its_width_grows_with_the_noise(small):
    z = noisy(small, 0.5, 2)
    a, b, c = (SmoothedScore(small, 0.3, draws=4, seed=seed).denoise(z, 0.5) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len(SmoothedScore(small, 0.3, draws=4).noise) == 4
    torch.testing.assert_close(SmoothedScore(small, 0.0).denoise(z, 0.5), ps.IdealScore(small).denoise(z, 0.5))


def test_published_sides_are_those_of_the_nearest_level():
    assert [pspc_sizes(sigma) for sigma in (100, 80, 5.0, 2.0, 1.0, 0.3, 0.08, 1e-3)] == [32, 32, 23, 11, 7, 3, 3, 3]


def test_a_table_and_a_function_give_the_side(small):
    z = noisy(small, 0.5, 2)
    sigmas = torch.tensor([0.1, 2.0])
    table = ps.ScaleTable([0.1, 2.0], [3, 5])
    found = PatchComposition(small, table).denoise(z, sigmas)
    for i, k in enumerate((3, 5)):
        expected = PatchComposition(small, k).denoise(z[i : i + 1], sigmas[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], expected)
    by_level = PatchComposition(
        small, masks=lambda sigma: MASKS if sigma > 1 else torch.ones(1, 6, 5, dtype=torch.bool)
    )
    torch.testing.assert_close(by_level.denoise(z[1:], 2.0), PatchComposition(small, masks=MASKS).denoise(z[1:], 2.0))
    torch.testing.assert_close(by_level.denoise(z[:1], 0.5), ps.IdealScore(small).denoise(z[:1], 0.5))


def test_windows_and_whole_images_are_collections(small):
    z, sigmas = noisy(small, 0.5, 2), torch.tensor([0.3, 1.0])
    ones = torch.ones(1, 6, 5)
    torch.testing.assert_close(FilteredMeans(small, ones).denoise(z, sigmas), ps.IdealScore(small).denoise(z, sigmas))
    # Windows of 3 x 3 about each pixel; beyond the border LocalScore has zeros in both images, no distance.
    near = [[[max(abs(i - a), abs(j - b)) < 2 for b in range(5)] for a in range(6)] for i in range(6) for j in range(5)]
    windows, one = torch.tensor(near, dtype=torch.float64), torch.eye(30).view(30, 6, 5)
    local = ps.LocalScore(small, 3).denoise(z, sigmas)
    torch.testing.assert_close(FilteredMeans(small, windows, one).denoise(z, sigmas), local)
    masks = PatchComposition(small, masks=MASKS).denoise(z, sigmas)
    torch.testing.assert_close(FilteredMeans(small, MASKS.double()).denoise(z, sigmas), masks)


def test_a_soft_square_is_as_wide_as_its_side():
    for k in (3, 7, 11):
        row = soft_squares((1, 1, 101), k)(0.5)[50, 0]
        offsets = torch.arange(101, dtype=torch.float64) - 50
        variance = (row * offsets.square()).sum() / row.sum()
        square = torch.arange(k, dtype=torch.float64).var(unbiased=False)
        assert variance.item() == pytest.approx(square.item(), rel=0.02)  # a sum for an integral: 2% at k = 3
    assert torch.equal(soft_squares((1, 2, 2), 1)(0.5), torch.eye(4, dtype=torch.float64).view(4, 2, 2))
    table = ps.ScaleTable([0.1, 2.0], [1, 3])
    assert torch.equal(soft_squares((1, 2, 2), table, 0.5)(0.1), soft_squares((1, 2, 2), 1)(0.1) + 0.5)


def test_masks_hold_the_hottest_pixels():
    heat = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert masks_of_heat(heat, 0.65).tolist() == [[[False, False, True, True]]]  # shares 0.1, 0.3, 0.6, 1
    assert masks_of_heat(heat, 0.39).tolist() == [[[False, False, False, True]]]
    assert masks_of_heat(heat, 1.0).all()
    assert masks_of_heat(heat, 1e-12).tolist() == [[[False, False, False, True]]]


def test_masks_are_made_once_for_a_level_and_class(small, monkeypatch):
    from patchscore.theories import pca

    made, original = [], pca.locality_mask
    monkeypatch.setattr(pca, "locality_mask", lambda *given: made.append(given[1]) or original(*given))
    machine = PcaLocality(small)
    for _ in range(2):
        machine.denoise(noisy(small, 0.5, 3), torch.tensor([0.5, 0.5, 1.0]))
    assert made == [0.5, 1.0]
    machine.denoise(noisy(small, 0.5), 0.5, "cat")
    assert made == [0.5, 1.0, 0.5]
    monkeypatch.setattr(pca, "KEPT", 1)
    machine.denoise(noisy(small, 0.5), 0.7)
    assert len(machine.masks.made) == 1


def test_theories_sample_like_any_denoiser(small):
    machine = PatchComposition(small, 3)
    images = ps.sample(machine, 2, steps=4, labels=["dog", "cat"], progress=False)
    assert images.shape == (2, 2, 6, 5)
    assert images.isfinite().all()
    assert "PatchComposition" in repr(machine)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda bank: NearestScore(3), TypeError, "bank: got int"),
        (lambda bank: NearestScore(bank, "vp"), ValueError, "scaling: got 'vp'"),
        (lambda bank: SmoothedScore(bank, -1), ValueError, "std: got -1"),
        (lambda bank: SmoothedScore(bank, 0.1, neighbors=0), ValueError, "neighbors: got 0"),
        (lambda bank: SmoothedScore(bank, 0.1, noise=torch.zeros(2, 3)), ValueError, "noise: got shape"),
        (lambda bank: SmoothedScore(bank, 0.1, noise=[1]), TypeError, "noise: got list"),
        (lambda bank: SmoothedScore(bank, 0.1, draws=0), ValueError, "draws: got 0"),
        (lambda bank: PcaLocality(bank, threshold=2), ValueError, "threshold: got 2"),
        (lambda bank: PcaLocality(bank, temperature=0), ValueError, "temperature: got 0"),
        (lambda bank: PcaLocality(bank, batch_size=0), ValueError, "batch_size: got 0"),
        (lambda bank: GoldenSubset(bank, k_min=3, k_max=2), ValueError, "k_max: got 2"),
        (lambda bank: GoldenSubset(bank, low_res=0), ValueError, "low_res: got 0"),
        (lambda bank: PatchComposition(bank), ValueError, "patch_size, masks: takes one"),
        (lambda bank: PatchComposition(bank, 3, masks=MASKS), ValueError, "patch_size, masks: takes one"),
        (lambda bank: PatchComposition(bank, 0), ValueError, "patch_size: got 0"),
        (lambda bank: PatchComposition(bank, masks=MASKS.float()), TypeError, "masks: takes a boolean"),
        (lambda bank: PatchComposition(bank, masks=MASKS[:, :3]), ValueError, "masks: got shape"),
        (lambda bank: PatchComposition(bank, masks=MASKS & False), ValueError, "masks: got shape"),
        (lambda bank: WrappedScore(bank, 4), ValueError, "patch_size: got 4"),
        (lambda bank: WrappedScore(bank, 7), ValueError, "patch_size: 7 does not fit"),
        (lambda bank: WrappedScore(3, 3), TypeError, "bank: got int"),
        (lambda bank: bank.wrapped(6), ValueError, "margin: got 6"),
        (lambda bank: bank.wrapped(-1), ValueError, "margin: got -1"),
        (lambda bank: FilteredMeans(bank, FILTERS[:, :3]), ValueError, "precisions: got shape"),
        (lambda bank: FilteredMeans(bank, -FILTERS), ValueError, "precisions: takes finite numbers from 0"),
        (lambda bank: FilteredMeans(bank, FILTERS, RESPONSES[:3]), ValueError, "responses: got 3 rows"),
        (lambda bank: FilteredMeans(bank, FILTERS, RESPONSES * 0), ValueError, "responses: a pixel has none"),
        (lambda bank: FilteredMeans(bank, [1]), TypeError, "precisions: got list"),
        (lambda bank: soft_squares(bank.shape, 0), ValueError, "patch_size: got 0"),
        (lambda bank: soft_squares(bank.shape, 3, -1), ValueError, "whole: got -1"),
        (lambda bank: GaussianScore(bank, ddof=2), ValueError, "ddof: got 2"),
        (lambda bank: masks_of_heat(torch.zeros(1, 2, 2), 0.5), ValueError, "heat: got shape"),
        (lambda bank: masks_of_heat(torch.ones(1, 2, 2), 0), ValueError, "threshold: got 0"),
    ],
)
def test_bad_arguments_are_named(small, make, error, message):
    with pytest.raises(error, match=message):
        make(small)


def test_a_bank_that_a_theory_cannot_serve_is_told_with_the_way_out(small):
    with pytest.raises(
        ValueError, match=r"memory_limit: the PCA mask of 60 .* GiB; take smaller images, or more memory"
    ):
        PcaLocality(small, memory_limit=10_000).denoise(noisy(small, 1.0), 1.0)
    with pytest.raises(ValueError, match="memory_limit: got 100 bytes, one image takes"):
        PatchComposition(small, 3, memory_limit=100).denoise(noisy(small, 1.0), 1.0)
    alone = ps.PatchBank(small.images[:1])
    with pytest.raises(ValueError, match="ddof: got 1, with 1 image there is no covariance"):
        PcaLocality(alone).denoise(noisy(alone, 1.0), 1.0)
    with pytest.raises(ValueError, match="moments: NearestScore gives the mean alone"):
        NearestScore(small).estimate(noisy(small, 1.0), 1.0, moments=True)
    with pytest.raises(ValueError, match="unknown label"):
        NearestScore(small).denoise(noisy(small, 1.0), 1.0, "cow")
