"""Engine `pruned` on the CPU: errors and times step by step, indexes, samples, coverage."""

import statistics

from patchscore.engines.pruned.policy import POLICY

from .results import measured_on, result, table


def shares_within(row: dict) -> str:
    """Shares within one, two and three standard errors; results of 0.1.0 have two alone."""
    shares = [row.get(f"within_{n}_stderr") for n in (1, 2, 3)]
    return " / ".join("" if share is None else f"{100 * share:.1f}" for share in shares)


def pruned_steps() -> str:
    record = result("pruned_cpu")
    header = [
        "k, sigma",
        "pairs",
        "rms",
        "worst",
        "within 1 / 2 / 3 stderr",
        "> 0.1, understated",
        "speedup",
        "least budget: rms, speedup",
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
                shares_within(row),
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


def pruned_policy() -> str:
    """Every constant at other values, over all settings."""
    record = result("pruned_policy")
    changes = dict.fromkeys((row["constant"], row["value"]) for row in record["rows"])
    rows = []
    for constant, value in changes:
        of = [row for row in record["rows"] if (row["constant"], row["value"]) == (constant, value)]
        ratios = [row["rms"] / row["usual_rms"] for row in of]
        within, usual = (100 * min(row[f"{name}within_2"] for row in of) for name in ("", "usual_"))
        rows.append([
            f"{constant} {getattr(POLICY, constant):g} -> {value:g}",
            f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{within:.1f}% ({usual:.1f}%)",
            f"{statistics.geometric_mean(row['seconds'] / row['usual_seconds'] for row in of):.2f}",
        ])  # fmt: skip
    return f"{table(['constant', 'rms error', 'within 2, least', 'time'], rows)}\n\n{measured_on(record)}"


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


def latents() -> str:
    record = result("latents")
    header = ["channels, k", "sigma", "exact", "`pruned`", "pairs", "rms", "stated", "rms of some images, in that time"]
    rows = [
        [
            f"{row['channels']}, {row['k']}",
            f"{row['sigma']:g}",
            f"{row['exact_seconds']:.2f} s",
            f"{row['seconds']:.2f} s",
            f"{row['pairs']:.1%}",
            f"{row['rms']:.4f}",
            f"{row['stated']:.4f}",
            f"{row['subset_rms']:.4f}",
            "exact" if row["stated"] == 0 else " / ".join(f"{100 * part:.1f}" for part in row["within"]),
        ]
        for row in record["rows"]
    ]
    return (
        f"{record['latents']:,} latents of 32 x 32, {record['band']} rows of another one, at a budget of "
        f"{record['budget']:.0%} {measured_on(record)}:\n\n{table([*header, 'within 1 / 2 / 3 stderr'], rows)}"
    )


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
    header = ["20 steps, budget 0.01", "samples", "r^2 with exact, median", "least", "exact", "pruned", "speedup"]
    return table(header, rows)


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
    header = ["bank", "sigma", "steps", "rms error", "stated over true", "within two stderr", "understated"]
    return f"{table(header, rows)}\n\n{measured_on(record)}"
