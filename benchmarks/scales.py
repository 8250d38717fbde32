"""How near patch sizes fitted by held-out error come to the published ones, and how well each predicts a network.

Every published table of the data set and padding is held beside the fit: how many pixels apart, how often inside the
fit's interval, and how much more held-out error its sizes have. With --network, images of that network are predicted
with every table from the same noise. Writes benchmarks/results/scales.json; rows are replaced one by one, so that runs
add up.

    python benchmarks/scales.py cifar10 FOLDER --limit 1000
    python benchmarks/scales.py cifar10 FOLDER --limit 1000 --padding-mode circular
    python benchmarks/scales.py fashion-mnist fashion-mnist --network examples/fashion-mnist-resnet-zeros.safetensors \\
        --calibrated examples/fashion-mnist-resnet-zeros.json
"""

import argparse
import json
import time

import numpy as np
import torch
from record import RESULTS, write

import patchscore as ps
from patchscore.adapters.network import from_network
from patchscore.networks import load_network

SIZES = range(3, 32, 2)
"""All that the published tables have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="fashion-mnist, mnist, cifar10 or celeba, as tables are published for them")
    parser.add_argument("source", help="its training images")
    parser.add_argument("--limit", type=int, help="training images to use")
    parser.add_argument("--padding-mode", default="zeros")
    parser.add_argument("-n", type=int, default=16, help="held-out images")
    parser.add_argument("--network", help="a network of examples/train_cnn.py, trained on SOURCE")
    parser.add_argument("--calibrated", help="the table that was calibrated on it")
    parser.add_argument("--images", type=int, default=20, help="of the network")
    options = parser.parse_args()
    if options.network is None:
        bank = ps.PatchBank.open(options.source, size=32, limit=options.limit)
        row = fit(options.name, bank, options.padding_mode, options.n)
        add("fits", row, ("dataset", "padding_mode", "bank"))
    else:
        bank = ps.PatchBank.open(options.source, limit=options.limit)
        for row in predictions(options.name, bank, options.network, options.calibrated, options.images):
            add("networks", row, ("dataset", "table"))


def fit(name: str, bank: ps.PatchBank, padding_mode: str, n: int) -> dict:
    levels = ps.get_schedule("cosine", 20).ratios[:-1].tolist()
    start = time.process_time()
    errors = ps.held_out_errors(bank, SIZES, levels, images=n, padding_mode=padding_mode)
    seconds = time.process_time() - start
    some = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:1000]
    quick = ps.held_out_errors(bank.take(some), padding_mode=padding_mode)
    table, quick_table = ps.ScaleTable.of_errors(errors, monotone=True), ps.ScaleTable.of_errors(quick, monotone=True)
    beside = {"as `sample` fits": quick_table}
    published = [f"{name.replace('-', '')}-{net}-{padding_mode}" for net in ("resnet", "unet")]
    beside |= {known: ps.ScaleTable.published(known) for known in published if known in ps.ScaleTable.names()}
    return {
        "dataset": name,
        "padding_mode": padding_mode,
        "bank": len(bank),
        "held_out": n,
        "cpu_seconds": seconds,
        "sigmas": errors.sigmas,
        "sizes": table.sizes,
        "intervals": errors.intervals(),
        "regret": float(np.mean(errors.regret)),
        "tables": [held_beside(known, other, errors, table) for known, other in beside.items()],
    }


def held_beside(name: str, other: ps.ScaleTable, errors: ps.HeldOutErrors, table: ps.ScaleTable) -> dict:
    """Another table at the levels of a fit."""
    sizes = [other(sigma) for sigma in errors.sigmas]
    apart = np.abs(np.subtract(sizes, table.sizes))
    inside = [low <= k <= high for k, (low, high) in zip(sizes, errors.intervals(), strict=True)]
    at = [errors.patch_sizes.index(k) for k in sizes]
    more = errors.means[np.arange(len(at)), at] / errors.means.min(1) - 1
    return {
        "table": name,
        "sizes": sizes,
        "pixels_apart": float(apart.mean()),
        "within_one_size": float((apart <= 2).mean()),
        "inside_interval": float(np.mean(inside)),
        "more_error": float(more.mean()),
    }


def predictions(name: str, bank: ps.PatchBank, path: str, calibrated: str | None, n: int) -> list[dict]:
    trained, _ = load_network(path)
    padding_mode, labels = trained.config["padding_mode"], list(bank.classes)
    start = time.process_time()
    fitted = ps.ScaleTable.fit(bank, padding_mode=padding_mode, conditional=True, monotone=True)
    seconds = time.process_time() - start
    tables = {"fitted": fitted, "published": ps.ScaleTable.published(f"{name.replace('-', '')}-resnet-{padding_mode}")}
    if calibrated is not None:
        tables["calibrated"] = ps.ScaleTable.load(calibrated)
    machines = {known: ps.EquivariantLocalScore(bank, table, padding_mode) for known, table in tables.items()}
    found = ps.compare(from_network(trained, bank.shape), machines, n, labels=labels, along=False)
    return [
        {
            "dataset": name,
            "table": row["machine"],
            "bank": len(bank),
            "fit_cpu_seconds": seconds,
            **row,
            "r2_median": row["correlation_squared_median"],
            "r2_interval": row["correlation_squared_interval"],
        }
        for row in found.rows()
    ]


def add(part: str, row: dict, key: tuple[str, ...]) -> None:
    path = RESULTS / "scales.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    parts = {name: there.get(name, []) for name in ("fits", "networks")}
    kept = [other for other in parts[part] if any(other[name] != row[name] for name in key)]
    parts[part] = [*kept, row]
    write("scales", "Patch sizes fitted by held-out error beside published and calibrated ones", **parts)


if __name__ == "__main__":
    main()
