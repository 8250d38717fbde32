"""Fifty thousand samples by one command: what saving takes beside sampling, and the memory over the run.

Runs `patchscore sample fashion-mnist` in this process on a small bank, whose sampling is cheap and against which saving
counts for most. Prints the shares of CPU time and the peak memory beyond that of the bank and the first batch, and
writes both and a curve into --out. The default takes about ten minutes of a core.

python benchmarks/many_samples.py -n 50000 --format zip --out many-samples
"""

from __future__ import annotations

import argparse
import json
import resource
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt

from patchscore.cli import main
from patchscore.runs import Run, formats


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measured(words: list[str]) -> tuple[dict, list[tuple[float, int, int]]]:
    """The command's CPU seconds, those of saving, and (seconds, images made, bytes) every half second."""
    saving, made = [0.0], [0]
    started = time.monotonic()
    curve: list[tuple[float, int, int]] = []
    ended = threading.Event()

    def timed(name: str) -> None:
        inner = getattr(Run, name)

        def outer(self, *arguments, **options):
            start = time.thread_time()
            try:
                return inner(self, *arguments, **options)
            finally:
                saving[0] += time.thread_time() - start
                made[0] = len(self.made)

        setattr(Run, name, outer)

    def watch() -> None:
        while not ended.wait(0.5):
            curve.append((round(time.monotonic() - started, 1), made[0], resident()))

    for name in ("_nearest", "_save_batch", "_pack", "_draw", "_take_up"):
        timed(name)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        main(words, standalone_mode=False)
    finally:
        ended.set()
        thread.join()
    total = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    return {"cpu_seconds": round(total, 1), "saving_seconds": round(saving[0], 1)}, curve


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=50_000)
    parser.add_argument("--format", choices=formats.FORMATS, default="zip")
    parser.add_argument("--limit", type=int, default=200, help="training images; each class has a tenth of them")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("many-samples"))
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    options = {"--limit": given.limit, "--labels": "all", "--table": 3, "--steps": given.steps, "-n": given.n}
    options |= {"--batch-size": 250, "--format": given.format, "--out": given.out}
    words = ["sample", "fashion-mnist", *(str(word) for pair in options.items() for word in pair)]
    found, curve = measured(words)
    first = next((at for at in curve if at[1] >= min(1000, given.n // 10)), curve[-1])
    peak = max(at[2] for at in curve)
    found |= {
        "command": " ".join(["patchscore", *words]),
        "saving_share": found["saving_seconds"] / (found["cpu_seconds"] - found["saving_seconds"]),
        "bytes_after_the_first_thousand": first[2],
        "peak_bytes": peak,
        "peak_beyond_it": peak - first[2],
        "curve": curve,
    }
    (given.out / "memory.json").write_text(json.dumps(found))
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([at[1] for at in curve], [at[2] / 2**20 for at in curve], lw=1)
    axes.set(xlabel="images made", ylabel="resident memory, MiB", ylim=(0, None), title=f"{given.n:,} samples")
    figure.savefig(given.out / "memory.png", dpi=150)
    print({name: value for name, value in found.items() if name != "curve"})
