"""Steps over files that are larger than the memory of the process."""

from .results import measured_on, result, table

STEPS = {
    "fingerprint": "fingerprint",
    "whole": "`IdealScore`, one image",
    "exact": "`EquivariantLocalScore`, k = 3, {pixels} x {pixels} pixels",
    "index": "index of {windows:,} windows, k = 3, {cells:,} cells",
}


def mapped() -> str:
    record = result("mapped")
    rows = []
    for row in record["rows"]:
        limit = f"{row['limit_gib']:g} GiB ({row['limited_by']})"
        pairs = f"{row['pairs']:.3g}" if "pairs" in row else ""
        peak = f"{row['peak_anonymous_gib']:.2f} GiB"
        read = f"{row['read_gib']:.1f} GiB" if "read_gib" in row else ""
        step = STEPS[row["step"]].format(**row)
        rows.append([f"{row['gib']:g} GiB", limit, step, pairs, peak, f"{row['cpu_seconds']:.0f} s", read])
    header = ["file", "process limited to", "step", "pairs", "peak of its own memory", "CPU time", "read from disk"]
    return f"`benchmarks/mapped.py` {measured_on(record)}:\n\n{table(header, rows)}"
