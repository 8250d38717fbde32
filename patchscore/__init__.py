"""patchscore: the score of a diffusion model that has no network, from nothing but training patches."""

from .bank import PatchBank
from .classification import Classification, classify
from .gaussian import GaussianScore
from .guidance import Guided, Switch
from .index import PatchIndex
from .machines import Denoiser, EquivariantLocalScore, Estimate, IdealScore, LocalScore
from .noise import Schedule, get_schedule
from .posterior import PosteriorSum, merge
from .sampling import Step, sample
from .scales import ScaleTable
from .version import __version__

__all__ = [
    "Classification",
    "Denoiser",
    "EquivariantLocalScore",
    "Estimate",
    "GaussianScore",
    "Guided",
    "IdealScore",
    "LocalScore",
    "PatchBank",
    "PatchIndex",
    "PosteriorSum",
    "ScaleTable",
    "Schedule",
    "Step",
    "Switch",
    "__version__",
    "classify",
    "get_schedule",
    "merge",
    "sample",
]
