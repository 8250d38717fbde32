"""Copy or mosaic: how near samples are to single training images, and how many training images own their pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .bank import PatchBank
from .explain import ExplainedSample, Explanation
from .nearest import nearest_images, usual_nearness

MEMORY_LEVEL = 0.5
"""The noise level at which sources are counted: the layout is settled, and details are being put in place."""


def count_sources(explanation: Explanation) -> tuple[Tensor, Tensor]:
    """[B] each: how many training images own a pixel, and their effective number 1 / sum (share of pixels)^2."""
    owners, _ = explanation.owners()
    counts = [row.unique(return_counts=True)[1].double() for row in owners.flatten(1)]
    distinct = torch.tensor([len(count) for count in counts])
    effective = torch.stack([1 / (count / count.sum()).square().sum() for count in counts])
    return distinct, effective


def memorisation_report(
    earlier: Mapping[str, Any], samples: Sequence[ExplainedSample], bank: PatchBank
) -> dict[str, Any]:
    """How many training images each explained sample is made of, beside how near the nearest is.

    Args:
        earlier: the report on samples explained before, or an empty one.
        samples: those explained now.
        bank: the training images.

    Returns:
        For the samples explained so far their nearest training image and rms distance, the distinct and effective
        number of training images that own their pixels at the noise level given; and the same distance between
        training images and their nearest others, for scale.
    """
    known = {entry["image"]: entry for entry in earlier.get("samples", [])}
    near = nearest_images(torch.stack([sample.image for sample in samples]).cpu(), bank)
    for i, sample in enumerate(samples):
        step = min(sample.steps, key=lambda step: abs(math.log(step.sigma / MEMORY_LEVEL)))
        distinct, effective = count_sources(step)
        known[sample.number] = {
            "image": sample.number,
            "nearest": int(near.image[i]),
            "rms": round(float(near.rms[i]), 4),
            "sigma": step.sigma,
            "sources": int(distinct[0]),
            "effective_sources": round(float(effective[0]), 2),
        }
    usual = usual_nearness(bank).rms.tolist() if len(bank) > 1 else []
    return {
        "samples": [known[image] for image in sorted(known)],
        "training_images_to_nearest_other": [round(rms, 4) for rms in usual],
    }
