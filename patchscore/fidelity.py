"""How a set of samples relates to the training images: fidelity, variety, statistics of patches, and memorisation.

Precision and recall are those of Kynkaanniemi et al. 2019, density and coverage those of Naeem et al. 2020; all four
count points of one set within balls about points of the other, whose radius is the distance to the k-th nearest point
of their own. Distances are between images as vectors of pixels, or between features. Sets are read block by block, and
of distances one block is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .bank import PatchBank
from .checks import RANGE_TOLERANCE
from .files import write_record
from .pixels import to_bytes, to_values

FORMAT = "patchscore-evaluation"
VERSION = 1

PRECISION_K = 3
"""Neighbours that set the radii of precision and recall, as Kynkaanniemi et al. 2019 chose."""
DENSITY_K = 5
"""Those of density and coverage, as Naeem et al. 2020 chose."""
MEMORISED_RATIO = 1 / 3
"""A sample is memorised below this ratio of its distances to the nearest and the second nearest training image, as in
Yoon et al. 2023 (Diffusion probabilistic models generalize when they fail to memorize) and Gu et al. 2023."""
PATCH_SIZES = (3, 7)
PATCHES = 2**14
"""Patches drawn of each set: projections of two independent draws of so many differ by some 1/sqrt(PATCHES)."""
DIRECTIONS = 128
MEMORY_LIMIT = 512 * 2**20

TIE = 1e-11
"""Squared distances this near, in units of the largest squared norms, are equal: ten thousand roundings of float64."""

Features = Callable[[Tensor], Any]
"""Images [B, C, H, W] in [-1, 1] to an array or tensor [B, ...]."""


@dataclass(frozen=True)
class Fidelity:
    """The result of `evaluate_samples`.

    Attributes:
        samples, reference: the numbers of images.
        precision: fraction of samples within a ball about a training image (of radius to its k-th nearest other).
        recall: fraction of training images within such a ball about a sample.
        density: balls about training images that hold a sample, on average, over k; 1 for samples of the same
            distribution, and not bounded by 1.
        coverage: fraction of training images whose ball holds a sample.
        nearest: [n] the nearest training image of each sample.
        distance: [n] how far it is: root mean squared difference of pixels, or Euclidean distance of features.
        memorised: fraction of samples three times as near to their nearest training image as to any other.
        nearer_than_usual: fraction of samples nearer to a training image than half of the training images are to their
            nearest other; about 0.5 for images that are new and of the same distribution. NaN for one training image.
        patch_wasserstein: by patch size, the sliced Wasserstein distance of order two between patches.
        patch_wasserstein_reference: the same between two halves of the training images: the noise floor.
        frechet: Frechet distance of the features' means and covariances (FID, with Inception's); None for pixels.
        settings: the arguments.
    """

    samples: int
    reference: int
    precision: float
    recall: float
    density: float
    coverage: float
    nearest: Tensor
    distance: Tensor
    memorised: float
    nearer_than_usual: float
    patch_wasserstein: dict[int, float]
    patch_wasserstein_reference: dict[int, float]
    frechet: float | None
    settings: dict[str, Any]

    def __repr__(self) -> str:
        """The figures in a line."""
        of = ", ".join(f"{name} {value:.3f}" for name, value in self.figures().items() if value is not None)
        return f"Fidelity({self.samples} samples, {self.reference} training images: {of})"

    def figures(self) -> dict[str, float | None]:
        """Every figure by name; those of patches as patch_wasserstein_3 and so on."""
        figures: dict[str, float | None] = {
            name: getattr(self, name)
            for name in ("precision", "recall", "density", "coverage", "memorised", "nearer_than_usual")
        }
        figures |= {f"patch_wasserstein_{k}": value for k, value in self.patch_wasserstein.items()}
        return figures | ({} if self.frechet is None else {"frechet": self.frechet})

    def save(self, path: str | os.PathLike[str], **more: Any) -> None:
        """Writes figures, settings and the nearest training image of every sample as JSON, and what else is given."""
        content = {
            "settings": self.settings,
            "samples": self.samples,
            "reference": self.reference,
            "figures": {name: _finite(value) for name, value in self.figures().items()},
            "patch_wasserstein_reference": {
                str(k): _finite(value) for k, value in self.patch_wasserstein_reference.items()
            },
            **more,
            "nearest": self.nearest.tolist(),
            "distance": [round(value, 6) for value in self.distance.tolist()],
        }
        write_record(Path(path), FORMAT, VERSION, json.loads(json.dumps(content)))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@torch.no_grad()
def evaluate_samples(
    samples: Any,
    reference: PatchBank,
    features: Features | tuple[Any, Any] | None = None,
    *,
    precision_k: int = PRECISION_K,
    density_k: int = DENSITY_K,
    patch_sizes: tuple[int, ...] = PATCH_SIZES,
    patches: int = PATCHES,
    directions: int = DIRECTIONS,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Fidelity:
    """Precision, recall, density, coverage, sliced patch Wasserstein distances and memorisation of samples.

    Args:
        samples: a PatchBank, or an array or tensor [n, C, H, W] in [-1, 1]; one in a mapped file (np.memmap) is read
            block by block, so `np.load("out/samples.npy", mmap_mode="r")` need not fit in memory.
        reference: the training images.
        features: None for distances between pixels; a function from images to features, called with a batch at a time;
            or two arrays [n, d] and [N, d], the features of the samples and of the training images.
        precision_k: which neighbour sets the radii of precision and recall; at most as many as a set has other points.
        density_k: likewise of density and coverage.
        patch_sizes: sides of the patches that are compared, as far as they fit; none for no comparison.
        patches: how many are drawn of each set, each set's images having equal shares.
        directions: onto how many they are projected, drawn uniformly.
        seed: of the positions of patches and of the directions.
        memory_limit: bytes for blocks of distances.
        device: where distances are computed, in float64.

    Returns:
        The figures, which `Fidelity` explains.

    Raises:
        ValueError: images of another shape than the training images', an empty set, values outside [-1, 1] or not
            finite, features of other sizes, arguments out of range.
        TypeError: neither images nor features.
    """
    if not isinstance(reference, PatchBank):
        raise TypeError(f"reference: got {type(reference).__name__}, takes a PatchBank")
    precision_k = checks.integer("precision_k", precision_k, at_least=1)
    density_k = checks.integer("density_k", density_k, at_least=1)
    patches = checks.integer("patches", patches, at_least=1)
    directions = checks.integer("directions", directions, at_least=1)
    memory_limit = checks.integer("memory_limit", memory_limit, at_least=1)
    sizes = tuple(checks.integer("patch_sizes", k, at_least=1) for k in patch_sizes)
    where = checks.device(device)
    made, trained = _Images("samples", samples), _Images("reference", reference)
    if made.shape != trained.shape:
        got, takes = (" x ".join(map(str, shape)) for shape in (made.shape, trained.shape))
        raise ValueError(f"samples: got {got} images, the training images are {takes}")
    x, y = _points(made, trained, features)
    unit = math.sqrt(math.prod(made.shape)) if features is None else 1.0
    counted = _Balls(x, y, precision_k, density_k, memory_limit, where, progress)
    sliced, scale = {}, {}
    for k in sizes:
        if k <= min(made.shape[1:]):
            drawn = [
                _projections(images, numbers, k, patches, directions, seed + i)
                for i, (images, numbers) in enumerate(
                    [
                        (made, range(len(made))),
                        (trained, range(len(trained))),
                        (trained, range(0, len(trained), 2)),
                        (trained, range(1, len(trained), 2)),
                    ]
                )
                if numbers
            ]
            sliced[k] = sliced_wasserstein(drawn[0], drawn[1])
            scale[k] = sliced_wasserstein(drawn[2], drawn[3]) if len(trained) > 1 else math.nan
    return Fidelity(
        samples=len(made),
        reference=len(trained),
        precision=counted.precision,
        recall=counted.recall,
        density=counted.density,
        coverage=counted.coverage,
        nearest=counted.nearest,
        distance=counted.distance / unit,
        memorised=counted.memorised,
        nearer_than_usual=counted.nearer_than_usual,
        patch_wasserstein=sliced,
        patch_wasserstein_reference=scale,
        frechet=None if features is None else frechet_distance(*_moments(x), *_moments(y)),
        settings={
            "features": "pixels" if features is None else getattr(features, "__name__", "given"),
            "precision_k": precision_k,
            "density_k": density_k,
            "patches": patches,
            "directions": directions,
            "seed": seed,
        },
    )


# Sets of images and of points, read block by block.


class _Images:
    """Images [n, C, H, W] of a bank, an array or a mapped file."""

    def __init__(self, name: str, images: Any):
        self.name = name
        if isinstance(images, PatchBank):
            self.images: Any = images
            self.shape, self.count = images.shape, len(images)
        elif isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
            self.images = images
            self.shape, self.count = tuple(images.shape[1:]), len(images)
        else:
            got = list(images.shape) if isinstance(images, (np.ndarray, Tensor)) else type(images).__name__
            raise TypeError(f"{name}: got {got}, takes a PatchBank or an array [n, C, H, W]")
        if not self.count:
            raise ValueError(f"{name}: got none, takes one or more images")

    def __len__(self) -> int:
        return self.count

    def block(self, start: int, stop: int) -> Tensor:
        """[m, C, H, W] float32."""
        if isinstance(self.images, PatchBank):
            return self.images.chunk(start, stop, torch.float32)
        part = self.images[start:stop]
        values = to_values(part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))).cpu()
        low, high = values.min().item(), values.max().item()
        if not (low >= -1 - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # NaN is neither
            raise ValueError(f"{self.name}: values from {low:.4g} to {high:.4g}, takes [-1, 1]")
        return values


class _Vectors:
    """Points [n, d]: features from an array, mapped or not, or images as vectors of their pixels."""

    def __init__(self, rows: Any, count: int, width: int):
        self.rows, self.count, self.width = rows, count, width

    def __len__(self) -> int:
        return self.count

    def block(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """[m, d] float64."""
        if isinstance(self.rows, _Images):
            return self.rows.block(start, stop).flatten(1).to(device, torch.float64)
        part = self.rows[start:stop]
        return (part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))).to(device, torch.float64)


def _points(made: _Images, trained: _Images, features: Any) -> tuple[_Vectors, _Vectors]:
    if features is None:
        width = math.prod(made.shape)
        return _Vectors(made, len(made), width), _Vectors(trained, len(trained), width)
    if callable(features):
        return _computed(made, features), _computed(trained, features)
    if not (isinstance(features, (tuple, list)) and len(features) == 2):
        raise TypeError(f"features: got {type(features).__name__}, takes a function or two arrays")
    found = []
    for images, array in zip((made, trained), features, strict=True):
        if not isinstance(array, (np.ndarray, Tensor)) or array.ndim != 2 or len(array) != len(images):
            got = list(array.shape) if isinstance(array, (np.ndarray, Tensor)) else type(array).__name__
            raise ValueError(f"features: got {got} for {images.name}, takes an array [{len(images)}, d]")
        found.append(_Vectors(array, len(array), array.shape[1]))
    if found[0].width != found[1].width:
        raise ValueError(f"features: got widths {found[0].width} and {found[1].width}, takes equal ones")
    return found[0], found[1]


def _computed(images: _Images, features: Features) -> _Vectors:
    """The features of every image, in a file that is gone once they are."""
    rows: np.memmap | None = None
    for start, stop in _blocks(len(images), 64):
        part = features(images.block(start, stop))
        found = np.asarray(part.detach().cpu() if isinstance(part, Tensor) else part, dtype=np.float32)
        if found.ndim < 2 or len(found) != stop - start:
            raise ValueError(f"features: {stop - start} images gave {list(found.shape)}, takes [{stop - start}, d]")
        found = found.reshape(len(found), -1)
        if rows is None:
            with tempfile.TemporaryFile() as file:
                rows = np.memmap(file, np.float32, "w+", shape=(len(images), found.shape[1]))
        if found.shape[1] != rows.shape[1]:
            raise ValueError(f"features: widths {rows.shape[1]} and {found.shape[1]}, takes one width")
        rows[start:stop] = found
    assert rows is not None
    return _Vectors(rows, len(rows), rows.shape[1])


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, count)) for start in range(0, count, size))


# Distances.


class _Balls:
    """What is counted of samples x [n, d] and training images y [N, d], in three passes over blocks of distances."""

    def __init__(
        self,
        x: _Vectors,
        y: _Vectors,
        precision_k: int,
        density_k: int,
        memory_limit: int,
        device: torch.device,
        progress: bool,
    ):
        # A block of distances with what is derived from it, and two blocks of points.
        self.size = max(1, min(math.isqrt(memory_limit // 96), memory_limit // (48 * x.width)))
        self.device = device
        n, count = -(-len(x) // self.size), -(-len(y) // self.size)
        total = n * (n + 1) // 2 + count * (count + 1) // 2 + n * count
        with tqdm(total=total, unit="block", desc="comparing", delay=2, disable=not progress) as self.bar:
            norms = [self._norms(of) for of in (x, y)]
            self.tie = TIE * 2 * max(float(norm.max()) for norm in norms)
            of_x = self._nearest_others(x, norms[0], precision_k)
            of_y = self._nearest_others(y, norms[1], max(precision_k, density_k, 1))
            self._count(x, y, norms, of_x, of_y, precision_k, density_k)

    def _norms(self, of: _Vectors) -> Tensor:
        norms = torch.cat([of.block(a, b).square().sum(1) for a, b in _blocks(len(of), self.size)])
        if not norms.isfinite().all():
            raise ValueError("features: got NaN or infinite values, takes finite ones")
        return norms.to(self.device)

    @staticmethod
    def _squared(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
        return torch.addmm(of_a[:, None] + of_b, a, b.T, alpha=-2)

    def _nearest_others(self, of: _Vectors, norms: Tensor, k: int) -> Tensor:
        """[n, k] squared distances from each point to the nearest others of its set, ascending; inf for want of any."""
        best = torch.full((len(of), k), torch.inf, dtype=torch.float64, device=self.device)

        def keep(rows: slice, distances: Tensor) -> None:
            few = distances.topk(min(k, distances.shape[1]), 1, largest=False).values
            best[rows] = torch.cat([best[rows], few], 1).topk(k, 1, largest=False).values

        for a, b in _blocks(len(of), self.size):
            points = of.block(a, b, self.device)
            for c, d in _blocks(b, self.size):
                others = points if c == a else of.block(c, d, self.device)
                distances = self._squared(points, others, norms[a:b], norms[c:d])
                if c == a:
                    distances.fill_diagonal_(torch.inf)
                else:
                    keep(slice(c, d), distances.T)
                keep(slice(a, b), distances)
                self.bar.update()
        return best

    def _count(
        self,
        x: _Vectors,
        y: _Vectors,
        norms: list[Tensor],
        of_x: Tensor,
        of_y: Tensor,
        precision_k: int,
        density_k: int,
    ) -> None:
        n, count, tie = len(x), len(y), self.tie
        # With fewer others than k, the farthest there is.
        radius_x, radius_y = _kth(of_x, precision_k, n), _kth(of_y, precision_k, count)
        radius_ball = _kth(of_y, density_k, count)
        precise = torch.zeros(n, dtype=torch.bool, device=self.device)
        recalled = torch.zeros(count, dtype=torch.bool, device=self.device)
        covered = torch.zeros(count, dtype=torch.bool, device=self.device)
        nearest = torch.full((n, 2), torch.inf, dtype=torch.float64, device=self.device)
        which = torch.zeros((n, 2), dtype=torch.int64, device=self.device)
        inside = 0
        for a, b in _blocks(n, self.size):
            points = x.block(a, b, self.device)
            for c, d in _blocks(count, self.size):
                distances = self._squared(points, y.block(c, d, self.device), norms[0][a:b], norms[1][c:d])
                # Closed balls in Kynkaanniemi et al. (equation 1); open ones in Naeem et al., whose centre is inside.
                precise[a:b] |= (distances <= radius_y[c:d] + tie).any(1)
                recalled[c:d] |= (distances <= radius_x[a:b, None] + tie).any(0)
                within = (distances < radius_ball[c:d] - tie) | (distances <= tie)
                covered[c:d] |= within.any(0)
                inside += int(within.sum())
                values, places = distances.topk(min(2, d - c), 1, largest=False)
                nearest[a:b], order = torch.cat([nearest[a:b], values], 1).topk(2, 1, largest=False)
                which[a:b] = torch.cat([which[a:b], places + c], 1).gather(1, order)
                self.bar.update()
        first, second = nearest.clamp(min=0).unbind(1)
        first = torch.where(first <= tie, 0.0, first)
        self.precision, self.recall = precise.double().mean().item(), recalled.double().mean().item()
        self.coverage = covered.double().mean().item()
        self.density = inside / (min(density_k, max(1, count - 1)) * n)
        self.nearest, self.distance = which[:, 0].cpu(), first.sqrt().cpu()
        self.memorised = (first <= second * MEMORISED_RATIO**2).double().mean().item() if count > 1 else math.nan
        usual = of_y[:, 0].median()
        self.nearer_than_usual = (first < usual - tie).double().mean().item() if count > 1 else math.nan


def _kth(distances: Tensor, k: int, count: int) -> Tensor:
    """[n] squared distance to the k-th nearest other, or to the farthest where there are fewer; 0 without others."""
    others = min(k, count - 1)
    return distances[:, others - 1].clamp(min=0) if others else torch.zeros_like(distances[:, 0])


# Patches.


def _projections(images: _Images, numbers: range, k: int, patches: int, directions: int, seed: int) -> Tensor:
    """[directions, patches] float32, each row ascending: patches k x k at random positions, projected.

    Each of the images with those numbers has an equal share. Directions are uniform on the sphere and the same for all
    sets; `seed` is of positions.
    """
    channels, height, width = images.shape
    generator = torch.Generator().manual_seed(0)
    onto = torch.randn(channels * k * k, directions, generator=generator)
    onto /= onto.norm(dim=0)
    generator = torch.Generator().manual_seed(seed % 2**63)
    rows = torch.randint(height - k + 1, (patches,), generator=generator)
    cols = torch.randint(width - k + 1, (patches,), generator=generator)
    of = torch.arange(patches) * len(numbers) // patches * numbers.step + numbers.start
    projected = np.empty((directions, patches), np.float32)
    for start, stop in _blocks(images.count, max(1, 2**24 // math.prod(images.shape))):
        here = ((of >= start) & (of < stop)).nonzero().flatten()
        if len(here):
            windows = images.block(start, stop).unfold(2, k, 1).unfold(3, k, 1)
            found = windows[of[here] - start, :, rows[here], cols[here]]
            projected[:, here] = (found.flatten(1) @ onto).T.numpy()
    projected.sort(1)  # NumPy's is ten times as fast as torch's
    return torch.from_numpy(projected)


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein distance of order two between samples of equal number, [L, m] projections in ascending order.

    The square root of the mean, over L directions, of the squared distance W_2^2 in one dimension, which pairs the two
    samples in order (Bonneel et al. 2015).
    """
    return (a.double() - b.double()).square().mean().sqrt().item()


