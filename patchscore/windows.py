"""Which training windows compete at which pixel, and how windows lie in images.

A competition is a product of its two axes. On a free axis every query coordinate competes with one range of training
coordinates; on a locked axis it competes with itself alone. The image splits into groups of pixels that share a rule:
one group in the interior, eight more along edges and corners where a machine is broken at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


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

    def only(self, groups: Sequence[Group]) -> Competition:
        """The same rule for some of its groups."""
        return Competition(self.patch_size, self.padding_mode, tuple(groups))

    def at(self, rows: range, cols: range) -> Competition:
        """The same rule for the pixels in these rows and columns."""
        parts = [Group(_part(group.rows, rows), _part(group.cols, cols)) for group in self.groups]
        return self.only([part for part in parts if part.pixels])


def _part(axis: Axis, coordinates: range) -> Axis:
    """The axis for those of its queries that are among the coordinates."""
    start, stop = max(axis.queries.start, coordinates.start), min(axis.queries.stop, coordinates.stop)
    return Axis(range(start, max(start, stop)), axis.windows)


WHOLE_IMAGE = Competition(patch_size=None, padding_mode="zeros")


# The competitions of local machines.


def local_competition(height: int, width: int, k: int) -> Competition:
    """Windows at the same position compete, zero-padded."""
    return Competition(widest(k, height, width), "zeros", (Group(Axis(range(height)), Axis(range(width))),))


def equivariant_competition(height: int, width: int, k: int, padding_mode: str) -> Competition:
    """Windows from every position compete; with "zeros" equivariance is broken at the border."""
    k = widest(k, height, width)
    if padding_mode == "circular":
        inside = Group(
            Axis(range(height), windows=_interior(height, k)),
            Axis(range(width), windows=_interior(width, k)),
        )
        return Competition(k, "circular", (inside,))
    groups = (Group(rows, cols) for rows in _broken_axis(height, k) for cols in _broken_axis(width, k))
    return Competition(k, "zeros", tuple(groups))


def _interior(length: int, k: int) -> range:
    """Coordinates whose window of size k lies inside an axis of this length."""
    return range(k // 2, length - k // 2)


def _broken_axis(length: int, k: int) -> list[Axis]:
    """An axis with equivariance broken at the border: near edge locked, interior free, far edge locked."""
    interior = _interior(length, k)
    if len(interior) <= 1:
        return [Axis(range(length))]
    parts = [Axis(range(interior.start)), Axis(interior, windows=interior), Axis(range(interior.stop, length))]
    return [part for part in parts if len(part.queries)]


def widest(k: int, height: int, width: int) -> int:
    """k, cut to the size at which a window holds the whole image from every pixel; beyond it nothing changes."""
    return min(k, 2 * max(height, width) - 1)


# Windows and images.


def span(coordinates: range) -> slice:
    """The slice of an axis that holds these coordinates."""
    return slice(coordinates.start, coordinates.stop)


def windows_as_rows(images: Tensor, k: int, rows: range, cols: range, group: Group) -> Tensor:
    """k x k windows of padded images at rows x cols as [L, n * free, C k^2], L being the group's locked coordinates."""
    windows = images.unfold(2, k, 1).unfold(3, k, 1)[:, :, span(rows), span(cols)]
    n, channels = windows.shape[:2]
    lr, fr = (len(rows), 1) if group.rows.locked else (1, len(rows))
    lc, fc = (len(cols), 1) if group.cols.locked else (1, len(cols))
    split = windows.reshape(n, channels, lr, fr, lc, fc, k, k)
    return split.permute(2, 4, 0, 3, 5, 1, 6, 7).reshape(lr * lc, n * fr * fc, channels * k * k)


def rows_as_pixels(x: Tensor, batch: int, group: Group) -> Tensor:
    """The inverse of `windows_as_rows` for results: [L, B * free, C] back to [B, C, rows, cols]."""
    rows, cols = len(group.rows.queries), len(group.cols.queries)
    lr, fr = (rows, 1) if group.rows.locked else (1, rows)
    lc, fc = (cols, 1) if group.cols.locked else (1, cols)
    return x.reshape(lr, lc, batch, fr, fc, -1).permute(2, 5, 0, 3, 1, 4).reshape(batch, -1, rows, cols)
