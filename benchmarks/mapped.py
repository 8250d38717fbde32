"""Banks in files larger than the memory: fingerprint, an exact step and an index, each in a process that is limited.

Makes a file of so many GiB in a temporary folder, half of it images mixed with noise and half of it noise, and removes
it at the end. Where this user may make a memory cgroup inside its own, a step lives in one of --limit-gib, which counts
pages of the file too; elsewhere RLIMIT_DATA limits what a process allocates, which pages of a mapped file are not.
Writes benchmarks/results/mapped.json; rows are replaced one by one, so that runs of several sizes add up.

    python benchmarks/mapped.py cifar10 --gib 12 --limit-gib 4 --max-windows 16000000
    python benchmarks/mapped.py cifar10 --gib 1 --limit-gib 0.5 --max-windows 8000000 --cells 16384
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from record import RESULTS, opened, smooth, write
from tqdm import tqdm

import patchscore as ps

GIB = 2**30
IMPORTED_GIB = 0.2
"""What a process takes that has imported torch and FAISS and opened a bank; 0.15 GiB were measured."""

BLOCK = 1 << 14
"""Images that are made and written together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="images of one size, or a tar of their files; smooth random ones")
    parser.add_argument("--gib", type=float, default=1.0, help="of the file")
    parser.add_argument("--limit-gib", type=float, default=0.5, help="of a step's process")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of them")
    parser.add_argument("--pixels", type=int, default=8, help="side of the noisy image of the exact step")
    parser.add_argument("--max-windows", type=int, help="of the index; all by default")
    parser.add_argument("--cells", type=int, help="of the index")
    parser.add_argument("--folder", help="where the file is made, on a disk with room for it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    unknown = set(options.steps.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"--steps: got {', '.join(sorted(unknown))}, takes some of {', '.join(STEPS)}")
    free = shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    if free < 1.5 * options.gib * GIB:
        parser.error(
            f"--gib: got {options.gib}, the disk has {free / GIB:.1f} GiB; leave half as much again for an index"
        )
    images = smooth(3, 32, 2000) if options.source is None else opened(options.source).images
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "bank.npy"
        make(path, images.numpy(), int(options.gib * GIB))
        for step in options.steps.split(","):
            add(measured(step, path, options))


def make(path: Path, images: np.ndarray, size: int) -> None:
    """A file of `size` bytes: by turns images mixed with noise and noise alone."""
    rng = np.random.default_rng(0)
    drawn = np.frombuffer(rng.bytes(4 * BLOCK * images[0].nbytes), np.uint8)  # parts of it, to be done in a minute
    count = size // images[0].nbytes
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *images.shape[1:]))
    del array
    with open(path, "r+b") as file:
        file.seek(-count * images[0].nbytes, os.SEEK_END)
        for block, start in enumerate(tqdm(range(0, count, BLOCK), "making the file", leave=False)):
            some = min(BLOCK, count - start)
            first = rng.integers(3 * BLOCK * images[0].nbytes)
            noise = drawn[first : first + some * images[0].nbytes].reshape(some, *images.shape[1:])
            if block % 2 == 0:
                picked = images[rng.integers(len(images), size=some)]
                noise = (picked >> 1) + (noise >> 1)
            file.write(np.ascontiguousarray(noise).data)


# A step, in a process of its own.


def fingerprint(bank: ps.PatchBank, options: argparse.Namespace) -> dict:
    return {"fingerprint": bank.fingerprint}


def exact(bank: ps.PatchBank, options: argparse.Namespace) -> dict:
    z = torch.randn(1, bank.shape[0], options.pixels, options.pixels, generator=torch.Generator().manual_seed(0))
    limit = int(options.limit_gib * GIB / 4)
    found = ps.EquivariantLocalScore(bank, 3, engine="sliding", memory_limit=limit).estimate(z, 1.0)
    assert found.mean.isfinite().all()
    return {"k": 3, "pixels": options.pixels, "pairs": found.pairs, "mean": found.mean.mean().item()}


