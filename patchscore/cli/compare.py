"""`patchscore compare`: a network and the theories side by side."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..denoiser import Denoiser
from ..draw import charts
from ..draw.images import pairs, png
from ..evaluate import baselines as known_machines
from ..evaluate import compare as run_comparison
from ..files import check_writable, locked, write_atomically
from ..machines import EquivariantLocalScore
from .fitted import keep, patch_sizes
from .networks import labels_of_network, network_options, opened_network
from .options import Computing, Source, Walk, one_line_errors, say, seconds_since, write_chart


@click.command(
    epilog="""
\b
Examples:
  patchscore compare fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors -n 10
  patchscore compare fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors --table calibrated/table.json
  patchscore compare photos/ mymodels:denoiser --size 32 --table 7 --no-baselines
"""
)
@network_options(required=True, steps="Levels of the noise schedule.")
@click.option("-n", "count", type=int, default=20, show_default=True, help="How many images.")
@click.option(
    "--table",
    default="auto",
    show_default=True,
    metavar="NAME|FILE|K",
    help="Patch sizes, as for sample; the table that calibrate wrote is the one to give.",
)
@click.option("--baselines/--no-baselines", default=True, help="Whether the other machines are held beside it.")
@click.option("--out", type=click.Path(path_type=Path), default="compared", show_default=True, help="Folder.")
@one_line_errors
def compare(
    source: Source,
    network: str,
    padding_mode: str,
    walk: Walk,
    computing: Computing,
    count: int,
    table: str,
    baselines: bool,
    out: Path,
) -> None:
    """Hold a network's images against what the theory makes of the same noise.

    SOURCE is the network's training images and NETWORK a file or module:function, as for calibrate. Writes
    comparison.json, pairs.png (the images under each other) and scatter.png.
    """
    walk.check()
    check_writable(out)
    bank = source.open()
    denoiser, padding_mode = opened_network(network, bank, padding_mode)
    sizes, errors = patch_sizes(table, source, bank, padding_mode, "els", False, None, computing, out)
    memory = computing.bytes
    own = f"els-{padding_mode}"
    machines: dict[str, Denoiser] = {own: EquivariantLocalScore(bank, sizes, padding_mode, computing.engine, memory)}
    if baselines:
        known = known_machines(bank, sizes, engine=computing.engine, memory_limit=memory)
        machines |= {name: machine for name, machine in known.items() if name != own}
    say(f"{bank!r} from {source.source}", f"{denoiser!r}, padding {padding_mode}, patch sizes {sizes.name}")
    labels = labels_of_network(walk.labels, bank, denoiser)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"{out}: another process is writing this folder; wait for it, or take another"):
        start = time.perf_counter()
        found = run_comparison(
            denoiser,
            machines,
            count,
            walk.steps,
            walk.schedule,
            walk.sampler,
            labels,
            walk.seed,
            batch_size=walk.batch_size,
            device=computing.where,
        )
        if errors is not None:
            keep(out, sizes, errors)
        found.save(out / "comparison.json")
        say(f"{'machine':<14} {'r^2':>6}  {'95% interval':<15} {'correlation':>11} {'mse':>8}")
        for row in found.rows():
            low, high = row["r2_interval"]
            interval = f"{low:.3f} to {high:.3f}"
            figures = (
                f"{row['r2_median']:6.3f}  {interval:<15} {row['correlation_median']:11.3f} {row['mse_median']:8.4f}"
            )
            say(f"{row['machine']:<14} {figures}")
        shown = {"network": found.images[:10], **{name: of.images[:10] for name, of in found.machines.items()}}
        write_atomically(out / "pairs.png", png(pairs(shown)))
        if baselines:
            write_chart(out / "scatter.png", lambda: charts.agreement(found, own, "ideal"))
    say(f"{seconds_since(start)}: see {out / 'comparison.json'} and {out / 'pairs.png'}")
