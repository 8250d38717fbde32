"""`patchscore explain`: which training patches made the samples of a run."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import click

from .. import checks, engines
from ..denoiser import ScoreMachine
from ..draw import charts
from ..draw.images import png
from ..draw.mosaic import mosaic, mosaic_rows
from ..draw.pages import explanation_page
from ..explain import ExplainedSample, explain_samples
from ..files import locked, write_atomically
from ..mixed import MixedBank
from ..noise import get_schedule
from ..runs import reopen, report_memorisation, warn_of_others
from .options import (
    bytes_in_words,
    described,
    device_named,
    device_option,
    numbers,
    one_line_errors,
    say,
    write_chart,
)


@click.command(
    epilog="""
\b
Examples:
  patchscore explain out/ --image 3
  patchscore explain out/ --image all --levels 8
  patchscore explain out/ --image 3 --sensitivity
  patchscore explain out/ --source moved/cifar.npz --index moved/cifar.index
"""
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--image", "images", default="0", show_default=True, metavar="N|N,M,...|all", help="Samples to explain, by number."
)
@click.option("--levels", type=int, help="Number of steps to explain.  [default: all, or 8 for more than four images]")
@click.option(
    "--top", type=int, default=12, show_default=True, help="Number of heaviest windows to find for each pixel."
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Also show which input pixels output pixels depend on, and draw sensitivity.png; takes two to four times "
    "as long.",
)
@click.option("--source", help="Where the run's training images are now; by default where they were.")
@click.option("--index", type=click.Path(path_type=Path), help="Where the run's index is now, if it had one; likewise.")
@device_option()
@one_line_errors
def explain(
    out: Path,
    images: str,
    levels: int | None,
    top: int,
    sensitivity: bool,
    source: str | None,
    index: Path | None,
    device: str,
) -> None:
    """Show which training patches made the samples of a run in OUT.

    Writes into that folder mosaic.png (mosaic-000000.png and so on for several images), explain.html, one page that
    needs nothing else, and memorisation.png; run.json gets the distance of each sample to its nearest training image,
    and the number of images that it is made of. --sensitivity adds to both pictures the input pixels that output pixels
    depend on (rows of the Jacobian of the denoiser), and sensitivity.png: the width of that dependence beside the patch
    size, over noise levels. A run made with an index is repeated with it, but explained by all windows, not only by
    those that it evaluated.
    """
    if not (out / "run.json").is_file():
        raise ValueError(f"{out / 'run.json'}: no such file; takes the folder of a run of patchscore sample")
    with locked(out, f"{out}: another process is writing this folder; wait for it"):
        _explain(out, images, levels, top, sensitivity, source, index, device)


def _explain(
    out: Path,
    images: str,
    levels: int | None,
    top: int,
    sensitivity: bool,
    source: str | None,
    index: Path | None,
    device: str,
) -> None:
    machine, settings, record, made = reopen(out, source, index)
    if machine.bank.value_range is not None or isinstance(machine.bank, MixedBank):
        what = "images of several sizes" if machine.bank.value_range is None else "latents"
        raise ValueError(f"{out}: made of {what}, which are not drawn here; patchscore.explain takes them in Python")
    if settings["size"] is not None:
        size = " x ".join(map(str, settings["size"]))
        raise ValueError(f"{out}: images of {size} are not drawn here; patchscore.explain explains them in Python")
    wanted = made if images == "all" else _of_run(images, made)
    schedule = get_schedule(settings["schedule"], settings["steps"])
    count = levels if levels is not None else len(schedule) if len(wanted) <= 4 else 8
    count = min(checks.integer("--levels", count, at_least=1), len(schedule))
    # The last step is always among them; the first hardly shows anything.
    chosen = [round((i + 1) * len(schedule) / count) - 1 for i in range(count)]
    say(repr(machine.bank), described(machine, device_named(device)))
    if machine.pruned is not None:
        # Which sizes the index lacks was told when the run was made.
        warnings.filterwarnings("ignore", message=".*the index has patch sizes")
    start = time.perf_counter()
    samples = explain_samples(machine, wanted, chosen, top, fields=sensitivity, device=device_named(device), **settings)
    warn_of_others(out, record, samples)
    sampled = _of_all_windows(machine, record, samples)
    if sampled:
        say(sampled)

    for sample in samples:
        name = "mosaic.png" if len(samples) == 1 else f"mosaic-{sample.number:06d}.png"
        write_atomically(out / name, png(mosaic(mosaic_rows(sample, machine.bank))))
    about = {
        "title": f"Which training patches made {'these images' if len(samples) > 1 else 'this image'}",
        "lines": [
            f"{type(machine).__name__} over {len(machine.bank):,} training images of {record['noted']['source']}, "
            f"seed {settings['seed']}. At each step a pixel becomes the weighted mean of the centre pixels of those "
            "training windows that look most like its own noisy window.",
            *([sampled] if sampled else []),
        ],
        "padding_mode": getattr(machine, "padding_mode", "zeros"),
    }
    page = explanation_page(samples, machine.bank, about)
    write_atomically(out / "explain.html", page.encode())
    report = report_memorisation(out, record, samples, machine.bank)
    entries = report["samples"]
    for entry in entries:
        if entry["image"] in wanted:
            say(
                f"image {entry['image']}: nearest training image {entry['nearest']} at rms {entry['rms']:.3f}; "
                f"{entry['sources']} own pixels at noise {entry['sigma']:.2g}, as many as "
                f"{entry['effective_sources']:.1f} of equal share"
            )
    write_chart(
        out / "memorisation.png",
        lambda: charts.memorisation(
            [entry["rms"] for entry in entries],
            [entry["effective_sources"] for entry in entries],
            report["training_images_to_nearest_other"],
        ),
    )
    if sensitivity:
        found = [sample.fields for sample in samples]
        write_chart(out / "sensitivity.png", lambda: charts.receptive_fields(found, max(machine.shape[1:])))
    each = (time.perf_counter() - start) / len(samples)
    say(f"{each:.1f} s an image: see {out / 'explain.html'} ({bytes_in_words(len(page))}) and {out / name}")


def _of_all_windows(machine: ScoreMachine, record: dict[str, Any], samples: list[ExplainedSample]) -> str:
    """What to say of a run that evaluated a sample of the windows; "" for any other."""
    made = record["settings"]
    if not (made.get("index") or made.get("budget")) or record["noted"]["engine"] in engines.NAMES:
        return ""
    least = f"budget {made['budget']:g}" if made.get("budget") else f"tolerance {made['tolerance']:g}"
    if machine.pruned is None:
        return (
            f"The run was made with an index ({least}), but here without it: noise, weights and denoised images are "
            "those of all windows."
        )
    through = ", through an index" if made.get("index") else ""
    apart = max(step for sample in samples for step in sample.apart)
    return (
        f"The run evaluated a sample of the windows{through} ({least}). Its own noise is shown; weights and "
        f"denoised images are those of all windows. What the run made of that noise is off by up to {apart:.2g} rms."
    )


def _of_run(images: str, made: list[int]) -> list[int]:
    wanted = numbers("--image", images, "numbers with commas between them, or all")
    for image in wanted:
        if image not in made:
            there = f"the run has {made[0]} to {made[-1]}" if made else "the run has none yet"
            raise ValueError(f"--image: got {image}, {there}")
    return wanted
