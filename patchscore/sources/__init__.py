"""Where images come from: one file a kind of source, each opened as a `Source`, and `read` that collects them."""

from __future__ import annotations

from .image import MOST_PIXELS
from .mapped import Mapped
from .opening import BUILT_IN
from .reading import Images, MixedSizes, memory_of_machine, read, read_mapped, read_sizes
from .source import IMAGE_KEYS, LABEL_KEYS, Source, UnreadableImage
from .tensors import read_values
from .writing import write

__all__ = [
    "BUILT_IN",
    "IMAGE_KEYS",
    "LABEL_KEYS",
    "MOST_PIXELS",
    "Images",
    "Mapped",
    "MixedSizes",
    "Source",
    "UnreadableImage",
    "memory_of_machine",
    "read",
    "read_mapped",
    "read_sizes",
    "read_values",
    "write",
]
