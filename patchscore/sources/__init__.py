"""Where images come from: one file a kind of source, each opened as a `Source`, and `read` that collects them."""

from __future__ import annotations

from .image import MOST_PIXELS
from .opening import BUILT_IN
from .reading import Images, read, read_sizes
from .source import IMAGE_KEYS, LABEL_KEYS, Source, UnreadableImage
from .tensors import read_values

__all__ = [
    "BUILT_IN",
    "IMAGE_KEYS",
    "LABEL_KEYS",
    "MOST_PIXELS",
    "Images",
    "Source",
    "UnreadableImage",
    "read",
    "read_sizes",
    "read_values",
]
