"""What commands share that take a network: the argument NETWORK, and the options beside it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ..adapters.load import LEVELS, load_diffusers, load_torchscript
from ..adapters.network import PREDICTIONS, SCALINGS, from_network
from ..bank import PatchBank
from ..denoiser import Denoiser
from ..networks import load_network
from .options import Command, computing_options, labels_named, sampling_options, say, source_options, taking

THEORY_LABELS = click.option(
    "--labels",
    default="auto",
    show_default=True,
    metavar="auto|none|all|A,B,...",
    help="Classes of the images, in turn; auto is all classes if the network takes labels, else none.",
)


@dataclasses.dataclass(frozen=True)
class Calling:
    """How a TorchScript network is called, and what it predicts."""

    prediction: str = "epsilon"
    scaling: str | None = None
    level: str = "sigma"


NO_CALLING = "--prediction, --scaling, --level: take a TorchScript file as NETWORK; other networks say so themselves"

calling_options = taking(
    Calling,
    click.option(
        "--prediction",
        type=click.Choice(PREDICTIONS),
        default="epsilon",
        show_default=True,
        help="What a TorchScript network predicts.",
    ),
    click.option(
        "--scaling",
        type=click.Choice(SCALINGS),
        help="Of its input x: alpha^2 + sigma^2 = 1, alpha = 1, or alpha + sigma = 1.  [default: preserving, or flow]",
    ),
    click.option(
        "--level",
        type=click.Choice(list(LEVELS)),
        default="sigma",
        show_default=True,
        help="The noise level that it takes: sigma, ln(sigma) / 4, sigma / (1 + sigma), or DDPM's timestep.",
    ),
)


def network_options(required: bool, steps: str) -> Callable[[Command], Command]:
    """SOURCE, NETWORK and the options of a comparison with it."""

    def decorate(command: Command) -> Command:
        for option in (
            computing_options(),
            sampling_options(THEORY_LABELS, None, "Images at a time.", steps),
            click.option(
                "--padding-mode",
                type=click.Choice(["auto", "zeros", "circular"]),
                default="auto",
                show_default=True,
                help="Padding of the machine; auto is that of the network, or zeros where the network does not say.",
            ),
            calling_options,
            click.argument("network", required=required),
            source_options,
        ):
            command = option(command)
        return command

    return decorate


def opened_network(network: str, bank: PatchBank, padding_mode: str, how: Calling) -> tuple[Denoiser, str]:
    """A denoiser from what NETWORK says, and the padding of the machine to hold beside it."""
    padding = "zeros" if padding_mode == "auto" else padding_mode
    scripted = Path(network).is_file() and _is_torchscript(Path(network))
    if how != Calling() and not scripted:
        raise ValueError(
            "--prediction, --scaling, --level: take a TorchScript file as NETWORK; others say so themselves"
        )
    if scripted:
        denoiser: Denoiser = load_torchscript(network, bank.shape, **dataclasses.asdict(how))
    elif Path(network).is_file():
        trained, _ = load_network(network)
        own = trained.config["padding_mode"]
        return from_network(trained, bank.shape), own if padding_mode == "auto" else padding_mode
    elif network.startswith("diffusers:"):
        denoiser = load_diffusers(network.removeprefix("diffusers:"))
    else:
        denoiser = _entry_point(network, bank)
    if tuple(denoiser.shape) != bank.shape:
        of, has = (" x ".join(map(str, shape)) for shape in (denoiser.shape, bank.shape))
        raise ValueError(f"NETWORK: {network} is for {of} images, SOURCE has {has}; --size and --channels convert them")
    return denoiser, padding


def _is_torchscript(path: Path) -> bool:
    """Whether a file is an archive with code in it, as torch.jit.save writes one."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def named_function(option: str, text: str, takes: str) -> Callable[..., Any]:
    """What module:function names, in the current folder or wherever Python finds modules."""
    module, colon, function = text.partition(":")
    if not (colon and module and function):
        raise ValueError(f"{option}: got {text!r}, takes {takes}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option}: {text}: {error}") from None


def _entry_point(network: str, bank: PatchBank) -> Denoiser:
    """What module:function makes of the bank."""
    takes = "a file that examples/train_cnn.py wrote, a TorchScript file, diffusers:PATH or module:function"
    build = named_function("NETWORK", network, takes)
    try:
        denoiser = build(bank)
    except TypeError as error:
        if error.__traceback__ and error.__traceback__.tb_next:  # from within it, with a place of its own
            raise
        raise TypeError(f"NETWORK: {network} cannot be called with a bank: {error}") from None
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"NETWORK: {network} returned {type(denoiser).__name__}, takes one that returns a denoiser")
    return denoiser


def labels_of_network(labels: str, bank: PatchBank, network: Denoiser) -> list[int] | None:
    """auto asks the network: every class of the bank if it takes one, else none."""
    if labels != "auto":
        return labels_named(labels, bank)
    if not bank.classes:
        return None
    try:
        network.denoise(torch.zeros(1, *network.shape), 1.0, [bank.classes[0]])
    except Exception as error:  # whatever a network of the user's raises when it is given a label
        say(f"labels none: the network takes none ({type(error).__name__}: {error})")
        return None
    return list(bank.classes)
