"""What patchscore writes itself, and what people type: valid files and words for tests/fuzz/readers.py to damage.

Indexes, runs, networks and progress carry checksums, so that most damage ends there. `seal` puts the checksums right
again after the damage, as an attacker would, so that what reads the content is reached too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.torch import load, save

import patchscore as ps
from patchscore import networks
from patchscore.calibrate import Calibration
from patchscore.cli import main
from patchscore.files import sealed, sha256
from patchscore.heldout import HeldOutErrors
from patchscore.runs.reopen import described_run, reopen, samples_of

Files = dict[str, bytes]


@dataclass(frozen=True)
class Written:
    """Valid files, how they are read, and how their checksums are put right; or words to type, drawn at random."""

    files: Files
    read: Callable[[Path], object]
    seal: Callable[[Files], Files] | None = None
    draw: Callable[[random.Random], Files] | None = None


@functools.cache
def bank() -> ps.PatchBank:
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    return ps.PatchBank(images, np.arange(12) % 2, ("ant", "bee"))


def seeds(place: Path) -> dict[str, Written]:
    """By name; `place` is an empty folder that stays, with the training images and the network."""
    source, network, found = str(place / "bank.npz"), str(place / "network.safetensors"), {}
    labels, names = np.arange(12) % 2, np.array(["ant", "bee"])
    np.savez(source, images=bank().images.numpy(), labels=labels, class_names=names)
    networks.save_network(networks.ResNet(1, (0, 1), 4, 1, "zeros"), network, {})

    def made(name: str, words: tuple[str, ...]) -> Files:
        done = CliRunner().invoke(main, [*words, "--out", str(place / name)])
        assert done.exit_code == 0, done.output
        return files_of(place / name)

    words: tuple[str, ...] = ("sample", source, "--table", "3", "--steps", "3", "-n", "4", "--batch-size", "2")
    words += ("--labels", "all")
    run = made("run", words)
    found["run"] = Written(run, functools.partial(_read_run, source), _seal)
    found["sample again"] = Written(run, functools.partial(_again, words), _seal)
    found["explain"] = Written(run, _explain, _seal)
    words = ("calibrate", source, network, "--steps", "2", "-n", "2", "--batch-size", "1", "--patch-sizes", "3,5")
    calibrated = made("calibrated", words)
    found["calibration"] = Written({"c.json": calibrated["calibration.json"]}, _read_calibration, _seal)
    found["calibrate again"] = Written(calibrated, functools.partial(_again, words), _seal)
    words = ("compare", source, network, "--steps", "2", "-n", "2", "--batch-size", "1", "--table", "3")
    words += ("--no-baselines",)
    found["compare again"] = Written(made("compared", words), functools.partial(_again, words), _seal)
    with contextlib.suppress(ImportError):
        import faiss  # noqa: F401

        words = ("index", source, "--patch-sizes", "3", "--cells", "16", "--rank", "4")
        found["index"] = Written(made("index", words), _read_index, _seal)
    words = ("synthesize", source, "--size", "10x12", "--levels", "2", "--patch-size", "3")
    words += ("--steps", "2")
    found["synthesize again"] = Written(made("synthesis", words), functools.partial(_again, words), _seal)
    found["evaluate"] = Written(run, functools.partial(_evaluate, source), _seal)

    ps.held_out_errors(bank(), patch_sizes=[3, 5], sigmas=[0.5, 1.0]).save(place / "held.json")
    found["held-out errors"] = Written({"h.json": (place / "held.json").read_bytes()}, _read_held_out, _seal)
    found["network"] = Written({"n.safetensors": Path(network).read_bytes()}, _read_network, _seal)
    (place / "mapped").mkdir()
    ps.PatchBank.convert(source, place / "mapped" / "bank.npy")
    ps.PatchBank.open(place / "mapped" / "bank.npy", mapped=True)
    found["mapped"] = Written(files_of(place / "mapped"), _read_mapped, _seal)
    found["words"] = Written({}, functools.partial(_type, place), draw=words_of)
    return found


def files_of(folder: Path) -> Files:
    """But for the lock."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# How they are read.


def command(*words: str) -> str:
    """Runs a command: "read", or "refused" in one line with exit code 2; AssertionError for anything else."""
    done = CliRunner().invoke(main, list(words))
    if not isinstance(done.exception, (SystemExit, type(None))):
        raise done.exception
    if done.exit_code not in (0, 2):
        raise AssertionError(f"exit code {done.exit_code}: {done.output}")
    last = done.output.splitlines()[-1:]
    usage = "Error: " in done.output  # click's; a word that it repeats may hold a newline
    if done.exit_code and not usage and not (last and last[0].startswith("patchscore: error: ")):
        raise AssertionError(f"no line of an error: {done.output}")
    return "refused" if done.exit_code else "read"


