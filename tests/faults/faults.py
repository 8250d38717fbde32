"""Faults on purpose: commands are killed, starved of disk, memory and descriptors, and find their files changed.

After each fault the same command, undisturbed, must end with the results of a run that nothing ever disturbed; or one
line must say what is wrong. Commands run in children forked from a process that has imported everything, so that a
fault takes a second and not ten.

    python tests/faults/faults.py --kills 50 --rounds 40    # by hand; `make faults`
    python tests/faults/faults.py --kills 2 --rounds 3      # in short, as tests/test_faults.py does
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import patchscore as ps
from patchscore.cli import main
from patchscore.draw import charts
from patchscore.networks import ResNet, save_network

FOLDER = Path("out")
TIMES = ("seconds_per_step", "build_seconds", "noted", "versions", "sha256")
"""What two runs with the same results may have written otherwise: how long it took, and hashes of that."""


@dataclass(frozen=True)
class Outcome:
    code: int
    stderr: str
    signal: int

    @property
    def in_order(self) -> bool:
        """Success, or exit code 2 or 130 and a line on stderr; no traceback, no crash."""
        said = self.stderr.strip().splitlines()
        told = bool(said) and said[-1].startswith("patchscore: ")
        ended = self.code == 0 or (self.code in (2, 130) and told)
        return ended and not self.signal and "Traceback" not in self.stderr


@dataclass(frozen=True)
class Case:
    """A command, what lies in its folder before, and what to do to make sure of its results."""

    name: str
    words: tuple[str, ...]
    before: Path | None = None


def forked(
    words: tuple[str, ...], disturb: Callable[[int], None] | None = None, limit: Callable[[], None] | None = None
):
    """Runs the command in a child; `limit` is called in the child before it, `disturb` in the parent with its id."""
    # A pipe, which no limit on files cuts, and long enough for all that is said.
    said, written = os.pipe()
    fcntl.fcntl(written, fcntl.F_SETPIPE_SZ, 1 << 20)
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(written, 2)
            for descriptor in (devnull, said, written):
                os.close(descriptor)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            if limit:
                limit()
            main(list(words), prog_name="patchscore")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)
    os.close(written)
    if disturb:
        disturb(pid)
    _, status = os.waitpid(pid, 0)
    with open(said, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), text, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)


def content(path: Path):
    """What a result file says, without what may differ: arrays of archives, JSON without times, bytes of the rest."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in arrays.files}
    if path.suffix == ".jsonl":
        listed = [entry for line in path.read_text().splitlines() for entry in json.loads(line)["images"]]
        return {entry["image"]: entry for entry in listed}
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def readable(path: Path):
    """The same, or that it cannot be read, as of files that were changed on purpose."""
    try:
        return content(path)
    except Exception as error:
        return f"unreadable: {error}"


