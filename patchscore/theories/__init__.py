"""Rival analytic denoisers, each a `Denoiser` over a bank, written from its paper; docs/theories.md defines them all.

They are exact where the papers' code approximates, do not depend on what else is in a batch, and take a noise level and
a class for each item.
"""

from ..gaussian import GaussianScore
from .composition import PatchComposition, masks_of_heat, pspc_sizes
from .filtered import FilteredMeans, soft_squares
from .golden import GoldenSubset
from .nearest import NearestScore
from .pca import PcaLocality
from .smoothed import SmoothedScore
from .wrapped import WrappedScore

__all__ = [
    "FilteredMeans",
    "GaussianScore",
    "GoldenSubset",
    "NearestScore",
    "PatchComposition",
    "PcaLocality",
    "SmoothedScore",
    "WrappedScore",
    "masks_of_heat",
    "pspc_sizes",
    "soft_squares",
]
