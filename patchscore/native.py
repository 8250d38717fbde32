"""The C++ extension `patchscore._native`, or why there is none."""

from __future__ import annotations

import numpy as np
from torch import Tensor

try:
    import patchscore._native as native

    missing = None
except ImportError as error:  # not built, or built for another Python
    native = None
    missing = f"the C++ extension was not built ({error})"

TILE = 8
"""Windows that lie side by side in a tile: [pairs of bytes, TILE, 2], each byte less 128."""


def pack(images: Tensor, ids: np.ndarray, sizes: np.ndarray, k: int, threads: int) -> np.ndarray:
    """The bytes of some windows of uint8 images, cell by cell in whole tiles: [tiles, pairs, TILE, 2]."""
    assert native is not None
    pairs = -(-images.shape[1] * k * k // 2)
    tiles = np.empty((int((-(-sizes // TILE)).sum()), pairs, TILE, 2), np.int8)
    native.pruned_pack(images.numpy(), ids, np.ascontiguousarray(sizes), k, tiles.reshape(-1), threads)
    return tiles
