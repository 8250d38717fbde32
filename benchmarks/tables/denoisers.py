"""Other people's samplers, guidance, and classification by denoising errors."""

from .results import measured_on, result, table


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


def nearest_cut() -> str:
    record = result("nearest_cut")
    cases: dict[tuple[str, float], list[dict]] = {}
    for row in record["rows"]:
        cases.setdefault((row["setting"], row["sigma"]), []).append(row)

    def cell(row: dict) -> str:
        return f"{row['rms']:.1g}" if row["rms"] < 1e-3 else f"{row['rms']:.3f}"

    def timed(row: dict) -> str:
        return f"{cell(row)} ({row['seconds']:.2g} s)"

    rows = []
    for (setting, sigma), of in cases.items():
        exact = next(row for row in of if row["method"] == "sliding")
        rival = [row for row in of if row["method"] == "nearest"]
        # At equal time: as many cells as the time of the exact sums allows; where none fits, the quickest.
        fitting = [row for row in rival if row["seconds"] <= exact["seconds"]] or [min(rival, key=_seconds)]
        pruned = max((row for row in of if row["method"] == "pruned"), key=lambda row: row["at"])
        drawn = next((timed(row) for row in of if row["method"] == "pruned, no index"), "")
        cut = (min(fitting, key=_rms), min(rival, key=_rms))
        rows.append([setting, f"{sigma:g}", *map(timed, (exact, *cut, pruned)), drawn])
    header = ["bank", "sigma", "`sliding`: all windows", "five nearest, in that time", "five nearest, best of any time"]
    return (
        f"Rms error and CPU time at k = {record['k']} {measured_on(record)}:\n\n"
        f"{table([*header, '`pruned`, 1% of the pairs', '`pruned` without an index, 25% of the images'], rows)}"
    )


def _seconds(row: dict) -> float:
    return row["seconds"]


def _rms(row: dict) -> float:
    return row["rms"]
