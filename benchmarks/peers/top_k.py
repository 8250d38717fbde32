"""Softmax over the nearest windows that a FAISS index finds: a cut without a stated error."""

from __future__ import annotations

import torch

from patchscore.pixels import to_values

NEAREST = 1000  # windows
STEP = 1 << 17  # windows whose features are computed together


def faiss_index(part):
    """The windows of one patch size in a FAISS inverted file of half-float principal axes, kept beside the part."""
    if "faiss_index" not in part.__dict__:
        import faiss

        cells = max(16, round(len(part.ids) ** 0.5))
        found = faiss.index_factory(part.rank, f"IVF{cells},SQfp16")
        for start in range(0, len(part.ids), STEP):
            features = part.project(part.pixels(part.ids[start : start + STEP]))[0].numpy()
            if not found.is_trained:
                found.train(features)
            found.add_with_ids(features, part.ids[start : start + STEP])
        part.__dict__["faiss_index"] = found
    return part.__dict__["faiss_index"]


def interior_mean(z, sigma, index, k, nprobe):
    """[B, C, rows, cols] where both axes are free; `nprobe` cells are searched."""
    part, r = index.at(k), k // 2
    windows = z.unfold(2, k, 1).unfold(3, k, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).contiguous()
    found = faiss_index(part)
    found.nprobe = nprobe
    near, ids = found.search(part.project(windows)[0].numpy(), NEAREST)
    near, ids = torch.from_numpy(near), torch.from_numpy(ids)
    weights = torch.softmax(torch.where(ids < 0, -torch.inf, -near / (2 * float(sigma[0]) ** 2)), 1).nan_to_num()
    rows, cols = len(part.rows), len(part.cols)
    image, at = ids.clamp(min=0) // (rows * cols), ids.clamp(min=0) % (rows * cols)
    values = to_values(index.images[image, :, r + at // cols, r + at % cols])
    mean = (weights[..., None] * values).sum(1)
    return mean.unflatten(0, (len(z), rows, cols)).permute(0, 3, 1, 2)
