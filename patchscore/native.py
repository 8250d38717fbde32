"""The C++ extension `patchscore._native`, or why there is none."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

try:
    import patchscore._native as native

    missing = None
except ImportError as error:  # not built, or built for another Python
    native = None
    missing = f"the C++ extension was not built ({error})"

TILE = 8
"""Windows that lie side by side in a tile: of bytes [pairs, TILE, 2], each less 128; of floats [2 pairs, TILE]."""


def pack(images: Tensor, ids: np.ndarray, sizes: np.ndarray, k: int, threads: int) -> np.ndarray:
    """Some windows of images, cell by cell in whole tiles: [tiles, 2 pairs TILE] int8, or float32 of such images."""
    assert native is not None
    values = 2 * -(-images.shape[1] * k * k // 2) * TILE
    tiles: np.ndarray = np.empty((int((-(-sizes // TILE)).sum()), values), tile_type(images))
    native.pruned_pack(images.numpy(), ids, np.ascontiguousarray(sizes), k, tiles.reshape(-1), threads)
    return tiles


def tile_type(images: Tensor) -> type:
    """Of what tiles of these images hold."""
    return np.int8 if images.dtype == torch.uint8 else np.float32
