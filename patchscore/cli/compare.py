"""`patchscore compare`: a network and the theories side by side."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import click

from .. import checks
from ..draw import charts
from ..draw.images import pairs, png
from ..draw.league import league_page
from ..evaluate import BASELINES, THEORIES, Comparison, theories_named
from ..evaluate import compare as run_comparison
from ..files import check_writable, locked, write_atomically
from .fitted import keep, patch_sizes
from .networks import Calling, labels_of_network, network_options, opened_network
from .options import Computing, Sampling, Source, one_line_errors, say, seconds_since, write_chart


@click.command(
    epilog="""
\b
Examples:
  patchscore compare fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors -n 10
  patchscore compare fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors --table calibrated/table.json
  patchscore compare fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors --theories els-zeros,pca,composition
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
    help="Patch sizes, as for sample; best the table that calibrate wrote for this network.",
)
@click.option(
    "--theories",
    default="machines",
    show_default=True,
    metavar="machines|all|NAME,...",
    help="Theories to compare: the machines of Kamb & Ganguli and a Gaussian (beside a circular network els-wrapped "
    "too); all theories; or some of "
    f"{', '.join(THEORIES)}.",
)
@click.option(
    "--baselines/--no-baselines",
    default=True,
    help="--no-baselines: only the machine with the network's padding.",
)
@click.option("--no-steps", is_flag=True, help="Compare final images only, not every step: half the work.")
@click.option("--out", type=click.Path(path_type=Path), default="compared", show_default=True, help="Folder to write.")
@one_line_errors
def compare(
    source: Source,
    network: str,
    padding_mode: str,
    calling: Calling,
    sampling: Sampling,
    computing: Computing,
    count: int,
    table: str,
    theories: str,
    baselines: bool,
    no_steps: bool,
    out: Path,
) -> None:
    """A league table of theories: which one explains a network's images best, from the same noise.

    SOURCE is the network's training images and NETWORK what was trained on them, as for calibrate. Writes
    comparison.html, a page with all that follows; comparison.json and comparison.csv, every figure with its interval;
    pairs.png (the images under each other) and scatter.png. The same command again continues an interrupted comparison;
    a larger -n and other --theories add to it.
    """
    sampling.check()
    known = {"machines": BASELINES, "all": THEORIES}.get(theories) or [name.strip() for name in theories.split(",")]
    for name in known:
        checks.one_of("--theories", name, THEORIES)
    check_writable(out)
    bank = source.open()
    denoiser, padding_mode = opened_network(network, bank, padding_mode, calling)
    sizes, errors = patch_sizes(table, source, bank, padding_mode, "els", False, None, computing, out)
    memory = computing.bytes
    own = f"els-{padding_mode}"
    if theories == "machines" and padding_mode == "circular":
        known = [*known, "els-wrapped"]
    names = [own] if not baselines else sorted(known, key=lambda name: name != own)
    machines = theories_named(names, bank, sizes, engine=computing.engine, memory_limit=memory)
    say(f"{bank!r} from {source.source}", f"{denoiser!r}, padding {padding_mode}, patch sizes {sizes.name}")
    labels = labels_of_network(sampling.labels, bank, denoiser)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"{out}: another process is writing this folder; wait for it, or take another"):
        start = time.perf_counter()
        found = run_comparison(
            denoiser,
            machines,
            count,
            sampling.steps,
            sampling.schedule,
            sampling.sampler,
            labels,
            sampling.seed,
            batch_size=sampling.batch_size,
            device=computing.where,
            along=not no_steps,
            resume=out / "comparison.npz",
        )
        if errors is not None:
            keep(out, sizes, errors)
        found.save(out / "comparison.json")
        found.save_csv(out / "comparison.csv")
        lines = [f"{denoiser!r} on {bank!r}", f"{count} images, patch sizes {sizes.name}, seed {sampling.seed}"]
        page = league_page(found, f"Theories beside {Path(network).name}", lines)
        write_atomically(out / "comparison.html", page.encode())
        _tell(found)
        shown = {"network": found.images[:10], **{name: of.images[:10] for name, of in found.machines.items()}}
        write_atomically(out / "pairs.png", png(pairs(shown)))
        if {own, "ideal"} <= set(machines):
            write_chart(out / "scatter.png", lambda: charts.agreement(found, own, "ideal"))
    say(f"{seconds_since(start)}: see {out / 'comparison.html'} and {out / 'pairs.png'}")


def _tell(found: Comparison) -> None:
    """Prints the league table, and which neighbours in it are told apart."""
    say(f"{'theory':<14} {'r^2':>6}  {'95% interval':<15} {'r':>7} {'determination':>14} {'mse':>8}")
    rows = {row["machine"]: row for row in found.rows()}
    table = found.league()
    for name in table:
        row = rows[name]
        low, high = row["correlation_squared_interval"]
        interval = f"{low:.3f} to {high:.3f}"
        figures = f"{row['correlation_squared_median']:6.3f}  {interval:<15} {row['correlation_median']:7.3f}"
        say(f"{name:<14} {figures} {row['determination_median']:14.3f} {row['mse_median']:8.4f}")
    told = {(row["first"], row["second"]): row for row in found.differences()}
    for first, second in pairwise(table):
        row = told[first, second]
        low, high = row["interval"]
        verdict = f"{row['nearer']} is nearer" if row["nearer"] else "not told apart"
        say(f"{first} against {second}: {verdict}, r^2 differs by {row['median']:.3f} ({low:.3f} to {high:.3f})")