def _again(words: tuple[str, ...], path: Path) -> str:
    return command(*words, "--out", str(path))


def _explain(path: Path) -> str:
    return command("explain", str(path), "--image", "0", "--levels", "2")


def _evaluate(source: str, path: Path) -> str:
    return command("evaluate", str(path), source, "--patch-sizes", "3", "--out", str(path / "evaluation.json"))


def _read_run(source: str, path: Path) -> None:
    described_run(path)
    reopen(path, source)
    samples_of(path)


def _read_calibration(path: Path) -> None:
    found = Calibration.load(path / "c.json")
    repr(found), found.table()


def _read_held_out(path: Path) -> None:
    found = HeldOutErrors.load(path / "h.json")
    repr(found), found.rows()


def _read_network(path: Path) -> None:
    network, _ = networks.load_network(path / "n.safetensors")
    network(torch.zeros(1, network.config["channels"], 8, 8), torch.ones(1))


def _read_mapped(path: Path) -> None:
    found = ps.PatchBank.open(path / "bank.npy", mapped=True)
    repr(found), found.fingerprint, found.chunk(0, 1)


def _read_index(path: Path) -> None:
    index = ps.PatchIndex.open(path, bank())
    z = bank().chunk(0, 1) + 0.3 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for k in index.patch_sizes:
        ps.EquivariantLocalScore(bank(), k, index=index, budget=0.05).estimate(z, 0.3, [0])
        index.search(z[0], 0.3, 3, k, nprobe=2)


# Checksums, put right again.


def _seal(files: Files) -> Files:
    """The files with their checksums as they must be for what they now hold."""
    found = dict(files)
    for name, content in files.items():
        if name.endswith((".json", ".jsonl")):
            found[name] = _sealed_lines(content)
        elif name.endswith("n.safetensors"):
            found[name] = _sealed_network(content)
    for name in sorted(files, reverse=True):  # meta.json of a patch size lists the files beside it
        record, folder = _parsed(found[name]), name.rpartition("/")[0]
        if name.endswith("meta.json") and isinstance(record, dict) and "files" in record:
            beside = {other.rpartition("/")[2]: other for other in files if other.rpartition("/")[0] == folder}
            beside.pop("meta.json")
            held = {own: {"bytes": len(files[at]), "sha256": sha256(files[at])} for own, at in beside.items()}
            found[name] = _sealed_record({**record, "files": held})
    return found


def _sealed_lines(content: bytes) -> bytes:
    """Of a JSON object over several lines, or one in each line."""
    record = _parsed(content)
    if isinstance(record, dict):
        return _sealed_record(record)
    lines = [_parsed(line) for line in content.split(b"\n") if line]
    return b"".join(_sealed_record(line) + b"\n" if isinstance(line, dict) else b"?\n" for line in lines)


def _sealed_record(record: dict[str, Any]) -> bytes:
    record.pop("sha256", None)
    return json.dumps(sealed(record)).encode()


def _sealed_network(content: bytes) -> bytes:
    try:
        weights = load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        metadata = {str(name): str(value) for name, value in metadata.items()}
        metadata["sha256"] = networks._digest(weights, metadata)
        return save(weights, metadata)
    except (SafetensorError, ValueError, AttributeError, KeyError, TypeError, RuntimeError):
        return content


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


# JSON that is JSON still.

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf"), "", "x",
    "../../x", "/", "\0", "\x1b[31m", "\udcff", "é" * 300, "0" * 500, [], {}, [[]], [None], {"": None}, ["a"] * 1000,
)  # fmt: skip


def damaged_json(rng: random.Random, content: bytes) -> bytes:
    """The content with a value, a name or an element of an object in it changed; metadata of .safetensors too."""
    if (length := int.from_bytes(content[:8], "little")) < len(content) and content[8:9] == b"{":
        begin = damaged_json(rng, content[8 : 8 + length])
        return len(begin).to_bytes(8, "little") + begin + content[8 + length :]
    record = _parsed(content)
    if record is None:
        lines = content.split(b"\n")
        at = rng.randrange(len(lines))
        if (line := _parsed(lines[at])) is not None:
            lines[at] = _dumped(_changed(rng, line))
        return b"\n".join(lines)
    return _dumped(_changed(rng, record))


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _changed(rng: random.Random, record: Any) -> Any:
    places = list(_places(record))
    if not places:
        return rng.choice(HOSTILE)
    where, key = rng.choice(places)
    value, kind = where[key], rng.randrange(6)
    if isinstance(value, str) and value[:1] in "[{" and _parsed(value.encode()) is not None:
        where[key] = _dumped(_changed(rng, _parsed(value.encode()))).decode()  # JSON in JSON
    elif kind == 0 and isinstance(where, dict):
        del where[key]
    elif kind == 1 and isinstance(where, dict):
        where[str(rng.choice(HOSTILE))] = where.pop(key)
    elif kind == 2 and isinstance(where, list):
        where[key:key] = [copy.deepcopy(value) for _ in range(rng.choice((1, 2, 50)))]
    elif kind == 3 and isinstance(value, (int, float)):
        where[key] = rng.choice((-value, value + 1, value * 2, value / 2, str(value), [value]))
    elif kind == 4:
        other, at = rng.choice(places)
        where[key] = copy.deepcopy(other[at])
    else:
        where[key] = rng.choice(HOSTILE)
    return record


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


