"""Puts measured numbers into README.md and docs/: every block between <!-- name --> and <!-- /name --> is made here.

From the files in benchmarks/results/ and, for what is derived on paper, paper.py. What has no file yet is marked as not
measured, with the command for it.

python benchmarks/report.py           # rewrites the blocks
python benchmarks/report.py --check   # fails if they are not what the results say
"""

import json
import re
import statistics
import sys
from pathlib import Path

import paper

from patchscore.engines import cost

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MACHINES = {"els": "EquivariantLocalScore", "local": "LocalScore", "ideal": "IdealScore"}
DATA = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
NOT_MEASURED = "not measured"

COMMANDS = {
    "exact_cpu": "exact_cpu.py --images cifar10",
    "accuracy": "accuracy.py",
    "pruned_cpu": "pruned_cpu.py --images cifar10 --indexes indexes",
    "scaling": "scaling.py --images cifar10",
    "end_to_end": "end_to_end.py --cifar10 cifar10 --fashion-mnist train-images-idx3-ubyte.gz --indexes indexes",
    "gpu-*": "gpu.py --images cifar10 --indexes indexes",
    "theory": "theory.py fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors fashion-mnist",
    "adapters": "adapters.py",
    "gaussian-fashion-mnist": "gaussian.py fashion-mnist",
    "gaussian-cifar10": "gaussian.py cifar10 cifar10/train",
    "guidance": "guidance.py",
    "classification": "classification.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz",
    "fused_precision": "fused_precision.py cifar10",
    "fused_compile": "compile_report.py",
    "fused_compile-triton-3.6": "compile_report.py --suffix=-triton-3.6",
    "pruned_compile": "compile_report.py",
    "pruned_compile-triton-3.6": "compile_report.py --suffix=-triton-3.6",
    "sliding_cuda_sass": "sass.py",
}
"""What writes each result file: every file that there is, or should be."""


class Missing(Exception):
    """A result file that nobody has written yet."""


