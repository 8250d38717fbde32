"""Moments, gradients and likelihoods: costs beside the mean, bits per dimension, samplers, restoration."""

from .results import DATA, Missing, measured_on, result, table

NAMES = {"gaussian": "`GaussianScore`", "ideal": "`IdealScore`", "local": "`LocalScore`", "els-zeros": "ELS, zeros"}


def rows_of(part: str) -> tuple[dict, list[dict]]:
    record = result("moments")
    if not record.get(part):
        raise Missing("moments")
    return record, record[part]


def bits() -> str:
    """Held-out bits per dimension by machine and noise level."""
    record, found = rows_of("bits")
    sigmas = sorted({row["sigma_min"] for row in found})
    rows = []
    for dataset, machine in dict.fromkeys((row["dataset"], row["machine"]) for row in found):
        cells = [DATA.get(dataset, dataset), NAMES[machine]]
        for sigma in sigmas:
            (row,) = (r for r in found if (r["dataset"], r["machine"], r["sigma_min"]) == (dataset, machine, sigma))
            error = f"{row['standard_error']:.2g}, integration {row['integration_error']:.1g}"
            cells.append(f"{row['bits_per_dim']:.2f} ({error})")
        rows.append(cells)
    header = ["data", "machine", *(f"sigma_min {sigma:g}" for sigma in sigmas)]
    about = f"{found[0]['images']} held-out images, {found[0]['bank']} training images"
    return (
        f"{table(header, rows)}\n\nBits a dimension (standard error, integration error); {about} {measured_on(record)}."
    )


def samplers() -> str:
    """Patch statistics by sampler and steps."""
    record, found = rows_of("samplers")
    steps = sorted({row["steps"] for row in found})
    rows = []
    for sampler in dict.fromkeys(row["sampler"] for row in found):
        cells = [f"`{sampler}`"]
        for count in steps:
            measured = [r for r in found if (r["sampler"], r["steps"]) == (sampler, count)]
            cells.append("; ".join(f"{row['distance']:.3f}, {row['r2']:.2f}" for row in measured))
        rows.append(cells)
    distances = {(row["sampler"], row["steps"]): row["distance"] for row in found}
    gains = ["distance of `ddpm-optimal`, of `ddpm`'s"]
    for count in steps:
        optimal, plain = distances.get(("ddpm-optimal", count)), distances["ddpm", count]
        gains.append("" if optimal is None else f"{optimal / plain:.0%}")
    rows.append(gains)
    note = (
        "Frechet distance between the 5 x 5 windows of samples and of held-out images, and r^2 (squared correlation) "
        f"with {steps[-1]} steps of `ddim` from the same noise; ancestral samplers add noise of their own, so theirs "
        f"does not tend to 1. Fashion-MNIST, {found[0]['bank']} training images, {found[0]['images']} samples, "
        "whose distances scatter"
    )
    return f"{table(['sampler', *(f'{count} steps' for count in steps)], rows)}\n\n{note} {measured_on(record)}."


def restoration() -> str:
    """PSNR of restored images."""
    record, found = rows_of("restoration")
    rows = [[row["task"], *(f"{row[name]:.1f}" for name in ("degraded", "nearest", "restored"))] for row in found]
    return f"{table(['task', 'degraded', 'nearest patches', 'restored'], rows)}\n\nPSNR in dB {measured_on(record)}."


def moment_costs() -> str:
    """Costs beside the plain mean."""
    record, found = rows_of("costs")
    rows = [
        [
            row["padding_mode"],
            f"{row['k']}, {row['sigma']:g}",
            *(f"{row[name]:.2f}" for name in ("moments", "vjp", "jvp")),
        ]
        for row in found
    ]
    _, (beside,) = rows_of("autograd")
    note = (
        "Times the cost of the plain mean, `sliding`, one thread, CIFAR-10 in colour, CPU time. J^T u by torch's "
        f"autograd through materialised patches (k = {beside['k']}, {beside['images']} images) takes "
        f"{beside['times']:.0f} times as long as `vjp`, and differs by {beside['difference']:.0e} of the largest entry"
    )
    return f"{table(['padding', 'k, sigma', 'moments', '`vjp`', '`jvp`'], rows)}\n\n{note}; {measured_on(record)}."
