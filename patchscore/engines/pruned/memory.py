"""What `pruned` remembers along a trajectory: windows that were heavy for a pixel at one noise level, for the next.

They are counted surely there, like those that the search for known windows finds. Draws of two noise levels are
independent, so the sample of the other windows stays what it is, whatever is remembered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...bank import PatchBank
from ...index import IndexedSize
from ...windows import Group, span
from .request import KNOWN


class Memory:
    """Of the images of one batch, each by the bank that competes and its place in the batch."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Remembered] = {}

    def of(self, bank: PatchBank, item: int, z: Tensor, sigma: float) -> Remembered:
        """What is remembered of an image, at a further noise level.

        Nothing where z [C, H, W] is not what the last one can have become in a step: a step of the flow or of an
        ancestral sampler moves a pixel by less than that noise, and another image, or another crop, lies farther off.
        """
        key = (id(bank), item)
        held = self._held.get(key)
        if held is None or held.z.shape != z.shape or (held.z - z).square().mean().item() > held.sigma**2:
            self._held[key] = held = Remembered(bank, *z.shape[1:])
        held.z, held.sigma = z, sigma
        return held


class Remembered:
    """Heavy windows of each pixel of an image, by where they are centred, at any patch size.

    Attributes:
        budget: what a tolerance took last, or None.
    """

    z: Tensor
    sigma: float

    def __init__(self, bank: PatchBank, height: int, width: int):
        self.bank = bank  # held, as it is known by its address
        self.budget: float | None = None
        self._centres = torch.full((height, width, KNOWN), -1)

    def recall(self, part: IndexedSize, group: Group) -> Tensor:
        """[pixels of the group, KNOWN] windows of `part`, or -1."""
        centres = self._centres[span(group.rows.queries), span(group.cols.queries)]
        height, width = part.images.shape[2:]
        image, row, col = centres // (height * width), centres // width % height, centres % width
        inside = (row >= part.rows.start) & (row < part.rows.stop) & (col >= part.cols.start) & (col < part.cols.stop)
        ids = image * part.windows_per_image + (row - part.rows.start) * len(part.cols) + col - part.cols.start
        return torch.where(inside & (centres >= 0), ids, -1).flatten(0, 1).contiguous()

    def keep(self, part: IndexedSize, group: Group, ids: Tensor) -> None:
        """Remembers windows of `part`, [pixels of the group, KNOWN] or -1."""
        height, width = part.images.shape[2:]
        place = ids % part.windows_per_image
        row, col = place // len(part.cols) + part.rows.start, place % len(part.cols) + part.cols.start
        centres = torch.where(ids >= 0, (ids // part.windows_per_image * height + row) * width + col, -1)
        shape = (len(group.rows.queries), len(group.cols.queries), KNOWN)
        self._centres[span(group.rows.queries), span(group.cols.queries)] = centres.view(shape)
