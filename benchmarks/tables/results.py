"""What tables are made of: result files, and how a table and the machine that measured it are written."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

RESULTS = ROOT / "benchmarks" / "results"

NOT_MEASURED = "not measured"
DATA = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}


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