def results(folder: Path):
    """Everything in a folder but locks and charts, whose bytes may depend on fonts and versions."""
    left_out = ("calibration.png", "memorisation.png", "scatter.png", ".lock")
    return {
        str(path.relative_to(folder)): readable(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in left_out
    }


def prepare(out: Path, case: Case) -> None:
    if out.is_mount() or out.exists():
        shutil.rmtree(out)
    if case.before is not None:
        shutil.copytree(case.before, out)


def make_cases(quick: bool) -> list[Case]:
    """A bank, a network and the commands over them, in the working folder."""
    charts.png(charts.memorisation([0.1], [1.0], []))  # matplotlib and its fonts, once for all children
    generator = np.random.default_rng(0)
    coarse = generator.normal(size=(60, 1, 4, 4)).repeat(3, axis=2).repeat(3, axis=3)
    images = ((0.4 * coarse + 0.1 * generator.normal(size=coarse.shape)).clip(-1, 1) * 127.5 + 127.5).round()
    np.savez("bank.npz", images=images.astype(np.uint8), labels=np.arange(60) % 2)
    save_network(ResNet(1, (0, 1), 4, 1, "zeros"), "network.safetensors", {})
    n = "24" if quick else "60"
    run = ("sample", "bank.npz", "--table", "5", "--steps", "8", "-n", n, "--batch-size", "4", "--labels", "all")
    network = ("bank.npz", "network.safetensors", "--steps", "5", "-n", "6", "--batch-size", "2")
    cases = [Case("sample", (*run, "--out", "out"))]
    if not quick:
        cases.append(Case("bank", ("bank", "bank.npz", "--overwrite", "--out", "out/bank.npy")))
        cases += [Case(f"sample {form}", (*run, "--format", form, "--out", "out")) for form in ("npz", "zip")]
    cases.append(Case("calibrate", ("calibrate", *network, "--patch-sizes", "3,5,7", "--out", "out")))
    cases.append(Case("compare", ("compare", *network, "--table", "5", "--no-baselines", "--out", "out")))
    made = forked((*run[:-1], "none", "--out", "explained"))
    assert made.code == 0, made
    cases.append(Case("explain", ("explain", "out", "--image", "0,1,2", "--levels", "4"), Path("explained")))
    if not quick:
        cases.append(Case("evaluate", ("evaluate", "out", "bank.npz", "--patch-sizes", "3"), Path("explained")))
    try:
        import faiss  # noqa: F401

        cases.append(Case("index", ("index", "bank.npz", "--patch-sizes", "3,5,7", "--out", "out")))
    except ImportError:
        print("no FAISS: no index")
    return cases


class Report:
    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    def note(self, fault: str, case: str, outcome: Outcome, wrong: str = "") -> None:
        ended = "served" if outcome.code == 0 else "killed" if outcome.signal else "told in a line"
        self.counts[f"{case}: {fault}", ended] += 1
        if wrong:
            self.wrong.append(f"{case}: {fault}: {wrong}\n    {outcome.stderr.strip()[-600:]}")
            print("WRONG", self.wrong[-1], flush=True)

    def show(self) -> None:
        for (what, ended), count in sorted(self.counts.items()):
            print(f"{what:<44} {ended:<16} {count}")
        print(f"{sum(self.counts.values())} faults, {len(self.wrong)} wrong")


def faults(kills: int, rounds: int, seed: int, quick: bool, only: list[str] | None = None) -> Report:
    """Every fault on every command, or on some, `kills` times for signals and `rounds` times for the others."""
    rng, report = random.Random(seed), Report()
    for case in make_cases(quick):
        if only and case.name not in only:
            continue
        prepare(FOLDER, case)
        start = time.perf_counter()
        first = forked(case.words)
        took = time.perf_counter() - start
        assert first.code == 0, (case, first)
        expected = results(FOLDER)

        def settle(fault: str, outcome: Outcome, case: Case = case, expected: dict = expected) -> None:
            """The outcome is in order, and the same command again gives the results of an undisturbed run."""
            wrong = "" if outcome.in_order or outcome.signal == signal.SIGKILL else "neither served nor told in a line"
            again = forked(case.words)
            if again.code != 0:
                wrong = wrong or f"the same command again ends with {again.code}: {again.stderr.strip()[-300:]}"
            elif (found := results(FOLDER)) != expected:
                other = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
                wrong = wrong or f"other results: {', '.join(sorted(other)[:5])}"
            report.note(fault, case.name, outcome, wrong)

        for _ in range(kills):
            prepare(FOLDER, case)
            sent = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT])
            moment = rng.uniform(0.02, 1.05) * took

            def kill(pid: int, sent: int = sent, moment: float = moment) -> None:
                time.sleep(moment)
                os.kill(pid, sent)

            settle("interrupted" if sent == signal.SIGINT else "killed", forked(case.words, kill))
        for fault, limits in LIMITS.items():
            for _ in range(rounds):
                prepare(FOLDER, case)
                settle(fault, forked(case.words, limit=limits(rng)))
        small_disks(case, rounds, rng, settle)
        read_only(case, settle)
        prepare(FOLDER, case)
        forked(case.words)
        changed_files(case, rounds, rng, report, expected)
        print(f"{case.name}: {sum(report.counts.values())} faults so far, one run takes {took:.2f} s", flush=True)
    return report


def file_size(rng: random.Random) -> Callable[[], None]:
    most = int(2 ** rng.uniform(5, 15))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def descriptors(rng: random.Random) -> Callable[[], None]:
    more = rng.randrange(0, 10)

    def limit() -> None:
        used = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, used + more))

    return limit


def memory(rng: random.Random) -> Callable[[], None]:
    more = int(2 ** rng.uniform(16, 27))

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    return limit


LIMITS = {"files cut (RLIMIT_FSIZE)": file_size, "few descriptors": descriptors, "little memory": memory}


@contextmanager
def mounted(*arguments: str):
    """A mount over the folder, or None where this user may not."""
    FOLDER.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(FOLDER)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(FOLDER)], check=True)


