"""The CPU backend of `pruned`: hands one image's queries to the native scan (csrc/pruned)."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor
from torch.nn import functional

from ...index import SIBLINGS, IndexedSize, Strata
from ...native import native
from ...posterior import PosteriorSum
from .policy import Policy
from .request import Request, Scanned, coefficients, encoded, least_bits


def scan(request: Request, policy: Policy) -> Scanned | None:
    """The sums of a request; None where a query is too far outside the pixels' range to be compared."""
    part, sigma = request.part, request.sigma
    queries = encoded(request.windows, part.images.dtype, sigma)
    if queries is None:
        return None
    count, channels = len(request.windows), request.windows.shape[1]
    features, rest = part.project(request.windows)
    out = {name: torch.zeros(count, dtype=torch.float64) for name in ("m", "s", "s2", "ss")}
    out |= {name: torch.zeros(count, channels, dtype=torch.float64) for name in ("v", "vs", "vv")}
    if request.moments:
        out |= {name: torch.zeros_like(out["s"]) for name in ("sl", "ee")}
        out |= {name: torch.zeros_like(out["v"]) for name in ("v2", "qq")}
    remembered = None if request.remembered is None else request.remembered.clone()  # the scan writes to it
    recalled = remembered is not None and bool((remembered >= 0).any())
    fits, pairs = torch.zeros(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
    competing = _competing(part, request.allowed)
    assert native is not None
    native.pruned_scan(
        images=part.images.numpy(),
        patch_size=part.k,
        sizes=part.cells.size.numpy(),
        ids=part.ids,
        tiles=part.tiles,
        allowed=None if request.allowed is None else request.allowed.numpy(),
        parents=_strata(part.parents, competing.view(-1, SIBLINGS).sum(1), part, sigma),
        children=_strata(part.cells, competing, part, sigma),
        features=features.contiguous().numpy(),
        rest=rest.numpy(),
        windows=queries.windows.numpy(),
        shift=queries.shift.numpy(),
        bits=queries.bits.numpy(),
        base=queries.base.numpy(),
        columns=request.columns,
        budget=max(1.0, (request.budget or 1.0) * request.competing),
        largest_budget=policy.further_most * request.competing,
        least=least_bits(request, policy),
        whole=request.budget is None or request.budget > policy.exact_budget,
        key=request.key,
        policy=dataclasses.replace(policy, pilot=policy.recalled_pilot) if recalled else policy,
        **{"v2": None, "sl": None, "qq": None, "ee": None} | {name: x.numpy() for name, x in out.items()},
        fits=fits.numpy(),
        pairs=pairs.numpy(),
        remembered=None if remembered is None else remembered.numpy(),
        threads=torch.get_num_threads(),
        simd=os.environ.get("PATCHSCORE_SIMD", ""),
    )  # fmt: skip
    sums = {name: x if x.ndim == 2 else x[:, None] for name, x in out.items()}
    return Scanned(PosteriorSum(**sums, span=1.0, pairs=int(pairs.sum())), fits.bool(), remembered)


def table(strata: Strata, sigma: float, dims: int) -> Tensor:
    """[groups, 2, 2 rank + 2, SIBLINGS] the coefficients (request.py), SIBLINGS strata side by side."""
    whole = coefficients(strata, sigma, dims)
    padded = functional.pad(whole, (0, 0, 0, 0, 0, -len(whole) % SIBLINGS))
    return padded.unflatten(0, (-1, SIBLINGS)).permute(0, 2, 3, 1).float().contiguous()


def _strata(strata: Strata, competing: Tensor, part: IndexedSize, sigma: float) -> tuple:
    tables = part.__dict__.setdefault("_tables", {})
    key = (sigma, len(strata.size))
    found = tables.get(key)  # other threads may clear the tables at any time
    if found is None:
        if len(tables) >= 2 and not any(held[0] == sigma for held in list(tables)):
            tables.clear()
        found = tables[key] = table(strata, sigma, len(part.centre))
    values = (strata.value.contiguous().numpy(), strata.value_square.contiguous().numpy())
    return found.numpy(), competing.float().numpy(), *values


def _competing(part: IndexedSize, allowed: Tensor | None) -> Tensor:
    """[cells] windows that compete."""
    if allowed is None:
        return part.cells.size
    held = part.__dict__.setdefault("_competing", {})
    if id(allowed) not in held:
        image = torch.from_numpy(part.ids // part.windows_per_image)
        cell = torch.repeat_interleave(torch.arange(len(part.cells.size)), part.cells.size)
        count = torch.bincount(cell[allowed[image].bool()], minlength=len(part.cells.size))
        held[id(allowed)] = (allowed, count)
    return held[id(allowed)][1]
