"""Puts measured numbers into docs/: every block between <!-- name --> and <!-- /name --> of these pages is made here.

python benchmarks/tables.py           # rewrites the blocks
python benchmarks/tables.py --check   # fails if they are not what the results say
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "adapters.md", ROOT / "docs" / "notes-fused.md"]
MACHINES = {"els": "EquivariantLocalScore", "local": "LocalScore", "ideal": "IdealScore"}
DATA = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


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
        rest = min(row["exponential_ceiling"], row["issue_ceiling"])
        one_after_other = 1 / (1 / row["matrix_ceiling"] + 1 / rest)
        cells = [row["plan"], str(row["columns"]), f"{row['tile']}, {row['warps']}w, {row['stages']}st"]
        cells += [str(row[key]) for key in ("registers", "spilled_bytes")]
        cells += [f"{row['shared_bytes'] / 1024:.0f}", str(row["wgmma"])]
        cells += [f"{row['per_pair']:.1f}", f"{row['exponentials_per_pair']:.2f}"]
        cells += [f"{row[key] / 1e12:.1f}" for key in ("exponential_ceiling", "issue_ceiling", "matrix_ceiling")]
        if row["per_pair_of_a_skipped_tile"]:
            # What is left of a tile that is passed over: the first product and its maxima.
            h200 = record["h200"]
            units = h200["clock"] * h200["multiprocessors"]
            issue = h200["lanes"] * units / row["per_pair_of_a_skipped_tile"]
            matrix = h200["products"] * units / row["columns"]
            cells.append(f"{1 / (1 / issue + 1 / matrix) / 1e12:.1f} to {min(issue, matrix) / 1e12:.1f} (skipped)")
        else:
            cells.append(f"{one_after_other / 1e12:.1f} to {min(rest, row['matrix_ceiling']) / 1e12:.1f}")
        rows.append(cells)
    header = ["plan", "K", "tile", "regs", "spilled", "KiB shared", "wgmma", "instr / pair", "exp / pair"]
    header += ["exp", "issue", "matrix", "expected"]
    return f"Triton {record['triton']}, sm_90 ({record['commit']}, {record['date']}):\n\n{table(header, rows)}"


def fused_everywhere() -> str:
    rows = []
    for name in ("fused_compile-triton-3.6", "fused_compile"):
        record = result(name)
        for capability, kind in ((90, "wgmma"), (80, "mma")):
            found = [row for row in record["rows"] if row["capability"] == capability]
            cells = [record["triton"], f"sm_{capability}", str(len(found))]
            cells += [f"{min(r['registers'] for r in found)} to {max(r['registers'] for r in found)}"]
            cells += [str(max(r["spilled_bytes"] for r in found))]
            cells += [f"{max(r['shared_bytes'] for r in found) / 1024:.0f}"]
            cells += [f"{sum(r[kind] > 0 for r in found)} with {kind}"]
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


def filled(page: str) -> str:
    """The page with every block made afresh."""
    blocks = (agreement, flow, guidance, departure, skipping, starting, classification)
    blocks += (fused_compiled, fused_everywhere, fused_precision, fused_columns)
    made = {block.__name__: block for block in blocks}

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{made[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, page, flags=re.DOTALL)


def main() -> None:
    for path in PAGES:
        page = path.read_text()
        made = filled(page)
        if "--check" in sys.argv[1:] and page != made:
            sys.exit(f"{path.relative_to(ROOT)} is not what the results say: run python benchmarks/tables.py")
        path.write_text(made)


if __name__ == "__main__":
    main()
