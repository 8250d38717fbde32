"""Processes and threads: forked children and spawned ones, threads that share a machine, OpenMP of torch and FAISS."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import smooth_images
from torch.utils.data import DataLoader

import patchscore as ps

SECONDS = 30
"""After which a child that takes a second counts as hanging."""


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "bank.npy"
    np.save(path, smooth_images(60, 3, 12, 12).numpy())
    np.save(path.with_name("bank.labels.npy"), np.arange(60) % 3)
    return ps.PatchBank.open(path, mapped=True)


@pytest.fixture(scope="module")
def machines(bank, tmp_path_factory):
    """Machines by what serves: each engine of the CPU, whole images, cells, drawn images."""
    els = ps.EquivariantLocalScore
    found = {
        "reference": els(bank, 3, engine="reference"),
        "sliding": els(bank, 3, engine="sliding"),
        "whole": ps.IdealScore(bank),
        "drawn": els(bank, 3, budget=0.3),
    }
    try:
        index = ps.PatchIndex.build(bank, 3, tmp_path_factory.mktemp("index") / "i", cells=32, progress=False)
        found["cells"] = els(bank, 3, index=index, budget=0.1)
    except ImportError:  # FAISS is an extra
        pass
    return found


def noisy(seed=0, count=2):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


class Denoised(torch.utils.data.Dataset):
    """Items that a machine denoises in a worker of a DataLoader."""

    def __init__(self, machine):
        self.machine = machine

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.machine.denoise(noisy(i, 1), 0.5)[0]


# Forks.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_is_forked_after_use_computes_the_same_and_does_not_hang(bank, machines, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # so that OpenMP has a pool, whose threads the child lacks
    try:
        expected = {name: machine.denoise(noisy(), 0.5, 1) for name, machine in machines.items()}
        torch.randn(400, 400) @ torch.randn(400, 400)

        def child(queue):
            found = {name: machine.denoise(noisy(), 0.5, 1).numpy() for name, machine in machines.items()}
            if "cells" in machines:
                ps.PatchIndex.build(bank, 3, tmp_path / "i", cells=16, progress=False)
            queue.put((torch.get_num_threads(), found))

        fork = multiprocessing.get_context("fork")
        queue = fork.Queue()
        started = fork.Process(target=child, args=(queue,))
        started.start()
        try:
            child_threads, found = queue.get(timeout=SECONDS)
        finally:
            started.kill()
            started.join()
        assert child_threads == 1
        assert torch.get_num_threads() == 2  # of the parent
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5, err_msg=name)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader_denoise(machines):
    machine = machines["sliding"]
    loader = DataLoader(Denoised(machine), batch_size=2, num_workers=2, timeout=SECONDS, multiprocessing_context="fork")
    found = torch.cat(list(loader))
    assert torch.equal(found, torch.cat([machine.denoise(noisy(i, 1), 0.5) for i in range(4)]))


# Spawned processes.

CHILD = """
import pickle, sys
import torch
machines = pickle.load(open(sys.argv[1], "rb"))
z = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
found = {name: machine.denoise(z, 0.5, 1) for name, machine in machines.items()}
torch.save((found, torch.get_num_threads(), machines["whole"].bank.mapped), sys.argv[2])
"""


def test_a_process_of_its_own_gets_machines_by_their_paths(machines, tmp_path):
    written = pickle.dumps(machines)
    assert len(written) < 20_000  # neither the bank nor the index
    (tmp_path / "machines").write_bytes(written)
    words = [sys.executable, "-c", CHILD, tmp_path / "machines", tmp_path / "found"]
    root = str(Path(ps.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run(words, check=True, timeout=4 * SECONDS, env=environment)
    found, threads, mapped = torch.load(tmp_path / "found")
    assert mapped
    assert threads == 1  # OMP_NUM_THREADS holds for torch and for the engines, which ask torch
    for name, values in found.items():
        torch.testing.assert_close(values, machines[name].denoise(noisy(), 0.5, 1), rtol=0, atol=1e-5)


# Threads.


def test_threads_may_call_one_machine_at_once(machines):
    calls = [(name, sigma, label) for name in machines for sigma in (0.3, 0.5, 0.9, 2.0) for label in (None, 1)]

    def call(asked):
        name, sigma, label = asked
        return machines[name].denoise(noisy(), sigma, label)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, calls * 2))
    for asked, values in zip(calls * 2, found, strict=True):
        torch.testing.assert_close(values, call(asked), rtol=0, atol=1e-5)


# OpenMP.


def test_building_an_index_leaves_the_threads_of_torch_and_faiss_alone(bank, tmp_path):
    faiss = pytest.importorskip("faiss")
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            faiss.omp_set_num_threads(threads)  # of torch too, where both use the one OpenMP
            ps.PatchIndex.build(bank, 3, tmp_path / f"i{threads}", cells=16, progress=False)
            assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (threads, threads)
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
    files = ("ids.bin", "rows.bin", "cells.safetensors")
    one, two = ([(tmp_path / f"i{threads}/k03/{name}").read_bytes() for name in files] for threads in (1, 2))
    assert one == two
