"""Differentiable: a denoiser whose results carry an autograd graph.

The graph's one node multiplies by the Jacobian of the denoiser, `vjp` backwards and `jvp` in forward mode; nothing of
the sums themselves is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser, Estimate, Labels


class Differentiable(Denoiser):
    """A denoiser with gradients: what `denoise`, `score` and `eps` return may be differentiated by the noisy images.

        x0 = ps.Differentiable(machine).denoise(z, sigma)
        (gradient,) = torch.autograd.grad(loss(x0), z)

    Forward mode (torch.autograd.forward_ad) works too. Adapters take it in the place of the denoiser. There are no
    derivatives by sigma, no second derivatives, and `estimate` carries no graph.

    Args:
        denoiser: one that has `vjp` and `jvp`: machines, GaussianScore, and Guided and Switch of such.

    Raises:
        TypeError: not a denoiser.
    """

    differentiable = True

    def __init__(self, denoiser: Denoiser):
        if not isinstance(denoiser, Denoiser):
            raise TypeError(f"denoiser: got {type(denoiser).__name__}, takes a machine or another Denoiser")
        self.denoiser = denoiser
        self.shape = denoiser.shape
        self.bank = getattr(denoiser, "bank", None)
        self.any_size = denoiser.any_size

    def check_size(self, size: tuple[int, int], sigmas: Sequence[float], name: str = "size") -> None:
        self.denoiser.check_size(size, sigmas, name)

    def denoise(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """D(z), [B, C, H, W], with a graph where z requires grad.

        Raises:
            ValueError: as of `Denoiser.denoise`; a sigma that requires grad.
        """
        if isinstance(sigma, Tensor) and sigma.requires_grad:
            raise ValueError("sigma: requires grad, and there is no derivative by the noise level")
        denoised: Tensor = _Denoise.apply(z, sigma, labels, self.denoiser)
        return denoised

    def with_parts(self, change: Callable[[Denoiser], Denoiser]) -> Differentiable:
        denoiser = change(self.denoiser)
        return self if denoiser is self.denoiser else Differentiable(denoiser)

    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        options = {"moments": True} if moments else {}
        return self.denoiser.estimate(z, sigma, labels, **options)

    def with_divergence(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> tuple[Tensor, Tensor]:
        return self.denoiser.with_divergence(z, sigma, labels)

    def vjp(self, z: Tensor, sigma: float | Tensor, u: Tensor, labels: Labels = None) -> Tensor:
        return self.denoiser.vjp(z, sigma, u, labels)

    def jvp(self, z: Tensor, sigma: float | Tensor, t: Tensor, labels: Labels = None) -> Tensor:
        return self.denoiser.jvp(z, sigma, t, labels)

    def __repr__(self) -> str:
        return f"Differentiable({self.denoiser!r})"


class _Denoise(torch.autograd.Function):
    """D(z), with J^T u backwards and J t forwards."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, sigma: float | Tensor, labels: Labels, denoiser: Denoiser) -> Tensor:
        ctx.save_for_backward(z)
        ctx.save_for_forward(z)
        ctx.rest = sigma, labels, denoiser
        return denoiser.denoise(z, sigma, labels)

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        return _Product.apply(u[0], z, *ctx.rest), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (z,) = ctx.saved_tensors
        sigma, labels, denoiser = ctx.rest
        product: Tensor = denoiser.jvp(z, sigma, tangents[0], labels)
        return product


class _Product(torch.autograd.Function):
    """J^T u, which refuses to be differentiated once more."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, z: Tensor, sigma: float | Tensor, labels: Labels, denoiser: Denoiser) -> Tensor:
        return denoiser.vjp(z, sigma, u, labels).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError("Differentiable: has no second derivatives; take create_graph=False")
