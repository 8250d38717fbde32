"""A comparison as one web page: the league table, paired differences and pictures, in a single file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources

from ..evaluate import FIGURES, Comparison, finite
from .images import grid, png
from .pages import script_safe

SHOWN = 12
"""Images of each theory on the page."""


def league_page(comparison: Comparison, title: str, lines: Sequence[str] = ()) -> str:
    """The page as text, from `data/compare.html`.

    Args:
        comparison: what `compare` found.
        title: the heading.
        lines: what to say below it.
    """
    template = resources.files("patchscore").joinpath("data/compare.html").read_text(encoding="utf-8")
    rows = {"network": comparison.images, **{name: of.images for name, of in comparison.machines.items()}}
    pictures = []
    for name, images in rows.items():
        shown = images[:SHOWN]
        picture = png(grid(shown, columns=len(shown), zoom=1))
        pictures.append([name, f"data:image/png;base64,{base64.b64encode(picture).decode()}"])
    data = {
        "title": title,
        "lines": list(lines),
        "figures": [{"name": name, "title": of.title, "more": of.more_is_nearer} for name, of in FIGURES.items()],
        "rows": comparison.rows(),
        "differences": [row for figure in FIGURES for row in comparison.differences(figure)],
        "sigmas": comparison.sigmas,
        "pictures": pictures,
    }
    return template.replace("/*DATA*/null", script_safe(finite(data)))
