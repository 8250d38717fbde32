"""Small convolutional networks to compare with the theory, and their files.

A network here takes x = alpha x_0 + sigma_t eps with alpha^2 + sigma_t^2 = 1, the noise level sigma = sigma_t / alpha
and class numbers, and predicts eps. `ResNet` has only 3 x 3 convolutions, so it is local and, up to its padding,
equivariant, as the machines are; `UNet` has a larger receptive field, because it halves the image, and with attention
sees all of it. Files are safetensors whose metadata hold the architecture and the training settings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from . import checks
from .files import check_header, header, parse_json, write_atomically

FORMAT = "patchscore-network"
VERSION = 1
FREQUENCIES = 16


class Network(nn.Module):
    """Base of both networks: the embedding of noise level and class, and the output parametrisation.

    Args:
        channels: C of the images.
        classes: the labels of a conditional network, ascending; empty for an unconditional one.
        width: channels of the hidden layers.
        depth: residual blocks (of a UNet: at each size).
        padding_mode: "zeros" or "circular".
    """

    def __init__(
        self,
        channels: int,
        classes: tuple[int, ...] = (),
        width: int = 48,
        depth: int = 4,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        self.config: dict[str, Any] = {
            "architecture": type(self).__name__,
            "channels": checks.integer("channels", channels, at_least=1),
            "classes": [checks.integer("classes", label) for label in classes],
            "width": checks.integer("width", width, at_least=1),
            "depth": checks.integer("depth", depth, at_least=1),
            "padding_mode": checks.one_of("padding_mode", padding_mode, ("zeros", "circular")),
        }
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.class_embedding = nn.Embedding(len(classes) + 1, 2 * width)  # 0 is "any class"
        self.enter = self.conv(channels, width)
        self.leave = self.conv(width, channels)
        nn.init.zeros_(self.leave.weight)

    def conv(self, inputs: int, outputs: int) -> nn.Conv2d:
        mode = self.config["padding_mode"]
        kind = CircularConv if mode == "circular" else nn.Conv2d
        return kind(inputs, outputs, 3, padding=1, padding_mode=mode)

    def block(self) -> Block:
        width = self.config["width"]
        return Block(self.conv(width, width), self.conv(width, width), 2 * width)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicts the noise eps in x.

        Args:
            x: [B, C, H, W] = (x_0 + sigma eps) / sqrt(1 + sigma^2).
            sigma: [B] noise levels sigma_t / alpha_t.
            labels: [B] positions in `classes`, -1 for any class; None means any class for all.
        """
        # The angle between image and noise lies between 0 and pi / 2.
        angle = torch.atan(sigma.to(x))
        frequencies = torch.arange(1, FREQUENCIES + 1, device=x.device, dtype=x.dtype)
        waves = angle[:, None] * frequencies
        position = torch.zeros(len(x), dtype=torch.long, device=x.device) if labels is None else labels.to(x.device) + 1
        embedding = F.silu(self.level(torch.cat([waves.cos(), waves.sin()], 1)) + self.class_embedding(position))
        v = self.leave(F.silu(self.body(self.enter(x), embedding)))
        # eps = sigma_t x + alpha v (Salimans & Ho 2022, appendix D): at high noise eps is nearly x, and the network
        # only predicts the difference.
        sigma_t, alpha = (part[:, None, None, None] for part in (angle.sin(), angle.cos()))
        return sigma_t * x + alpha * v

    def body(self, h: Tensor, embedding: Tensor) -> Tensor:
        raise NotImplementedError


class Wrap(torch.autograd.Function):
    """F.pad(x, (1, 1, 1, 1), mode="circular"), but keeping channels_last: training takes half as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        channels_last = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None
        padded = torch.empty(
            (batch, channels, height + 2, width + 2),
            dtype=x.dtype,
            device=x.device,
            memory_format=channels_last or torch.contiguous_format,
        )
        padded[..., 1:-1, 1:-1] = x
        padded[..., 1:-1, 0], padded[..., 1:-1, -1] = x[..., -1], x[..., 0]
        padded[..., 0, :], padded[..., -1, :] = padded[..., -2, :], padded[..., 1, :]
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        g = gradient.clone()
        g[..., -2, :] += g[..., 0, :]
        g[..., 1, :] += g[..., -1, :]
        g[..., -2] += g[..., 0]
        g[..., 1] += g[..., -1]
        return g[..., 1:-1, 1:-1]


class CircularConv(nn.Conv2d):
    """A 3 x 3 convolution with circular padding."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as the convolution would; half as much to copy
        return F.conv2d(Wrap.apply(x), self.weight, self.bias)


class Block(nn.Module):
    """h + conv(silu(scale conv(silu(h)) + shift)), with scale and shift from the embedding; the identity at first."""

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, embedding: int):
        super().__init__()
        self.first, self.second = first, second
        self.modulate = nn.Linear(embedding, 2 * first.out_channels)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)
        nn.init.zeros_(self.second.weight)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, 1)
        return h + self.second(F.silu(self.first(F.silu(h)) * (1 + scale) + shift))


