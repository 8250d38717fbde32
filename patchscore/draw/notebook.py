"""Results as notebooks show them: `_repr_html_` of Estimate, Explanation and Comparison, a sentence and a picture.

The results lie below pictures in the order of imports, so `attach` gives them the method from here.
"""

from __future__ import annotations

import base64
import html

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..denoiser import Estimate
from ..evaluate import Comparison
from ..explain import Explanation
from ..pixels import to_values
from .images import default_zoom, grid, pairs, png
from .mosaic import source_colour

SHOWN = 8
"""Images of a batch that are shown."""


def estimate_html(estimate: Estimate) -> str:
    """The denoised images; below them, where there is any, the standard error (white is its maximum)."""
    mean = estimate.mean[:SHOWN]
    parts = [_picture(grid(mean, columns=len(mean)), "denoised images")]
    stderr = estimate.stderr[:SHOWN].amax(1, keepdim=True)
    if stderr.max() > 0:
        parts.append(_picture(grid(2 * stderr / stderr.max() - 1, columns=len(mean)), "standard error"))
    return _block(repr(estimate), *parts)


def explanation_html(explanation: Explanation) -> str:
    """The noisy and denoised images, and each pixel in the colour of the training image with the largest share."""
    count = min(SHOWN, len(explanation.image))
    noisy, spread = explanation.z[:count], max(1.0, 2 * float(explanation.z.std()))
    owners = explanation.owners()[0][:count].cpu()
    number, rank = owners.unique(return_inverse=True)
    colours = np.array([source_colour(r) for r in range(len(number))], np.uint8)
    sources = to_values(torch.from_numpy(colours[rank.numpy()]).movedim(-1, 1))
    rows = {"noisy": noisy / spread, "denoised": explanation.mean[:count], "source": sources}
    if noisy.shape[2:] != sources.shape[2:]:
        return _block(repr(explanation))  # one pixel alone
    return _block(repr(explanation), *(_picture(grid(row, columns=count), name) for name, row in rows.items()))


def comparison_html(comparison: Comparison) -> str:
    """The network's images above each machine's, from the same seeds."""
    rows: dict[str, Tensor] = {"network": comparison.images[:SHOWN]}
    rows |= {name: of.images[:SHOWN] for name, of in comparison.machines.items()}
    return _block(repr(comparison), _picture(pairs(rows, default_zoom(comparison.images.shape[-1])), "images"))


def attach() -> None:
    """Gives the results their `_repr_html_`."""
    for kind, shown in (
        (Estimate, estimate_html),
        (Explanation, explanation_html),
        (Comparison, comparison_html),
    ):
        setattr(kind, "_repr_html_", shown)  # noqa: B010 (mypy knows no such attribute)


def _picture(image: Image.Image, title: str) -> str:
    data = base64.b64encode(png(image)).decode()
    return f'<img alt="{html.escape(title)}" title="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _block(sentence: str, *parts: str) -> str:
    return f"<div><code>{html.escape(sentence)}</code>{''.join(f'<div>{part}</div>' for part in parts)}</div>"
