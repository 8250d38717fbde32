"""Ranks: what was measured with a few, and what that means for banks of 10^9 and 10^10 windows."""

import numpy as np

from patchscore.windows import equivariant_competition

from .results import result, table

WINDOWS = (10**9, 10**10)
RANKS = (16, 64, 256)


def ranks() -> str:
    """Measured speedups and bytes beside what they should be."""
    of = result("scale")
    bank, images, eight, last = of["bank"], of["images"], of["bytes"]["8"], of["weak_scaling"][-1]
    size = f"{of['bank_images']:,} images, k = {of['patch_size']}"
    rows = [
        ["images over 2 ranks of one thread", f"{images['speedup']:.2f}x", "1.9x"],
        [f"bank over 2 ranks of one thread, exact, {size}", f"{bank['speedup']:.2f}x", "1.85x"],
        ["largest difference of a pixel from one rank", f"{bank['largest_difference']:.1e}", "1e-6"],
        ["bytes that a rank of 8 sends, an image and step", f"{eight['bytes a rank, mean'] / 1e3:.0f} kB", "100 kB"],
        *(
            [f"the same {told}", f"{eight[f'bytes a rank, {also}'] / 1e3:.0f} kB", "100 kB"]
            for also, told in {
                "with ess": "with effective sample sizes",
                "with standard errors": "of `pruned` with standard errors",
                "vjp": "of a product with the Jacobian",
            }.items()
        ),
        [f"weak scaling to {last['ranks']} ranks, simulated", f"{last['efficiency']:.0%}", "90%"],
    ]
    return table(["", "measured", "target"], rows)


def many_samples() -> str:
    """The memory of a long run, from the rank that had most."""
    of = result("many_samples")
    mib = {name: f"{of[name] / 2**20:.0f} MiB" for name in ("own_bytes_early", "own_bytes_at_most", "rss_at_most")}
    rows = [
        [
            "images made, by two ranks until interrupted, then by one process",
            f"{of['interrupted_at']:,} + {of['images'] - of['interrupted_at']:,}",
            "",
        ],
        ["memory of its own after the first fiftieth", mib["own_bytes_early"], ""],
        ["memory of its own, at most", mib["own_bytes_at_most"], "1 GiB beyond the bank"],
        ["resident with pages of files, at most", mib["rss_at_most"], ""],
        ["processor seconds, of all ranks", f"{of['cpu_seconds']:.0f} s", ""],
    ]
    return f"`{of['command']}`:\n\n{table(['', 'measured', 'target'], rows)}"


def step_cost() -> str:
    """Seconds of an exact step of one image, from the rate of one rank and the time of messages."""
    of = result("scale")
    competition = equivariant_competition(32, 32, of["patch_size"], "zeros")
    rate = competition.pairs_per_image * of["bank_images"] / of["bank"]["seconds_of_one_rank"]
    measured = {int(count) - 1: of["bytes"][count]["seconds on the clock, mean"] for count in of["bytes"]}
    more, start = np.polyfit(list(measured), list(measured.values()), 1)
    inside = (32 - of["patch_size"] + 1) ** 2
    rows = []
    for windows in WINDOWS:
        images = windows / inside
        row = [f"{windows:.0e}", f"{images:,.0f}", f"{images * 3 * 32 * 32 / 2**30:.1f} GiB"]
        for count in RANKS:
            seconds = competition.pairs_per_image * images / rate / count + start + (count - 1) * more
            row.append(f"{seconds:,.0f} s")
        rows.append(row)
    header = ["windows", "images", "bank", *(f"{count} ranks" for count in RANKS)]
    pairs, exchange = f"{rate / 1e9:.2f} billion pairs a second", f"{1e3 * more:.1f} ms for each other rank"
    threads = f"One thread evaluates {pairs}; an exchange takes {exchange}."
    return f"{table(header, rows)}\n\n{threads}"
