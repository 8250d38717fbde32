"""What engines keep on a device between calls: a bank's images, and rows made from them, safe across streams.

What one stream made, another waits for, and memory that a stream reads is not given away before it has. What a CUDA
graph has recorded it reads at every replay, so that is kept as long as the process lives.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

RESIDENT_SHARE = 0.5
"""Of the device's free memory: a larger bank is streamed."""
CACHE_SHARE = 0.4
"""The fraction of a GPU's memory that rows may keep; what does not fit is made again from the pixels, call by call."""
CACHE_BYTES_CPU = 64 * 2**20


# What Triton needs.


def missing_for_triton(device: torch.device) -> str | None:
    """Why its kernels cannot run on a CUDA device, or under its interpreter on the CPU; or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is missing ({error}); pip install 'patchscore[gpu]'"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "it was written for NVIDIA's GPUs"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


# Streams.


def recording() -> bool:
    """Whether the current CUDA stream records a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Made:
    """Tensors and the work that makes them: `use` lets the current stream read them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.event: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self.event = torch.cuda.current_stream(tensors[0].device).record_event()

    def use(self) -> None:
        """Makes the current stream wait until they are made, and their memory wait for the stream.

        A stream that records a graph can wait for nothing outside it; torch.cuda.graph waits for the device before.
        """
        if self.event is not None and not recording():
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.event)
            for tensor in self.tensors:
                tensor.record_stream(stream)


_pinned: dict[int, object] = {}
"""What recorded CUDA graphs read, by id."""


def pin(owner: object) -> None:
    """Keeps a bank, or a part of an index, and with it all that is kept of it, if a CUDA graph is being recorded."""
    if recording():
        _pinned[id(owner)] = owner


# Images of banks.

copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of a bank's images by device, as long as the bank's own live."""


def on_device(images: Tensor, device: torch.device) -> Tensor | None:
    """The images there, copied once; None if they would fill too much of its memory."""
    if images.device == device:
        return images
    pin(images)
    kept: dict[torch.device, Made] = copies.setdefault(images, {})
    if device not in kept:
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes > RESIDENT_SHARE * free:
            return None
        kept[device] = Made([images.to(device)])
    kept[device].use()
    return kept[device].tensors[0]


# Rows.


class Rows(Protocol):
    """A piece of what is kept."""

    @property
    def tensors(self) -> Sequence[Tensor]: ...


@dataclass
class _Entry:
    rows: list[Any]
    made: Made
    pinned: bool = False

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.made.tensors)


class Cache:
    """Rows by device, owner (a bank, or a part of an index) and purpose; those of an owner die with it.

    Each device has a limit of its own, and gives up the least recently used first.
    """

    def __init__(self) -> None:
        self._entries: dict[torch.device, OrderedDict[tuple, _Entry]] = {}
        self._owners: set[int] = set()
        self._dead: deque[int] = deque()
        self._lock = threading.Lock()

    def get(self, owner: object, device: torch.device, key: tuple) -> list[Any] | None:
        """The rows, once the current stream may read them, or None."""
        pin(owner)
        with self._lock:
            self._bury()
            entry = self._entries.get(device, OrderedDict()).get((id(owner), *key))
            if entry is None:
                return None
            self._entries[device].move_to_end((id(owner), *key))
            entry.pinned = entry.pinned or recording()
        entry.made.use()
        return entry.rows

    def has(self, owner: object, device: torch.device, key: tuple) -> bool:
        with self._lock:
            return (id(owner), *key) in self._entries.get(device, {})

    def put(self, owner: object, device: torch.device, key: tuple, rows: Sequence[Rows], limit: int) -> None:
        """Keeps rows that the current stream made, if they fit beside what graphs have pinned.

        A graph's own rows are made at its replays, so nothing is kept while one is recorded.
        """
        if recording():
            return
        full = (id(owner), *key)
        entry = _Entry(list(rows), Made([tensor for part in rows for tensor in part.tensors]))
        with self._lock:
            self._bury()
            here = self._entries.setdefault(device, OrderedDict())
            free = limit - entry.nbytes - sum(other.nbytes for other in here.values())
            for old in [old for old, other in here.items() if not other.pinned]:
                if free >= 0:
                    break
                free += here.pop(old).nbytes
            if free < 0:
                return
            here[full] = entry
            if id(owner) not in self._owners:
                self._owners.add(id(owner))
                weakref.finalize(owner, self._forget, id(owner))

    def clear(self, device: torch.device | None = None) -> None:
        """Drops all rows, or those on a device, except those that graphs read."""
        with self._lock:
            for where, here in self._entries.items():
                if device is None or where == device:
                    for key in [key for key, entry in here.items() if not entry.pinned]:
                        del here[key]

    @property
    def nbytes(self) -> int:
        """On all devices."""
        with self._lock:
            self._bury()
            return sum(entry.nbytes for here in self._entries.values() for entry in here.values())

    def _forget(self, owner: int) -> None:
        """Called when an owner is garbage-collected, which may be at any moment; the next call then drops its rows."""
        self._dead.append(owner)
        if self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    def _bury(self) -> None:
        while self._dead:
            owner = self._dead.popleft()
            self._owners.discard(owner)
            for here in self._entries.values():
                for key in [key for key in here if key[0] == owner]:
                    del here[key]


cache = Cache()


def cache_limit(device: torch.device) -> int:
    """Bytes of rows that may be kept on a device."""
    if device.type != "cuda":
        return CACHE_BYTES_CPU
    return int(CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory)
