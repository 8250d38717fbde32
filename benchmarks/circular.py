"""Why images of a circular network differ from its machine's: two hypotheses, tested image by image.

Sizes: no one table of patch sizes is right for all trajectories. Then the machine is nearer with the sizes that are
calibrated on the very trajectory that it predicts ("own sizes"). Wrapping: the network also learns windows that reach
over the border of a training image. Then `theories.WrappedScore` is nearer. All start from the network's noise, and
tables are calibrated on other trajectories. Writes benchmarks/results/circular.json, networks one by one; a second run
continues the first.

    python benchmarks/circular.py fashion-mnist NETWORK SOURCE [--limit N]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from record import PICTURES, RESULTS, write
from theory import training

import patchscore as ps
from patchscore.adapters.network import from_network
from patchscore.calibrate import Calibration, calibrate
from patchscore.draw.images import pairs, png
from patchscore.evaluate import FIGURES, Agreement, Comparison, compare, finite
from patchscore.networks import load_network
from patchscore.theories import WrappedScore

SIZES = (3, 5, 7, 9, 13, 17, 21)
"""Patch sizes that compete: the field of the network is 21 pixels wide."""
CALIBRATION_SEEDS = 10_000
"""Images from this number on are for the tables, those from 0 on for the test."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the data set")
    parser.add_argument("network", type=Path)
    parser.add_argument("source", help="its training images")
    parser.add_argument("--limit", type=int, help="as in training")
    parser.add_argument("-n", type=int, default=20, help="images of the test")
    parser.add_argument("--walks", type=int, default=10, help="trajectories behind the tables")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="patch sizes that compete")
    parser.add_argument("--no-own", action="store_true", help="leave the sizes of each trajectory out")
    parser.add_argument("--work", type=Path, default=Path("out-theory"), help="folder for what can be resumed")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    trained, notes = load_network(options.network)
    bank = ps.PatchBank.open(options.source, limit=options.limit)
    if bank.fingerprint != notes["bank"]["fingerprint"]:
        raise SystemExit(f"{options.source}: not the images that {options.network} was trained on")
    if trained.config["padding_mode"] != "circular":
        raise SystemExit(f"{options.network}: pads with {trained.config['padding_mode']}, takes a circular network")
    network, labels = from_network(trained, bank.shape), list(bank.classes)
    key = f"{options.name}-{notes['images_seen']}"

    def calibrated(machine: str, first: int, n: int) -> Calibration:
        resume = options.work / f"{key}.{machine}.{first}.json"
        return calibrate(
            network, bank, options.sizes, n=n, padding_mode="circular", machine=machine, labels=labels, first=first,
            batch_size=5, resume=resume,
        )  # fmt: skip

    tables = {machine: calibrated(machine, CALIBRATION_SEEDS, options.walks) for machine in ("els", "wrapped")}
    own = None if options.no_own else calibrated("els", 0, options.n)
    table = tables["els"].table()
    machines = {
        "els-circular": ps.EquivariantLocalScore(bank, table, "circular"),
        "els-wrapped, the same sizes": WrappedScore(bank, table),
        "els-wrapped": WrappedScore(bank, tables["wrapped"].table()),
    }
    found = []
    for i in range(options.n):
        if own is not None:
            sizes = ps.ScaleTable(own.sigmas[::-1], own.choices[::-1, i].tolist(), "own")
            machines["els-circular, own sizes"] = ps.EquivariantLocalScore(bank, sizes, "circular")
        resume = options.work / f"{key}.{i}.npz"
        found.append(compare(network, machines, 1, labels=labels, first=i, along=False, resume=resume, progress=False))
    result = joined(found)

    path = RESULTS / "circular.json"
    networks = json.loads(path.read_text())["networks"] if path.exists() else {}
    networks[key] = finite(
        {
            "dataset": options.name,
            "images_seen": notes["images_seen"],
            "training": training(notes, trained),
            "bank": len(bank),
            "n": options.n,
            "rows": result.rows(),
            "differences": result.differences(),
            "calibrations": {
                machine: {
                    "sigmas": tables[machine].sigmas,
                    "median": tables[machine].median,
                    "smallest": tables[machine].choices.min(1).tolist(),
                    "largest": tables[machine].choices.max(1).tolist(),
                    "agreement": chosen_agreement(tables[machine]),
                    "walks": tables[machine].choices.shape[1],
                }
                for machine in tables
            },
        }
    )
    write("circular", "Circular networks: patch sizes of each trajectory, and windows that wrap", networks=networks)
    shown = {"network": result.images, **{name: of.images for name, of in result.machines.items()}}
    shown = {name: images[:10] for name, images in shown.items()}
    (PICTURES / f"circular-{options.name}.png").write_bytes(png(pairs(shown, zoom=2)))


def chosen_agreement(found: Calibration) -> list[float]:
    """[steps] the cosine similarity of the network's score and the best machine's, median over trajectories."""
    return np.median(found.agreement.max(-1), axis=1).tolist()


def joined(parts: list[Comparison]) -> Comparison:
    """Comparisons of single images as one."""
    first = parts[0]
    machines = {
        name: Agreement(
            torch.cat([part.machines[name].images for part in parts]),
            {figure: torch.cat([part.machines[name].figures[figure] for part in parts]) for figure in FIGURES},
            {figure: torch.cat([part.machines[name].steps[figure] for part in parts], 1) for figure in FIGURES},
        )
        for name in first.machines
    }
    return Comparison(torch.cat([part.images for part in parts]), machines, first.sigmas, None, first.settings)


if __name__ == "__main__":
    main()
