"""How well the theory predicts trained networks."""

from .results import DATA, measured_on, result, table


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
    """The networks of theory.json, and those trained with --validation, of circular.json and league.json."""
    listed = [(titled(kind), of) for kind, of in trained(result("theory"))]
    for of in result("circular")["networks"].values():
        listed.append((f"{DATA[of['dataset']]}, ResNet, circular", of["training"]))
    for of in result("league")["networks"].values():
        if of.get("training", {}).get("validation_loss") is not None:
            kind = of["architecture"] + (" with attention" if of["attention"] else "")
            listed.append((f"{DATA[of['dataset']]}, {kind}, {of['padding_mode']}", of["training"]))
    rows = [
        [
            title,
            f"{of['weights']:,}",
            f"{of['images']:,}",
            f"{of['images_seen']:,}",
            f"{of['images_seen'] / of['images']:.0f}",
            f"{of['seconds'] / 60:.0f} min",
            f"{of['loss']:.3f}",
            "" if of.get("validation_loss") is None else f"{of['validation_loss']:.3f}",
        ]
        for title, of in listed
    ]
    header = ["network", "weights", "training images", "images seen", "epochs", "one shared CPU core", "last loss"]
    return table([*header, "validation loss"], rows)


def scales() -> str:
    """Fitted patch sizes beside the published tables of the same data and padding."""
    record = result("scales")
    parts, rows = [], []
    for fit in sorted(record["fits"], key=lambda fit: (fit["dataset"] == "cifar10", fit["padding_mode"] == "circular")):
        title = f"{DATA[fit['dataset']]}, {fit['padding_mode']}"
        listed = [["fitted", *map(str, fit["sizes"])], ["95% interval", *(f"{a}-{b}" for a, b in fit["intervals"])]]
        for of in fit["tables"]:
            listed.append([of["table"], *map(str, of["sizes"])])
            near = [f"{of['pixels_apart']:.1f}", f"{of['within_one_size']:.0%}", f"{of['inside_interval']:.0%}"]
            rows.append([title, f"{fit['bank']:,}", of["table"], *near, f"{of['more_error']:.1%}"])
        header = ["sigma", *(f"{sigma:.2g}" for sigma in fit["sigmas"])]
        parts.append(f"{title}, {fit['bank']:,} images, {fit['held_out']} held out:\n\n{table(header, listed)}")
    header = ["data, padding", "images", "table", "pixels apart", "within 2 pixels", "in the interval", "more error"]
    return "\n\n".join([*parts, "Nearness to the fit, over the 19 levels:", table(header, rows), measured_on(record)])


def scales_of_networks() -> str:
    """How well each table predicts a network."""
    record = result("scales")
    rows = [
        [DATA[row["dataset"]], row["table"], str(row["n"]), median(row, "r2"), median(row, "correlation")]
        for row in sorted(record["networks"], key=lambda row: -row["r2_median"])
    ]
    return table(["data", "patch sizes", "n", "r^2", "correlation"], rows)


def league() -> str:
    """All theories against each network, the nearest first."""
    record = result("league")
    parts = []
    for name, of in record["networks"].items():
        rows = []
        ahead = [None, *of["neighbours"]]
        for row, before in zip(of["rows"], ahead, strict=True):
            told = "" if before is None else "yes" if before["nearer"] == before["first"] else "no"
            figures = [median(row, "correlation_squared"), median(row, "determination"), f"{row['mse_median']:.3f}"]
            rows.append([f"`{row['machine']}`", f"{row['correlation_median']:.3f}", *figures, told])
        header = [
            "theory",
            "r",
            "r^2, squared correlation",
            "coefficient of determination",
            "mse",
            "told from the one above",
        ]
        kind = of["architecture"] + (" with attention" if of["attention"] else "")
        title = f"`{name}`: {kind}, {of['images_seen']:,} images seen, {of['bank']:,} training images, n = {of['n']}"
        parts.append(f"{title}, patch sizes {of['table']}:\n\n{table(header, rows)}")
        if behind := of.get("behind_the_first"):
            first = behind[0]["first"]
            level = [f"`{row['second']}`" for row in behind if row["nearer"] is None]
            parts.append(f"Not told apart from `{first}`, image by image: {', '.join(level) or 'none'}.")
    return "\n\n".join([*parts, f"Medians, with 95% intervals {measured_on(record)}."])


def circular() -> str:
    """Circular networks: sizes of each trajectory, and windows that wrap."""
    record = result("circular")
    rows, told, levels = [], [], []
    for of in sorted(record["networks"].values(), key=lambda of: of["images_seen"]):
        title = f"{DATA[of['dataset']]}, {of['images_seen']:,} seen"
        for row in sorted(of["rows"], key=lambda row: -row["correlation_median"]):
            figures = [median(row, "correlation"), median(row, "correlation_squared"), f"{row['mse_median']:.3f}"]
            rows.append([title, row["machine"], str(row["n"]), *figures])
        for row in of["differences"]:
            if row["figure"] == "correlation_squared" and "els-circular" in (row["first"], row["second"]):
                ahead = row["first"] if row["second"] == "els-circular" else row["second"]
                sign = 1 if ahead == row["first"] else -1
                low, high = sorted(sign * end for end in row["interval"])
                about = f"{sign * row['median']:+.3f} ({low:+.2f} to {high:+.2f})"
                told.append([title, f"{ahead} minus els-circular", about, "yes" if row["nearer"] else "no"])
        sigmas = of["calibrations"]["els"]["sigmas"]
        header = ["calibrated sizes, sigma", *(f"{sigma:.2g}" for sigma in sigmas)]
        listed = [[name, *map(str, found["median"])] for name, found in of["calibrations"].items()]
        levels.append(f"{title}:\n\n{table(header, listed)}")
    return "\n\n".join(
        [
            table(["network", "machine", "n", "correlation", "r^2", "mse"], rows),
            "Paired differences of r^2:",
            table(["network", "difference", "median", "told"], told),
            *levels,
            f"Medians, with 95% intervals {measured_on(record)}.",
        ]
    )


def theories_cost() -> str:
    """CPU seconds of every theory for a step."""
    record = result("theories")
    channels, height, width = record["shape"]
    least = min(row["step_seconds"] for row in record["rows"])
    rows = [
        [
            f"`{row['theory']}`",
            f"{row['step_seconds']:.2g}",
            f"{row['step_seconds'] / least:.0f}",
            f"{row['once_seconds'] / least:.0f}",
            f"{row['pairs']:,}",
            f"{row['pairs'] / row['step_seconds']:.1e}" if row["pairs"] else "",
        ]
        for row in sorted(record["rows"], key=lambda row: row["step_seconds"])
    ]
    about = (
        f"One step of one image of {channels} x {height} x {width}, {record['images']:,} training images, sigma = "
        f"{record['sigma']:g}, k = {record['patch_size']}, one thread: CPU seconds, and times the fastest theory's "
        f"{measured_on(record)}. A pair is an image or window weighed for a pixel, a square, or the whole image."
    )
    header = ["theory", "a step (s)", "times the fastest", "once a noise level or class", "pairs", "pairs/s"]
    return f"{about}\n\n{table(header, rows)}"


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
