"""Networks from files: a folder or hub id of diffusers, and TorchScript.

Both become a `NetworkDenoiser`. Weights are read from safetensors alone; no pickle is loaded. A TorchScript file is a
program: open only files from sources that you trust.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..noise import linear
from .network import NetworkDenoiser, from_diffusers

TIMESTEPS = 1000
HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's answer."""


def _ddpm_timestep() -> Callable[[float], float]:
    """sigma -> timestep of DDPM's linear schedule, 0 to 999, interpolated in log sigma."""
    log_sigmas = linear(TIMESTEPS).ratios[:-1].flip(0).log().numpy()
    return lambda sigma: float(np.interp(math.log(sigma), log_sigmas, np.arange(TIMESTEPS)))


LEVELS: dict[str, Callable[[], Callable[[float], float]]] = {
    "sigma": lambda: lambda sigma: sigma,
    "edm": lambda: lambda sigma: math.log(sigma) / 4,
    "flow": lambda: lambda sigma: sigma / (1 + sigma),
    "ddpm": _ddpm_timestep,
}
"""How networks are told the noise level: sigma itself; c_noise of EDM, ln(sigma) / 4; t of flow matching; the timestep
of DDPM's 1,000 linear betas."""


def load_torchscript(
    path: str | os.PathLike[str],
    shape: tuple[int, int, int],
    prediction: str = "epsilon",
    scaling: str | None = None,
    level: str = "sigma",
    classes: tuple[int, ...] | None = None,
) -> NetworkDenoiser:
    """A network that torch.jit.save wrote, called as `network(x, level)` or `network(x, level, labels)`.

    Args:
        path: the file.
        shape: (C, H, W) of the images.
        prediction: as of `NetworkDenoiser`.
        scaling: likewise; None is "flow" where it predicts "flow", else "preserving".
        level: the form in which the network takes the noise level: "sigma", "edm", "flow" or "ddpm" (`LEVELS`).
        classes: the labels that it knows.

    Raises:
        ValueError: no TorchScript file (the message names it), or an argument out of its range.
        OSError: the file cannot be read.
    """
    checks.one_of("level", level, LEVELS)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: not a TorchScript file: {' '.join(str(error).split())[:200]}") from None

    def call(x: Tensor, at: Tensor, *labels: Tensor) -> Any:
        return network.to(x.device)(x, at, *labels)

    scaling = scaling or ("flow" if prediction == "flow" else "preserving")
    return NetworkDenoiser(call, shape, prediction, scaling, LEVELS[level](), classes)


def load_diffusers(source: str | os.PathLike[str]) -> NetworkDenoiser:
    """A UNet2DModel with its scheduler, from a folder that diffusers wrote or by its id on the hub.

    The folder is that of a pipeline (unet/ and scheduler/), or has both in one place. Noise levels and kinds of
    prediction are those of the scheduler, as `from_diffusers` reads them.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: no such model, another kind of model, or a scheduler that is not served; the message names it.
    """
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except ImportError as error:
        message = f'a network of diffusers needs diffusers ({error}): pip install "patchscore[diffusers]"'
        raise ImportError(message) from None
    problem = None if Path(source).exists() else _hub_problem(str(source))
    options = {"use_safetensors": True, "low_cpu_mem_usage": False}  # the latter needs accelerate
    model = _component(source, UNet2DModel, "unet", ("UNet2DModel",), problem, **options)
    scheduler = _component(source, DDPMScheduler, "scheduler", None, problem)
    try:
        return from_diffusers(model.eval(), scheduler)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _hub_problem(name: str) -> str | None:
    """Why the hub cannot be asked for a model; None where it has it.

    One question with a time limit: diffusers asks for every file, and repeats that five times where nobody answers.

    Raises:
        ValueError: the hub answers that it has no such model, or the name cannot be one.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        model_info(name, timeout=HUB_TIMEOUT)
    except (HFValidationError, RepositoryNotFoundError):
        raise ValueError(f"{name}: no such folder, and no model of that name on the hub") from None
    except Exception as error:  # of whichever client the hub's library uses
        return f"not in the hub's cache, and the hub cannot be reached ({' '.join(str(error).split())[:100]})"
    return None


def _component(
    source: Any, kind: Any, name: str, takes: tuple[str, ...] | None, hub_problem: str | None, **options: Any
) -> Any:
    """A model or scheduler of diffusers, from the subfolder `name` or from the folder itself.

    Its class is that of its own configuration, which any class of its `kind` can read.
    """
    import diffusers

    options["local_files_only"] = Path(source).exists() or hub_problem is not None
    problems = []
    for subfolder in (name, None):
        where = {} if subfolder is None else {"subfolder": subfolder}
        try:
            config = kind.load_config(source, **where, local_files_only=options["local_files_only"])
        except (OSError, ValueError) as error:
            problems.append(" ".join(str(error).split())[:200])
            continue
        found = config.get("_class_name", "")
        if takes is not None and found not in takes:
            raise ValueError(f"{source}: its {name} is a {found or 'model of no name'}, takes {' or '.join(takes)}")
        if not hasattr(diffusers, found):
            raise ValueError(f"{source}: its {name} is a {found!r}, which diffusers {diffusers.__version__} has not")
        try:
            return getattr(diffusers, found).from_pretrained(source, **where, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{source}: its {name} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    if hub_problem is not None:
        raise ValueError(f"{source}: no such folder, {hub_problem}")
    raise ValueError(f"{source}: no {name} of diffusers there: {problems[-1]}")