class Attention(nn.Module):
    """h + conv(softmax(q k^T / sqrt(d)) v) over all pixels, q, k, v from 1 x 1 convolutions; the identity at first."""

    HEADS = 4

    def __init__(self, width: int):
        super().__init__()
        self.heads = self.HEADS if width % self.HEADS == 0 else 1
        self.norm = nn.GroupNorm(1, width)
        self.into = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        batch, width, *size = h.shape
        parts = self.into(self.norm(h)).flatten(2).view(batch, 3, self.heads, width // self.heads, -1)
        q, k, v = parts.transpose(-1, -2).unbind(1)  # [B, heads, pixels, d]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, width, *size)
        return h + self.out(mixed)


class ResNet(Network):
    """Residual blocks at full resolution, 3 x 3 convolutions; the receptive field is 2 (2 depth + 2) + 1 wide."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.blocks = nn.ModuleList(self.block() for _ in range(self.config["depth"]))

    def body(self, h: Tensor, embedding: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, embedding)
        return h


class UNet(Network):
    """Three resolutions, each half the previous one, with additive skip connections (Ronneberger et al. 2015).

    With `attention` every block of the two lower resolutions is followed by self-attention, as in DDPM: every pixel
    then sees the whole image, and the network is not local at any noise level.
    """

    SIZES = 3

    def __init__(self, *args: Any, attention: bool = False, **options: Any):
        super().__init__(*args, **options)
        if attention:
            self.config["attention"] = True
        depth, width = self.config["depth"], self.config["width"]
        self.down = nn.ModuleList(nn.ModuleList(self.block() for _ in range(depth)) for _ in range(self.SIZES))
        self.up = nn.ModuleList(nn.ModuleList(self.block() for _ in range(depth)) for _ in range(self.SIZES - 1))
        # By resolution, from half on; in the order in which blocks come, down and up again.
        counts = [2 * depth] * (self.SIZES - 2) + [depth] if attention else []
        self.attention = nn.ModuleList(nn.ModuleList(Attention(width) for _ in range(count)) for count in counts)

    def _attend(self, h: Tensor, level: int, number: int) -> Tensor:
        """Self-attention after a block of a lower resolution, if the network has any."""
        if level == 0 or not len(self.attention):
            return h
        attended: Tensor = self.attention[level - 1][number](h)  # type: ignore[index]
        return attended

    def body(self, h: Tensor, embedding: Tensor) -> Tensor:
        kept = []
        for level, blocks in enumerate(self.down):
            if level:
                kept.append(h)
                h = F.avg_pool2d(h, 2, ceil_mode=True)
            for number, block in enumerate(cast(nn.ModuleList, blocks)):
                h = self._attend(block(h, embedding), level, number)
        for blocks in self.up:
            skip = kept.pop()
            h = skip + F.interpolate(h, size=skip.shape[-2:], mode="nearest")
            for number, block in enumerate(cast(nn.ModuleList, blocks)):
                h = self._attend(block(h, embedding), len(kept), self.config["depth"] + number)
        return h


ARCHITECTURES: dict[str, type[Network]] = {"ResNet": ResNet, "UNet": UNet}


def save_network(
    network: Network,
    path: str | os.PathLike[str],
    notes: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a network's weights in `dtype`, with its configuration and `notes` (how it was made) as metadata."""
    weights = {name: weight.detach().cpu().to(dtype).contiguous() for name, weight in network.state_dict().items()}
    metadata = {name: str(value) for name, value in header(FORMAT, VERSION).items()}
    metadata |= {"config": json.dumps(network.config), "notes": json.dumps(dict(notes))}
    metadata["sha256"] = _digest(weights, metadata)
    write_atomically(Path(path), save(weights, metadata))


def _check_sizes(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """ValueError where a configuration asks for more than the weights there are, before any memory is taken for it."""
    width, channels = weights["enter.weight"].shape[:2]
    there = {"width": width, "channels": channels, "classes": len(weights["class_embedding.weight"]) - 1}
    asked = {"width": config["width"], "channels": config["channels"], "classes": len(config["classes"])}
    if asked != there or checks.integer("depth", config["depth"], at_least=1) > len(weights):
        raise ValueError("its configuration does not fit its weights")


def _digest(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata and of every weight with its name, type and shape."""
    digest = hashlib.sha256(json.dumps({n: metadata[n] for n in ("config", "notes") if n in metadata}).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes() if weight.numel() else b"")
    return digest.hexdigest()


def load_network(path: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """A network that `save_network` wrote, in float32 and evaluation mode, and its notes.

    Raises:
        ValueError: not such a file, another version, or weights that do not fit; names the path.
        OSError: the file cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_header(metadata, FORMAT, VERSION)
        if "sha256" in metadata and metadata["sha256"] != _digest(stored, metadata):  # 0.1.0 wrote none
            raise ValueError("was changed since it was written")
        weights = {name: weight.to(torch.float32, copy=True) for name, weight in stored.items()}
        config, notes = parse_json(metadata["config"].encode()), parse_json(metadata["notes"].encode())
        if not (isinstance(config, dict) and isinstance(notes, dict)):
            raise ValueError("its config or notes are no JSON object")
        architecture = ARCHITECTURES[checks.one_of("architecture", config.pop("architecture"), ARCHITECTURES)]
        _check_sizes(config, weights)
        network = architecture(**config)
        network.load_state_dict(weights)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a usable network: no whole .safetensors file ({error})") from None
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: not a usable network: {' '.join(str(error).split())[:300]}") from None
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise ValueError(f"{path}: not a usable network: NaN or infinite weights")
    return network.eval(), notes