# Features.


def _moments(points: _Vectors) -> tuple[Tensor, Tensor]:
    """The mean [d] and the covariance [d, d], with n - 1 in its denominator, as float64."""
    blocks = list(_blocks(len(points), max(1, 2**24 // points.width)))
    mean = torch.stack([points.block(a, b).sum(0) for a, b in blocks]).sum(0) / len(points)
    scatter = torch.zeros(points.width, points.width, dtype=torch.float64)
    for a, b in blocks:
        apart = points.block(a, b) - mean
        scatter += apart.T @ apart
    return mean, scatter / max(1, len(points) - 1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Frechet distance between Gaussians, as FID has it: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    Args:
        mean_a, mean_b: [d] float64.
        cov_a, cov_b: [d, d] float64, symmetric and positive semidefinite.

    From Dowson & Landau 1982 and Heusel et al. 2017. The trace of the root is that of (R S_b R)^(1/2), R = S_a^(1/2).
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    between = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * between)


INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def inception_features(weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu") -> Features:
    """The 2,048 features of the Inception network that FID is defined by, through torch-fidelity.

    As `features` of `evaluate_samples` they make `Fidelity.frechet` the FID of torch-fidelity, which agrees with the
    original TensorFlow code: images are rounded to 8 bits, gray ones become RGB.

    Args:
        weights: the file of weights; None looks where torch-fidelity keeps what it downloads. Nothing is downloaded.
        device: where the network runs.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: there is no such file of weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(f"FID needs torch-fidelity ({error}): pip install torch-fidelity") from None
    path = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path}: no such file; FID needs Inception's weights, {INCEPTION_WEIGHTS} of torch-fidelity")
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    network = network.to(checks.device(device)).eval()

    def inception(images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
        return network(to_bytes(colour).to(device))[0].cpu()

    return inception
