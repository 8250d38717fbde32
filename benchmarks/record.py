"""What every figure script shares: where results go, what is written beside them, and how the data is opened.

python benchmarks/record.py FOLDER       adds the steps of gpu_quick.sh to the gpu-*.json it wrote in FOLDER
"""

import csv
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

import patchscore as ps
from patchscore.pixels import to_bytes

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results"
"""The results that are part of the project."""
RESULTS = Path(os.environ.get("PATCHSCORE_RESULTS", KEPT))
PICTURES = Path(os.environ.get("PATCHSCORE_RESULTS", ROOT / "docs" / "images"))
"""Where this run's results and pictures go; PATCHSCORE_RESULTS, a folder, keeps those of the project as they are."""


def write(name: str, what: str, **content: object) -> None:
    """benchmarks/results/<name>.json: the content, and on what, with what and when it was measured."""
    record = {"what": what, **provenance(), **content}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(as_json(rounded(record)) + "\n")


def read(name: str) -> dict:
    """A result of the project."""
    return json.loads((KEPT / f"{name}.json").read_text())


def as_json(record: object) -> str:
    """Indented, but a row of a table on one line, with lists of numbers in it."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\{([^{}\[\]]|\[[^{}\[\]]*\])*\}", lambda row: " ".join(row[0].split()), text)


def provenance() -> dict[str, object]:
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    commit = os.environ.get("PATCHSCORE_COMMIT") or _git("describe", "--always") or "unknown"
    # What figure scripts write themselves does not count.
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs", ":!README.md"
    )
    return {
        "machine": f"{model}, {torch.get_num_threads()} threads",
        "versions": {"patchscore": ps.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": f"{commit}-dirty" if changed else commit,
        "date": datetime.date.today().isoformat(),
    }


def _git(*command: str) -> str:
    """Nothing where there is no git, or no repository: a copy of the tree on a rented machine."""
    try:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def add_steps(folder: Path) -> None:
    """How every step of gpu_quick.sh ended, into the results beside its steps.tsv: red tests withhold rates."""
    with (folder / "steps.tsv").open() as file:
        steps = list(csv.DictReader(file, delimiter="\t"))
    for path in folder.glob("gpu-*.json"):
        record = json.loads(path.read_text())
        path.write_text(as_json({**record, "steps": steps}) + "\n")


def rounded(value: object) -> object:
    """Floats to five digits, so that a rerun differs where something changed."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def opened(source: str | Path, **options) -> ps.PatchBank:
    """PatchBank.open, for which a tar of image files is unpacked."""
    if not (Path(source).is_file() and tarfile.is_tarfile(source)):
        return ps.PatchBank.open(source, **options)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
        within = list(Path(folder).iterdir())  # the classes, or a folder of them
        return ps.PatchBank.open(within[0] if len(within) == 1 else folder, **options)


def smooth(channels: int, size: int, count: int) -> torch.Tensor:
    """uint8 [count, channels, size, size] smooth random images, the same each time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, channels, size // 4, size // 4, generator=generator)
    fine = F.interpolate(coarse, size=(size, size), mode="bicubic")
    fine += 0.1 * torch.randn(fine.shape, generator=generator)
    return to_bytes(fine * 0.5)


def shuffled(bank: ps.PatchBank) -> torch.Tensor:
    """All images in an order of their own, the same each time: what is taken first is of all classes."""
    return bank.images[torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))].contiguous()


def r_squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[B] squared correlation of the pixels of each pair of images."""
    a, b = (x.double().flatten(1) - x.double().flatten(1).mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) ** 2 / ((a * a).sum(1) * (b * b).sum(1))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    add_steps(Path(sys.argv[1]))
