"""Exact sums on the CPU: errors, rates beside peers, scaling, and whole samples."""

from . import results
from .results import NOT_MEASURED, measured_on, result, table


def accuracy() -> str:
    """Worst pixel by engine and noise, over machines, patch sizes and channels."""
    record = result("accuracy")
    sigmas = sorted({row["sigma"] for row in record["rows"]})
    kinds = dict.fromkeys((row["engine"], row["dtype"]) for row in record["rows"])
    rows = []
    for engine, dtype in kinds:
        for ideal, machine in ((False, "windows"), (True, "whole images")):
            same = [
                row
                for row in record["rows"]
                if (row["engine"], row["dtype"], row["machine"] == "ideal") == (engine, dtype, ideal)
            ]
            worst = [max(row["worst"] for row in same if row["sigma"] == sigma) for sigma in sigmas]
            rows.append([f"`{engine}`, {dtype}", machine, *(f"{value:.0e}" for value in worst)])
    return f"{table(['engine', 'over', *(f'{s:g}' for s in sigmas)], rows)}\n\n{measured_on(record)}"


def exact() -> str:
    """Pairs a second of exact engines and peers on the CPU."""
    record = result("exact_cpu")
    parts = []
    for size, channels in dict.fromkeys((row["size"], row["channels"]) for row in record["rows"]):
        parts.append(f"{size} x {size}, {'colour' if channels == 3 else 'gray'}:\n\n{rates(record, size, channels)}")
    speed = record["ceilings"]
    note = (
        "Billions of (pixel, window) pairs a second; in brackets how many times `sliding` is ahead. In the same run "
        f"torch did {speed['fused_multiply_adds_per_second'] / 1e9:.0f} billion multiply-adds and "
        f"{speed['exponentials_per_second'] / 1e9:.1f} billion exponentials a second. Instructions: {record['simd']}. "
        f"{measured_on(record)}"
    )
    return "\n\n".join([*parts, note])


PEERS = {
    "sliding": "`sliding`",
    "attention": "torch attention",
    "gemm": "GEMM, online softmax",
    "convolution": "convolution (published)",
    "keops": "KeOps",
    "reference": "`reference`",
}


def rates(record: dict, size: int, channels: int) -> str:
    same = [row for row in record["rows"] if (row["size"], row["channels"]) == (size, channels)]
    found = {(row["k"], row["sigma"], row["engine"]): row for row in same}
    names = [name for name in PEERS if any(name == engine for _, _, engine in found)]
    rows = []
    for k, sigma in sorted({(k, sigma) for k, sigma, _ in found}):
        ours = found[k, sigma, "sliding"]["pairs_per_second"]
        cells = [f"{k}, {sigma:g}", f"{ours / 1e9:.2f}"]
        for name in names[1:]:
            rate = found[k, sigma, name]["pairs_per_second"]
            cells.append(f"{rate / 1e9:.3f} ({ours / rate:.1f}x)")
        rows.append(cells)
    return table(["k, sigma", *(PEERS[name] for name in names)], rows)


def end_to_end() -> str:
    record = result("end_to_end")
    settings = sorted({row["setting"] for row in record["rows"]} | {"fashion-mnist-60000", "cifar10-20000"})
    found = {(row["setting"], row["method"]): row for row in record["rows"]}
    rows = []
    for method in dict.fromkeys(row["method"] for row in record["rows"]):
        cells = [method]
        for setting in settings:
            row, whole = found.get((setting, method)), found.get((setting, "sliding, exact"))
            if row is None or whole is None:
                cells += [NOT_MEASURED, ""]
                continue
            ratio = f"{row['seconds']:,.0f} s ({row['seconds'] / whole['seconds']:.2g})"
            r2 = "extrapolated" if row["extrapolated"] else f"{row['r2_median']:.4f} ({row['r2_least']:.4f})"
            cells += [ratio, r2]
        rows.append(cells)
    built = {row["setting"]: row["build_seconds"] for row in record["rows"] if row.get("build_seconds")}
    minutes = [f"{seconds / 60:.0f}" for seconds in built.values()]
    header = [f"{record['rows'][0]['images']} images, {record['steps']} steps"]
    for setting in settings:
        header += [f"{setting} (times exact)", "r^2, median (least)"]
    note = "Extrapolated: timed on a part, the rest by its pairs; these peers sum over the same windows as exact."
    if minutes:
        note = f"Indexes were built once before, in {' and '.join(minutes)} minutes. {note}"
    return f"{table(header, rows)}\n\n{note} {measured_on(record)}"


SERIES = {
    "windows": "windows in the bank",
    "side": "side of the image",
    "batch": "noisy images at once",
    "k": "patch size",
    "threads": "threads",
}


def scaling() -> str:
    record = result("scaling")
    rows = []
    for fit in record["fits"]:
        of = [row for row in record["rows"] if (row["series"], row["engine"]) == (fit["series"], fit["engine"])]
        first, last = of[0], of[-1]
        cells = [SERIES[fit["series"]], f"`{fit['engine']}`", f"{fit['from']:,} to {fit['to']:,}"]
        cells += [f"{fit[name]:.2f}" if name in fit else "" for name in ("pairs", "seconds", "memory")]
        cells.append(f"{first['seconds_median']:.3f} to {last['seconds_median']:.3f} s")
        grown = [row["memory_mib"] for row in (first, last)]
        cells.append(NOT_MEASURED if None in grown else f"{grown[0]:.1f} to {grown[1]:.1f} MiB")
        rows.append(cells)
    header = ["quantity x", "engine", "from", "pairs: e", "seconds: e", "memory: e", "seconds", "memory"]
    skipped = "; ".join(record["skipped"])
    notes = [f"Images: {record['data']}; `pruned` at a budget of {record['budget']:g}. {measured_on(record)}"]
    notes += [f"Not measured: {skipped}."] * bool(skipped)
    return "\n\n".join([table(header, rows), "![Time and memory](images/scaling.png)", *notes])


def headline() -> str:
    """The README's table: the time that every method takes for the same samples, and how close they come."""
    record = result("end_to_end")
    found = [row for row in record["rows"] if row["setting"] == "cifar10-20000"]
    exact = next(row["seconds"] for row in found if row["method"] == "sliding, exact")
    rows = []
    for row in found:
        r2 = "same sum" if row["extrapolated"] else f"{row['r2_median']:.4f}"
        cells = [PEERS.get(row["method"], row["method"]), f"{row['seconds']:,.0f} s{' *' * row['extrapolated']}"]
        rows.append([*cells, f"{row['seconds'] / exact:.2g}", r2])
    images, devices = found[0]["images"], sorted(results.RESULTS.glob("gpu-*.json"))
    header = [f"{images} CIFAR-10 images, {record['steps']} steps, 20,000 training images", "time", "relative"]
    gpu = f"measured on {', '.join(path.stem.removeprefix('gpu-') for path in devices)}" if devices else NOT_MEASURED
    note = f"\\* Extrapolated from a part of the pairs. r^2: squared correlation with the exact images. GPU: {gpu}."
    return f"{table([*header, 'r^2'], rows)}\n\n{note} {measured_on(record)}"
