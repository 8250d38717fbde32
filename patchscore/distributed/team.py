"""Team: the ranks that make the images of one run; each batch goes to the next free rank.

Ranks tell each other through torch.distributed's key-value store: which batch comes next is a counter there, and so are
the steps that all have made. Every rank signals each second that it is alive; the failure of one is reported by all.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from .ranks import RankError, Ranks, timeout

BEAT = 1.0
"""Seconds between two signs of life, and between two looks at those of others; a quarter of the timeout if shorter."""


class Team:
    """The ranks of a run, in groups that hold one bank each; by itself, one rank.

    Args:
        ranks: all of them.
        shards: how many hold a bank together: 1 where every rank has all images.

    Attributes:
        bank: the ranks that this one shares a bank with.
        part: the number of this rank's group.
        first: whether this is rank 0, which writes what there is one of.
        leads: whether this rank saves what its group makes.

    Raises:
        ValueError: shards that do not divide the ranks.
    """

    def __init__(self, ranks: Ranks | None = None, shards: int = 1):
        self.ranks = ranks or Ranks()
        self.bank = self.ranks.split(shards)
        self.part = self.ranks.rank // shards
        self.first = self.ranks.rank == 0
        self.leads = self.bank.rank == 0
        self._round = 0
        self._looked = 0.0
        self._heard: dict[int, tuple[str, float]] = {}
        self._asker = _Asker()

    def share(self, value: Any) -> Any:
        """What rank 0 has, on all ranks."""
        return self.ranks.gather(value)[0]

    @contextmanager
    def working(self) -> Iterator[None]:
        """A context for work that ranks do at their own pace, in which they watch each other.

        Raises:
            RankError: another rank failed, or is silent for longer than the timeout.
        """
        if self.ranks.size == 1:
            yield
            return
        self._round += 1
        self._heard, self._looked = {}, time.monotonic()
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        beating.start()
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            line = " ".join(f"{error}".split()) or type(error).__name__
            line = f"rank {self.ranks.rank} of {self.ranks.size}: {line}"
            with suppress(RankError):
                self._asking(lambda: self._store.set(self._key("failed"), line))
            raise
        finally:
            ended.set()
            beating.join()
            if not isinstance(sys.exc_info()[1], RankError):
                with suppress(RankError):
                    self._asking(lambda: None)  # the last sign of life has been given: Python may end

    def batches(self, count: int) -> Iterator[int]:
        """Numbers below `count`, each on one group's ranks only, in the order in which groups are free."""
        if self.ranks.size == 1:
            yield from range(count)
            return
        while (number := self._next()) < count:
            yield number

    def _next(self) -> int:
        """The next batch, which a group's leader draws for all of it."""
        drawn = self._count("batches") - 1 if self.leads else None
        return int(self.bank.gather(drawn)[0])

    def made(self, steps: int) -> int:
        """Counts steps of images, and says how many all groups have made; RankError as of `working`."""
        if self.ranks.size == 1:
            return steps
        self.look()
        return self._count("steps", steps if self.leads else 0)

    def end(self, waiting: Callable[[int], None]) -> None:
        """Waits until all ranks are done; `waiting` is called with the steps made so far, now and then."""
        if self.ranks.size == 1:
            return
        self._count("done")
        self._wait("done", self.ranks.size, waiting)
        # Rank 0 may hold the store, so it leaves last.
        if self.first:
            self._wait("left", self.ranks.size - 1, waiting)
        else:
            self._count("left")

    def _count(self, name: str, more: int = 1) -> int:
        return int(self._asking(lambda: self._store.add(self._key(name), more)))

    def _wait(self, name: str, count: int, waiting: Callable[[int], None]) -> None:
        while self._count(name, 0) < count:
            time.sleep(0.05)
            self.look()
            waiting(self.made(0))

    def look(self) -> None:
        """Now and then, whether all are well; RankError as of `working`."""
        limit, now = timeout(), time.monotonic()
        if now - self._looked < min(BEAT, limit / 4):
            return
        self._looked = now
        failed = self._key("failed")
        if line := self._asking(partial(self._found, failed)):
            error = RankError(line)
            error.reported = True
            raise error
        for rank in range(1, self.ranks.size) if self.first else ():
            key = self._key(f"alive/{rank}")
            sign = self._asking(partial(self._found, key))
            if sign != self._heard.get(rank, (None, now))[0]:
                self._heard[rank] = (sign, now)
            sign, since = self._heard[rank]
            if now - since > limit:
                where = f" on {sign.split()[0]}" if sign else ""
                raise RankError(
                    f"rank {rank} of {self.ranks.size}{where} has been silent for {now - since:.0f} s; "
                    "PATCHSCORE_TIMEOUT says how long is too long"
                )

    def _beat(self, ended: threading.Event) -> None:
        count, key = 0, self._key(f"alive/{self.ranks.rank}")
        while not ended.wait(min(BEAT, timeout() / 4) if count else 0):
            count += 1
            sign = f"{socket.gethostname()} {count}"
            self._asker.submit(partial(self._store.set, key, sign))

    @property
    def _store(self) -> Any:
        return self.ranks.store

    def _found(self, key: str) -> str:
        return str(self._store.get(key).decode()) if self._store.check([key]) else ""

    def _key(self, name: str) -> str:
        return f"{self._round}/{name}"

    def _asking(self, call: Callable[[], Any]) -> Any:
        """What the store answers; RankError where it does not within the timeout, as it may not by itself."""
        answered = self._asker.submit(call)
        try:
            return answered.result(timeout())
        except FutureTimeout:
            reason = f"no answer for {timeout():g} s"
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
        raise RankError(f"rank {self.ranks.rank} of {self.ranks.size} lost rank 0's host: {reason}")


class _Asker:
    """One thread for all calls, which may block for ever where a host is gone; Python then ends without it."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        answer: Future[Any] = Future()
        self._calls.put((call, answer))
        return answer

    def _serve(self) -> None:
        while True:
            call, answer = self._calls.get()
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)
