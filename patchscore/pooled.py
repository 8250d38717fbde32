"""Machines whose windows compete together: of banks of several image sizes, and mirrored or turned windows.

A posterior over the windows of several machines is one sum over all of them, and sums merge. A mirrored window matches
a pixel of z exactly where the window itself matches that pixel of the mirrored z, so nothing is stored twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import checks
from .denoiser import Labels, ScoreMachine, labels_per_item
from .machines import EquivariantLocalScore
from .posterior import PosteriorSum, merge_served
from .windows import Competition


class Composed(ScoreMachine):
    """A machine made of others: it has their sums, and no competition of its own."""

    def take_over(self, machine: ScoreMachine) -> None:
        """Has the bank, the patch sizes and the engines of `machine`."""
        self.bank, self.shape, self.patch_size = machine.bank, machine.shape, machine.patch_size
        self.engine, self.engines, self.memory_limit = machine.engine, machine.engines, machine.memory_limit
        self.pruned, self.tolerance, self.any_size = machine.pruned, machine.tolerance, machine.any_size

    def competition(self, k: int | None) -> Competition:
        raise ValueError(f"machine: {type(self).__name__} sums over several competitions, of which none is told alone")

    def product(self, *arguments: object) -> Tensor:
        raise ValueError(f"{type(self).__name__} has no gradient")


class Pooled(Composed):
    """Equivariant machines whose windows all compete at every pixel, such as those of several banks with indexes.

        photos = MixedBank.open("photos/")
        indexes = [PatchIndex.build(bank, 7, f"index-{i}") for i, bank in enumerate(photos.banks)]
        machine = Pooled([EquivariantLocalScore(i.bank, 7, index=i, budget=0.01) for i in indexes])

    It is what one machine over all windows would be. Pixels near a border compete with the windows as near to that
    border of every image. The classes are those of all banks.

    Args:
        machines: EquivariantLocalScore machines with the same patch sizes, padding mode and number of channels, of
            banks with the same value range. `shape` is the first one's.

    Raises:
        TypeError: other machines.
        ValueError: none, or machines that differ in these.
    """

    def __init__(self, machines: Sequence[EquivariantLocalScore]):
        self.machines = tuple(machines)
        if not self.machines:
            raise ValueError("machines: got none, takes one or more")
        first = self.machines[0]
        for machine in self.machines:
            if not isinstance(machine, EquivariantLocalScore):
                raise TypeError(f"machines: got {type(machine).__name__}, takes EquivariantLocalScore")
            for name, of in (
                ("patch_size", lambda m: m.patch_size),
                ("padding_mode", lambda m: m.padding_mode),
                ("channels", lambda m: m.shape[0]),
                ("value_range", lambda m: m.bank.value_range),
            ):
                if of(machine) != of(first):
                    raise ValueError(f"machines: got {name} {of(first)!r} and {of(machine)!r}, takes the same for all")
        self.take_over(first)
        self.any_size = True

    def check_size(self, size: tuple[int, int], sigmas: Sequence[float], name: str = "size") -> None:
        for machine in self.machines:
            machine.check_size(size, sigmas, name)

    def label_ids(self, labels: Labels, batch: int) -> list[int | None]:
        found: list[int | None] = []
        for label in labels_per_item(labels, batch):
            found.append(None if label is None else self._label_id(label))
        return found

    def redrawn(self, draw: int) -> Pooled:
        return self._of([machine.redrawn(draw) for machine in self.machines])

    def within(self, tolerance: float) -> Pooled:
        return self._of([machine.within(tolerance) for machine in self.machines])

    def following(self) -> Pooled:
        return self._of([machine.following() for machine in self.machines])

    def _of(self, machines: Sequence[ScoreMachine]) -> Pooled:
        same = all(new is old for new, old in zip(machines, self.machines, strict=True))
        return self if same else Pooled(machines)  # type: ignore[arg-type]

    def _label_id(self, label: int | str) -> int:
        numbers, errors = set(), []
        for machine in self.machines:
            try:
                numbers.add(machine.bank.label_ids([label])[0])
            except ValueError as error:
                errors.append(error)
        if not numbers:
            raise errors[0]
        if len(numbers) > 1:
            raise ValueError(f"labels: {label!r} is the name of classes {sorted(numbers)} in different banks")
        return numbers.pop()

    def sums_of(
        self, label: int | None, z: Tensor, sigmas: Tensor, k: int | None, ess: bool = True, moments: bool = False
    ) -> tuple[PosteriorSum, list[str]]:
        serving = [machine for machine in self.machines if label is None or label in machine.bank.classes]
        return merge_served([machine.sums_of(label, z, sigmas, k, ess, moments) for machine in serving])

    def __repr__(self) -> str:
        return f"Pooled({', '.join(map(repr, self.machines))})"


Change = Callable[[Tensor], Tensor]


def _turned(turns: int, mirrored: bool) -> tuple[Change, Change]:
    """[..., H, W] mirrored and then turned by 90 degrees so many times, and the inverse."""

    def change(x: Tensor) -> Tensor:
        return torch.rot90(x.flip(-1) if mirrored else x, turns, (-2, -1))

    def back(x: Tensor) -> Tensor:
        x = torch.rot90(x, -turns, (-2, -1))
        return x.flip(-1) if mirrored else x

    return change, back


SYMMETRIES = {
    "flip": [_turned(0, False), _turned(0, True)],
    "rotations": [_turned(turns, False) for turns in range(4)],
    "all": [_turned(turns, mirrored) for mirrored in (False, True) for turns in range(4)],
}


class Symmetric(Composed):
    """A machine whose mirrored or turned training images compete too, as networks see them that train on such.

    It is exactly the machine of a bank that holds them, which are read backwards and not stored. A machine with an
    index or a budget draws a sample for each orientation, independently of the others, and a tolerance is met by each
    of them; the standard error is that of the whole sum.

    Args:
        machine: IdealScore, LocalScore, EquivariantLocalScore or Pooled.
        symmetry: "flip" (left and right), "rotations" (by 90, 180 and 270 degrees) or "all" (the eight of a square).

    Raises:
        TypeError: not such a machine.
        ValueError: an unknown symmetry, or turned images that are not square for a machine that takes one size only.
    """

    def __init__(self, machine: ScoreMachine, symmetry: str = "flip"):
        if not isinstance(machine, ScoreMachine) or isinstance(machine, Symmetric):
            raise TypeError(f"machine: got {type(machine).__name__}, takes one that sums over training windows")
        self.symmetry = checks.one_of("symmetry", symmetry, SYMMETRIES)
        _, height, width = machine.shape
        if symmetry != "flip" and height != width and not machine.any_size:
            raise ValueError(f'symmetry: got "{symmetry}", and turned {height} x {width} images have another size')
        self.machine = machine
        # A machine for each orientation; where they sample, with draws of their own.
        self.turned = [machine.redrawn(i) if i else machine for i in range(len(SYMMETRIES[symmetry]))]
        self.take_over(machine)

    def redrawn(self, draw: int) -> Symmetric:
        machine = self.machine.redrawn(draw)
        return self if machine is self.machine else Symmetric(machine, self.symmetry)

    def within(self, tolerance: float) -> Symmetric:
        machine = self.machine.within(tolerance)
        return self if machine is self.machine else Symmetric(machine, self.symmetry)

    def following(self) -> Symmetric:
        turned = [machine.following() for machine in self.turned]
        if all(new is old for new, old in zip(turned, self.turned, strict=True)):
            return self
        same = copy.copy(self)
        same.machine, same.turned = turned[0], turned
        same.take_over(turned[0])
        return same

    def check_size(self, size: tuple[int, int], sigmas: Sequence[float], name: str = "size") -> None:
        self.machine.check_size(size, sigmas, name)
        if self.symmetry != "flip":
            self.machine.check_size((size[1], size[0]), sigmas, name)

    def label_ids(self, labels: Labels, batch: int) -> list[int | None]:
        return self.machine.label_ids(labels, batch)

    def sums_of(
        self, label: int | None, z: Tensor, sigmas: Tensor, k: int | None, ess: bool = True, moments: bool = False
    ) -> tuple[PosteriorSum, list[str]]:
        parts = []
        for machine, (change, back) in zip(self.turned, SYMMETRIES[self.symmetry], strict=True):
            total, names = machine.sums_of(label, change(z).contiguous(), sigmas, k, ess, moments)
            parts.append((total.mapped(back), names))
        return merge_served(parts)

    def __repr__(self) -> str:
        return f"Symmetric({self.machine!r}, {self.symmetry!r})"
