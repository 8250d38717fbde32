"""How well the theory predicts trained networks: calibrated on some seeds, tested on others.

Takes networks that examples/train_cnn.py trained, and the images they were trained on. For each: patch sizes are
calibrated on ten trajectories from seeds not used again; then network and machines start from the same noise, one
image of each class in turn. Writes benchmarks/results/theory.json (rows are replaced network by network, so that runs
add up) and pictures in docs/.

    python benchmarks/theory.py NAME NETWORK SOURCE [--limit N]     e.g.
    python benchmarks/theory.py fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors fashion-mnist
    python benchmarks/theory.py --draw                              only the pictures, from theory.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from record import PICTURES, RESULTS, write

import patchscore as ps
from patchscore.adapters.network import from_network
from patchscore.calibrate import PATCH_SIZES, Calibration, calibrate
from patchscore.draw import charts
from patchscore.draw import images as pictures
from patchscore.evaluate import Comparison, baselines, bootstrap_interval, compare
from patchscore.networks import Network, load_network

CALIBRATION_SEEDS = 10_000
"""Images from this number on are for calibration, those from 0 on for the test."""

FIRST = (20, 30, 40)
"""Networks were tested on more images as time allowed, always from image 0 on."""

PUBLISHED = {
    ("fashion-mnist", "ResNet", "zeros"): "fashionmnist-resnet-zeros",
    ("fashion-mnist", "ResNet", "circular"): "mnist-resnet-circular",  # none was published for Fashion-MNIST
    ("fashion-mnist", "UNet", "zeros"): "fashionmnist-unet-zeros",
    ("cifar10", "ResNet", "zeros"): "cifar10-resnet-zeros",
    ("cifar10", "ResNet", "circular"): "cifar10-resnet-circular",
    ("cifar10", "UNet", "zeros"): "cifar10-unet-zeros",
}

OFFERED = {"ResNet": PATCH_SIZES, "UNet": (*PATCH_SIZES, 23, 25, 27)}
"""Patch sizes that compete: a UNet sees further than these ResNets, whose field is 21 pixels wide."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="fashion-mnist or cifar10")
    parser.add_argument("network", nargs="?", type=Path)
    parser.add_argument("source", nargs="?")
    parser.add_argument("--limit", type=int, help="as in training")
    parser.add_argument("--bank", type=int, help="let the machines see only so many of the training images")
    parser.add_argument("--wider", help="let the machines see other images than the training, from here")
    parser.add_argument("-n", type=int, default=50, help="images of the test")
    parser.add_argument("--walks", type=int, default=10, help="of the calibration")
    parser.add_argument("--only-els", action="store_true", help="leave the baselines out")
    parser.add_argument("--published", action="store_true", help="calibrate nothing, take the published sizes")
    parser.add_argument("--few", action="store_true", help="of the baselines only those that cost little")
    parser.add_argument("--no-along", action="store_true", help="only final images, not every step of the way")
    parser.add_argument("--work", type=Path, default=Path("out-theory"), help="folder for what can be resumed")
    parser.add_argument("--draw", action="store_true", help="only draw the pictures")
    options = parser.parse_args()
    if not options.draw:
        measure(options)
    draw()


def measure(options: argparse.Namespace) -> None:
    options.work.mkdir(exist_ok=True)
    trained, notes = load_network(options.network)
    architecture, padding_mode = trained.config["architecture"], trained.config["padding_mode"]
    kind = (options.name, architecture, padding_mode)
    bank = ps.PatchBank.open(options.source, limit=options.limit)
    if bank.fingerprint != notes["bank"]["fingerprint"]:
        raise SystemExit(f"{options.source}: not the images that {options.network} was trained on")
    if options.bank or options.wider:
        bank = ps.PatchBank.open(options.wider or options.source, limit=options.bank)
    network = from_network(trained, bank.shape)
    labels = list(bank.classes)
    key = f"{stem(*kind)}-{notes['images_seen']}-{len(bank)}"

    machines: dict[str, ps.Denoiser] = {}
    own, published = f"els-{padding_mode}", ps.ScaleTable.published(PUBLISHED[kind])
    beside = ps.EquivariantLocalScore(bank, published, padding_mode)
    if options.published:
        machines = {f"{own}, published sizes": beside, **baselines(bank, published)}
        machines = {name: machine for name, machine in machines.items() if name not in ("els-zeros", "els-circular")}
        compared(options, notes, trained, kind, bank, machines, None)
        return

    # Patch sizes from trajectories of their own.
    sizes = tuple(k for k in OFFERED[architecture] if padding_mode == "zeros" or k <= min(bank.shape[1:]))
    found = calibrate(
        network,
        bank,
        sizes,
        n=options.walks,
        padding_mode=padding_mode,
        labels=labels,
        first=CALIBRATION_SEEDS,
        batch_size=5,
        resume=options.work / f"{key}.calibration.json",
    )
    table = found.table("median")

    # The machine of the network's own padding with that table; the same with the published table; and the others.
    known = baselines(bank, table)
    if padding_mode == "circular":
        known["els-circular"] = ps.EquivariantLocalScore(bank, table, "circular")
    machines[own] = known.pop(own)
    if not options.only_els:
        machines[f"{own}, published sizes"] = beside
        machines |= known
    if options.few:
        machines = {name: machines[name] for name in (own, "ideal", "gaussian")}
    compared(options, notes, trained, kind, bank, machines, found)


