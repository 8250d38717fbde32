"""Which training windows compete at which pixel: the words a machine uses to ask and an engine to answer.

A competition is a product of its two axes. On a free axis every query coordinate competes with one range of training
coordinates; on a locked axis it competes with itself alone. The image splits into groups of pixels that share a rule:
one group in the interior, eight more along edges and corners where a machine is broken at the border.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of a group: query coordinates, and the training coordinates (window centres) they compete with.

    `windows=None` locks the axis: query coordinate i competes with training coordinate i only.
    """

    queries: range
    windows: range | None = None

    @property
    def locked(self) -> bool:
        return self.windows is None

    @property
    def centres(self) -> range:
        """The training coordinates that this axis reads at all."""
        return self.queries if self.windows is None else self.windows

    @property
    def windows_per_query(self) -> int:
        return 1 if self.windows is None else len(self.windows)


@dataclass(frozen=True)
class Group:
    """Pixels whose competing windows follow one rule: the product of a rule for rows and a rule for columns."""

    rows: Axis
    cols: Axis

    @property
    def pixels(self) -> int:
        return len(self.rows.queries) * len(self.cols.queries)

    @property
    def windows_per_image(self) -> int:
        """Windows of one training image that compete at each pixel of the group."""
        return self.rows.windows_per_query * self.cols.windows_per_query


@dataclass(frozen=True)
class Competition:
    """All groups of one machine at one patch size; together their pixels cover the image once.

    `patch_size=None` means whole images: one distance a training image, shared by all pixels, and no groups.
    `padding_mode` says how the noisy image is continued beyond its border: "zeros" or "circular". Training images are
    continued with zeros; in circular competitions every competing window lies inside its image.
    """

    patch_size: int | None
    padding_mode: str
    groups: tuple[Group, ...] = ()

    @property
    def pairs_per_image(self) -> int:
        """(query pixel, window) pairs that one training image adds for one noisy image; one where images compete."""
        if self.patch_size is None:
            return 1
        return sum(group.pixels * group.windows_per_image for group in self.groups)


WHOLE_IMAGE = Competition(patch_size=None, padding_mode="zeros")