def whole(bank: ps.PatchBank, options: argparse.Namespace) -> dict:
    z = torch.randn(1, *bank.shape, generator=torch.Generator().manual_seed(0))
    found = ps.IdealScore(bank, memory_limit=int(options.limit_gib * GIB / 4)).estimate(z, 1.0)
    return {"pairs": found.pairs, "mean": found.mean.mean().item()}


def index(bank: ps.PatchBank, options: argparse.Namespace) -> dict:
    folder = Path(options.child).with_name("bank.index")
    limit = int((options.limit_gib - IMPORTED_GIB) * GIB)
    sizes = {"cells": options.cells, "max_windows": options.max_windows}
    built = ps.PatchIndex.build(bank, 3, folder, memory_limit=limit, **sizes)
    part, size = built.at(3), sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"k": 3, "windows": part.meta["windows"], "cells": part.meta["cell_count"], "index_gib": size / GIB}


STEPS = {step.__name__: step for step in (fingerprint, exact, whole, index)}


def child(options: argparse.Namespace) -> None:
    """One step, and what it took."""
    peak = [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], status("RssAnon"))
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    bank = ps.PatchBank.open(options.child, mapped=True)
    start, cpu, before = time.perf_counter(), time.process_time(), read_from_disk()
    found = STEPS[options.steps](bank, options)
    taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    taken["read_gib"] = (read_from_disk() - before) / GIB
    peak[0] = max(peak[0], status("RssAnon"))
    print(json.dumps({**found, **taken, "threads": torch.get_num_threads(), "peak_anonymous_gib": peak[0] / GIB}))


def read_from_disk() -> int:
    """Bytes that this process had read, pages of mapped files included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def status(name: str) -> int:
    """Bytes, of what Linux says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def measured(step: str, path: Path, options: argparse.Namespace) -> dict:
    limit = int(options.limit_gib * GIB)
    words = [sys.executable, __file__, "--child", str(path), "--steps", step, "--limit-gib", str(options.limit_gib)]
    words += ["--pixels", str(options.pixels)]
    for name in ("max_windows", "cells"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    # Pages that another process has read are not counted for this one.
    os.sync()
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with cgroup(limit) as group:

        def limited() -> None:
            if group is None:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            else:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        print(f"{step} at {options.gib:g} GiB, limited to {options.limit_gib:g} GiB", file=sys.stderr)
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, preexec_fn=limited)
        if done.returncode:
            sys.exit(f"{step}: ended with {done.returncode}")
        row = {"step": step, "gib": options.gib, "limit_gib": options.limit_gib}
        row["limited_by"] = "RLIMIT_DATA" if group is None else "a memory cgroup"
        if group is not None:
            row["peak_cgroup_gib"] = int(first(group, "memory.max_usage_in_bytes", "memory.peak").read_text()) / GIB
    row |= json.loads(done.stdout)
    print(row, file=sys.stderr)
    return row


@contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A memory cgroup inside the one of this process, or None where this user may not make one."""
    group = None
    try:
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        path = next((path for _, kinds, path in own if "memory" in kinds.split(",")), None)
        base = Path("/sys/fs/cgroup") / (own[-1][2] if path is None else f"memory{path}").lstrip("/")
        made = base / f"patchscore-benchmark-{os.getpid()}"
        made.mkdir()
        group = made
        first(group, "memory.limit_in_bytes", "memory.max").write_text(str(limit))
    except (OSError, StopIteration):
        if group is not None:
            group.rmdir()
        group = None
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def first(folder: Path, *names: str) -> Path:
    return next(folder / name for name in names if (folder / name).exists())


def add(row: dict) -> None:
    """Puts a row among those of before, in the place of the one of the same step and size."""
    path = RESULTS / "mapped.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [other for other in rows if any(other[name] != row[name] for name in ("step", "gib"))]
    rows = sorted([*rows, row], key=lambda row: (row["gib"], list(STEPS).index(row["step"])))
    write("mapped", "Steps over mapped files larger than the memory that a process may use", rows=rows)


if __name__ == "__main__":
    main()
