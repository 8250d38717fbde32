"""Fuzzes everything that reads files: damaged files must give a bank or one line, in ten seconds and in bounded memory.

python tests/fuzz/readers.py --seconds 60            # damages valid files of every format, from a seed
python tests/fuzz/readers.py --seconds 60 --atheris  # lets atheris damage them, guided by coverage

A worker process reads the damaged files; what ends it, or lets an error of another kind through, is kept in --findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import gzip
import inspect
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import patchscore as ps
from patchscore import sources

sys.path.insert(0, str(Path(__file__).parent))
import written

Files = dict[str, bytes]
LONGEST = 10
"""Seconds that one input may take."""

MEMORY = 2 << 30
"""Bytes of address space beyond what the process has when it begins."""

MEMORY_LIMIT = 1 << 28
"""Bytes of a bank."""


@dataclass(frozen=True)
class Seed:
    """A valid input: its files, how they are packed to one file, and which is opened ("" is the folder).

    Those of patchscore itself are read by a function of their own, and their checksums put right after damage.
    """

    files: Files
    opened: str
    pack: Callable[[Files], bytes] | None = None
    own: written.Written | None = None


def own_seeds(place: Path) -> dict[str, Seed]:
    """What patchscore writes itself, made in an empty folder that stays, and words on the command line."""
    return {name: Seed(own.files, "", own=own) for name, own in written.seeds(place).items()}


def seeds() -> dict[str, Seed]:
    """A small valid input of every format of training images, and of tables, that can be written here."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    labels = np.array([0, 1, 1, 0])
    planar = rng.integers(0, 256, (2, 3072), dtype=np.uint8)

    def saved(write: Callable[[io.BytesIO], object]) -> bytes:
        file = io.BytesIO()
        write(file)
        return file.getvalue()

    def image(kind: str, i: int = 0, **options: object) -> bytes:
        return saved(lambda file: Image.fromarray(images[i]).save(file, kind, **options))

    found: dict[str, Seed] = {}
    for suffix in ("png", "jpeg", "gif", "tiff", "bmp", "webp", "ico", "ppm", "tga", "jpeg2000", "pcx", "sgi"):
        name = "a." + {"jpeg2000": "jp2"}.get(suffix, suffix)
        found[suffix] = Seed({name: image(suffix)}, name)
    exif = Image.Exif()
    exif[0x0112] = 6
    found["exif"] = Seed({"a.jpg": image("jpeg", exif=exif)}, "a.jpg")
    try:
        import pillow_heif

        smooth = Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8))
        found["heic"] = Seed({"a.heic": saved(lambda f: pillow_heif.from_pillow(smooth).save(f))}, "a.heic")
    except ImportError:
        pass

    classes = {f"{name}/{i}.png": image("png", i) for i, name in enumerate(("ant", "bee", "12", "ant"))}
    found["folder"] = Seed(classes, "")
    edm = {
        **classes,
        "dataset.json": json.dumps({"labels": [[name, i % 2] for i, name in enumerate(classes)]}).encode(),
    }
    found["edm"] = Seed(edm, "")
    found["zip"] = Seed(edm, "a.zip", _zipped)
    found["tar"] = Seed(classes, "a.tar", _tarred)
    found["tar.gz"] = Seed(classes, "a.tar.gz", lambda files: gzip.compress(_tarred(files), 1))
    shard = {f"{i}.{kind}": data for i in range(3)
             for kind, data in (("png", image("png", i)), ("cls", b"1"), ("json", b'{"label": 1}'))}  # fmt: skip
    found["webdataset"] = Seed(shard, "a.tar", _tarred)

    def idx(array: np.ndarray) -> bytes:
        return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()

    mnist = {"train-images-idx3-ubyte": idx(images[..., 0]), "train-labels-idx1-ubyte": idx(labels)}
    found["idx"] = Seed(mnist, "")
    found["idx.gz"] = Seed({"i": mnist["train-images-idx3-ubyte"]}, "images.gz", lambda f: gzip.compress(f["i"], 1))

    def npy(array: np.ndarray) -> bytes:
        return saved(lambda file: np.save(file, array))

    found["npy"] = Seed({"a.npy": npy(np.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8))}, "a.npy")
    for kind, arrays in {
        "npz": {"images": images, "labels": labels, "class_names": np.array(["ant", "bee"])},
        "adm": {"arr_0": images, "arr_1": labels},
        "medmnist": {"train_images": images, "train_labels": labels[:, None], "test_images": images},
        "imagenet": {"data": planar, "labels": np.array([1, 2])},
    }.items():
        found[kind] = Seed({f"{key}.npy": npy(array) for key, array in arrays.items()}, "a.npz", _zipped)

    batch = pickle.dumps({b"data": planar, b"labels": [0, 1]}, 2)
    meta = pickle.dumps({"label_names": ["ant", "bee"]}, 2)
    cifar = {"cifar-10-batches-py/data_batch_1": batch, "cifar-10-batches-py/batches.meta": meta}
    found["cifar"] = Seed(cifar, "")
    found["cifar.tar.gz"] = Seed(cifar, "c.tar.gz", lambda files: gzip.compress(_tarred(files), 1))
    found["cifar.bin"] = Seed({"train.bin": b"".join(bytes(2) + row.tobytes() for row in planar)}, "train.bin")

    try:
        from scipy.io import savemat

        digits = {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]}
        for packed in (False, True):
            written = saved(lambda file, packed=packed: savemat(file, digits, do_compression=packed))
            found["svhn.gz" if packed else "svhn"] = Seed({"train_32x32.mat": written}, "")
    except ImportError:
        pass
    faces = {f"img_align_celeba/{i}.png": image("png", i) for i in range(4)}
    faces["list_attr_celeba.txt"] = b"4\nBald Smiling\n" + b"".join(b"%d.png -1 1\n" % i for i in range(4))
    faces["list_eval_partition.txt"] = b"".join(b"%d.png %d\n" % (i, i % 3) for i in range(4))
    found["celeba"] = Seed(faces, "")
    stl = {"train_X.bin": rng.integers(0, 256, (1, 3, 96, 96), dtype=np.uint8).tobytes(), "train_y.bin": b"\1"}
    found["stl10"] = Seed({**stl, "class_names.txt": b"ant\nbee\n"}, "")

    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    content = {"images": tensor, "labels": torch.from_numpy(labels)}
    for legacy in (False, True):
        written = saved(lambda file, old=legacy: torch.save(content, file, _use_new_zipfile_serialization=not old))
        found["legacy pt" if legacy else "pt"] = Seed({"a.pt": written}, "a.pt")
    from safetensors.torch import save

    found["safetensors"] = Seed({"a.safetensors": save(content)}, "a.safetensors")
    found["table"] = Seed({"t.json": b""}, "t.json")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.json")
        ps.ScaleTable.published("cifar10-resnet-zeros").save(path)
        found["table"] = Seed({"t.json": path.read_bytes()}, "t.json")
        found["scales"] = Seed({"t.json": saved(lambda file: torch.save([3, 5, 7], file))}, "t.json")
        try:
            import lmdb

            with lmdb.open(folder) as database, database.begin(write=True) as transaction:
                for i in range(4):
                    transaction.put(b"%d" % i, image("png", i, compress_level=0) * (1 + 20 * (i == 3)))
            found["lmdb"] = Seed({"data.mdb": Path(folder, "data.mdb").read_bytes()}, "")
        except ImportError:
            pass
    try:
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({"image": [{"bytes": image("png", i), "path": "a"} for i in range(4)], "label": labels})
        found["parquet"] = Seed({"a.parquet": saved(lambda file: parquet.write_table(table, file))}, "a.parquet")
        nested = pyarrow.table({"image": images.tolist(), "label": ["ant", "bee", "bee", "ant"]})
        found["parquet of lists"] = Seed({"a.parquet": saved(lambda f: parquet.write_table(nested, f))}, "a.parquet")

        def stream(file: io.BytesIO) -> None:
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)

        state = json.dumps({"_data_files": [{"filename": "data.arrow"}]}).encode()
        found["save_to_disk"] = Seed({"data.arrow": saved(stream), "state.json": state}, "")
    except ImportError:
        pass
    return found


