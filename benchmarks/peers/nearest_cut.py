"""The posterior mean over the five nearest windows (arXiv 2606.04299), which FAISS finds: a cut without stated error.

Distances are those of whole windows in single precision. An inverted file of sqrt(M) cells is searched in its nprobe
nearest cells; where more of them change nothing, what is left is the error of the cut alone.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from . import rows

NEAREST = 5  # windows, as published
MOST_TRAINED = 64  # windows a cell that k-means sees: FAISS warns below 39 and draws 256 at most


class NearestCut:
    """Windows of training images [N, C, H, W] with values in [-1, 1], in cells."""

    def __init__(self, train: torch.Tensor, k: int):
        import faiss

        windows, self.centres = rows.window_rows(train, k)
        self.k, self.cells = k, round(len(windows) ** 0.5)
        self.found = faiss.index_factory(windows.shape[1], f"IVF{self.cells},Flat")
        self.found.cp.max_points_per_centroid = MOST_TRAINED
        self.found.train(windows.numpy())
        self.found.add(windows.numpy())

    def interior_mean(self, z: torch.Tensor, sigma: float, nprobe: int, nearest: int = NEAREST) -> torch.Tensor:
        """[B, C, H - k + 1, W - k + 1]: the denoised pixels whose windows lie inside z [B, C, H, W]."""
        size = [side - self.k + 1 for side in z.shape[2:]]
        queries = functional.unfold(z, self.k).transpose(1, 2).flatten(0, 1).contiguous()
        self.found.nprobe = nprobe
        squares, at = (torch.from_numpy(part) for part in self.found.search(queries.numpy(), nearest))
        # Cells that are nearly empty may hold fewer windows than asked for: position -1.
        weights = torch.softmax(torch.where(at < 0, -torch.inf, squares / (-2 * sigma**2)), 1)
        mean = (weights[..., None] * self.centres[at.clamp(min=0)]).sum(1)
        return mean.unflatten(0, (len(z), *size)).permute(0, 3, 1, 2)
