"""Where scores depart from the Gaussian one, and what a sampler gains by it."""

from .results import DATA, measured_on, result, table

MACHINES = {"els": "EquivariantLocalScore", "local": "LocalScore", "ideal": "IdealScore"}


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
