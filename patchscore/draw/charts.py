"""Charts of what was measured, with matplotlib (the extra `plots`): calibration curves, agreement, nearness.

Each function returns a matplotlib Figure; nothing is shown and no global state is touched.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calibrate import Calibration
from ..evaluate import Comparison
from ..heldout import HeldOutErrors
from ..receptive import ReceptiveFields
from ..scales import ScaleTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, ACCENT = "#26241f", "#8a8478", "#b4451f"


def calibration_curves(found: Mapping[str, Calibration], beside: Mapping[str, ScaleTable | None]) -> Figure:
    """Patch size against noise, a panel each: median, middle half and range over trajectories, and a table beside it.

    Args:
        found: calibrations by name.
        beside: for some of the names, a table to draw with it.
    """
    figure, panels = _panels(len(found), 4.2, 3.4)
    for panel, (name, of) in zip(panels, found.items(), strict=True):
        low, lower, upper, high = np.quantile(of.choices, [0, 0.25, 0.75, 1], axis=1)
        panel.fill_between(of.sigmas, low, high, color=ACCENT, alpha=0.12, lw=0, label="all trajectories")
        panel.fill_between(of.sigmas, lower, upper, color=ACCENT, alpha=0.25, lw=0, label="middle half")
        panel.plot(of.sigmas, of.median, "o-", color=ACCENT, ms=3.5, lw=1.5, label="median")
        table = beside.get(name)
        if table is not None:
            panel.plot(table.sigmas, table.sizes, "s--", color=INK, ms=3, lw=1, label=table.name)
        panel.set(xscale="log", xlabel="noise sigma / alpha", ylabel="patch size", title=name)
        panel.set_yticks(sorted({*of.patch_sizes}))
        panel.legend(frameon=False, fontsize=8)
    return figure


def held_out_sizes(
    found: Mapping[str, tuple[HeldOutErrors, ScaleTable]], beside: Mapping[str, ScaleTable | None]
) -> Figure:
    """Patch size against noise, a panel each: what a fit chose, its interval over images, and a table beside it.

    Args:
        found: held-out errors and the table of them, by name.
        beside: for some of the names, a table to draw with it.
    """
    figure, panels = _panels(len(found), 4.2, 3.4)
    for panel, (name, (errors, fitted)) in zip(panels, found.items(), strict=True):
        low, high = zip(*errors.intervals(), strict=True)
        panel.fill_between(errors.sigmas, low, high, color=ACCENT, alpha=0.2, lw=0, label="95% interval over images")
        panel.plot(fitted.sigmas, fitted.sizes, "o-", color=ACCENT, ms=3.5, lw=1.5, label="least held-out error")
        table = beside.get(name)
        if table is not None:
            panel.plot(table.sigmas, table.sizes, "s--", color=INK, ms=3, lw=1, label=table.name)
        panel.set(xscale="log", xlabel="noise sigma / alpha", ylabel="patch size", title=name)
        panel.set_yticks(sorted({*errors.patch_sizes}))
        panel.legend(frameon=False, fontsize=8)
    return figure


def agreement(found: Comparison, machine: str, baseline: str) -> Figure:
    """Beside each other: r^2 with the network's image, a dot an image, machine against baseline; and r^2 by step."""
    figure, (left, right) = _panels(2, 4.2, 3.9)
    a, b = found.machines[baseline].r2, found.machines[machine].r2
    left.plot([0, 1], [0, 1], color=SOFT, lw=1)
    left.scatter(a, b, s=16, color=ACCENT, alpha=0.8, lw=0)
    better = float((b > a).double().mean())
    left.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"r² of {baseline}", ylabel=f"r² of {machine}", aspect="equal")
    left.set_title(f"{machine} is nearer for {better:.0%} of {len(a)} images")
    for name, of in found.machines.items():
        if of.step_r2.isnan().any():
            continue
        style: dict[str, Any] = {"color": ACCENT, "lw": 2, "zorder": 5} if name == machine else {"lw": 1.2}
        right.plot(found.sigmas, np.median(of.step_r2, axis=1), label=name, **style)
    right.set(xscale="log", ylim=(0, 1.02), xlabel="noise sigma / alpha", ylabel="median r² of one denoising")
    right.set_title("along the network's own trajectory")
    right.legend(frameon=False, fontsize=8)
    return figure


def memorisation(rms: Sequence[float], sources: Sequence[float], usual: Sequence[float]) -> Figure:
    """How far each sample is from its nearest training image, against how many training images own its pixels.

    Args:
        rms: [n] distance of each sample to its nearest training image.
        sources: [n] effective number of training images that own its pixels.
        usual: distances between training images and their nearest others, for scale; none where there is one image.
    """
    figure, (panel,) = _panels(1, 5.4, 4)
    if len(usual):
        low, middle, high = np.quantile(usual, [0.05, 0.5, 0.95])
        panel.axvspan(low, high, color=SOFT, alpha=0.15, lw=0, label="training images to their nearest other (90%)")
        panel.axvline(middle, color=SOFT, lw=1)
    panel.scatter(rms, sources, s=22, color=ACCENT, lw=0, label="samples", zorder=3)
    panel.set(xlabel="rms distance to the nearest training image", ylabel="effective number of source images")
    panel.set(xlim=(0, None), yscale="log", ylim=(0.9, max(20, 2.5 * max(sources))))
    panel.annotate("copies", (0.02, 0.03), xycoords="axes fraction", color=SOFT)
    panel.annotate("mosaics of many", (0.98, 0.94), xycoords="axes fraction", color=SOFT, ha="right")
    panel.legend(frameon=False, fontsize=8, loc="center right")
    return figure


def receptive_fields(found: Sequence[Sequence[ReceptiveFields]], image_size: int) -> Figure:
    """Width of the region that output pixels depend on, beside the patch size, over noise levels.

    Args:
        found: for each sample the fields at its steps, the same noise levels for all.
        image_size: what is drawn as patch size where whole images compete.
    """
    figure, (panel,) = _panels(1, 5.4, 4)
    levels = [step.sigma for step in found[0]]
    widths = [
        np.concatenate([fields.widths.flatten().cpu().numpy() for fields in step]) for step in zip(*found, strict=True)
    ]
    low, lower, median, upper, high = np.array([np.quantile(step, [0, 0.25, 0.5, 0.75, 1]) for step in widths]).T
    panel.fill_between(levels, low, high, color=ACCENT, alpha=0.12, lw=0, label="all pixels")
    panel.fill_between(levels, lower, upper, color=ACCENT, alpha=0.25, lw=0, label="middle half")
    panel.plot(levels, median, "o-", color=ACCENT, ms=3.5, lw=1.5, label="median width of what a pixel depends on")
    sizes = [step.patch_size or image_size for step in found[0]]
    local = found[0][0].patch_size is not None
    panel.plot(levels, sizes, "s--", color=INK, ms=3, lw=1, label="patch size" if local else "image size")
    panel.set(xscale="log", xlabel="noise sigma / alpha", ylabel="pixels across", ylim=(0, None))
    panel.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()


def _panels(count: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'charts need matplotlib ({error}): pip install "patchscore[plots]"') from None
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False).flatten()
    for spare in panels[count:]:
        spare.remove()
    for panel in panels[:count]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(10)
    return figure, list(panels[:count])
