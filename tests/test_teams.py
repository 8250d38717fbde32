"""`patchscore sample` by several ranks: one run, whoever made which image, and nothing lost when a rank fails."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import smooth_images
from launched import launched

from patchscore.cli import main
from patchscore.runs.run import Run

COUNT = 23
"""Images of the whole run: batches of four do not divide them, nor do ranks."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bank and the run of one process."""
    folder = tmp_path_factory.mktemp("teams")
    np.savez(folder / "bank.npz", images=smooth_images(30, 3, 12, 10).numpy(), labels=np.arange(30) % 3)
    assert run(folder, "one")[0] == 0
    return folder


def run(folder, out, *options, count=COUNT, sabotage=None):
    """Exit code and output of `patchscore sample` in this process, which is a rank or by itself."""
    arguments = [
        "sample",
        str(folder / "bank.npz"),
        "--table",
        "3",
        "--labels",
        "all",
        "--steps",
        "4",
        "-n",
        str(count),
    ]
    arguments += ["--batch-size", "4", "--out", str(folder / out), *options]
    if sabotage:
        sabotage()
    said = Path(folder) / f"said-{os.environ.get('RANK', 0)}.txt"
    streams, leave = [os.dup(1), os.dup(2)], os._exit
    os._exit = sys.exit  # the test wants to hear how it ended
    with open(said, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        main(arguments, prog_name="patchscore")
    except SystemExit as end:
        return end.code, said.read_text()
    finally:
        os._exit = leave
        for target, kept in zip((1, 2), streams, strict=True):
            os.dup2(kept, target)


def content(folder):
    """Every file of a run but its run.json, whose notes tell how many ranks there were; lines of batches in order."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "batches.jsonl", ".lock")
    }
    lines = [json.loads(line)["images"] for line in (folder / "batches.jsonl").read_text().splitlines()]
    return files, sorted((entry for images in lines for entry in images), key=lambda entry: entry["image"])


@pytest.mark.parametrize("form", ["png", "zip"])
def test_a_run_of_any_number_of_ranks_is_that_of_one_process(form, place):
    options = ("--format", form)
    if form != "png":
        assert run(place, form, *options)[0] == 0
    for size, count in ((2, 9), (3, COUNT)):  # the second launch continues the first
        for code, said in launched(size, run, place, f"{form}-ranks", *options, "-n", str(count)):
            assert code == 0, said
        assert (place / "said-0.txt").read_text().count("made ") == 1
        assert not (place / "said-1.txt").read_text()
    assert content(place / f"{form}-ranks") == content(place / ("one" if form == "png" else form))
    assert not (place / f"{form}-ranks" / "parts").exists()
    assert json.loads((place / f"{form}-ranks" / "run.json").read_text())["noted"]["ranks"] == 3


@pytest.mark.parametrize(("size", "shard"), [(2, "bank"), (4, "2")])
def test_ranks_that_share_the_bank_make_the_same_images(size, shard, place):
    for code, said in launched(size, run, place, f"shard-{shard}", "--shard", shard):
        assert code == 0, said
    alone, shared = (np.load(place / name / "samples.npy") for name in ("one", f"shard-{shard}"))
    # Three steps of sums that agree to 1e-6, each of which moves the next by a small multiple.
    assert np.abs(alone - shared).max() <= 2e-5
    of_one, of_many = (content(place / name)[1] for name in ("one", f"shard-{shard}"))
    assert [entry["nearest"]["image"] for entry in of_one] == [entry["nearest"]["image"] for entry in of_many]
    assert "bank over 2 ranks" in (place / "said-0.txt").read_text()


def index(folder):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        main(["index", str(folder / "bank.npz"), "--patch-sizes", "3", "--cells", "16", "--out", str(folder / "index")])
    except SystemExit as end:
        return end.code


def test_ranks_index_a_shard_each_and_any_number_of_them_samples(place):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    assert launched(2, index, place) == [0, 0]
    assert sorted(path.name for path in (place / "index").iterdir()) == ["shard-000-of-002", "shard-001-of-002"]
    options = ("--index", str(place / "index"), "--budget", "0.1")
    for out, size, shard in (("shards-2", 2, "bank"), ("shards-1", 1, "images")):
        for code, said in launched(size, run, place, out, *options, "--shard", shard):
            assert code == 0, said
    one, two = (np.load(place / f"shards-{size}" / "samples.npy") for size in (1, 2))
    assert np.abs(one - two).max() <= 2e-5
    assert json.loads((place / "shards-2" / "run.json").read_text())["settings"]["index"]["shards"] == 2
    with pytest.raises(SystemExit) as end:
        main(["explain", str(place / "shards-2"), "--levels", "1", "--image", "0"], prog_name="patchscore")
    assert end.value.code == 0
    assert (place / "shards-2" / "explain.html").exists()
    ends = launched(4, run, place, "too-many", *options, "--shard", "bank")
    assert "an index in 2 shards for 4 ranks" in "".join(said for _, said in ends)


def in_second_batch(action):
    """Lets rank 1 do something instead of saving its second batch, and rank 0 leave it enough of them."""
    saved, batches = Run._save_batch, []

    def save(self, *arguments):
        batches.append(1)
        if os.environ["RANK"] == "0":
            time.sleep(0.4)
        elif len(batches) == 2:
            action()
        saved(self, *arguments)

    Run._save_batch = save


def full_disk():
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device", "out/parts/001/samples.npy")

    in_second_batch(fail)


def killed():
    in_second_batch(lambda: os.kill(os.getpid(), signal.SIGKILL))


def stopped():
    in_second_batch(lambda: os.kill(os.getpid(), signal.SIGSTOP))


@pytest.mark.parametrize("sabotage", [full_disk, killed, stopped])
def test_a_failed_rank_is_told_and_the_run_continues(sabotage, place):
    out = f"after-{sabotage.__name__}"
    ends = launched(2, run_until, place, out, sabotage, timeout=3, may_die=1)
    code, said = ends[0]
    if sabotage is full_disk:
        assert (code, ends[1][0]) == (2, 2)
        assert "No space left on device" in ends[1][1]
        assert "error" not in said  # rank 1 says it, once
    else:
        assert code == 2
        assert "patchscore: error: rank 1 of 2" in said
        assert "has been silent for" in said
    listed = sum(len(path.read_text().splitlines()) for path in (place / out).rglob("batches.jsonl"))
    assert listed >= 2  # what was finished is there
    for code, said in launched(3, run, place, out):
        assert code == 0, said
    assert "were there" in (place / "said-0.txt").read_text()
    assert content(place / out) == content(place / "one")


def run_until(folder, out, sabotage):
    return run(folder, out, sabotage=sabotage)


def check_difference(folder, name):
    last = os.environ["RANK"] == "1"
    options = {"seed": ("--seed", str(int(last))), "labels": ("--labels", "1" if last else "all")}
    options["bank"] = ("--limit", "29" if last else "30")
    return run(folder, f"unlike-{name}", *options[name])


@pytest.mark.parametrize("name", ["seed", "labels", "bank"])
def test_ranks_of_unlike_commands_are_named(name, place):
    ends = launched(2, check_difference, place, name)
    assert [code for code, _ in ends] == [2, 2]
    said = "".join(text for _, text in ends)
    assert said.count("patchscore: error:") == 1
    assert f"patchscore: error: {name}: rank 0 has" in said
    assert "rank 1 has" in said


def test_other_commands_and_shards_are_refused_once(place):
    ends = launched(2, run, place, "refused", "--shard", "3")
    assert "".join(text for _, text in ends).count("--shard: got 3, takes a divisor of the 2 ranks") == 1
    assert "--shard: got 'half', takes images, bank or a number" in "".join(
        text for _, text in launched(2, run, place, "refused", "--shard", "half")
    )


def test_torchrun_restarts_a_run_whose_rank_was_killed(place):
    out, log = place / "restarted", place / "torchrun.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["-m", "patchscore", "sample", str(place / "bank.npz"), "--table", "3", "--labels", "all"]
    command += ["--steps", "60", "-n", "120", "--batch-size", "2", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATCHSCORE_TIMEOUT": "30"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    with open(log, "wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as agent:
        until = time.monotonic() + 120
        while not (out / "parts" / "001" / "batches.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.05)
        (victim,) = [process for process in children(agent.pid) if rank_of(process) == "1"]
        os.kill(victim, signal.SIGKILL)
        assert agent.wait(120) == 0, log.read_text()
    assert "stopped (torchrun ended its ranks" in log.read_text()
    assert "were there" in log.read_text()
    assert run(place, "alone", "--steps", "60", count=120)[0] == 0
    assert content(out)[0]["samples.npy"] == content(place / "alone")[0]["samples.npy"]


def children(process):
    """Numbers of the processes that a process started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def rank_of(process):
    words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((word[5:].decode() for word in words if word.startswith(b"RANK=")), None)


if not Path("/proc/self/task").exists():
    test_torchrun_restarts_a_run_whose_rank_was_killed = pytest.mark.skip("takes /proc to find the rank")(
        test_torchrun_restarts_a_run_whose_rank_was_killed
    )


# Two hosts.


def ip(*words):
    return subprocess.run([shutil.which("ip"), *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts():
    """Two network namespaces, joined by a cable: names, and what each is called by the other."""
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("network namespaces take root and the command ip")
    names = [f"ps{os.getpid()}{letter}" for letter in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                f"{names[0]}0",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                f"{names[1]}0",
                "netns",
                names[1],
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"{name}0")
            for device in ("lo", f"{name}0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run([shutil.which("ip"), "netns", "del", name], capture_output=True, check=False)


def enter(name):
    """Moves this process into a network namespace, as setns(2) does."""
    import ctypes

    with open(f"/var/run/netns/{name}") as namespace:
        assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000) == 0


def run_on_host(folder, out, names, cut, shard):
    """A rank on its host; rank 1 takes its host off the network in its second batch."""
    name = names[int(os.environ["RANK"])]
    enter(name)
    os.environ |= {
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "MASTER_ADDR": "10.77.0.1",
        "GLOO_SOCKET_IFNAME": f"{name}0",
    }
    down = [shutil.which("ip"), "link", "set", f"{name}0", "down"]
    if cut:
        in_second_batch(lambda: subprocess.run(down, check=True)) if shard == "images" else cut_in_sum(down)
    start = time.monotonic()
    return *run(folder, out, "--shard", shard), time.monotonic() - start


def cut_in_sum(down):
    if os.environ["RANK"] == "1":
        from patchscore import Sharded

        sums_of, calls = Sharded.sums_of, []

        def sums(self, *arguments):
            calls.append(1)
            if len(calls) == 5:
                subprocess.run(down, check=True)
            return sums_of(self, *arguments)

        Sharded.sums_of = sums


@pytest.mark.parametrize("shard", ["images", "bank"])
def test_a_host_that_is_cut_off_ends_the_run_within_the_timeout(shard, hosts, place):
    out, limit = f"hosts-{shard}", 4
    ends = launched(2, run_on_host, place, out, hosts, True, shard, timeout=limit)
    for rank, (code, said, seconds) in enumerate(ends):
        assert code == 2, said
        assert f"patchscore: error: rank {rank if shard == 'bank' or rank else 1} of 2" in said, said
        assert said.count("\npatchscore: error") <= 1
        assert seconds < 4 * limit + 15  # a look and an answer may each wait for the limit; the rest is work
    for name in hosts:
        ip("-n", name, "link", "set", f"{name}0", "up")
    for code, said, _ in launched(2, run_on_host, place, out, hosts, False, shard):
        assert code == 0, said
    alone, again = (np.load(place / name / "samples.npy") for name in ("one", out))
    assert np.abs(alone - again).max() <= (0 if shard == "images" else 2e-5)
    assert torch.equal(torch.from_numpy(alone), torch.from_numpy(again)) or shard == "bank"