def _zipped(files: Files) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def _tarred(files: Files) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


# Damage.

_NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1]


def damaged(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """The content with a few bytes, numbers or stretches changed; the beginning, where headers are, more often."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.6 else rng.randrange(min(len(data), 200) + 1)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] = rng.randrange(256)
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(_NUMBERS) & ((1 << 8 * width) - 1)
            data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 3:
            del data[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 4:
            data[at:at] = data[at : at + rng.choice((1, 4, 64))] * rng.choice((1, 2, 50))
        elif kind == 5:
            del data[at:]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[at : at + 16] = other[start : start + rng.choice((4, 16, 256))]
    return bytes(data)


def damaged_input(rng: random.Random, seed: Seed, others: list[bytes]) -> tuple[Files, str]:
    """The files to write and which of them to open, one of them damaged, before it is packed or after."""
    if seed.own is not None:
        return damaged_own(rng, seed.own, others), seed.opened
    files = dict(seed.files)
    packed = seed.pack is not None
    if not packed or rng.random() < 0.6:
        name = rng.choice(sorted(files))
        files[name] = damaged(rng, files[name], others)
        if rng.random() < 0.02:
            files[name + rng.choice(("\x1b[31m", "\n", "..", "\udcff"))] = files.pop(name)
    if seed.pack is not None:
        try:
            content = seed.pack(files)
        except (ValueError, OSError, KeyError):  # A name that the format cannot hold.
            content = seed.pack(seed.files)
        files = {seed.opened: content if packed and rng.random() < 0.6 else damaged(rng, content, others)}
    return files, seed.opened


def damaged_own(rng: random.Random, own: written.Written, others: list[bytes]) -> Files:
    """Files that patchscore wrote, one of them damaged, missing or in the place of another; checksums right or not."""
    if own.draw is not None:
        return own.draw(rng)
    files = dict(own.files)
    name = rng.choice(sorted(files))
    if name.endswith((".json", ".jsonl", ".safetensors")) and rng.random() < 0.6:
        files[name] = written.damaged_json(rng, files[name])
    elif rng.random() < 0.9:
        files[name] = damaged(rng, files[name], others)
    elif rng.random() < 0.5:
        del files[name]
    else:
        other = rng.choice(sorted(files))
        files[name], files[other] = files[other], files[name]
    if own.seal is not None and rng.random() < 0.7:
        files = own.seal(files)
    return files


# One input.


def write(folder: Path, files: Files) -> None:
    """Exactly these files in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def check(path: Path, options: dict[str, object], own: written.Written | None = None) -> str:
    """Reads a source: "read" or "refused". Raises AssertionError where an error is not one line, or of another kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if own is not None:
                return str(own.read(path) or "read")
            if path.name == "t.json":
                if path.exists():
                    ps.ScaleTable.load(path)
            else:
                images = sources.read(path, memory_limit=MEMORY_LIMIT, **options)[0]
                assert images.ndim == 4
                assert len(images)
        except (ValueError, TypeError, ImportError) as error:
            found: Exception = error
        except OSError as error:  # as the command line tells it, with the name of a file
            if own is None or (error.filename is None and str(path) not in str(error)):
                raise
            return "refused"
        else:
            return "read"
    if not str(found).replace(str(path), ""):
        raise AssertionError("an error without words") from found
    if type(found) not in (ValueError, TypeError, ImportError):
        raise AssertionError(f"an error of the kind {type(found).__name__}") from found
    return "refused"


def check_command(path: Path) -> str:
    """The same for `patchscore info`: what it is, or one line and exit code 2."""
    return written.command("info", str(path), "--limit", "3")


OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"limit": 2},
    {"size": 8},
    {"skip_bad": True, "limit": 3},
    {"labels": False},
)


# The loop.


def work(folder: Path, findings: Path, seed: int, seconds: float, count: int, only: list[str]) -> None:
    """Damages and reads until time or count is up, printing what came of it; the parent knows the last input."""
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)  # says where, then ends the process
    rng = random.Random(seed)
    place = folder / "own"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    found = {name: value for name, value in {**seeds(), **own_seeds(place)}.items() if not only or name in only}
    others = [content for value in found.values() for content in value.files.values() if content] or [b"0"]
    counts: Counter[str] = Counter()
    slowest, end = (0.0, ""), time.monotonic() + seconds
    made = 0
    while made < count and time.monotonic() < end:
        name = rng.choice(sorted(found))
        files, opened = damaged_input(rng, found[name], others)
        try:
            write(folder / "input", files)
        except (OSError, ValueError):
            continue
        made += 1
        signal.alarm(LONGEST if found[name].own is None else 6 * LONGEST)  # commands compute, besides
        start = time.monotonic()
        try:
            path, options = folder / "input" / opened, rng.choice(OPTIONS)
            own = found[name].own
            by_command = own is None and opened != "t.json" and rng.random() < 0.05
            counts[check_command(path) if by_command else check(path, options, own)] += 1
        except Exception:
            counts["errors"] += 1
            keep(folder, findings / f"{seed}-{made}", traceback.format_exc())
        signal.alarm(0)
        slowest = max(slowest, (time.monotonic() - start, name))
    print(json.dumps({"inputs": made, **counts, "slowest": slowest}))


def keep(folder: Path, place: Path, error: str) -> None:
    """Keeps the input that was being read, and what went wrong."""
    shutil.copytree(folder / "input", place, dirs_exist_ok=True)
    (place / "error.txt").write_text(error)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def guided(folder: Path, seconds: float) -> None:
    """The same with atheris, which sees which branches of the readers an input reaches."""
    import atheris

    found = seeds()
    names = sorted(found)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        seed = found[name]
        files = {seed.opened: seed.pack(seed.files)} if seed.pack is not None else seed.files
        for file, content in files.items():
            (corpus / f"{number}-{file.replace('/', '_')}").write_bytes(bytes([number]) + content)

    def one(data: bytes) -> None:
        if not data:
            return
        seed = found[names[data[0] % len(names)]]
        files = {**(seed.files if seed.pack is None else {})}
        files[seed.opened or max(seed.files, key=lambda name: len(seed.files[name]))] = data[1:]
        write(folder / "input", files)
        check(folder / "input" / seed.opened, OPTIONS[len(data) % len(OPTIONS)])

    # The readers alone: torch has forty thousand functions more.
    for function in [found for found in gc.get_objects() if inspect.isfunction(found)]:
        if function.__module__ and function.__module__.startswith("patchscore.sources"):
            atheris.instrument_func(function)
    options = [f"-max_total_time={int(seconds)}", f"-timeout={LONGEST}", "-rss_limit_mb=4096", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, default=1 << 60, help="inputs at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="formats, by name")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.findings, options.seed, options.seconds, options.count, options.only)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.atheris:
            guided(Path(folder), options.seconds)
        return _watched(Path(folder), options)


def _watched(folder: Path, options: argparse.Namespace) -> int:
    """Runs workers one after another until time is up; 0 where nothing was found."""
    end, ended, total = time.monotonic() + options.seconds, 0, Counter[str]()
    seed = options.seed
    while (left := end - time.monotonic()) > 1 and total["inputs"] < options.count and ended < 20:
        command = [sys.executable, __file__, "--work", str(folder), "--findings", str(options.findings)]
        command += ["--seed", str(seed), "--seconds", str(left), "--only", *options.only]
        command += ["--count", str(min(options.count - total["inputs"], 20_000))]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if done.returncode == 0:
            result = json.loads(done.stdout.splitlines()[-1])
            print(result, flush=True)
            total.update({key: value for key, value in result.items() if isinstance(value, int)})
        else:
            ended += 1
            keep(folder, options.findings / f"{seed}-end", done.stderr)
            print(f"seed {seed}: exit status {done.returncode}\n{done.stderr[-1500:]}", flush=True)
        seed += 1
    found = ended + total["errors"]
    print(f"{total['inputs']} inputs: {total['read']} read, {total['refused']} refused,", end=" ")
    print(f"{total['errors']} errors of another kind, {ended} crashes or hangs", end="\n" if not found else "; ")
    if found:
        print(f"kept in {options.findings}")
    return int(found > 0)


ROOT = Path(__file__).parent.parent.parent

if __name__ == "__main__":
    sys.exit(main())
