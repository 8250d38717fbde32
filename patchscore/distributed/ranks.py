"""Ranks: the processes that torchrun started, and the messages between them.

torch.distributed does the work: gloo for tensors on CPUs, NCCL for those on GPUs. Every rank calls the same methods in
the same order. What goes wrong elsewhere reaches every rank as one line: `RankError` names the rank that failed,
`ValueError` the two that were asked for different things.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks

TIMEOUT = 300.0
"""Seconds that a rank waits for the others at an exchange, where PATCHSCORE_TIMEOUT does not say. Ranks reach it at
different times, by as much as their parts of a step differ; a rank that is gone is noticed after this long at worst."""


class RankError(ConnectionError):
    """Another rank failed, or cannot be reached any more."""

    reported = False
    """Whether the rank that failed says so itself."""


class Disagreement(ValueError):
    """Ranks were called with different arguments. All ranks raise it; `reported` is True on all but the first."""

    def __init__(self, line: str, ranks: Ranks):
        super().__init__(line)
        self.reported = ranks.rank > 0


@dataclass(frozen=True)
class Ranks:
    """Processes that work together; with size 1, a single process. `join` and `split` make them.

    Attributes:
        rank: this process' number among them, from 0.
        size: how many they are.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, repr=False)
    store: Any = field(default=None, repr=False)
    """Keys and values that all processes of the launch share; None where the process group is somebody else's."""

    def split(self, size: int) -> Ranks:
        """Those of `size` consecutive ranks among whom this one is; every rank calls it.

        Raises:
            ValueError: a size that does not divide the number of ranks.
        """
        size = checks.integer("size", size, at_least=1)
        if self.size % size:
            raise ValueError(f"size: got {size}, takes a divisor of the {self.size} ranks")
        if size in (1, self.size):
            return self if size == self.size else Ranks(store=self.store)
        with self._reaching():
            numbers = dist.get_process_group_ranks(self.group)
            # All ranks make all groups.
            groups = [dist.new_group(numbers[first : first + size]) for first in range(0, self.size, size)]
        return Ranks(self.rank % size, size, groups[self.rank // size], self.store)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, on all of them; overwrites x."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """The elementwise maximum of every rank's x, on all of them; overwrites x."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        x = x.contiguous()  # torch would reduce the memory of a view as it lies
        if self.size > 1:
            with self._reaching():
                dist.all_reduce(x, op, self.group)
        return x

    def stack(self, x: Tensor) -> Tensor:
        """[size, ...] every rank's x, on all of them; of one shape and type."""
        if self.size == 1:
            return x[None]
        found = [torch.empty_like(x) for _ in range(self.size)]
        with self._reaching():
            dist.all_gather(found, x.contiguous(), self.group)
        return torch.stack(found)

    def exchange(self, x: Tensor) -> Tensor:
        """[size, ...] from each rank what it has for this one: row r of x [size, ...] goes to rank r."""
        found = torch.empty_like(x, memory_format=torch.contiguous_format)
        with self._reaching():
            dist.all_to_all_single(found, x.contiguous(), group=self.group)
        return found

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, on all of them: anything that JSON holds."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.stack(torch.tensor([len(content)])).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(content)] = content
        rows = self.stack(padded)
        return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def agree(self, facts: Mapping[str, Any], advice: str, failure: str = "") -> None:
        """Returns if no rank failed and all have equal facts; exchanges a few bytes.

        Args:
            facts: what must be the same, by name: anything that JSON holds.
            advice: what the message says to a user whose ranks differ.
            failure: what went wrong on this rank.

        Raises:
            RankError: a rank says that it failed, or cannot be reached.
            Disagreement: two ranks differ; names the fact and both ranks.
        """
        if self.size == 1:
            return
        known = json.dumps(facts, sort_keys=True)
        number = int.from_bytes(hashlib.blake2b(known.encode(), digest_size=7).digest(), "big")
        found = self.max(torch.tensor([number, -number, bool(failure)]))
        if found[0] == -found[1] and not found[2]:
            return
        said = self.gather([failure, json.loads(known)])
        for rank, (failed, _) in enumerate(said):
            if failed:
                error = RankError(f"rank {rank} of {self.size} failed: {failed}")
                error.reported = True
                raise error
        first = said[0][1]
        for rank, (_, other) in enumerate(said):
            for name in first:
                if other.get(name) != first[name]:
                    both = f"rank 0 has {first[name]}, rank {rank} has {other.get(name)}"
                    raise Disagreement(f"{name}: {both}; {advice}", self)
        raise AssertionError("equal facts have equal digests")

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A context for work that a rank does alone: an error in it reaches the other ranks, which are waiting."""
        try:
            yield
        except (RankError, Disagreement):
            raise  # the others know
        except Exception as error:
            with suppress(RankError):  # this rank's own failure, or nobody is left to hear of it
                self.agree({}, "", " ".join(f"{error}".split()) or type(error).__name__)
            raise

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns torch's errors about a lost rank into one line."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # gloo's messages begin with the place in its source.
            reason = re.sub(r"^(\[[^\]]*\]\s*)+", "", str(error).strip()).split("\n")[0].split(". ")[0]
            raise RankError(
                f"rank {self.rank} of {self.size} lost another rank: {reason}; what the other one printed says why"
            ) from None


_joined: list[Ranks] = []


def join() -> Ranks:
    """All ranks of this launch: those that torchrun started, or this process alone.

    The first call sets up torch.distributed, if nobody did. A rank has the GPU of its number on its host.
    PATCHSCORE_TIMEOUT is how many seconds ranks wait for each other, 300 by default.

    Raises:
        RankError: the others cannot be reached.
        ValueError: a process group without gloo; a PATCHSCORE_TIMEOUT that is not a positive number.
    """
    if _joined and dist.is_initialized():
        return _joined[0]
    if dist.is_available() and dist.is_initialized():
        if "cpu:" not in dist.get_backend_config():
            raise ValueError('process group: has NCCL alone; init_process_group takes "cpu:gloo,cuda:nccl" here')
        return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    if not launched():
        return Ranks()
    limit = timedelta(seconds=timeout())
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        attempt = _attempt(store, rank, size)
        groups, shared = (dist.PrefixStore(f"{attempt}/{use}", store) for use in ("groups", "shared"))
        dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(f"rank {os.environ['RANK']} cannot join the others at {where}: {reason}") from None
    atexit.register(_leave)
    _joined[:] = [Ranks(rank, size, dist.group.WORLD, shared)]
    return _joined[0]


def _attempt(store: Any, rank: int, size: int) -> str:
    """A name that the ranks of this start have in common, and no other start has.

    torchrun keeps keys and values when it starts ranks again, and counts starts on each host by itself. So every rank
    shows a token of its own, and rank 0 answers each token with its own, until all have read the answer.
    """
    token, until = secrets.token_hex(8), time.monotonic() + timeout()

    def found(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    if rank:
        store.set(f"token/{rank}", token)
        while not (answer := found(f"answer/{rank}")).startswith(token):
            _wait_for("rank 0", until)
        attempt = answer.split()[1]
        store.set(f"{attempt}/read/{rank}", "1")
        return attempt
    others = set(range(1, size))
    while others:
        for other in others:
            store.set(f"answer/{other}", f"{found(f'token/{other}')} {token}")
        others = {other for other in others if not store.check([f"{token}/read/{other}"])}
        _wait_for(f"rank {min(others, default=0)}", until)
    return token


def _wait_for(whom: str, until: float) -> None:
    if time.monotonic() > until:
        raise RuntimeError(f"{whom} did not come within {timeout():g} s")
    time.sleep(0.02)


def first_to_say(line: str) -> bool:
    """Whether no other rank has asked this of the same line, as where all meet the same error."""
    if not _joined or _joined[0].store is None:
        return True
    try:
        return bool(_joined[0].store.add(f"said/{hashlib.sha256(line.encode()).hexdigest()}", 1) == 1)
    except RuntimeError:  # nobody is left to ask
        return True


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of several."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in needed) and os.environ["WORLD_SIZE"] != "1"


def timeout() -> float:
    """Seconds that ranks wait for each other."""
    said = os.environ.get("PATCHSCORE_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"PATCHSCORE_TIMEOUT: got {said!r}, takes a positive number of seconds")
    return seconds


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
