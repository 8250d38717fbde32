"""Sharded: a machine whose bank is spread over ranks; every rank sums over its part, and the sums are added.

A posterior sum is a sum over windows, so it does not matter which rank holds which window: every rank sums over its
own, and wire.py adds the partial sums.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import engines
from ..bank import PatchBank
from ..denoiser import Labels, ScoreMachine
from ..machines import EquivariantLocalScore, IdealScore, LocalScore
from ..pooled import Composed, Pooled, Symmetric
from ..posterior import PosteriorSum, accumulator_dtype, merge
from ..scales import ScaleTable
from ..version import __version__
from ..windows import Competition
from .parts import SpreadBank, owners
from .ranks import Disagreement, Ranks, join
from .wire import added, sum_of

SAME = "all ranks of a Sharded machine take the same"


class Sharded(Composed):
    """A machine over the images of all ranks, of which every rank holds a part.

        bank = ps.PatchBank.open("imagenet64.npy")
        machine = ps.Sharded(ps.EquivariantLocalScore(ps.shard(bank), 7))  # in a script under torchrun
        images = ps.sample(machine, n=16)  # the same images on every rank

    It gives the results of one machine over all images: to rounding (1e-6) where engines are exact, and with the
    standard error of all parts together where `pruned` samples, each rank with draws of its own. Samplers, adapters and
    everything else take it like `machine`; `bank` is the whole bank, in which training images are numbered.

    Every rank calls the same methods with the same arguments: all take part in every sum. One process by itself,
    without torchrun, is one rank with all images.

    Where parts come from `shard`, the whole bank is the one it was given. Other parts, such as files of which every
    rank has one, count in the order of the ranks; pixels of the whole are then fetched from whoever has them.

    With ess=False, as in `denoise` and samplers, ranks exchange means only; standard errors of sampled sums are then
    unknown, and `Estimate.stderr` is 2, the largest error that there can be.

    Args:
        machine: IdealScore, LocalScore or EquivariantLocalScore over this rank's part, with an index of that part or
            none; or Pooled or Symmetric of such.
        ranks: among whom the bank is spread; None: all of this launch.

    Attributes:
        machine: this rank's machine.
        bank: the images of all ranks.
        ranks: this rank's number and theirs.

    Raises:
        TypeError: another machine.
        ValueError: ranks with other options, versions or banks, or without a part of their own; names both ranks.
        RankError: a rank that cannot be reached or that failed, here and whenever the machine is asked.
    """

    def __init__(self, machine: ScoreMachine, ranks: Ranks | None = None):
        self.ranks = join() if ranks is None else ranks
        with self.ranks.failing_together():
            leaves = _leaves(machine)
            facts = {"version": f"patchscore {__version__}, torch {torch.__version__}", **_options(machine)}
            parts = [_part(leaf.bank, self.ranks) for leaf in leaves]
        self.ranks.agree(facts, SAME)
        _check_parts(parts, self.ranks)
        wholes = {id(leaf.bank): self._whole(leaf.bank) for leaf in leaves}
        self.machine = _rebuilt(machine, lambda leaf: _with_own_draws(leaf, self.ranks))
        self.take_over(_rebuilt(machine, lambda leaf: _with_bank(leaf, wholes[id(leaf.bank)])))
        self._sampled = any(leaf.pruned is not None for leaf in leaves)
        self.leaf = leaves[0]
        """One of the machines that this rank's is made of."""
        self._held = self.leaf.bank
        if len(leaves) > 1 and len({id(whole) for whole in wholes.values()}) == 1:
            self._held = self.bank.take(self.numbers(None))

    def _whole(self, bank: PatchBank) -> PatchBank:
        if bank.part is not None:
            return bank.part.whole
        return bank if self.ranks.size == 1 else SpreadBank(bank, self.ranks)

    def take_over(self, machine: ScoreMachine) -> None:
        super().take_over(machine)
        self._over_all = machine
        """The machine over all images, of which only options, labels and image numbers are asked."""

    def redrawn(self, draw: int) -> Sharded:
        if not self._sampled:
            return self
        return self._asking(self.machine.redrawn(draw))

    def within(self, tolerance: float) -> Sharded:
        # The mean over all ranks is a weighted mean of theirs, and so is off by no more than they are.
        return self._asking(self.machine.within(tolerance))

    def following(self) -> Sharded:
        return self._asking(self.machine.following())

    def _asking(self, machine: ScoreMachine) -> Sharded:
        same = copy.copy(self)
        same.machine = machine
        return same

    def check_size(self, size: tuple[int, int], sigmas: Sequence[float], name: str = "size") -> None:
        self.machine.check_size(size, sigmas, name)

    def competition(self, k: int | None) -> Competition:
        # Parts of one bank compete alike.
        return (self.leaf if self._leaves_of_one_bank() else self.machine).competition(k)

    def _leaves_of_one_bank(self) -> bool:
        parts = [leaf.bank.part for leaf in _leaves(self.machine)]
        return isinstance(self.machine, Pooled) and all(part and part.whole is self.bank for part in parts)

    def label_ids(self, labels: Labels, batch: int) -> list[int | None]:
        return self._over_all.label_ids(labels, batch)

    def held(self, label: int | None) -> PatchBank | None:
        return self._held.of_class(label) if self._holds(label) else None

    def numbers(self, label: int | None) -> Tensor:
        """The numbers in `bank` of the images that `held` has."""
        whole, parts = self.bank, [leaf.bank.part for leaf in _leaves(self.machine)]
        if parts[0] is not None:
            own = torch.tensor([part.rank for part in parts if part])
            owned = torch.isin(owners(whole.labels, len(whole), parts[0].of), own)
            numbers = owned.nonzero().flatten()
        else:
            numbers = torch.arange(len(self._held)) + (whole.first if isinstance(whole, SpreadBank) else 0)
        return numbers if label is None or whole.labels is None else numbers[whole.labels[numbers] == label]

    def _holds(self, label: int | None) -> bool:
        return label is None or any(label in leaf.bank.classes for leaf in _leaves(self.machine))

    def sums_of(
        self, label: int | None, z: Tensor, sigmas: Tensor, k: int | None, ess: bool = True, moments: bool = False
    ) -> tuple[PosteriorSum, list[str]]:
        with self.ranks.failing_together():
            if self._holds(label):
                own, names = self.machine.sums_of(label, z, sigmas, k, ess, moments)
            else:
                own, names = _nothing(z, k, moments).with_pairs(0), []
            call = _call(label, z, sigmas, k, ess, moments)
        return self._meet([own], call, ess, sampled=self._sampled)[0], names

    def exact_sums_of(
        self, label: int | None, z: Tensor, sigmas: Tensor, competitions: Sequence[Competition]
    ) -> list[PosteriorSum]:
        with self.ranks.failing_together():
            own = [_nothing(z, competition.patch_size, False) for competition in competitions]
            for leaf in _leaves(self.machine):
                if label is None or label in leaf.bank.classes:
                    found = leaf.exact_sums_of(label, z, sigmas, competitions)
                    own = [merge(before, more) for before, more in zip(own, found, strict=True)]
            call = _call(label, z, sigmas, [competition.patch_size for competition in competitions])
        return self._meet(own, call)

    def product_of(
        self, label: int | None, transposed: bool, z: Tensor, sigmas: Tensor, direction: Tensor, k: int | None
    ) -> Tensor:
        with self.ranks.failing_together():
            machine, bank = self.machine, self.held(label)
            if bank is None:  # the definition sums over no images as over any number
                machine, bank = copy.copy(machine), _none_of(machine.bank)
                machine.engine, machine.engines = "reference", engines.EXACT[-1:]
            call = _call(label, z, sigmas, k, transposed, _digest(direction))
            exact = accumulator_dtype(z.device)
            addend = machine.product(
                transposed,
                z,
                sigmas,
                direction.to(exact),
                bank,
                k,
                lambda sums: self._meet([sums], call, ess=False, fine=True)[0],
            )
        self.ranks.agree(call, SAME)
        return addend if self.ranks.size == 1 else sum_of(addend.to(direction.dtype), self.ranks)

    def heaviest(self, windows: Tensor, distance2: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest windows of all ranks, nearest first, from each rank's.

        Args:
            windows: [3, B, T, H, W] image, row and column, the image by its number in `bank`; -1 where there is none.
            distance2: [B, T, H, W] squared distances, infinite where there is none.
        """
        # Where whole images compete a rank may have fewer than the others.
        self.ranks.agree({}, "")
        count = int(self.ranks.max(torch.tensor([windows.shape[2]])))
        missing = (0, 0, 0, 0, 0, count - windows.shape[2])
        windows, distance2 = F.pad(windows, missing, value=-1), F.pad(distance2, missing, value=torch.inf)
        found = self.ranks.stack(torch.cat([windows.to(distance2), distance2[None]]))  # [ranks, 4, B, T, H, W]
        *places, distance2 = found.transpose(0, 1).movedim(1, 2).flatten(2, 3).unbind(0)
        distance2, order = distance2.sort(dim=1, stable=True)
        return torch.stack(places).gather(2, order.expand(3, *order.shape)).to(windows), distance2

    def _meet(
        self, own: Sequence[PosteriorSum], call: dict[str, Any], ess: bool = True, **options: bool
    ) -> list[PosteriorSum]:
        """The sums of all ranks."""
        if self.ranks.size == 1:
            return list(own)
        self.ranks.agree(call, SAME)
        return [added(sums, self.ranks, ess, **options) for sums in own]

    def __repr__(self) -> str:
        return f"Sharded({self.machine!r}, rank {self.ranks.rank} of {self.ranks.size})"


def _nothing(z: Tensor, k: int | None, moments: bool) -> PosteriorSum:
    """The sum over no windows; whole images have one weight for all pixels."""
    total = PosteriorSum.empty(z.shape, z.device, moments=moments)
    if k is not None:
        return total
    one = {name: total.fields[name][:, :, :1, :1] for name in ("m", "s", "s2", "sl") if name in total.fields}
    return replace(total, **one)  # type: ignore[arg-type]


def _call(label: int | None, z: Tensor, sigmas: Tensor, *options: Any) -> dict[str, Any]:
    """The arguments that must be equal on all ranks."""
    return {"z": _digest(z), "sigma": sigmas.tolist(), "labels": label, "shape": list(z.shape), "asked": options}


def _digest(x: Tensor) -> str:
    return hashlib.blake2b(x.detach().cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def _leaves(machine: ScoreMachine) -> list[ScoreMachine]:
    """The machines with a bank of their own that a machine is made of."""
    if isinstance(machine, Pooled):
        return [leaf for part in machine.machines for leaf in _leaves(part)]
    if isinstance(machine, Symmetric):
        return _leaves(machine.machine)
    if not isinstance(machine, (IdealScore, LocalScore, EquivariantLocalScore)):
        raise TypeError(
            f"machine: got {type(machine).__name__}, takes IdealScore, LocalScore, EquivariantLocalScore, or Pooled or "
            "Symmetric of these; others go around a Sharded machine or take the whole bank on every rank"
        )
    if not isinstance(machine.bank, PatchBank):
        raise TypeError(f"machine: is over a {type(machine.bank).__name__}, takes one over a PatchBank")
    return [machine]


def _rebuilt(machine: ScoreMachine, change: Callable[[ScoreMachine], ScoreMachine]) -> ScoreMachine:
    """A machine made of changed leaves."""
    if isinstance(machine, Pooled):
        return Pooled([_rebuilt(part, change) for part in machine.machines])  # type: ignore[misc]
    if isinstance(machine, Symmetric):
        return Symmetric(_rebuilt(machine.machine, change), machine.symmetry)
    return change(machine)


def _with_bank(leaf: ScoreMachine, bank: PatchBank) -> ScoreMachine:
    other = copy.copy(leaf)
    other.bank = bank
    return other


def _with_own_draws(leaf: ScoreMachine, ranks: Ranks) -> ScoreMachine:
    """Samples of different parts are independent, so that their variances add, and the same whoever has the part."""
    part = leaf.bank.part
    if part is not None:
        return leaf if part.of == 1 else leaf.redrawn(part.rank)
    return leaf if ranks.size == 1 else leaf.redrawn(ranks.rank)


def _none_of(bank: PatchBank) -> PatchBank:
    """A selection of no images, which users cannot make."""
    none = bank.take([0])
    none.indices = torch.empty(0, dtype=torch.int64)
    return none


def _options(machine: ScoreMachine) -> dict[str, Any]:
    """What determines a machine's numbers beside its part of the bank."""
    found: dict[str, Any] = {"machine": type(machine).__name__}
    for name in ("padding_mode", "symmetry", "engine", "tolerance"):
        found[name] = getattr(machine, name, None)
    sizes = machine.patch_size
    found["patch_size"] = [sizes.sigmas, sizes.sizes] if isinstance(sizes, ScaleTable) else sizes
    if machine.pruned is not None:
        for name in ("budget", "tolerance", "seed"):
            found[name] = getattr(machine.pruned, name)
        index = machine.pruned.index
        found["index"] = None if index is None else index.patch_sizes
    bank = machine.bank
    found["images"] = [list(bank.shape), str(bank.images.dtype), bank.scale, bank.class_names, bank.labels is not None]
    leaf = _leaves(machine)[0]
    found["made of"] = None if leaf is machine else _options(leaf)
    return found


def _part(bank: PatchBank, ranks: Ranks) -> list[Any]:
    """Which part of which bank a bank is, and of how many; parts that `shard` did not make are whole banks here."""
    if bank.part is None:
        return [bank.fingerprint if ranks.size > 1 else "", 0, 0]
    return [bank.part.whole.fingerprint if ranks.size > 1 else "", bank.part.rank, bank.part.of]


def _check_parts(parts: Sequence[list[Any]], ranks: Ranks) -> None:
    """Disagreement, on every rank, where the ranks' parts make no bank."""
    said = [[tuple(part) for part in own] for own in ranks.gather(list(parts))]
    of = said[0][0][2]
    for rank, own in enumerate(said):
        others = [part for part in own if bool(part[2]) != bool(of)]
        if others:
            without, with_ = (0, rank) if not of else (rank, 0)
            line = f"bank: rank {with_} has a part that `shard` made, rank {without} has none; {SAME}"
            raise Disagreement(line, ranks)
        banks, first = ({part[0] for part in some} for some in (own, said[0]))
        if of and banks != first:
            one, other = min(first)[:16], min(banks)[:16]
            raise Disagreement(f"bank: rank 0 has {one}, rank {rank} has {other}; {SAME}", ranks)
        for part in own if ranks.size > 1 else ():
            before = [earlier for earlier in range(rank) if part in said[earlier]]
            if before:
                line = f"bank: ranks {before[0]} and {rank} hold the same images; `shard` gives every rank its part"
                raise Disagreement(line, ranks)
    held = {part for own in said for part in own}
    for bank, _, count in held if of else ():
        missing = [number for number in range(count) if (bank, number, count) not in held]
        if missing:
            raise Disagreement(f"bank: part {missing[0]} of {count} is on none of {ranks.size} ranks", ranks)