def small_disks(case: Case, rounds: int, rng: random.Random, settle: Callable[[str, Outcome], None]) -> None:
    """A disk that is full at first and then has room: a small tmpfs, made larger."""
    for _ in range(rounds):
        prepare(FOLDER, Case(case.name, case.words))
        with mounted("-t", "tmpfs", "-o", f"size={rng.randrange(1, 60) * 4096}", "tmpfs") as usable:
            if not usable:
                return
            if case.before is not None:
                subprocess.run(["mount", "-o", "remount,size=64m", str(FOLDER)], check=True)
                shutil.copytree(case.before, FOLDER, dirs_exist_ok=True)
                used = sum(-(-p.stat().st_size // 4096) * 4096 for p in FOLDER.rglob("*") if p.is_file())
                size = used + rng.randrange(1, 60) * 4096
                subprocess.run(["mount", "-o", f"remount,size={size}", str(FOLDER)], check=True)
            outcome = forked(case.words)
            subprocess.run(["mount", "-o", "remount,size=64m", str(FOLDER)], check=True)
            settle("full disk (tmpfs)", outcome)


def read_only(case: Case, settle: Callable[[str, Outcome], None]) -> None:
    """The folder lies on a file system mounted read-only, which binds root too."""
    prepare(FOLDER, case)
    FOLDER.mkdir(exist_ok=True)
    with mounted("--bind", str(FOLDER)) as usable:
        if not usable or subprocess.run(["mount", "-o", "remount,bind,ro", str(FOLDER)]).returncode:
            return
        outcome = forked(case.words)
    settle("read-only folder" if outcome.code == 2 else "read-only folder, but written", outcome)


def changed_files(case: Case, rounds: int, rng: random.Random, report: Report, expected: dict) -> None:
    """A flipped bit, a cut file, two files exchanged: refused in a line, or the results are those of before."""
    whole = {path: path.read_bytes() for path in sorted(FOLDER.rglob("*")) if path.is_file() and path.name != ".lock"}
    for i in range(rounds * 4):
        for path, kept in whole.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(kept)
        fault = ("a bit flipped", "a bit flipped", "a file cut", "two files exchanged")[i % 4]
        one, other = rng.sample(sorted(whole), 2)
        if fault == "a bit flipped":
            flipped = bytearray(whole[one])
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            one.write_bytes(flipped)
        elif fault == "a file cut":
            one.write_bytes(whole[one][: rng.randrange(len(whole[one]))])
        else:
            one.write_bytes(whole[other])
            other.write_bytes(whole[one])
        outcome = forked(case.words)
        wrong = "" if outcome.in_order else "neither served nor told in a line"
        if outcome.code == 0 and case.name in ("sample", "calibrate", "compare", "explain"):
            found = results(FOLDER)
            others = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
            if case.name == "explain":  # it mends nothing of the run itself
                others = [name for name in others if name.startswith(("explain.html", "mosaic", "run.json"))]
            if others:
                changed = f"{one.relative_to(FOLDER)}" + (f" and {other.relative_to(FOLDER)}" if "two" in fault else "")
                wrong = wrong or f"{changed}: other results: {', '.join(sorted(others)[:5])}"
        elif outcome.code == 0 and case.name == "index":
            wrong = wrong or estimates_differ()
        report.note(fault, case.name, outcome, wrong)
    for path, kept in whole.items():
        path.write_bytes(kept)


def estimates_differ() -> str:
    """What an index that was opened without complaint says beside the exact sums."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        try:
            bank = ps.PatchBank.open("bank.npz")
            index = ps.PatchIndex.open(FOLDER, bank, verify=True)
            z = bank.chunk(0, 1)
            for k in index.patch_sizes:
                found = ps.EquivariantLocalScore(bank, k, index=index, budget=1.0).estimate(z, 1.0)
                apart = (found.mean - ps.EquivariantLocalScore(bank, k).denoise(z, 1.0)).abs()
                if not (apart <= 6 * found.stderr + 2e-3).all():
                    os._exit(3)
        except (ValueError, OSError):
            os._exit(0)  # refused by name, now that every file is looked at
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    ended = os.waitstatus_to_exitcode(status)
    return "" if ended == 0 else f"opened, and estimates are off or it crashed ({ended})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="signals at random moments, each command")
    parser.add_argument("--rounds", type=int, default=20, help="times each other fault, each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="smaller runs")
    parser.add_argument("--only", nargs="*", help="commands, by name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        found = faults(options.kills, options.rounds, options.seed, options.quick, options.only)
        os.chdir("/")
    found.show()
    sys.exit(bool(found.wrong))
