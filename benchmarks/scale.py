"""Ranks: images and a bank over two of them, bytes on the wire at eight, and weak scaling simulated to 64.

Ranks are processes of one thread on this machine. Speedups are ratios of processor seconds (of one rank, and of the
busiest of two, with all that it does to talk), the least of several turns each, as other work on the machine adds to
them, and more to times on the clock; those stand beside. Bytes are those that the loopback device counted while eight
ranks took steps. The simulation replays processor seconds of a step and times of an exchange measured here. Writes
benchmarks/results/scale.json.

    python benchmarks/scale.py --images cifar.npz                 (under 5 minutes)
    unshare -n python benchmarks/scale.py --images cifar.npz      (bytes of others on the loopback device do not count)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
import torch.distributed as dist

import patchscore as ps
from patchscore.distributed import join

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["patchscore", "record"])
K, SIGMA = 7, 0.99
RANKS = (1, 2, 4, 8)
CLOCK = "seconds on the clock, mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="training images of 32 x 32 in colour, as PatchBank.open reads")
    parser.add_argument("--bank", type=int, default=20_000, help="training images of the bank over ranks")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False, capture_output=True)  # of a new namespace
    found: dict[str, Any] = {"bank_images": options.bank, "patch_size": K, "sigma": SIGMA}

    # A bank over two ranks, a denoised image of one against two in turns.
    turns = [
        [_launched(size, bank_step, options.images, options.bank) for size in (1, 2)] for _ in range(options.repeats)
    ]
    found["bank"] = _speedup(turns)
    one, two = (np.array(turns[0][i][0]["mean"]) for i in (0, 1))
    found["bank"]["largest_difference"] = float(np.abs(one - two).max())

    # Images over two ranks.
    turns = [[_launched(size, images_made, options.images, size) for size in (1, 2)] for _ in range(options.repeats)]
    found["images"] = _speedup(turns)

    # Bytes and time of the exchange alone.
    found["bytes"] = {size: _launched(size, exchange, options.images)[0] for size in RANKS[1:]}
    found["weak_scaling"] = weak_scaling(found["bank"]["seconds_of_ranks"], found["bytes"])
    record.write("scale", "images and a bank over ranks: speedups, bytes on the wire, simulated weak scaling", **found)
    print(json.dumps({name: value for name, value in found.items()}, indent=1))


def _launched(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns on each of several ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = SERVER.SimpleQueue()
    ranks = [
        SERVER.Process(target=_rank, args=(rank, size, store.port, answers, function, arguments))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    said = dict(answers.get() for _ in ranks)
    for rank in ranks:
        rank.join()
    return [said[rank] for rank in range(size)]


def _rank(rank: int, size: int, port: int, answers: Any, function: Callable[..., Any], arguments: Any) -> None:
    where = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    answers.put((rank, function(*arguments)))


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor, all threads of this process, and on the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - clock


def _noise(count: int) -> torch.Tensor:
    return SIGMA * torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bank_step(images: str, count: int) -> dict[str, Any]:
    """One image denoised by all windows of the bank, of which this rank holds its part."""
    bank = ps.PatchBank.open(images, limit=count)
    machine = ps.Sharded(ps.EquivariantLocalScore(ps.shard(bank), K, engine="sliding"))
    found: list[torch.Tensor] = []
    cpu, clock = _timed(lambda: found.append(machine.denoise(_noise(1), SIGMA)))
    return {"cpu": cpu, "clock": clock, "mean": found[0].tolist()}


def images_made(images: str, size: int) -> dict[str, Any]:
    """This rank's share of four samples; each is five steps over 1,000 training images."""
    join()
    machine = ps.EquivariantLocalScore(ps.PatchBank.open(images, limit=1000), K, engine="sliding")
    each = 4 // size
    first = int(os.environ["RANK"]) * each
    cpu, clock = _timed(lambda: ps.sample(machine, n=each, first=first, steps=6, batch_size=1, progress=False))
    return {"cpu": cpu, "clock": clock}


def exchange(images: str, steps: int = 50) -> dict[str, float]:
    """Bytes and seconds of a step of an image, of which nothing but the exchange counts: a bank of few images."""
    ranks, bank = join(), ps.PatchBank.open(images, limit=64)
    machine = ps.Sharded(ps.LocalScore(ps.shard(bank), 3, engine="sliding"))
    sampled = ps.Sharded(ps.LocalScore(ps.shard(bank), 3, budget=0.5))
    z = _noise(1)
    found: dict[str, float] = {}
    for name, call in {
        "mean": machine.denoise,
        "with ess": machine.estimate,
        "with standard errors": sampled.estimate,
        "vjp": lambda z, sigma: machine.vjp(z, sigma, z),
    }.items():
        call(z, SIGMA)
        ranks.agree({}, "")
        before = _loopback()
        times = [_timed(lambda call=call: call(z, SIGMA)) for _ in range(steps)]  # type: ignore[misc]
        ranks.agree({}, "")
        found[f"bytes a rank, {name}"] = (_loopback() - before) / steps / ranks.size
        # The quickest step on the clock, as other work on the machine adds to the others.
        found[f"seconds on the clock, {name}"] = min(clock for _, clock in times)
        found[f"seconds of the processor, {name}"] = statistics.mean(cpu for cpu, _ in times)
    return found


def _loopback() -> int:
    """Bytes that were sent over the loopback device, with their headers."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


def _speedup(turns: list[list[list[dict[str, float]]]]) -> dict[str, Any]:
    """One rank's least seconds over the least of the busiest of two; on the clock, the median over turns."""
    one, two = [one[0]["cpu"] for one, _ in turns], [max(rank["cpu"] for rank in two) for _, two in turns]
    clock = statistics.median(one[0]["clock"] / max(rank["clock"] for rank in two) for one, two in turns)
    return {
        "speedup": min(one) / min(two),
        "speedup_of_turns": [alone / busiest for alone, busiest in zip(one, two, strict=True)],
        "speedup_on_the_clock": clock,
        "seconds_of_one_rank": min(one),
        "seconds_of_ranks": [rank["cpu"] for _, two in turns for rank in two],
    }


def weak_scaling(seconds: list[float], exchanges: dict[int, dict[str, float]]) -> list[dict[str, float]]:
    """Efficiency of R ranks that hold as many images each as one did, by replaying what was measured.

    A step takes as long as the slowest of R draws from the processor seconds of a rank, and the exchange, whose time
    grows in a line with the number of the other ranks: least squares through what was measured.
    """
    generator = np.random.default_rng(0)
    more, start = np.polyfit(*zip(*((count - 1, of[CLOCK]) for count, of in exchanges.items()), strict=True), 1)
    rows = []
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        compute = generator.choice(seconds, (1000, ranks))
        talk = float(start + more * (ranks - 1)) if ranks > 1 else 0.0
        step = compute.max(1) + talk
        rows.append({"ranks": ranks, "efficiency": float(compute.mean() / step.mean()), "seconds_of_exchange": talk})
    return rows


if __name__ == "__main__":
    main()
