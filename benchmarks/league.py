"""The league table of all theories against a network: who explains it, and which differences are told.

Writes benchmarks/results/league.json (networks are replaced one by one) and a picture in docs/.

    python benchmarks/league.py fashion-mnist-resnet examples/fashion-mnist-resnet-zeros.safetensors fashion-mnist \\
        --table examples/fashion-mnist-resnet-zeros.json
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

from record import PICTURES, RESULTS, write
from theory import training

import patchscore as ps
from patchscore.adapters.network import from_network
from patchscore.draw.images import pairs, png
from patchscore.evaluate import THEORIES, finite, theories_named
from patchscore.networks import load_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the network, in the table")
    parser.add_argument("network", type=Path)
    parser.add_argument("source", help="its training images")
    parser.add_argument("--dataset", default="fashion-mnist", help="fashion-mnist or cifar10, for the tables")
    parser.add_argument("--limit", type=int, help="as in training")
    parser.add_argument("--table", help="a file of patch sizes, or a published table; else they are fitted")
    parser.add_argument("-n", type=int, default=10, help="images")
    parser.add_argument("--theories", nargs="*", choices=THEORIES, default=list(THEORIES), help="some of them")
    parser.add_argument("--no-along", action="store_true", help="only final images, not every step of the way")
    parser.add_argument("--work", type=Path, default=Path("out-league"), help="folder for what can be resumed")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    bank = ps.PatchBank.open(options.source, limit=options.limit)
    trained, notes = load_network(options.network)
    if options.table:
        known = options.table in ps.ScaleTable.names()
        table = ps.ScaleTable.published(options.table) if known else ps.ScaleTable.load(options.table)
    else:
        table = ps.ScaleTable.fit(bank, monotone=True, conditional=bool(trained.config["classes"]))
    labels = list(bank.classes) if trained.config["classes"] else None
    machines = theories_named(options.theories, bank, table)
    resume = options.work / f"{options.name}.npz"
    network = from_network(trained, bank.shape)
    found = ps.compare(network, machines, options.n, labels=labels, along=not options.no_along, resume=resume)
    rows = {row["machine"]: row for row in found.rows()}
    league = found.league()
    told = {(row["first"], row["second"]): row for row in found.differences()}
    path = RESULTS / "league.json"
    networks = json.loads(path.read_text())["networks"] if path.exists() else {}
    networks[options.name] = finite(
        {
            "architecture": trained.config["architecture"],
            "attention": bool(trained.config.get("attention")),
            "images_seen": notes.get("images_seen"),
            "dataset": options.dataset,
            "padding_mode": trained.config["padding_mode"],
            "training": training(notes, trained),
            "bank": len(bank),
            "n": options.n,
            "table": table.name,
            "sigmas": found.sigmas,
            "rows": [rows[name] for name in league],
            "neighbours": [told[pair] for pair in pairwise(league)],
            "behind_the_first": [told[league[0], name] for name in league[1:]],
        }
    )
    write("league", "All theories against a network, from the same noise", networks=networks)
    shown = {"network": found.images, **{name: found.machines[name].images for name in league}}
    shown = {name: images[:10] for name, images in shown.items()}
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / f"league-{options.name}.png").write_bytes(png(pairs(shown, zoom=2)))


if __name__ == "__main__":
    main()
