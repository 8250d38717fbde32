"""A trained network as a denoiser, for any kind of prediction: the reverse of the other adapters.

The denoiser takes z = x_0 + sigma eps. The network gets the image scaled as in its training and the noise level in its
own units, and its prediction is solved for x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..denoiser import Denoiser, Estimate, Labels, check_noisy, check_sigma, labels_per_item
from ..networks import Network

PREDICTIONS = ("epsilon", "v", "x0", "score", "flow")
SCALINGS = ("preserving", "exploding", "flow")


class NetworkDenoiser(Denoiser):
    """A network as a denoiser. With sigma = sigma_t / alpha_t and x = alpha_t x_0 + sigma_t eps,

        epsilon: D = (x - sigma_t eps) / alpha_t        v: D = alpha_t x - sigma_t v
        score:   D = (x + sigma_t^2 score) / alpha_t    x0: D = x0
        flow:    D = x - t u, with u = eps - x_0 the velocity of x_t = (1 - t) x_0 + t eps

    (Ho et al. 2020; Salimans & Ho 2022, appendix D; Vincent 2011; Lipman et al. 2022, and Liu et al. 2022).

    Args:
        network: called as `network(x, level)`, or `network(x, level, labels)` where there are labels: x [B, C, H, W]
            float32, level [B], labels [B] int64 with -1 for "any class". Returns [B, C, H, W], or an object that has
            it as `.sample`.
        shape: (C, H, W) of the images.
        prediction: "epsilon", "v", "x0", "score" or "flow".
        scaling: of x: "preserving", alpha_t^2 + sigma_t^2 = 1 (such as DDPM), "exploding", alpha_t = 1, or "flow",
            alpha_t = 1 - t and sigma_t = t, so that sigma = t / (1 - t).
        level: maps sigma to the network's own noise argument, such as a timestep; None passes sigma, or t where the
            scaling is "flow".
        classes: the labels of the network; None leaves the check to the network.

    `estimate` has stderr 0, ess NaN (it has no meaning for a network) and pairs 0.

    Raises:
        TypeError: a network or a level that cannot be called.
        ValueError: an unknown prediction or scaling, v where x is not variance-preserving, or flow where x is not of
            scaling "flow".
    """

    def __init__(
        self,
        network: Callable[..., Any],
        shape: tuple[int, int, int],
        prediction: str = "epsilon",
        scaling: str = "preserving",
        level: Callable[[float], float] | None = None,
        classes: tuple[int, ...] | None = None,
    ):
        if not callable(network):
            raise TypeError(f"network: got {type(network).__name__}, takes a callable network(x, level, labels)")
        if level is not None and not callable(level):
            raise TypeError(f"level: got {level!r}, takes a function from sigma to the network's noise argument")
        self.network = network
        self.shape = tuple(shape)  # type: ignore[assignment]
        self.prediction = checks.one_of("prediction", prediction, PREDICTIONS)
        self.scaling = checks.one_of("scaling", scaling, SCALINGS)
        if prediction == "v" and scaling != "preserving":
            raise ValueError(f'prediction: got "v" with scaling="{scaling}"; v is defined where alpha^2 + sigma^2 = 1')
        if prediction == "flow" and scaling != "flow":
            raise ValueError(f'prediction: got "flow" with scaling="{scaling}"; it is defined where alpha + sigma = 1')
        self.level = level if level is not None or scaling != "flow" else lambda sigma: sigma / (1 + sigma)
        self.classes = classes

    @torch.no_grad()
    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        if moments:
            raise ValueError("moments: a network predicts the mean alone")
        z = check_noisy(z, self.shape, who=type(self).__name__)
        sigmas = check_sigma(sigma, len(z))
        listed = self._labels(labels, len(z))
        level = sigmas if self.level is None else torch.tensor([self.level(s) for s in sigmas.tolist()])

        ratio = sigmas.to(z)[:, None, None, None]
        if self.scaling == "preserving":
            alpha = (1 + ratio**2).rsqrt()
        else:
            alpha = torch.ones_like(ratio) if self.scaling == "exploding" else 1 / (1 + ratio)
        sigma_t, x = ratio * alpha, alpha * z
        arguments = [x.float(), level.to(z.device, torch.float32)]
        if listed is not None:
            arguments.append(listed.to(z.device))
        predicted = self.network(*arguments)
        predicted = getattr(predicted, "sample", predicted)
        if not isinstance(predicted, Tensor) or predicted.shape != z.shape:
            got = list(predicted.shape) if isinstance(predicted, Tensor) else type(predicted).__name__
            raise ValueError(f"network: returned {got} for images {list(z.shape)}")
        predicted = predicted.to(z)

        if self.prediction == "epsilon":
            x0 = (x - sigma_t * predicted) / alpha
        elif self.prediction == "v":
            x0 = alpha * x - sigma_t * predicted
        elif self.prediction == "flow":
            x0 = x - sigma_t * predicted
        elif self.prediction == "score":
            x0 = (x + sigma_t**2 * predicted) / alpha
        else:
            x0 = predicted
        ess = z.new_full((len(z), *z.shape[2:]), math.nan)
        return Estimate(x0, torch.zeros_like(x0), ess, 0, "network")

    def _labels(self, labels: Labels, batch: int) -> Tensor | None:
        listed = labels_per_item(labels, batch)
        if all(label is None for label in listed):
            return None
        for label in listed:
            if isinstance(label, str) or (label is not None and label not in (self.classes or (label,))):
                known = f"this network knows {list(self.classes)}" if self.classes else "a network takes numbers"
                raise ValueError(f"labels: unknown label {label!r}; {known}")
        return torch.tensor([-1 if label is None else int(label) for label in listed])

    def __repr__(self) -> str:
        return f"NetworkDenoiser({type(self.network).__name__}, {self.prediction})"


def from_network(network: Network, shape: tuple[int, int, int]) -> NetworkDenoiser:
    """One of this package's networks as a denoiser of images of `shape`."""
    channels, classes = network.config["channels"], network.config["classes"]
    if shape[0] != channels:
        raise ValueError(f"network: made for {channels} channels, the images have {shape[0]}")
    positions = {-1: -1, **{label: position for position, label in enumerate(classes)}}

    def position(label: int) -> int:
        if label not in positions:
            knows = f"knows {list(classes)}" if classes else "was trained without labels"
            raise ValueError(f"labels: unknown label {label}; this network {knows}")
        return positions[label]

    def predict(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        known = None if labels is None else torch.tensor([position(label) for label in labels.tolist()])
        return network.to(x.device)(x, sigma, known)

    return NetworkDenoiser(predict, shape, classes=tuple(classes))


def from_edm(network: Any, shape: tuple[int, int, int] | None = None) -> NetworkDenoiser:
    """A network as in EDM's code (Karras et al. 2022): D = network(z, sigma, class_labels), preconditioned inside.

    `class_labels` are one row an image, one-hot over `network.label_dim` classes, a row of zeros for any class; without
    classes None is passed.

    Args:
        network: the preconditioned network, such as EDMPrecond.
        shape: (C, H, W) of the images; None takes `img_channels` and `img_resolution` of the network.

    Raises:
        ValueError: no shape, where the network has no `img_channels` and `img_resolution`.
    """
    if shape is None:
        if not hasattr(network, "img_resolution") or not hasattr(network, "img_channels"):
            raise ValueError("shape: the network has no img_channels and img_resolution, give (C, H, W)")
        shape = (network.img_channels, network.img_resolution, network.img_resolution)
    count = int(getattr(network, "label_dim", 0) or 0)

    def predict(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Any:
        if labels is not None and not count:
            raise ValueError("labels: this network was trained without labels")
        one_hot = None
        if count:
            one_hot = x.new_zeros(len(x), count)
            for row, label in enumerate([] if labels is None else labels.tolist()):
                if label >= 0:
                    one_hot[row, label] = 1
        return network(x, sigma, one_hot)

    return NetworkDenoiser(predict, shape, "x0", "exploding", classes=tuple(range(count)) or None)


def from_diffusers(unet: Any, scheduler: Any, shape: tuple[int, int, int] | None = None) -> NetworkDenoiser:
    """A diffusers model such as UNet2DModel as a denoiser; the scheduler is the one it was trained with.

    A noise level is mapped to the timestep with that sigma_t / alpha_t, interpolated in log sigma between whole
    timesteps and clamped to the first and the last. With a scheduler of flow matching (FlowMatch...) the model predicts
    the velocity, and its timestep is t times the number of timesteps.

    Raises:
        ValueError: a scheduler without `alphas_cumprod` that is not of flow matching, or of another prediction type; no
            shape, where the model's configuration has no sample_size.
    """
    kind = type(scheduler).__name__
    alphas_cumprod: Any = getattr(scheduler, "alphas_cumprod", None)
    flow = kind.startswith("FlowMatch")
    if (alphas_cumprod is None and not flow) or not hasattr(scheduler, "config"):
        raise ValueError(f"scheduler: got {kind}, takes one of flow matching or one that has alphas_cumprod")
    names = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    predicts = scheduler.config.get("prediction_type", "epsilon")
    if not flow:
        checks.one_of("scheduler.config.prediction_type", predicts, names)
    if shape is None:
        size = unet.config.sample_size
        if size is None:
            raise ValueError("shape: the model's configuration has no sample_size, give (C, H, W)")
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (unet.config.in_channels, height, width)
    parameter = next(unet.parameters())
    classes = tuple(range(unet.config.get("num_class_embeds") or 0))

    def predict(x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Any:
        if classes and (labels is None or (labels < 0).any()):
            raise ValueError("labels: this network takes a class for every image")
        options = {} if labels is None else {"class_labels": labels.to(parameter.device)}
        predicted = unet(x.to(parameter), timestep.to(parameter.device), **options)
        return predicted.sample.to(x)

    if flow:
        count = scheduler.config.num_train_timesteps
        return NetworkDenoiser(
            predict, shape, "flow", "flow", lambda sigma: count * sigma / (1 + sigma), classes or None
        )
    cumprod = alphas_cumprod.detach().cpu().double().clamp(2.0**-40, 1 - 2.0**-40).numpy()
    log_sigmas = 0.5 * np.log((1 - cumprod) / cumprod)

    def level(sigma: float) -> float:
        return float(np.interp(math.log(sigma), log_sigmas, np.arange(len(log_sigmas))))

    return NetworkDenoiser(predict, shape, names[predicts], level=level, classes=classes or None)
