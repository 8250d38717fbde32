"""New images from one: a texture that tiles, a landscape, and a wider one: python examples/synthesis.py out.png [part]

Every panel is as large as the part says (1 by default): 0.25 takes seconds, 1 about a minute on one core.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import patchscore as ps
from patchscore.draw.images import to_pil

here, part = Path(__file__).parent, float(sys.argv[2]) if len(sys.argv) > 2 else 1.0


def size(height, width):
    return max(40, round(height * part / 8) * 8), max(40, round(width * part / 8) * 8)


gravel, rocket = (ps.PatchBank.open(here / name) for name in ("gravel.png", "rocket.png"))
# Patches as wide as several stones keep them apart.
coarse_to_fine = {"levels": 2, "patch_size": [19, 13], "steps": [14, 6], "strength": 0.2}
tile = ps.synthesize(gravel, size(96, 96), tile=True, **coarse_to_fine).image
landscape = ps.synthesize(rocket, size(96, 192), steps=8).image
wide = ps.synthesize(rocket, size(72, 192), start="source", steps=8).image

panels = [to_pil(torch.cat([torch.cat([tile, tile], 2)] * 2, 1)), to_pil(landscape), to_pil(wide)]
exemplars = [to_pil(bank.chunk(0, 1)[0]) for bank in (gravel, rocket, rocket)]
gap = 8
width = gap + sum(max(a.width, b.width) + gap for a, b in zip(exemplars, panels, strict=True))
above = 2 * gap + max(picture.height for picture in exemplars)
page = Image.new("RGB", (width, above + max(picture.height for picture in panels) + gap), "white")
left = gap
for exemplar, panel in zip(exemplars, panels, strict=True):
    page.paste(exemplar, (left, above - gap - exemplar.height))
    page.paste(panel, (left, above))
    left += max(exemplar.width, panel.width) + gap
page.save(sys.argv[1], optimize=True)
