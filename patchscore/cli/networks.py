"""What commands share that take a network: the argument NETWORK, and the options beside it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch

from ..adapters.network import from_network
from ..bank import PatchBank
from ..denoiser import Denoiser
from ..networks import load_network
from .options import Command, computing_options, labels_named, say, source_options, walk_options

THEORY_LABELS = click.option(
    "--labels",
    default="auto",
    show_default=True,
    metavar="auto|none|all|A,B,...",
    help="Classes that the images take in turn; auto is all that there are, if the network takes labels.",
)


def network_options(required: bool, steps: str) -> Callable[[Command], Command]:
    """SOURCE, NETWORK and the options of a comparison with it."""

    def decorate(command: Command) -> Command:
        for option in (
            computing_options(),
            walk_options(THEORY_LABELS, None, "Images at a time.", steps),
            click.option(
                "--padding-mode",
                type=click.Choice(["auto", "zeros", "circular"]),
                default="auto",
                show_default=True,
                help="Of the machine; auto is the network's own, zeros where it does not say.",
            ),
            click.argument("network", required=required),
            source_options,
        ):
            command = option(command)
        return command

    return decorate


def opened_network(network: str, bank: PatchBank, padding_mode: str) -> tuple[Denoiser, str]:
    """A denoiser from a checkpoint or from module:function, and the padding of the machine to hold beside it."""
    if Path(network).is_file():
        trained, _ = load_network(network)
        own = trained.config["padding_mode"]
        return from_network(trained, bank.shape), own if padding_mode == "auto" else padding_mode
    module, colon, function = network.partition(":")
    if not (colon and module and function):
        raise ValueError(f"NETWORK: got {network!r}, takes a file that examples/train_cnn.py wrote or module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"NETWORK: {network}: {error}") from None
    denoiser = build(bank)
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"NETWORK: {network} returned {type(denoiser).__name__}, takes one that returns a denoiser")
    return denoiser, "zeros" if padding_mode == "auto" else padding_mode


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
