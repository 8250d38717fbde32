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