def result(name: str) -> dict:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise Missing(name)
    return json.loads(path.read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_on(record: dict) -> str:
    versions = record["versions"]
    return f"({record['machine']}, torch {versions['torch']}, {record['commit']}, {record['date']})"


def agreement() -> str:
    record = result("adapters")
    rows = []
    for row in record["rows"]:
        figures = [row.get(dtype) for dtype in ("float32", "float64")]
        cells = [f"{figure['rms']:.0e} / {figure['worst']:.0e}" if figure else "" for figure in figures]
        rows.append([row["scheduler"], f"`{row['against'].split(', ')[1]}`", *cells])
    note = (
        f"{record['images']} images of EquivariantLocalScore over {record['bank']} of Fashion-MNIST, {record['steps']} "
        f"steps, diffusers {record['diffusers']} {measured_on(record)}:"
    )
    header = ["diffusers scheduler", "our sampler", "float32: rms / worst pixel", "float64: rms / worst pixel"]
    return f"{note}\n\n{table(header, rows)}"


def flow() -> str:
    record = result("adapters")
    steps = [key for key in record["flow"][0] if key != "scheduler"]
    rows = [[row["scheduler"], *(f"{row[step]:.1e}" for step in steps)] for row in record["flow"]]
    return table(["scheduler", *(f"{step} steps" for step in steps)], rows)


def guidance() -> str:
    record = result("guidance")
    rows = [
        [
            f"{row['scale']:g}",
            f"{row['in_class'] * record['samples']:.0f} of {record['samples']}",
            f"{row['largest']:.2g}",
        ]
        for row in record["rows"]
    ]
    header = ["scale", "samples that a classifier puts in their class", "largest absolute value denoised on the way"]
    return table(header, rows)


def departure() -> str:
    parts = []
    for data, title in DATA.items():
        record = result(f"gaussian-{data}")
        steps = {name: measured["departure"] for name, measured in record["machines"].items()}
        rows = []
        for i, row in enumerate(steps["els"]):
            cells = [f"{steps[name][i]['rms']:.2f} / {100 * steps[name][i]['score']:.1f}%" for name in MACHINES]
            rows.append([str(i + 1), f"{row['sigma']:.3g}", str(row["k"]), *cells])
        header = ["step", "sigma", "k", *MACHINES.values()]
        parts.append(f"{title}, {record['bank']} {measured_on(record)}:\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def skipping() -> str:
    parts = []
    for data, title in DATA.items():
        record = result(f"gaussian-{data}")
        rows = []
        for i, row in enumerate(record["machines"]["els"]["skipping"]):
            cells = []
            for name in MACHINES:
                of = record["machines"][name]["skipping"][i]
                cells += [f"{of['r2']:.2f} / {of['r2_flow']:.2f}", f"{of['time']:.2f}"]
            rows.append([f"{row['skipped']} ({100 * row['share']:.0f}%)", f"{row['until']:.3g}", *cells])
        header = ["steps skipped", "sigma"] + [cell for name in MACHINES.values() for cell in (name, "time")]
        parts.append(f"{title}:\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def starting() -> str:
    parts = []
    for data, title in DATA.items():
        record = result(f"gaussian-{data}")
        rows = []
        for i, row in enumerate(record["machines"]["els"]["starting"]):
            cells = []
            for name in MACHINES:
                of = record["machines"][name]["starting"][i]
                cells += [f"{of['white']:.2f} / {of['gaussian']:.2f}", f"{of['time']:.2f}"]
            rows.append([f"{row['s']:g}", str(row["steps"]), *cells])
        header = ["s", "steps left"] + [cell for name in MACHINES.values() for cell in (name, "time")]
        parts.append(f"{title}:\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def classification() -> str:
    record = result("classification")
    rows = [
        [
            row["machine"],
            f"{row['bank']:,}",
            ", ".join(f"{sigma:g}" for sigma in row["sigmas"]),
            f"{100 * row['accuracy']:.1f}%",
            f"{row['pairs']:.2g}" if row["pairs"] else "none",
            f"{row['cpu_milliseconds']:.2g}",
        ]
        for row in record["rows"]
    ]
    header = ["denoiser", "bank", "sigmas", "accuracy", "pairs an image", "CPU ms an image"]
    note = (
        f"{record['images']} held-out images, one draw at each sigma {measured_on(record)}; the nearest of "
        f"{max(row['bank'] for row in record['rows']):,} training images is right for "
        f"{100 * record['nearest_neighbour']:.1f}%:"
    )
    return f"{note}\n\n{table(header, rows)}"


def fused_compiled() -> str:
    record = result("fused_compile-triton-3.6")
    rows = []
    for row in record["rows"]:
        if row["capability"] != 90:
            continue
        work, skipped = paper.compiled_work(row)
        cells = [row["plan"], str(row["columns"]), f"{row['tile']}, {row['warps']}w, {row['stages']}st"]
        cells += [str(row[key]) for key in ("registers", "spilled_bytes")]
        cells += [f"{row['shared_bytes'] / 1024:.0f}", str(row["wgmma"])]
        cells += [f"{row['per_pair']:.1f}", f"{row['exponentials_per_pair']:.2f}"]
        cells += [f"{row[key] / 1e12:.1f}" for key in ("exponential_ceiling", "issue_ceiling", "matrix_ceiling")]
        cells.append(f"{paper.DEVICE.l2_rate / work.l2_bytes / 1e12:.2g}")
        cells.append(paper.shown(cost.rate(work, paper.DEVICE, cost.TRITON)) + " (skipped)" * skipped)
        rows.append(cells)
    header = ["plan", "K", "tile", "regs", "spilled", "KiB shared", "wgmma", "instr / pair", "exp / pair"]
    header += ["exp", "issue", "matrix", "L2", "derived"]
    return f"Triton {record['triton']}, sm_90 ({record['commit']}, {record['date']}):\n\n{table(header, rows)}"


def pruned_compiled() -> str:
    record = result("pruned_compile-triton-3.6")
    rows = []
    for row in record["rows"]:
        if row["capability"] != 90:
            continue
        cells = [f"{row['kernel']} {row.get('variant', '').lower()}".strip(), str(row.get("columns", ""))]
        cells.append(f"{row['tile']}, {row['warps']}w, {row['stages']}st" if "tile" in row else "")
        cells += [str(row[key]) for key in ("registers", "spilled_bytes")]
        cells += [f"{row['shared_bytes'] / 1024:.0f}", str(row["wgmma"])]
        if "per_pair" in row:
            work = paper.compiled_scan(row)
            cells += [f"{row['per_pair']:.1f}", f"{row['exponentials_per_pair']:.2f}"]
            cells += [f"{row[key] / 1e12:.1f}" for key in ("exponential_ceiling", "issue_ceiling", "matrix_ceiling")]
            cells.append(f"{paper.DEVICE.l2_rate / work.l2_bytes / 1e12:.2g}")
            cells.append(paper.shown(cost.rate(work, paper.DEVICE, cost.TRITON)))
        else:
            cells += [""] * 7
        rows.append(cells)
    header = ["kernel", "K", "tile", "regs", "spilled", "KiB shared", "wgmma", "instr / pair", "exp / pair"]
    header += ["exp", "issue", "matrix", "L2", "derived"]
    return f"Triton {record['triton']}, sm_90 ({record['commit']}, {record['date']}):\n\n{table(header, rows)}"


def fused_everywhere() -> str:
    return _everywhere("fused_compile")


def pruned_everywhere() -> str:
    return _everywhere("pruned_compile")


def _everywhere(report: str) -> str:
    rows = []
    for name in (f"{report}-triton-3.6", report):
        record = result(name)
        for capability, kind in ((90, "wgmma"), (80, "mma")):
            found = [row for row in record["rows"] if row["capability"] == capability]
            cells = [record["triton"], f"sm_{capability}", str(len(found))]
            cells += [f"{min(r['registers'] for r in found)} to {max(r['registers'] for r in found)}"]
            cells += [str(max(r["spilled_bytes"] for r in found))]
            cells += [f"{max(r['shared_bytes'] for r in found) / 1024:.0f}"]
            multiply = [r for r in found if r.get("kernel", "scan") == "scan"]
            cells += [f"{sum(r[kind] > 0 for r in multiply)} of {len(multiply)} with {kind}"]
            rows.append(cells)
    header = [
        "Triton",
        "device",
        "compiled",
        "registers",
        "most bytes spilled",
        "most KiB shared",
        "matrix instructions",
    ]
    return table(header, rows)


def fused_precision() -> str:
    record = result("fused_precision")
    rows = []
    sigmas = sorted({row["sigma"] for row in record["rows"]})
    for k in sorted({row["k"] for row in record["rows"]}):
        found = {row["sigma"]: row for row in record["rows"] if row["k"] == k}
        rows.append([str(k), *(f"{found[s]['columns']}: {found[s]['worst']:.0e}" for s in sigmas)])
    worst = max(row["worst"] for row in record["rows"])
    note = (
        f"{record['queries']} query pixels a cell, CIFAR-10, columns: worst of {record['queries']} pixels x 3 channels "
        f"({record['commit']}, {record['date']}). The worst of all is {worst:.1e}, {record['tolerance']:g} was asked:"
    )
    return f"{note}\n\n{table(['k', *(f'{s:g}' for s in sigmas)], rows)}"


def fused_columns() -> str:
    record = result("fused_precision")
    sigmas = sorted({row["sigma"] for row in record["rows"]})
    rows = []
    for k in sorted({row["k"] for row in record["rows"]}):
        found = {row["sigma"]: row for row in record["rows"] if row["k"] == k}
        rows.append([str(k), str(3 * k * k), *(str(found[s]["columns_50000"]) for s in sigmas)])
    return table(["k", "C k^2", *(f"{s:g}" for s in sigmas)], rows)


def theory() -> str:
    record = result("theory")
    best = longest(record)
    parts = []
    for key, of in best.items():
        rows = [
            [row["machine"], str(row["n"]), median(row, "r2"), median(row, "correlation"), f"{row['mse_median']:.3f}"]
            for row in record["rows"]
            if is_of(row, key, of)
        ]
        header = ["machine", "n", "r^2", "correlation", "mse"]
        title = f"{titled(key)} padding, {of['images']:,} training images, {of['images_seen']:,} seen"
        parts.append(f"{title}:\n\n{table(header, rows)}")
    return "\n\n".join([*parts, f"Medians, with 95% intervals {measured_on(record)}."])


def limits() -> str:
    record = result("theory")
    own = [row for row in sorted(record["rows"], key=order) if row["machine"] == f"els-{row['padding_mode']}"]
    rows = []
    for row in own:
        about = [titled(kind_of(row)), f"{row['images_seen']:,}", f"{row['bank']:,}"]
        # Rows of fewer images are held against the same images of this one.
        beside = {other["n"] for other in own if kind_of(other) == kind_of(row)}
        for n, first in row.get("r2_first", {}).items():
            if int(n) in beside:
                rows.append([*about, f"first {n}", median(first, "r2")])
        rows.append([*about, str(row["n"]), median(row, "r2")])
    return table(["network", "images seen in training", "training images the machine has", "n", "r^2"], rows)


def training() -> str:
    record = result("theory")
    rows = [
        [
            titled(key),
            f"{of['weights']:,}",
            f"{of['images']:,}",
            f"{of['images_seen']:,}",
            f"{of['images_seen'] / of['images']:.0f}",
            f"{of['seconds'] / 60:.0f} min",
            f"{of['loss']:.3f}",
        ]
        for key, of in trained(record)
    ]
    header = ["network", "weights", "training images", "images seen", "epochs", "one shared CPU core", "last loss"]
    return table(header, rows)


def longest(record: dict) -> dict[tuple[str, str, str], dict]:
    """The network of each data set, architecture and padding that was trained longest, of those with baselines."""
    return {
        key: of
        for key, of in trained(record)
        if any(is_of(row, key, of) and row["machine"] == "ideal" for row in record["rows"])
    }


def trained(record: dict) -> list[tuple[tuple[str, str, str], dict]]:
    """Every network once, whatever banks its machines had, in the order of the tables."""
    networks = sorted(record["networks"].values(), key=order)
    return [(kind_of(of), of) for i, of in enumerate(networks) if of not in networks[:i]]


def kind_of(of: dict) -> tuple[str, str, str]:
    return of["dataset"], of["network"], of["padding_mode"]


def titled(kind: tuple[str, str, str]) -> str:
    return f"{DATA[kind[0]]}, {kind[1]}, {kind[2]}"


def is_of(row: dict, key: tuple[str, str, str], of: dict) -> bool:
    return kind_of(row) == key and row["images_seen"] == of["images_seen"] and row["bank"] == of["images"]


def order(of: dict) -> tuple:
    """By data set, architecture and padding, then by length of training and size of bank."""
    return (
        of["dataset"] == "cifar10",
        of["network"],
        of["padding_mode"] == "circular",
        of["images_seen"],
        of.get("bank", 0),
    )


def median(row: dict, figure: str) -> str:
    low, high = row[f"{figure}_interval"]
    return f"{row[f'{figure}_median']:.3f} ({low:.2f} to {high:.2f})"


def pruned_steps() -> str:
    record = result("pruned_cpu")
    header = [
        "k, sigma",
        "pairs",
        "rms",
        "worst",
        "within 2 stderr",
        "> 0.1 unsaid",
        "sooner",
        "least budget: rms, sooner",
    ]
    header += ["interior, equal time: pruned", "FAISS top-k", "uniform subset", "screened"]
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in record["rows"]):
        rows = [
            [
                f"{row['k']}, {row['sigma']:.3g}",
                f"{row['pairs_share']:.1%}",
                f"{row['rms']:.4f}",
                f"{row['worst']:.2f}",
                f"{row['within_2_stderr']:.1%}",
                str(row["silent"]),
                f"{row['faster']:.1f}x",
                f"{row['least_budget']:g}: {row['least_rms']:.4f}, {row['least_faster']:.1f}x",
                *(f"{row[f'{name}_rms']:.4f}" for name in ("interior", "top_k", "subset", "screened")),
            ]
            for row in record["rows"]
            if row["setting"] == setting
        ]
        images = next(row["images"] for row in record["rows"] if row["setting"] == setting)
        parts.append(f"{setting}, {images} noisy images at a time:\n\n{table(header, rows)}")
    return "\n\n".join([*parts, measured_on(record)])


def pruned_indexes() -> str:
    record = result("pruned_cpu")
    rows = [
        [
            row["setting"],
            f"{row['windows']:,}",
            f"{row['bytes_a_window']:.1f}",
            f"{row['build_seconds']:.0f} s" if "build_seconds" in row else "not measured",
            f"{row['open_seconds']:.2f} s",
        ]
        for row in record["indexes"]
    ]
    return table(["index", "windows", "bytes a window", "built in", "opened in"], rows)


def pruned_samples() -> str:
    record = result("pruned_cpu")
    rows = [
        [
            row["setting"],
            str(row["images"]),
            f"{row['r2_median']:.4f}",
            f"{row['r2_least']:.4f}",
            f"{row['exact_seconds']:.0f} s",
            f"{row['pruned_seconds']:.0f} s",
            f"{row['faster']:.1f}x",
        ]
        for row in record["samples"]
    ]
    header = ["20 steps, budget 0.01", "samples", "r^2 with exact, median", "least", "exact", "pruned", "sooner"]
    return table(header, rows)


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


def coverage() -> str:
    """How well stated errors of `pruned` cover the true ones."""
    record = result("pruned_cpu")
    rows = []
    for setting in dict.fromkeys(row["setting"] for row in record["rows"]):
        for low, high in ((0, 0.2), (0.2, 1), (1, 3), (3, 100)):
            steps = [row for row in record["rows"] if row["setting"] == setting and low <= row["sigma"] < high]
            if not steps:
                continue
            ratio = [row["stderr_rms"] / row["rms"] for row in steps]
            within = [row["within_2_stderr"] for row in steps]
            span = f"{min(row['sigma'] for row in steps):.2g} to {max(row['sigma'] for row in steps):.2g}"
            cells = [setting, span, str(len(steps)), f"{statistics.median(row['rms'] for row in steps):.4f}"]
            cells += [f"{statistics.median(ratio):.2f}", f"{min(within):.1%} to {max(within):.1%}"]
            rows.append([*cells, str(sum(row["silent"] for row in steps))])
    header = ["bank", "sigma", "steps", "rms error", "stated over true", "within two stderr", "unsaid"]
    return f"{table(header, rows)}\n\n{measured_on(record)}"


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
    images, devices = found[0]["images"], sorted(RESULTS.glob("gpu-*.json"))
    header = [f"{images} CIFAR-10 images, {record['steps']} steps, 20,000 training images", "time", "relative"]
    gpu = f"measured on {', '.join(path.stem.removeprefix('gpu-') for path in devices)}" if devices else NOT_MEASURED
    note = f"\\* Extrapolated from a part of the pairs. r^2: squared correlation with the exact images. GPU: {gpu}."
    return f"{table([*header, 'r^2'], rows)}\n\n{note} {measured_on(record)}"


def optional(block) -> str:
    """The block, or that there is nothing to make it from."""
    try:
        return block()
    except Missing as missing:
        command = f"python benchmarks/{COMMANDS[str(missing)]}"
        return f"*Not measured*: there is no `benchmarks/results/{missing}.json`; `{command}` makes it."


def files() -> str:
    """Every result file: what it is, and of what machine, commit and date."""
    names = sorted({*(path.stem for path in RESULTS.glob("*.json")), *(name for name in COMMANDS if "*" not in name)})
    if not any(name.startswith("gpu-") for name in names):
        names.append("gpu-*")
    rows = []
    for name in names:
        script = COMMANDS.get(name) or COMMANDS["gpu-*"]
        path = RESULTS / f"{name}.json"
        if path.exists():
            record = result(name)
            where = [record["machine"], f"torch {record['versions']['torch']}", record["commit"], record["date"]]
            rows.append([f"`{name}`", record["what"].rstrip("."), *where, f"`{script}`"])
        else:
            rows.append([f"`{name}`", NOT_MEASURED, "", "", "", "", f"`{script}`"])
    return table(["file", "what", "machine", "versions", "commit", "date", "`python benchmarks/...`"], rows)


def red_engines(record: dict) -> set[str]:
    """Engines whose GPU tests did not pass in the run of gpu_quick.sh that made the record."""
    ended = {step["step"]: step["status"] for step in record.get("steps", [])}
    return {engine for engine in ("fused", "pruned", "sliding") if ended.get(f"tests-{engine}", "passed") != "passed"}


def gpu_table(rows: list[dict], red: set[str] = frozenset()) -> str:
    """Rows of gpu.py, which prints this too; no speed of an engine whose tests are red."""

    def cells(row: dict) -> list[str]:
        named = [str(row.get(name, "")) for name in ("engine", "k", "sigma", "batch")]
        if red & set(row["engine"].split(" and ")):
            return [row["section"], *named, *[""] * 4, "not reported: its tests are red", *[""] * 7]
        return [
            row["section"],
            *named,
            f"{row['windows']:,}" if "windows" in row else "",
            *(str(row.get(name, "")) for name in ("columns", "precision", "budget")),
            f"{row['pairs_per_second'] / 1e12:.3f}" if "pairs_per_second" in row else "",
            f"{row['derived_low'] / 1e12:.2f} to {row['derived_high'] / 1e12:.2f}" if "derived_low" in row else "",
            f"{row['clock_mhz'] / 1e3:.2f}, {row['power_watts']:.0f}" if "clock_mhz" in row else "",
            *(f"{row[name]:.1e}" if name in row else "" for name in ("error", "rms", "stderr_rms")),
            f"{1e3 * row['seconds_median'] / row.get('batch', 1):.2f}",
            f"{row['peak_gib']:.1f}" if "peak_gib" in row else "",
        ]

    header = ["section", "engine", "k", "sigma", "batch", "windows", "columns", "precision", "budget", "1e12 pairs/s"]
    header += ["derived", "GHz, W", "worst pixel", "rms", "rms stated", "ms an image", "peak GiB"]
    return table(header, [cells(row) for row in rows])


def gpu() -> str:
    devices = sorted(RESULTS.glob("gpu-*.json"))
    if not devices:
        raise Missing("gpu-*")
    parts = []
    for path in devices:
        record = json.loads(path.read_text())
        lacking = {"Not measured": record["skipped"], "Failed": record["failed"]}
        parts.append(f"{record['device']}, {measured_on(record)}:\n\n{gpu_table(record['rows'], red_engines(record))}")
        parts += [
            "\n".join([f"{what} there:\n", *(f"- {of}" for of in some)]) for what, some in lacking.items() if some
        ]
    return "\n\n".join(parts)


def end_to_end() -> str:
    record = result("end_to_end")
    settings = sorted({row["setting"] for row in record["rows"]} | {"fashion-mnist-60000", "cifar10-20000"})
    # Methods of equal time take another number of images of each bank.
    kinds = dict.fromkeys(row["method"].partition(",")[0] for row in record["rows"])
    found = {(row["setting"], row["method"].partition(",")[0]): row for row in record["rows"]}
    rows = []
    for kind in kinds:
        names = {found[of, kind]["method"] for of in settings if (of, kind) in found}
        cells = [names.pop() if len(names) == 1 else f"{kind}, as long as pruned"]
        for setting in settings:
            row, whole = found.get((setting, kind)), found.get((setting, "sliding"))
            if row is None or whole is None:
                cells += [NOT_MEASURED, ""]
                continue
            ratio = f"{row['seconds']:,.0f} s ({row['seconds'] / whole['seconds']:.2g})"
            r2 = "extrapolated" if row["extrapolated"] else f"{row['r2_median']:.4f} ({row['r2_least']:.4f})"
            cells += [ratio, r2]
        rows.append(cells)
    built = [found[of, "pruned"].get("build_seconds") for of in settings if (of, "pruned") in found]
    minutes = [f"{seconds / 60:.0f}" for seconds in built if seconds]
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


def on_paper() -> str:
    rows = [
        [
            f"{row['windows']:.0e}".replace("e+", "e"),
            f"{row['k']}, {row['sigma']:g}",
            f"{row['images'] / 1e6:.2g}M",
            f"{row['pairs']:.1e}".replace("e+", "e"),
            f"{row['bank_bytes'] / 1e9:.0f}",
            f"`{row['engine']}`",
            str(row["gpus"]),
            f"{row['bytes_a_gpu'] / 1e9:.0f}",
            f"{row['seconds']:.2g}",
            row["binds"],
        ]
        for row in paper.larger_banks()
    ]
    header = ["windows", "k, sigma", "images", "pairs", "bank, GB", "engine", "GPUs", "GB a GPU", "s a step", "binds"]
    device = paper.DEVICE
    note = (
        f"Derived for {device.name}s of {device.multiprocessors} multiprocessors at {device.clock / 1e9:g} GHz, "
        f"{device.memory / 1e9:.0f} GB at {device.memory_rate:.2g} bytes/s, L2 at {device.l2_rate:.2g} bytes/s "
        f"(assumed), PCIe at {paper.BUS:.2g} and NVLink at {paper.LINK:.2g} bytes/s; not measured."
    )
    return f"{table(header, rows)}\n\n{note}"


def expected_steps() -> str:
    """Each step of a published table over all of CIFAR-10, by engine."""
    steps = paper.steps()
    rows = [
        [
            f"{row['sigma']:.3g}",
            str(row["k"]),
            f"{row['columns']}{' (exact)' if row['exact'] else ''}",
            f"{row['pairs']:.2g}".replace("e+", "e"),
            *(f"{row[engine]:.1f}" for engine in ("sliding", "auto")),
            f"`{row['interior']}`",
        ]
        for row in steps
    ]
    mean = [f"{sum(row[engine] for row in steps) / len(steps):.1f}" for engine in ("sliding", "auto")]
    rows.append(["mean", "", "", "", *mean, ""])
    header = ["sigma", "k", "K", "pairs an image", "ms an image: `sliding`", "`auto`", "interior by"]
    note = (
        f"Derived, not measured: {paper.BATCH} images at once on {paper.DEVICE.name}, {paper.IMAGES:,} images of "
        f"CIFAR-10, zero padding, `{paper.TABLE}`; K of the next lower noise in the table of columns:"
    )
    return f"{note}\n\n{table(header, rows)}"


def anchors() -> str:
    """The model beside published attention kernels."""
    rows = []
    for name, of in cost.PUBLISHED.items():
        for head, teraflops in of.items():
            work = cost.attention(head, 2 if name == "FlashAttention-3" and head > 64 else 1)
            published = teraflops * 1e12 / (4 * head)
            share = published * work.seconds(cost.H100, 1.0)
            rows.append([name, str(head), str(teraflops), f"{published / 1e12:.2f}",
                         f"{1 / work.seconds(cost.H100, 1.0) / 1e12:.2f}", f"{share:.2f}"])  # fmt: skip
    header = ["kernel", "head size", "published TFLOPS", "1e12 pairs/s", "model at efficiency 1", "efficiency"]
    return f"H100, half floats, no causal mask, 16k tokens (arXiv:2407.08608, figure 5):\n\n{table(header, rows)}"


BLOCKS = (
    headline,
    files,
    accuracy,
    coverage,
    exact,
    end_to_end,
    scaling,
    on_paper,
    expected_steps,
    anchors,
    gpu,
    agreement,
    flow,
    guidance,
    departure,
    skipping,
    starting,
    classification,
    theory,
    limits,
    training,
    pruned_steps,
    pruned_indexes,
    pruned_samples,
    fused_compiled,
    fused_everywhere,
    pruned_compiled,
    pruned_everywhere,
    fused_precision,
    fused_columns,
)


def filled(page: str) -> str:
    """The page with every block made afresh."""
    made = {block.__name__: block for block in BLOCKS}

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{optional(made[name])}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, page, flags=re.DOTALL)


def main() -> None:
    for path in PAGES:
        page = path.read_text()
        made = filled(page)
        if "--check" in sys.argv[1:] and page != made:
            sys.exit(f"{path.relative_to(ROOT)} is not what the results say: run python benchmarks/report.py")
        if page != made:
            path.write_text(made)


if __name__ == "__main__":
    main()
