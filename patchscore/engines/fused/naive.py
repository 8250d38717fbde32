"""What the kernel of `fused` computes, in float64 and with a matrix of logits: its definition, which tests hold it to.

Everything here is about one launch: query rows of one group over patch rows of some images. Log-weights are in bits,
relative to the query's own -|q|^2 / (2 sigma^2) where the plan takes products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan
from .rows import Patches, Queries


def numbers(rows: Tensor, plan: Plan, low: int, at: int) -> Tensor:
    """[..., size] the numbers a row stands for: high halves, and `low` leading low halves that begin at column `at`."""
    x = rows[..., : plan.size].double()
    x[..., :low] += rows[..., at : at + low].double()
    return x


def log_weights(queries: Queries, patches: Patches, plan: Plan) -> Tensor:
    """[L, Q, M] bits of every window. Rows that fill the last tile are not among them."""
    per_unit, _, c = queries.scale.double()[..., None]  # [L, Q, 1] each
    rows = patches.rows[:, : patches.filled]
    if not plan.exact:
        return (queries.rows.double() @ rows.double().mT) * per_unit
    q = numbers(queries.rows, plan, plan.q_lo, plan.size)
    p = numbers(rows, plan, plan.p_lo, plan.size + plan.q_lo)
    difference = q[:, :, None] - c[..., None] * p[:, None]  # [L, Q, M, size]
    return -0.5 * difference.square().sum(-1) * per_unit / c


def pilot_reference(bits: Tensor, tile: int, every: int, mean_bits: float) -> Tensor:
    """[L, Q] the log-weight that a weight of 1 has: the mean weight of every `every`-th tile is 2^mean_bits."""
    chosen = torch.arange(bits.shape[-1]) // tile % every == 0
    rows = -(-bits.shape[-1] // (tile * every)) * tile  # the last tile may be filled with rows of weight zero
    largest = bits[..., chosen].amax(-1, keepdim=True)
    total = torch.exp2(bits[..., chosen] - largest).sum(-1)
    return largest[..., 0] + torch.log2(total / rows) - mean_bits


def sums(bits: Tensor, values: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """[L, Q, NV] sum of w values, and [L, Q] sum of w^2, of weights w = 2^(bits - reference)."""
    w = torch.exp2(bits - reference[..., None])
    return w @ values.double(), w.square().sum(-1)


def splits(patches: int, splits: int, tile: int) -> list[range]:
    """The patches of each split: whole tiles, as even as can be, none empty."""
    tiles = -(-patches // tile)
    each = -(-tiles // splits) * tile
    return [range(first, min(first + each, patches)) for first in range(0, patches, each)]