def compared(
    options: argparse.Namespace,
    notes: dict,
    trained: Network,
    kind: tuple[str, str, str],
    bank: ps.PatchBank,
    machines: dict[str, ps.Denoiser],
    found: Calibration | None,
) -> None:
    """Network and machines from the same noise, and all that is recorded and drawn of it."""
    own = next(iter(machines))
    network, labels = from_network(trained, bank.shape), list(bank.classes)
    key = f"{stem(*kind)}-{notes['images_seen']}-{len(bank)}"
    result = compare(network, machines, n=options.n, labels=labels, batch_size=10, along=not options.no_along)
    result.save(options.work / f"{key}.comparison.json")
    torch.save(
        {"network": result.images, **{name: of.images for name, of in result.machines.items()}},
        options.work / f"{key}.images.pt",
    )

    of = dict(zip(("dataset", "network", "padding_mode"), kind, strict=True))
    about = {**of, "images_seen": notes["images_seen"], "bank": len(bank)}
    rows = [{**about, **squared(row), "mse": row["mse_median"]} for row in result.rows()]
    for row in rows:
        row["r2_first"] = first_alone(result.machines[row["machine"]].r2)
    record = json.loads((RESULTS / "theory.json").read_text()) if (RESULTS / "theory.json").exists() else {}
    mine = tuple(about.values())
    kept = [row for row in record.get("rows", []) if tuple(row[name] for name in about) != mine]
    networks = {**record.get("networks", {}), key: {**of, **training(notes, trained)}}
    tables = {**record.get("calibrations", {}), **({key: calibrated(found)} if found else {})}
    write("theory", what(), rows=kept + rows, networks=networks, calibrations=tables)
    if not (options.only_els or options.bank or options.wider):
        pairs(result, own, stem(*kind))
        if not options.no_along:
            charts.agreement(result, own, "ideal").savefig(PICTURES / f"theory-{stem(*kind)}-scatter.png", dpi=110)


def squared(row: dict) -> dict:
    """A row with the squared correlation by the name that it has in theory.json."""
    return {**row, **{f"r2_{what}": row[f"correlation_squared_{what}"] for what in ("median", "interval")}}


def stem(name: str, architecture: str, padding_mode: str) -> str:
    """What keys and pictures of a network begin with."""
    return "-".join([name, *(["unet"] if architecture == "UNet" else []), padding_mode])


def first_alone(r2: Sequence[float] | torch.Tensor) -> dict[str, dict]:
    """What fewer images, the first of them, give: rows of other sizes can be held against these."""
    return {
        str(n): {"r2_median": float(np.median(r2[:n])), "r2_interval": bootstrap_interval(r2[:n])}
        for n in FIRST
        if n < len(r2)
    }


def training(notes: dict, network: torch.nn.Module) -> dict:
    weights = sum(weight.numel() for weight in network.parameters())
    return {name: notes[name] for name in ("images_seen", "seconds", "loss", "torch")} | {
        "weights": weights,
        "images": notes["bank"]["images"],
        "validation_loss": notes.get("validation_loss"),
    }


def calibrated(found: Calibration) -> dict:
    return {"sigmas": found.sigmas, "median": found.median, "mode": found.mode, "choices": found.choices.tolist()}


def pairs(result: Comparison, own: str, name: str) -> None:
    """Ten test images, one of each class: the network's above the machines'."""
    shown = [name for name in (own, "local", "ideal", "gaussian") if name in result.machines]
    rows = {"network": result.images, **{machine: result.machines[machine].images for machine in shown}}
    pictures.pairs({row: images[:10] for row, images in rows.items()}).save(PICTURES / f"theory-{name}.png")


def draw() -> None:
    """Calibrated sizes beside the published ones."""
    record = json.loads((RESULTS / "theory.json").read_text())
    curves, beside = {}, {}
    for key, found in record["calibrations"].items():
        kind = kind_of(record["networks"][key])
        longest = max(
            (of for of in record["networks"].values() if kind_of(of) == kind), key=lambda of: of["images_seen"]
        )
        if key != f"{stem(*kind)}-{longest['images_seen']}-{longest['images']}":
            continue
        title = ", ".join(kind)
        curves[title] = Calibration(found["sigmas"], OFFERED[kind[1]], one_hot(found["choices"], OFFERED[kind[1]]), {})
        beside[title] = ps.ScaleTable.published(PUBLISHED[kind])
    charts.calibration_curves(curves, beside).savefig(PICTURES / "theory-calibration.png", dpi=110)


def kind_of(network: dict) -> tuple[str, str, str]:
    return network["dataset"], network["network"], network["padding_mode"]


def one_hot(choices: list[list[int]], sizes: tuple[int, ...]):
    chosen = torch.tensor(choices)
    return (chosen[..., None] == torch.tensor(sizes)).double().numpy()


def what() -> str:
    return " ".join((__doc__ or "").split("\n")[0].split())


if __name__ == "__main__":
    main()
