"""Fifty thousand samples: a run by two ranks that is interrupted, continued by one process; its memory over the run.

Makes an index of a few training images in a temporary folder and starts `patchscore sample --budget` under torchrun, as
a user does. At --interrupt-at images torchrun gets Ctrl-C's signal; then one process makes the rest. Every second the
resident memory of each rank is read, its own (anonymous) and with the pages of files. Writes
benchmarks/results/many_samples.json, and a curve into --out. The default takes about ten minutes of a core.

    python benchmarks/many_samples.py train-images-idx3-ubyte.gz
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import record

from patchscore.runs import formats


def children(process: int) -> list[int]:
    """The processes that a process started, and those that these did."""
    try:
        own = [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return own + [grandchild for child in own for grandchild in children(child)]


def memory(process: int) -> tuple[int, int]:
    """Bytes of a process: anonymous, and all that are resident."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return tuple(int(found.get(name, 0)) * 1024 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


class Listed:
    """The numbers of the images that a run's folder lists as made; reads what was added since."""

    def __init__(self, out: Path):
        self.out = out
        self.read: dict[Path, int] = {}
        self.made: set[int] = set()

    def count(self) -> int:
        for path in self.out.rglob("batches.jsonl"):
            start = self.read.get(path, 0)
            try:
                with open(path, "rb") as file:
                    file.seek(start)
                    added = file.read()
            except OSError:  # a part that was merged
                continue
            whole = added[: added.rfind(b"\n") + 1]
            self.made |= {image["image"] for line in whole.splitlines() for image in json.loads(line)["images"]}
            self.read[path] = start + len(whole)
        return len(self.made)


def watched(words: list[str], out: Path, curve: list[dict[str, Any]], interrupt_at: int | None) -> int:
    """Runs a command and adds (seconds, images, bytes of the largest rank) to the curve; its exit code."""
    started = curve[-1]["seconds"] if curve else 0.0
    begun, stopped, listed = time.monotonic(), False, Listed(out)
    process = subprocess.Popen(words, start_new_session=True)
    while process.poll() is None:
        time.sleep(1)
        images = listed.count()
        ranks = [memory(number) for number in [process.pid, *children(process.pid)]]
        own, resident = max(ranks, default=(0, 0))
        row = {"seconds": round(started + time.monotonic() - begun, 1), "images": images, "own": own, "rss": resident}
        if own:
            curve.append(row)
        if interrupt_at is not None and images >= interrupt_at and not stopped:
            os.kill(process.pid, signal.SIGINT)
            stopped = True
    return process.returncode


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="training images, as PatchBank.open reads")
    parser.add_argument("-n", type=int, default=50_000)
    parser.add_argument("--limit", type=int, default=1000, help="training images")
    parser.add_argument("--size", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.001)
    parser.add_argument("--interrupt-at", type=int, default=20_000)
    parser.add_argument("--format", choices=formats.FORMATS, default="zip")
    parser.add_argument("--out", type=Path, default=Path("many-samples"))
    return parser.parse_args()


def main() -> None:
    given = arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    python = [sys.executable, "-m"]
    images = [given.source, "--limit", str(given.limit), "--size", str(given.size)]
    curve: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        index = f"{folder}/few.index"
        build = ["patchscore", "index", *images, "--patch-sizes", "3", "--cells", "256", "--out", index]
        subprocess.run([*python, *build], check=True)
        options = {"--table": 3, "--padding-mode": "circular", "--index": index, "--budget": given.budget}
        options |= {"--steps": given.steps, "-n": given.n, "--batch-size": 250}
        options |= {"--format": given.format, "--out": given.out}
        words = ["patchscore", "sample", *images, *(str(word) for pair in options.items() for word in pair)]
        two_ranks = [*python, "torch.distributed.run", "--nproc-per-node", "2", "-m", *words]
        ends = [watched(two_ranks, given.out, curve, given.interrupt_at)]
        interrupted_at = max(row["images"] for row in curve)
        ends.append(watched([*python, *words], given.out, curve, None))

    # Whole and complete?
    assert ends[0] != 0, f"the first launch was to be interrupted: {ends}"
    assert ends[1] == 0, f"the second launch was to finish: {ends}"
    lines = (given.out / "batches.jsonl").read_text().splitlines()
    made = sorted(image["image"] for line in lines for image in json.loads(line)["images"])
    assert made == list(range(given.n)), "every image once"
    if given.format == "zip":
        names = zipfile.ZipFile(given.out / "samples.zip").namelist()
        assert sum(name.endswith(".png") for name in names) == given.n

    first = next(row for row in curve if row["images"] >= given.n // 50)
    peak = max(row["own"] for row in curve)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = {index: "few.index", given.source: Path(given.source).name}
    found = {
        "command": " ".join(shown.get(word, word) for word in words),
        "images": given.n,
        "interrupted_at": interrupted_at,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": curve[-1]["seconds"],
        "own_bytes_early": first["own"],
        "own_bytes_at_most": peak,
        "rss_at_most": max(row["rss"] for row in curve),
        "curve": curve[:: max(1, len(curve) // 200)],
    }
    record.write(
        "many_samples", "Fifty thousand samples, interrupted and continued: memory of the largest rank", **found
    )
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, label in (("rss", "resident"), ("own", "of its own")):
        axes.plot([row["images"] for row in curve], [row[name] / 2**20 for row in curve], lw=1, label=label)
    axes.axvline(interrupted_at, color="0.7", lw=1, ls="--")
    axes.set(xlabel="images made", ylabel="memory of the largest rank, MiB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(given.out / "memory.png", dpi=150)
    print({name: value for name, value in found.items() if name != "curve"})


if __name__ == "__main__":
    main()
