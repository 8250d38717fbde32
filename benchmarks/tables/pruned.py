"""Engine `pruned` on the CPU: errors and times step by step, indexes, samples, coverage."""

import statistics

from patchscore.engines.pruned.policy import POLICY

from .results import measured_on, result, table


def rows_by_step(record: dict, setting: str) -> list[list[dict]]:
    """The rows of each step, one for each budget."""
    rows = [row for row in record["rows"] if row["setting"] == setting]
    return [[row for row in rows if row["step"] == step] for step in dict.fromkeys(row["step"] for row in rows)]


def settings_of(record: dict) -> list[str]:
    return list(dict.fromkeys(row["setting"] for row in record["rows"]))


def pruned_steps() -> str:
    """Rms error and speedup of every budget; the fastest that meets the aim; contenders in the time of 1%."""
    record = result("pruned_cpu")
    parts = []
    for setting in settings_of(record):
        steps = rows_by_step(record, setting)
        budgets = [row["budget"] for row in steps[0]]
        header = ["k, sigma", "exact", *(f"{budget:.2%}" for budget in budgets), "fastest that meets the aim"]
        rows = []
        for step in steps:
            meet = [row["faster"] for row in step if row["rms"] <= (0.008 if row["k"] <= 7 else 0.015)]
            rows.append([
                f"{step[0]['k']}, {step[0]['sigma']:.3g}",
                f"{step[0]['exact_seconds']:.2f} s",
                *(f"{row['rms']:.4f}, {row['faster']:.1f}x" for row in step),
                f"{max(meet):.1f}x" if meet else "none",
            ])  # fmt: skip
        exact = sum(step[0]["exact_seconds"] for step in steps)
        whole = [exact / sum(step[i]["pruned_seconds"] for step in steps) for i in range(len(budgets))]
        rows.append(["all steps", f"{exact:.0f} s", *(f"{faster:.1f}x" for faster in whole), ""])
        parts.append(f"{setting}, {steps[0][0]['images']} images:\n\n{table(header, rows)}")
    return "\n\n".join([*parts, measured_on(record)])


def pruned_contenders() -> str:
    """Rms errors of the interior in equal time, and their ratios to those of others."""
    record = result("pruned_cpu")
    others = {"top_k": "FAISS top-k", "subset": "uniform subset", "screened": "screened images"}
    parts = []
    for setting in settings_of(record):
        steps = [row for row in record["contenders"] if row["setting"] == setting]
        rows = [
            [
                f"{row['k']}, {row['sigma']:.3g}",
                *(f"{row[f'{name}_rms']:.4f}" if f"{name}_rms" in row else "" for name in ("interior", *others)),
            ]
            for row in steps
        ]
        ratios = {
            name: [row["interior_rms"] / row[f"{name}_rms"] for row in steps if f"{name}_rms" in row] for name in others
        }
        rows.append(
            ["ratio, mean (worst)", "", *(f"{statistics.mean(of):.2f} ({max(of):.2f})" for of in ratios.values())]
        )
        parts.append(f"{setting}:\n\n{table(['k, sigma', '`pruned`', *others.values()], rows)}")
    return "\n\n".join([*parts, measured_on(record)])


def pruned_attack() -> str:
    """Random cases of any z, by what z is and by the budget."""
    record = result("pruned_attack")
    rows = [
        [
            f"budget {float(row['group'].split()[1]):.2%}" if row["group"].startswith("budget") else row["group"],
            f"{row['cases']:,}",
            f"{row['pixels']:,}",
            f"{row['sampled']:.0%}",
            " / ".join(f"{100 * row[f'within_{n}']:.1f}" for n in (1, 2, 3)),
            f"{1e6 * row['beyond_5']:.0f}",
            f"{row['silent']}",
            f"{row['nan']}",
        ]
        for row in sorted(record["rows"], key=lambda row: (row["group"] != "all", row["group"]))
    ]
    header = ["z, budget, bank", "cases", "values", "sampled", "within 1 / 2 / 3 stderr, %", "beyond 5, of 1e6"]
    return f"{table([*header, 'understated', 'NaN'], rows)}\n\n{measured_on(record)}"


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


def coverage() -> str:
    """How well stated errors of `pruned` cover the true ones, over all steps."""
    record = result("pruned_cpu")
    rows = []
    for setting in settings_of(record):
        for budget in dict.fromkeys(row["budget"] for row in record["rows"]):
            steps = [row for row in record["rows"] if (row["setting"], row["budget"]) == (setting, budget)]
            sampled = sum(row["sampled"] for row in steps)
            within = [sum(row[f"within_{n}_stderr"] * row["sampled"] for row in steps) / sampled for n in (1, 2, 3)]
            ratio = [row["stderr_rms"] / row["rms"] for row in steps if row["rms"]]
            rows.append([
                f"{setting}, {budget:.2%}",
                f"{statistics.median(row['rms'] for row in steps):.4f}",
                f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})",
                " / ".join(f"{100 * share:.1f}" for share in within),
                f"{min(row['within_3_stderr'] for row in steps):.1%}",
                f"{sum(row['beyond_6_stderr'] for row in steps)}",
                f"{sum(row['silent'] for row in steps)}",
                f"{sampled:,}",
            ])  # fmt: skip
    header = ["bank, budget", "rms error, median", "stated over true, median (range)", "within 1 / 2 / 3 stderr, %"]
    header += ["within 3, worst step", "beyond 6", "understated", "of pixel values"]
    return f"{table(header, rows)}\n\n{measured_on(record)}"
