"""How well the theory predicts trained networks: calibrated on some seeds, tested on others.

Takes networks that examples/train_cnn.py trained, and the images they were trained on. For each: patch sizes are
calibrated on ten walks from seeds that are not used again; then network and machines start from the same noise, one
image of each class in turn. Writes benchmarks/results/theory.json (rows are replaced network by network, so that runs
add up) and pictures in docs/.

    python benchmarks/theory.py NAME NETWORK SOURCE [--limit N]     e.g.
    python benchmarks/theory.py fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors fashion-mnist
    python benchmarks/theory.py --draw                              only the pictures, from theory.json
"""

import argparse
import json
from pathlib import Path

import torch
from record import DOCS, RESULTS, write

import patchscore as ps
from patchscore import charts, plots
from patchscore.adapters.network import from_network
from patchscore.calibrate import PATCH_SIZES, Calibration, calibrate
from patchscore.evaluate import Comparison, baselines, compare
from patchscore.networks import load_network

CALIBRATION_SEEDS = 10_000
"""Images from this number on are for calibration, those from 0 on for the test."""

PUBLISHED = {
    ("fashion-mnist", "zeros"): "fashionmnist-resnet-zeros",
    ("fashion-mnist", "circular"): "mnist-resnet-circular",  # none was published for Fashion-MNIST
    ("cifar10", "zeros"): "cifar10-resnet-zeros",
    ("cifar10", "circular"): "cifar10-resnet-circular",
}


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
    parser.add_argument("--few", action="store_true", help="of the baselines only those that cost little")
    parser.add_argument("--no-along", action="store_true", help="only the final images, not every step of the walk")
    parser.add_argument("--work", type=Path, default=Path("out-theory"), help="folder for what can be resumed")
    parser.add_argument("--draw", action="store_true", help="only draw the pictures")
    options = parser.parse_args()
    if not options.draw:
        measure(options)
    draw()


def measure(options: argparse.Namespace) -> None:
    options.work.mkdir(exist_ok=True)
    trained, notes = load_network(options.network)
    padding_mode = trained.config["padding_mode"]
    bank = ps.PatchBank.open(options.source, limit=options.limit)
    if bank.fingerprint != notes["bank"]["fingerprint"]:
        raise SystemExit(f"{options.source}: not the images that {options.network} was trained on")
    if options.bank or options.wider:
        bank = ps.PatchBank.open(options.wider or options.source, limit=options.bank)
    network = from_network(trained, bank.shape)
    labels = list(bank.classes)
    key = f"{options.name}-{padding_mode}-{notes['images_seen']}-{len(bank)}"

    # Patch sizes from walks of their own.
    sizes = PATCH_SIZES if padding_mode == "zeros" else tuple(k for k in PATCH_SIZES if k <= min(bank.shape[1:]))
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
    tables = {"median": found.table("median"), "mode": found.table("mode")}

    # The machine of the network's own padding with that table; the same with the mode, and with the published table.
    machines: dict[str, ps.Denoiser] = {}
    own = f"els-{padding_mode}"
    known = baselines(bank, tables["median"])
    if padding_mode == "circular":
        known["els-circular"] = ps.EquivariantLocalScore(bank, tables["median"], "circular")
    machines[own] = known.pop(own)
    if not options.only_els:
        published = ps.ScaleTable.published(PUBLISHED[options.name, padding_mode])
        machines[f"{own}, published sizes"] = ps.EquivariantLocalScore(bank, published, padding_mode)
        machines |= known
    if options.few:
        machines = {name: machines[name] for name in (own, "ideal", "gaussian")}
    result = compare(network, machines, n=options.n, labels=labels, batch_size=10, along=not options.no_along)
    result.save(options.work / f"{key}.comparison.json")
    torch.save(
        {"network": result.images, **{name: of.images for name, of in result.machines.items()}},
        options.work / f"{key}.images.pt",
    )

    about = {
        "dataset": options.name,
        "network": trained.config["architecture"],
        "padding_mode": padding_mode,
        "images_seen": notes["images_seen"],
        "bank": len(bank),
    }
    rows = [{**about, **row, "mse": row["mse_median"]} for row in result.rows()]
    record = json.loads((RESULTS / "theory.json").read_text()) if (RESULTS / "theory.json").exists() else {}
    mine = tuple(about.values())
    kept = [row for row in record.get("rows", []) if tuple(row[name] for name in about) != mine]
    networks = {**record.get("networks", {}), key: training(notes, trained)}
    tables = {**record.get("calibrations", {}), key: calibrated(found)}
    write("theory", what(), rows=kept + rows, networks=networks, calibrations=tables)
    if not (options.only_els or options.bank or options.wider):
        pairs(result, options.name, padding_mode)
        if not options.no_along:
            charts.agreement(result, own, "ideal").savefig(
                DOCS / f"theory-{options.name}-{padding_mode}-scatter.png", dpi=110
            )


def training(notes: dict, network: torch.nn.Module) -> dict:
    weights = sum(weight.numel() for weight in network.parameters())
    return {name: notes[name] for name in ("images_seen", "seconds", "loss", "torch")} | {
        "weights": weights,
        "images": notes["bank"]["images"],
    }


def calibrated(found: Calibration) -> dict:
    return {"sigmas": found.sigmas, "median": found.median, "mode": found.mode, "choices": found.choices.tolist()}


def pairs(result: Comparison, name: str, padding_mode: str) -> None:
    """Ten test images, one of each class: the network's above the machines'."""
    shown = [name for name in (f"els-{padding_mode}", "local", "ideal", "gaussian") if name in result.machines]
    rows = {"network": result.images, **{machine: result.machines[machine].images for machine in shown}}
    plots.pairs({row: images[:10] for row, images in rows.items()}).save(DOCS / f"theory-{name}-{padding_mode}.png")


def draw() -> None:
    """Calibrated sizes beside the published ones."""
    record = json.loads((RESULTS / "theory.json").read_text())
    curves, beside = {}, {}
    for key, found in record["calibrations"].items():
        name, padding_mode = next(kind for kind in PUBLISHED if key.startswith("-".join(kind)))
        alike = [of for other, of in record["networks"].items() if other.startswith(f"{name}-{padding_mode}-")]
        longest = max(alike, key=lambda of: of["images_seen"])
        if key != f"{name}-{padding_mode}-{longest['images_seen']}-{longest['images']}":
            continue
        title = f"{name}, ResNet, {padding_mode}"
        curves[title] = Calibration(found["sigmas"], PATCH_SIZES, one_hot(found["choices"]), {})
        beside[title] = ps.ScaleTable.published(PUBLISHED[name, padding_mode])
    charts.calibration_curves(curves, beside).savefig(DOCS / "theory-calibration.png", dpi=110)


def one_hot(choices: list[list[int]]):
    chosen = torch.tensor(choices)
    return (chosen[..., None] == torch.tensor(PATCH_SIZES)).double().numpy()


def what() -> str:
    return " ".join((__doc__ or "").split("\n")[0].split())


if __name__ == "__main__":
    main()