# What people type.

TYPED = (
    "", " ", "-", "--", "-1", "0", "1", "2", "3", "4", "5", "0.5", "1e30", "1e-30", "nan", "inf", "-inf", "1,3",
    "3,5,7", ",", "3;5", "3x4", "8x8", "x", "all", "none", "auto", "ant", "'a, b'", '"', "0-3", "99999999999999999999",
    "é", "\x1b[2J", "\n", "\udcff", "a" * 5000, "BANK", "NETWORK", "RUN", "INDEX", "HELD", "EMPTY", "FOLDER", "MISSING",
    "OUT", "/dev/null", "no.such:module", "json:loads", "os:getcwd", "diffusers:FOLDER", "http://x", "..", "~", "%s",
    "{}", "--help", "fashion-mnis",
)  # fmt: skip
SMALL = {
    "sample": ("BANK", "--steps", "2", "-n", "2", "--table", "3"),
    "synthesize": ("BANK", "--size", "9x9", "--levels", "1", "--steps", "2"),
    "bank": ("BANK",),
    "index": ("BANK", "--patch-sizes", "3", "--cells", "16"),
    "info": ("BANK",),
    "calibrate": ("BANK", "NETWORK", "--steps", "2", "-n", "2", "--patch-sizes", "3"),
    "compare": ("BANK", "NETWORK", "--steps", "2", "-n", "2", "--table", "3", "--no-baselines"),
    "explain": ("RUN", "--image", "0", "--levels", "2"),
    "evaluate": ("RUN", "BANK", "--patch-sizes", "3"),
    "likelihood": ("BANK", "BANK", "--limit", "2", "--table", "3", "--steps", "2"),
}
"""Words of a command that takes a moment; those drawn come after them, and the last of an option counts."""


def words_of(rng: random.Random) -> Files:
    """A command line: a command that is short or none, and options and values drawn at random."""
    name = rng.choice(sorted(SMALL))
    small = list(SMALL[name])
    if "--out" in (options := _options(name)):
        small += ["--out", "OUT"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        option = rng.choice(options)
        words = [option] if rng.random() < 0.3 else [option, _value(rng, name, option)]
        at = len(small) if rng.random() < 0.8 else rng.randrange(len(small) + 1)
        small[at:at] = words
    if rng.random() < 0.2:
        small[rng.randrange(len(small))] = rng.choice(TYPED)
    return {"words": _dumped([name if rng.random() < 0.98 else rng.choice(TYPED), *small])}


@functools.cache
def _options(name: str) -> list[str]:
    found = [word for parameter in main.commands[name].params for word in parameter.opts + parameter.secondary_opts]
    long = ("--tolerance",) if name == "likelihood" else ()  # takes up to 10,000 steps, as it says
    return [word for word in found if word.startswith("-") and word not in long]


def _value(rng: random.Random, name: str, option: str) -> str:
    """One of an option's choices, or anything."""
    for parameter in main.commands[name].params:
        if option in parameter.opts and isinstance(parameter.type, click.Choice) and rng.random() < 0.6:
            return str(rng.choice(list(parameter.type.choices)))
    return rng.choice(TYPED[:20] if rng.random() < 0.4 else TYPED)


def _type(place: Path, path: Path) -> str:
    """Types the words, with names of files for the names in capitals; what they write goes into the input's folder."""
    words = json.loads((path / "words").read_bytes())
    (path / "empty").touch()
    shutil.copytree(place / "run", path / "run")
    names = {
        "BANK": place / "bank.npz", "NETWORK": place / "network.safetensors", "RUN": path / "run",
        "INDEX": place / "index", "HELD": place / "held.json", "EMPTY": path / "empty", "FOLDER": place / "mapped",
        "MISSING": path / "missing", "OUT": path / "out",
    }  # fmt: skip
    for name, at in names.items():
        words = [word.replace(name, str(at)) if isinstance(word, str) else word for word in words]
    before = os.getcwd()
    os.chdir(path)  # contextlib.chdir is of Python 3.11
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return command(*words)
    finally:
        os.chdir(before)
