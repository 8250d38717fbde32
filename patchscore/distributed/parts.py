"""Parts of a bank: which training images which rank sums over, and a bank of which every rank holds a part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..bank import Part, PatchBank
from .ranks import Ranks, join


def shard(bank: PatchBank, ranks: Ranks | None = None) -> PatchBank:
    """This rank's part of a bank that every rank has opened: a selection that shares its memory.

    Every rank gets as many images of every class as any other, but for one, and they lie together in the bank; so a
    memory-mapped bank is read once, by all ranks together. `Sharded` makes one machine of the parts.

    Args:
        bank: the training images, the same on every rank.
        ranks: among whom to divide; None: all of this launch. One rank alone gets all images.

    Raises:
        TypeError: not a PatchBank.
        ValueError: fewer images than ranks.
    """
    if not isinstance(bank, PatchBank):
        raise TypeError(f"bank: got {type(bank).__name__}, takes a PatchBank")
    ranks = join() if ranks is None else ranks
    if len(bank) < ranks.size:
        raise ValueError(f"bank: {len(bank)} images for {ranks.size} ranks, takes one or more for each")
    part = bank.take((owners(bank.labels, len(bank), ranks.size) == ranks.rank).nonzero().flatten())
    part.part = Part(bank, ranks.rank, ranks.size)
    return part


def owners(labels: Tensor | None, images: int, ranks: int) -> Tensor:
    """[images] the rank of each: neighbours together, each class in equal shares.

    Where a class of n images does not divide evenly, the n mod R ranks that get one more follow on those of the class
    before; so the totals differ by one image at most, too.
    """
    labels = torch.zeros(images, dtype=torch.int64) if labels is None else labels
    found = torch.empty(images, dtype=torch.int64)
    numbers, following = torch.arange(ranks), 0
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        each, more = divmod(len(members), ranks)
        counts = each + ((numbers - following) % ranks < more).long()
        found[members] = numbers.repeat_interleave(counts)
        following = (following + more) % ranks
    return found


class SpreadBank(PatchBank):
    """The images of all ranks as one bank, in the order of the ranks; none has it whole.

    Pixels come from the rank that holds them, so all ranks request the same ones in the same order.
    """

    def __init__(self, own: PatchBank, ranks: Ranks):
        facts = ranks.gather([len(own), own.fingerprint, None if own.labels is None else own.labels.tolist()])
        counts: Sequence[int] = [fact[0] for fact in facts]
        vars(self).update(vars(own.take([0])))  # without what was derived of `own`
        self._own, self._ranks = own, ranks
        self.first = sum(counts[: ranks.rank])
        """The number of this rank's first image."""
        self.images = own.images[:0]  # for shape and type; nobody reads pixels here
        self.indices = torch.arange(sum(counts))
        self.labels = None if own.labels is None else torch.tensor([label for fact in facts for label in fact[2]])
        self._digests = [fact[1] for fact in facts]

    @property
    def fingerprint(self) -> str:
        """Of the parts and their order: not that of a bank that holds the same images."""
        assert self.indices is not None
        digest = hashlib.sha256(" ".join(self._digests).encode())
        digest.update(self.indices.numpy().tobytes())
        return digest.hexdigest()

    def stored_at(self, numbers: Tensor) -> Tensor:
        assert self.indices is not None
        own = self.indices[numbers] - self.first
        mine = (own >= 0) & (own < len(self._own))
        found = torch.zeros(len(own), *self.shape, dtype=self.images.dtype)
        found[mine] = self._own.stored_at(own[mine])
        return self._ranks.sum(found)

    def stored(self, start: int, stop: int) -> Tensor:
        return self.stored_at(torch.arange(start, min(stop, len(self))))
