"""What every kind of source is opened as: a number of images, item i on demand, and what is known of the labels."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "x", "x_train", "data", "arr_0")
LABEL_KEYS = ("label", "labels", "fine_label", "fine_labels", "cls", "y", "y_train", "target", "targets")


class UnreadableImage(ValueError):
    """One image that cannot be read; what `skip_bad` leaves out."""


@dataclass(frozen=True)
class Source:
    """`item(i)` is image i, a PIL image or an array [C, H, W] of any numbers, and its label: a number, a text or None.

    `labels` are the numbers that are known without loading items, or None. Labels that are texts are numbered by
    their place in `class_names`, or without those in the order of the texts.
    """

    name: str
    count: int
    item: Callable[[int], tuple[Any, Any]]
    item_name: Callable[[int], str]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    threads: int = 1


@dataclass
class Wanted:
    """What the caller asked for beyond the source itself; each wish is used by the kind of source that knows it."""

    labels: bool = True
    limit: int | None = None
    split: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    memory_limit: int = 1 << 40
    unused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.unused = {name for name in ("split", "image_key", "label_key") if getattr(self, name) is not None}

    def choose_split(self, name: str, offered: Iterable[str], default: str | None = None) -> str:
        """The split to read, one of those offered; without a default the caller has to say which of several."""
        offered = list(offered)
        self.unused.discard("split")
        usual = default if default in offered else offered[0] if len(offered) == 1 else None
        split = self.split or usual
        if split is None or split not in offered:
            got = "" if self.split is None else f"split: got {split!r}, "
            raise ValueError(
                f"{name}: {got}holds {listed(offered, 'and')}; pass split={offered[0]!r} (on the command line "
                f"--split {offered[0]}){' or another' if len(offered) > 1 else ''}"
            )
        return split

    def choose_keys(
        self, name: str, held: Sequence[str], images: Sequence[str] = IMAGE_KEYS, labels: Sequence[str] = LABEL_KEYS
    ) -> tuple[str, str | None]:
        """The names under which a source that holds several things has the images and the labels."""
        self.unused -= {"image_key", "label_key"}
        image = self.image_key or next((key for key in images if key in held), None)
        label = self.label_key or next((key for key in labels if key in held), None)
        for asked, key in (("image_key", image), ("label_key", label)):
            if getattr(self, asked) is not None and key not in held:
                raise ValueError(f"{name}: {asked}: got {key!r}, holds {listed(held)}")
        if image is None:
            raise ValueError(f"{name}: holds {listed(held)}, takes images called {listed(images)}; or pass image_key=")
        return image, label if self.labels else None

    def check_memory(self, name: str, needed: int) -> None:
        """ValueError where something that has to be read whole takes more bytes than are allowed."""
        if needed > self.memory_limit:
            raise ValueError(
                f"{name}: takes {needed / 1e9:.3g} GB to read, more than the memory limit of "
                f"{self.memory_limit / 1e9:.3g} GB"
            )

    def check_used(self, name: str) -> None:
        """ValueError where a wish met a source that knows nothing of it."""
        for wish in sorted(self.unused):
            what = "splits" if wish == "split" else "names to choose from"
            raise ValueError(f"{wish}: got {getattr(self, wish)!r}, but {name} has no {what}")


def listed(names: Iterable[object], conjunction: str = "or", most: int = 8) -> str:
    """a, b or c"""
    words = [str(name) for name in names]
    if len(words) > most:
        words = [*words[:most], f"{len(words) - most} more"]
        conjunction = "and"
    return f" {conjunction} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or "nothing"


def printable(text: str) -> str:
    """The text with control characters, which names in archives and folders can have, written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(error: BaseException) -> str:
    """What went wrong in one line, for errors of libraries that say it in several or not at all."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    return " ".join(str(error).split()) or type(error).__name__


def unreadable(name: str, error: Exception) -> UnreadableImage:
    """The error of one image, whatever its decoder stumbled over."""
    return UnreadableImage(f"{name}: cannot be read ({one_line(error)})")


@contextmanager
def named(path: object) -> Iterator[None]:
    """Every error within is a ValueError of one line that begins with `path`.

    Decoders of foreign bytes raise whatever they stumble over: zlib.error, struct.error, KeyError, MemoryError.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:
        text = one_line(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def joined(name: str, parts: Sequence[Source]) -> Source:
    """One source after the other, as one."""
    if len(parts) == 1:
        return parts[0]
    ends = list(accumulate(part.count for part in parts))
    names = parts[0].class_names
    if any(part.class_names != names for part in parts):
        raise ValueError(f"{name}: {parts[0].name} and others in it have different class names")
    unlabelled = [part for part in parts if part.labels is None and part.count]
    if unlabelled and len(unlabelled) < len(parts):
        raise ValueError(f"{name}: {unlabelled[0].name} has no labels, where others have; or pass labels=False")

    def of(i: int) -> tuple[Source, int]:
        part = bisect.bisect_right(ends, i)
        return parts[part], i - (ends[part - 1] if part else 0)

    def item(i: int) -> tuple[Any, Any]:
        part, j = of(i)
        return part.item(j)

    def item_name(i: int) -> str:
        part, j = of(i)
        return part.item_name(j)

    labels = None if unlabelled else np.concatenate([part.labels for part in parts if part.labels is not None])
    return Source(name, ends[-1], item, item_name, labels, names, min(part.threads for part in parts))
