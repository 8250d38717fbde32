"""What engines keep on devices: streams wait for what others made, graphs pin what they read, devices have own limits.

There is no GPU: streams and events are made up, and tensors say that they lie on CUDA.
"""

import gc
import threading
from dataclasses import dataclass, field

import pytest
import torch

from patchscore.engines import device as devices
from patchscore.engines.device import Cache, Made

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


class Owner:
    """A bank."""


@dataclass(eq=False)
class Stream:
    waits: list = field(default_factory=list)

    def record_event(self):
        return ("event of", self)

    def wait_event(self, event):
        self.waits.append(event)


@dataclass(eq=False)
class OnGpu:
    """A tensor on a GPU."""

    nbytes: int = 10
    device: torch.device = GPU
    is_cuda: bool = True
    streams: list = field(default_factory=list)

    def record_stream(self, stream):
        self.streams.append(stream)


@dataclass(eq=False)
class Rows:
    tensors: list


def rows(nbytes=10):
    return [Rows([OnGpu(nbytes)])]


class World:
    """The current stream, and whether it records a graph."""

    stream = Stream()
    recording = False


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: world.stream)
    monkeypatch.setattr(devices, "recording", lambda: world.recording)
    monkeypatch.setattr(devices, "_pinned", {})
    return world


def test_a_stream_waits_for_rows_that_another_made_and_their_memory_for_it(world):
    cache, owner, made = Cache(), Owner(), rows()
    maker = world.stream = Stream()
    cache.put(owner, GPU, (3,), made, 100)
    reader = world.stream = Stream()
    assert cache.get(owner, GPU, (3,)) == made
    assert reader.waits == [("event of", maker)]
    assert made[0].tensors[0].streams == [reader]


def test_all_that_is_kept_is_used_the_same_way(world):
    tensor = OnGpu()
    maker = world.stream = Stream()
    made = Made([tensor])
    reader = world.stream = Stream()
    made.use()
    assert reader.waits == [("event of", maker)]
    assert tensor.streams == [reader]


def test_on_the_cpu_there_is_nothing_to_wait_for():
    cache, owner = Cache(), Owner()
    made = [Rows([torch.zeros(3)])]
    cache.put(owner, torch.device("cpu"), (), made, 100)
    assert cache.get(owner, torch.device("cpu"), ()) == made
    assert cache.nbytes == 12


def test_a_graph_pins_what_it_reads(world):
    cache, owner, other = Cache(), Owner(), Owner()
    pinned = rows(60)
    cache.put(owner, GPU, (3,), pinned, 100)
    world.recording = True
    world.stream = Stream()
    assert cache.get(owner, GPU, (3,)) == pinned
    assert world.stream.waits == []  # a stream that records cannot wait for what lies outside
    world.recording = False
    cache.put(other, GPU, (5,), rows(60), 100)  # does not fit beside it
    assert cache.get(other, GPU, (5,)) is None
    cache.clear()
    assert cache.get(owner, GPU, (3,)) == pinned
    del owner
    gc.collect()
    assert cache.nbytes == 60


def test_what_a_graph_makes_is_not_kept(world):
    cache, owner = Cache(), Owner()
    world.recording = True
    cache.put(owner, GPU, (3,), rows(), 100)
    world.recording = False
    assert cache.get(owner, GPU, (3,)) is None


def test_each_device_has_a_limit_of_its_own(world):
    cache, owner = Cache(), Owner()
    cache.put(owner, GPU, (3,), rows(60), 100)
    cache.put(owner, OTHER, (3,), rows(60), 100)
    assert cache.get(owner, GPU, (3,)) is not None
    assert cache.get(owner, OTHER, (3,)) is not None
    cache.clear(OTHER)
    assert cache.get(owner, GPU, (3,)) is not None
    assert cache.get(owner, OTHER, (3,)) is None


def test_the_least_recently_used_goes_first(world):
    cache, owner = Cache(), Owner()
    for key in (1, 2):
        cache.put(owner, GPU, (key,), rows(40), 100)
    cache.get(owner, GPU, (1,))
    cache.put(owner, GPU, (3,), rows(40), 100)
    assert [cache.has(owner, GPU, (key,)) for key in (1, 2, 3)] == [True, False, True]


def test_rows_die_with_their_owner_even_in_the_middle_of_a_call(world):
    cache, owner = Cache(), Owner()
    cache.put(owner, GPU, (3,), rows(), 100)
    with cache._lock:  # as if garbage were collected inside of another call
        del owner
        gc.collect()
    assert cache.nbytes == 0


def test_threads_share_a_cache(world):
    cache, owners = Cache(), [Owner() for _ in range(4)]
    failures = []

    def work(number):
        try:
            for i in range(200):
                cache.put(owners[number], GPU, (i % 5,), rows(10), 120)
                found = cache.get(owners[(number + i) % 4], GPU, (i % 5,))
                assert found is None or found[0].tensors[0].nbytes == 10
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cache.nbytes <= 120
