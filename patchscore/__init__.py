"""patchscore: the score of a diffusion model, computed from training patches instead of by a network."""

from . import processes
from . import theories as theories
from .adapters.network import NetworkDenoiser
from .aggregate import PatchAverage
from .bank import PatchBank
from .calibrate import Calibration, calibrate
from .classification import Classification, classify
from .conditioned import Conditioned
from .denoiser import Denoiser, Estimate
from .distributed import RankError, Sharded, shard
from .draw import notebook
from .evaluate import Comparison, baselines, compare
from .explain import Explanation, explain, explain_samples
from .fidelity import Fidelity, evaluate_samples, inception_features
from .gaussian import GaussianScore
from .gradients import Differentiable
from .guidance import Guided, Switch
from .heldout import HeldOutErrors, held_out_errors
from .index import PatchIndex
from .likelihood import LogLikelihood, log_likelihood
from .machines import EquivariantLocalScore, IdealScore, LocalScore
from .mixed import MixedBank
from .noise import Schedule, get_schedule
from .pooled import Pooled, Symmetric
from .posterior import PosteriorSum, merge
from .receptive import ReceptiveFields, receptive_fields, sensitivity
from .replicates import Replicated, replicated
from .sampling import Step, sample
from .scales import ScaleTable
from .synthesis import Synthesis, SynthesisLevel, synthesize
from .version import __version__

notebook.attach()
processes.after_forks()

__all__ = [
    "Calibration",
    "Classification",
    "Comparison",
    "Conditioned",
    "Denoiser",
    "Differentiable",
    "EquivariantLocalScore",
    "Estimate",
    "Explanation",
    "Fidelity",
    "GaussianScore",
    "Guided",
    "HeldOutErrors",
    "IdealScore",
    "LocalScore",
    "LogLikelihood",
    "MixedBank",
    "NetworkDenoiser",
    "PatchAverage",
    "PatchBank",
    "PatchIndex",
    "Pooled",
    "PosteriorSum",
    "RankError",
    "ReceptiveFields",
    "Replicated",
    "ScaleTable",
    "Schedule",
    "Sharded",
    "Step",
    "Switch",
    "Symmetric",
    "Synthesis",
    "SynthesisLevel",
    "__version__",
    "baselines",
    "calibrate",
    "classify",
    "compare",
    "evaluate_samples",
    "explain",
    "explain_samples",
    "get_schedule",
    "held_out_errors",
    "inception_features",
    "log_likelihood",
    "merge",
    "receptive_fields",
    "replicated",
    "sample",
    "sensitivity",
    "shard",
    "synthesize",
]
