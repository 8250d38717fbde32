"""The command line: what it writes, how it continues, and one line for everything that goes wrong."""

import builtins
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import smooth_images
from PIL import Image

import patchscore as ps
from patchscore import engines, files
from patchscore.cli import fitted as cli_fitted
from patchscore.cli import main
from patchscore.cli.fitted import published_for
from patchscore.cli.options import labels_named
from patchscore.runs import MOST_IMAGES, RunFolder, batches, folder, formats, reopen


@pytest.fixture
def photos(tmp_path):
    """A folder with two classes of six RGB images of 10 x 12."""
    for i, image in enumerate(smooth_images(12, 3, 10, 12).numpy()):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def sample(photos, out, *more):
    return run("sample", photos, "--steps", 4, "--table", 3, "-n", 3, "--out", out, *more)


def images_of(out):
    """What a run lists, by number, and the hashes of its files as they are."""
    lines = [json.loads(line) for line in (out / "batches.jsonl").read_text().splitlines()]
    listed = {entry["image"]: entry for line in lines for entry in line["images"]}
    rows = np.load(out / "samples.npy") if listed else []
    for image, entry in listed.items():
        assert entry["file"] == f"samples/{image:06d}.png"
        assert hashlib.sha256((out / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        assert hashlib.sha256(rows[image].tobytes()).hexdigest() == entry["row_sha256"]
    return listed


def test_sample_writes_what_it_promises(photos, tmp_path):
    out = tmp_path / "out"
    result = sample(photos, out, "--labels", "all", "--seed", 7)
    assert result.exit_code == 0
    assert {p.name for p in out.iterdir()} == {
        ".lock",
        "batches.jsonl",
        "grid.png",
        "run.json",
        "samples",
        "samples.npy",
        "trajectory.npz",
        "trajectory.png",
    }
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"00000{i}.png" for i in range(3)]

    bank = ps.PatchBank.open(photos)
    images = ps.sample(ps.EquivariantLocalScore(bank, 3), 3, steps=4, labels=[0, 1], seed=7).numpy()
    assert np.abs(np.load(out / "samples.npy") - images).max() < 1e-5
    with np.load(out / "trajectory.npz") as saved:
        assert saved["image"].tolist() == [0, 1, 2]
        assert saved["x"].shape == saved["x0"].shape == (3, 3, 3, 10, 12)
        assert np.abs(saved["x0"][:, -1].astype(float) - images).max() < 2e-3
        assert np.allclose(saved["sigmas"] ** 2 + saved["alphas"] ** 2, 1)
    for i in range(3):
        png = np.asarray(Image.open(out / "samples" / f"00000{i}.png")).transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(png - images[i]).max() <= 0.5 / 127.5 + 1e-5
    assert [entry["label"] for entry in images_of(out).values()] == [0, 1, 0]

    record = json.loads((out / "run.json").read_text())
    assert record["bank"]["fingerprint"] == bank.fingerprint
    assert record["settings"]["labels"] == [0, 1]
    assert record["settings"]["seed"] == 7
    assert record["noted"]["source"] == str(photos)
    assert record["bank"]["class_names"] == ["cat", "dog"]
    assert record["versions"]["patchscore"] == ps.__version__
    (batch,) = [json.loads(line) for line in (out / "batches.jsonl").read_text().splitlines()]
    assert len(batch["seconds_per_step"]) == 3
    assert Image.open(out / "grid.png").size > (20, 20)
    assert Image.open(out / "trajectory.png").size > (20, 20)


def test_a_repeated_run_keeps_what_is_there_and_a_larger_one_adds(photos, tmp_path):
    out = tmp_path / "out"
    sample(photos, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("samples/*")}
    assert len(before) == 3
    assert "nothing left to make, 3 were there" in sample(photos, out).output
    assert "made 5 images" in sample(photos, out, "-n", 8).output
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("samples/*")}.items() >= before.items()

    at_once = tmp_path / "at_once"
    sample(photos, at_once, "-n", 8)
    assert np.allclose(np.load(out / "samples.npy"), np.load(at_once / "samples.npy"), atol=2e-3)
    with np.load(out / "trajectory.npz") as a, np.load(at_once / "trajectory.npz") as b:
        assert a.files == b.files
        assert a["image"].tolist() == [0, 1, 2, 3, 4, 5]
        for name in a.files:
            assert np.allclose(a[name], b[name], atol=2e-3)


def test_the_folder_of_samples_is_one_that_tools_take(photos, tmp_path):
    """FID tools take every PNG in a folder, and so does `info`: all of one size, in the order of their numbers."""
    out = tmp_path / "out"
    sample(photos, out, "-n", 5)
    run("explain", out, "--levels", 1)
    assert "5 images, 3 x 10 x 12" in run("info", out / "samples").output
    bank = ps.PatchBank.open(out / "samples")
    rows = np.load(out / "samples.npy")
    assert np.abs(bank.chunk(0, 5).numpy() - rows).max() <= 0.5 / 127.5 + 1e-5
    numbers = (0, 9, 99, 9999, 10000, 99999, MOST_IMAGES - 1)
    names = [RunFolder(out, rows.shape[1:]).samples.path(i).name for i in numbers]
    assert sorted(names) == names
    refused = sample(photos, out, "-n", MOST_IMAGES + 1)
    assert refused.exit_code == 2
    assert "-n: got 1000001, takes an integer from 1 to 1000000" in refused.stderr


@pytest.mark.parametrize(
    ("name", "damage", "made"),
    [
        ("samples/000000.png", lambda content: content[:-9], 1),
        ("samples/000002.png", lambda content: None, 1),
        ("samples.npy", lambda content: None, 3),
        ("samples.npy", lambda content: content[:-5], 1),
        ("samples.npy", lambda content: flipped(content, 128), 1),
        ("samples.npy", lambda content: flipped(content, 9), 0),
        ("trajectory.npz", lambda content: b"PK\x03\x04 no", 3),
        ("trajectory.npz", lambda content: content[:60], 3),
        ("batches.jsonl", lambda content: flipped(content, len(content) // 2), 3),
        ("batches.jsonl", lambda content: content[: len(content) // 2], 3),
        ("batches.jsonl", lambda content: b"[" * 100_000, 3),
        ("batches.jsonl", lambda content: content.rstrip(), 0),
        ("grid.png", lambda content: None, 0),
    ],
)
def test_damaged_or_missing_files_are_made_again(photos, tmp_path, name, damage, made):
    out = tmp_path / "out"
    sample(photos, out)
    whole = {p: p.read_bytes() for p in [*out.glob("samples/*"), out / "samples.npy", out / "grid.png"]}
    content = damage((out / name).read_bytes())
    if content is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(content)
    result = sample(photos, out)
    assert result.exit_code == 0
    assert (f"made {made} image" if made else "nothing left to make") in result.output
    assert {p: p.read_bytes() for p in whole} == whole
    assert sorted(images_of_whole_lines(out)) == [0, 1, 2]
    assert "made 1 image" in sample(photos, out, "-n", 4).output
    assert sorted(images_of(out)) == [0, 1, 2, 3]
    assert "nothing left to make" in sample(photos, out).output
    if name == "batches.jsonl" and made:
        assert "1 of 1 lines are damaged, their images are made again" in result.stderr


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def images_of_whole_lines(out):
    return RunFolder(out, np.load(out / "samples.npy").shape[1:]).batches.made()


def test_a_smaller_n_keeps_the_images_beyond_it_where_rows_are_lost(photos, tmp_path):
    out = tmp_path / "out"
    sample(photos, out, "-n", 6)
    kept = {p: p.read_bytes() for p in out.glob("samples/*")}
    (out / "samples.npy").unlink()
    assert "made 2 images" in sample(photos, out, "-n", 2).output
    assert {p: p.read_bytes() for p in out.glob("samples/*")} == kept


def test_saving_takes_time_in_proportion_to_the_number_of_images(photos, tmp_path, monkeypatch):
    """Bytes written, which no other load changes: twice the images take twice as many."""
    written = {}

    def count(out):
        total = 0
        opened = builtins.open

        class Counting:
            def __init__(self, file):
                self.file = file

            def write(self, content):
                nonlocal total
                total += len(content)
                return self.file.write(content)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                self.file.__enter__()
                return self

            def __exit__(self, *arguments):
                return self.file.__exit__(*arguments)

        for module in (files, batches, formats):
            monkeypatch.setattr(module, "open", lambda *a, **k: Counting(opened(*a, **k)), raising=False)
        assert sample(photos, tmp_path / f"{out}", "-n", out, "--batch-size", 2).exit_code == 0
        return total

    written = {n: count(n) for n in (120, 240, 480)}
    assert (written[480] - written[240]) / (written[240] - written[120]) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("change", [["--seed", "1"], ["--sampler", "heun"], ["--machine", "ls"], ["--table", "5"]])
def test_other_settings_do_not_mix_into_a_run(photos, tmp_path, change):
    out = tmp_path / "out"
    sample(photos, out)
    before = (out / "run.json").read_bytes()
    result = sample(photos, out, *change)
    assert result.exit_code == 2
    assert "holds a run with" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (out / "run.json").read_bytes() == before
    assert sample(photos, out, *change, "--overwrite").exit_code == 0


def test_another_bank_does_not_mix_into_a_run(photos, tmp_path):
    out = tmp_path / "out"
    sample(photos, out)
    next(photos.glob("*/*.png")).unlink()
    assert "other training images" in sample(photos, out).stderr


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"format": "patchscore-run", "version": 99}', b"\xff\xfe"])
def test_a_foreign_run_json_is_refused_by_name(photos, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_bytes(content)
    result = sample(photos, out)
    assert result.exit_code == 2
    assert "run.json" in result.stderr
    assert (out / "run.json").read_bytes() == content


def test_every_machine_sampler_and_schedule_is_within_reach(photos, tmp_path):
    for i, more in enumerate(
        [
            ["--machine", "ideal", "--table", "auto"],
            ["--machine", "ls", "--schedule", "linear", "--sampler", "ddpm"],
            ["--padding-mode", "circular", "--schedule", "karras", "--sampler", "heun", "--labels", "cat"],
            ["--size", "8", "--channels", "1", "--limit", "4", "--engine", "reference", "--device", "cpu"],
        ]
    ):
        assert sample(photos, tmp_path / str(i), *more).exit_code == 0
    assert np.load(tmp_path / "3" / "samples.npy").shape == (3, 1, 8, 8)


def test_a_table_can_come_from_a_file_or_by_name(photos, tmp_path):
    ps.ScaleTable([0.5, 5.0], [3, 5], "mine").save(tmp_path / "mine.json")
    assert sample(photos, tmp_path / "a", "--table", tmp_path / "mine.json").exit_code == 0
    assert json.loads((tmp_path / "a" / "run.json").read_text())["settings"]["table"] == "mine"
    named = run(
        "sample",
        photos,
        "--size",
        24,
        "--limit",
        4,
        "--steps",
        3,
        "-n",
        1,
        "--table",
        "celeba-resnet-zeros",
        "--out",
        tmp_path / "b",
    )
    assert named.exit_code == 0
    assert "celeba-resnet-zeros" in named.output


def fitted(output):
    """What a command says of a fit, or nothing."""
    return [line for line in output.splitlines() if "fitted to these images" in line]


def test_patch_sizes_are_fitted_to_a_source_of_its_own_and_kept(photos, tmp_path):
    words = ("sample", photos, "--steps", 4, "-n", 1, "--out")
    (line,) = fitted(run(*words, tmp_path / "a").output)
    assert "12 images held out of 12" in line
    settings = json.loads((tmp_path / "a" / "run.json").read_text())["settings"]
    table = ps.ScaleTable.load(tmp_path / "a" / "table.json")
    assert settings["table"] == table.name == "fitted"
    assert list(settings["patch_sizes"].values()) == list(table.sizes) == sorted(table.sizes)
    errors = ps.HeldOutErrors.load(tmp_path / "a" / "held-out.json")
    assert table == ps.ScaleTable.of_errors(errors, monotone=True)
    assert table == ps.ScaleTable.fit(ps.PatchBank.open(photos), monotone=True, progress=False)

    # The same run goes on, and another beside it takes the same sizes, without a fit; with labels it needs its own.
    (line,) = fitted(run(*words, tmp_path / "a", "-n", 2).output)
    assert f"read from {tmp_path / 'a' / 'held-out.json'}" in line
    (line,) = fitted(run(*words, tmp_path / "b", "--sampler", "heun").output)
    assert f"read from {tmp_path / 'a' / 'held-out.json'}" in line
    assert (tmp_path / "b" / "held-out.json").read_bytes() == (tmp_path / "a" / "held-out.json").read_bytes()
    (line,) = fitted(run(*words, tmp_path / "c", "--labels", "all").output)
    assert "held out" in line
    # A damaged file is as none.
    (tmp_path / "a" / "held-out.json").write_text("{}")
    shutil.rmtree(tmp_path / "b")
    (line,) = fitted(run(*words, tmp_path / "a", "-n", 2).output)
    assert "held out" in line
    assert run(*words, tmp_path / "a", "--machine", "ls", "--overwrite").exit_code == 0
    assert ps.HeldOutErrors.load(tmp_path / "a" / "held-out.json").settings["machine"] == "local"


def test_runs_of_releases_that_did_not_fit_go_on_with_their_table(photos, tmp_path):
    words = ("sample", photos, "--steps", 3, "--out", tmp_path / "out")
    run(*words, "-n", 1, "--table", "cifar10-resnet-zeros")
    result = run(*words, "-n", 2)
    assert result.exit_code == 0
    assert not fitted(result.output)
    assert "cifar10-resnet-zeros" in result.output


def test_published_sizes_serve_the_data_that_they_were_made_for():
    for source, shape, padding_mode, table in (
        ("fashion-mnist", (1, 28, 28), "zeros", "fashionmnist-resnet-zeros"),
        ("data/CIFAR10.npz", (3, 32, 32), "circular", "cifar10-resnet-circular"),
        ("cifar-10-batches-py", (3, 32, 32), "zeros", "cifar10-resnet-zeros"),
        ("mnist", (1, 32, 32), "circular", "mnist-resnet-circular"),
        ("img_align_celeba", (3, 32, 32), "zeros", "celeba-resnet-zeros"),
        ("img_align_celeba", (3, 64, 64), "zeros", None),
        ("fashion-mnist", (1, 28, 28), "circular", None),
        ("cifar100.npz", (3, 32, 32), "zeros", None),
        ("cifar10.npz", (1, 32, 32), "zeros", None),
        ("photos", (3, 32, 32), "zeros", None),
    ):
        found = published_for(source, shape, padding_mode)
        assert (None if found is None else found.name) == table, source


def test_of_one_image_no_patch_sizes_can_be_fitted(photos, tmp_path):
    result = run("sample", photos / "cat" / "1.png", "--steps", 3, "-n", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "patch sizes cifar10-resnet-zeros: of one image none can be held out" in result.output


def test_a_large_bank_is_fitted_on_a_part(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_fitted, "WINDOWS", 5 * 120)
    monkeypatch.setattr(cli_fitted, "FEWEST", 3)
    (line,) = fitted(run("sample", photos, "--steps", 3, "-n", 1, "--out", tmp_path / "out").output)
    assert "5 images held out of 5" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--table", "imagenet"], "--table: got 'imagenet'"),
        (["--table", "4"], "--table: got 4, takes an odd integer"),
        (["--table", "13", "--padding-mode", "circular"], "patch_size: 13 does not fit"),
        (["--labels", "cow"], "labels: unknown label 'cow'; this bank has 0 (cat), 1 (dog)"),
        (["--steps", "1"], "steps: got 1"),
        (["-n", "0"], "-n: got 0"),
        (["--engine", "warp"], "engine: got 'warp'"),
        (["--device", "abacus"], "device: 'abacus'"),
        (["--limit", "0"], "limit"),
        (["--size", "-4"], "size"),
        (["--memory-limit", "0"], "--memory-limit: got 0"),
        (["--memory-limit", "nan"], "--memory-limit: got nan"),
        (["--memory-limit", "inf"], "--memory-limit: got inf"),
        (["--device", "meta"], "device: 'meta'"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--machine", "ideal"], "--table: got 3, the ideal machine"),
        (["--machine", "ls", "--padding-mode", "circular"], "--padding-mode: got circular"),
    ],
)
def test_a_bad_option_is_one_line_and_writes_nothing(photos, tmp_path, more, message):
    result = sample(photos, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "run.json").exists()
    assert not list(tmp_path.glob("out/*"))


def test_bad_sources_are_one_line(photos, tmp_path):
    for source in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        result = run("info", source)
        assert result.exit_code == 2
        assert str(source) in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    [
        "samples/000000.png",
        "samples/cat.jpg",
        "grid.png",
        "samples.npy",
        "samples",
        "samples.zip",
        "parts",
        "explain.html",
    ],
)
def test_somebody_elses_files_are_not_replaced(photos, tmp_path, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    for more in ([], ["--overwrite"]):
        result = sample(photos, out, *more)
        assert result.exit_code == 2
        assert name in result.stderr
        assert (out / name).read_text() == "mine"


def test_the_training_images_are_no_place_for_new_ones(photos):
    for out in (photos, photos / "new"):
        assert "lies in the folder of training images" in sample(photos, out).stderr
    assert not list(photos.glob("*.json"))


def test_overwriting_never_mixes_two_runs(photos, tmp_path):
    out = tmp_path / "out"
    sample(photos, out)
    (out / "notes.txt").write_text("mine")
    assert sample(photos, out, "--seed", 5, "-n", 1, "--overwrite").exit_code == 0
    assert [p.name for p in out.glob("samples/*")] == ["000000.png"]
    assert (out / "notes.txt").exists()


def test_overwriting_removes_all_that_a_run_wrote_and_nothing_else(photos, tmp_path):
    out = tmp_path / "out"
    sample(photos, out)
    for images in ("0", "all"):
        assert run("explain", out, "--image", images, "--levels", 1).exit_code == 0
    (out / "samples" / "012345.png").write_bytes((out / "samples" / "000000.png").read_bytes())  # of a cut batch
    written = {p.relative_to(out) for p in out.rglob("*")}
    assert {str(p) for p in written} >= {"explain.html", "mosaic.png", "mosaic-000002.png", "memorisation.png"}
    mine = ["notes.txt", "samples/notes.txt", "samples/0001.png", "0000.png", "mosaic-of-mine.png", "grid.png.txt"]
    for name in mine:
        (out / name).write_text("mine")
    assert sample(photos, out, "--seed", 5, "-n", 1, "--overwrite").exit_code == 0
    left = {str(p.relative_to(out)) for p in out.rglob("*")}
    assert left == {
        *mine,
        *(".lock", "batches.jsonl", "grid.png", "run.json", "samples", "samples.npy"),
        *("samples/000000.png", "trajectory.npz", "trajectory.png"),
    }


def test_a_second_run_into_a_folder_is_refused_by_name_while_the_first_writes(photos, tmp_path):
    out = tmp_path / "out"
    sample(photos, out)
    with RunFolder(out, (3, 10, 12)).open():
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for result in (
            sample(photos, out, "--seed", 2, "--overwrite"),
            sample(photos, out, "-n", 9),
            run("explain", out),
        ):
            assert result.exit_code == 2
            assert f"{out}: another process is writing this folder" in result.stderr
            assert result.stderr.count("\n") == 1
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert sample(photos, out, "-n", 9).exit_code == 0


@pytest.mark.parametrize("at", ["first PNG", "last PNG", "samples.npy", "batches.jsonl", "run.json", "grid.png"])
def test_a_run_cut_in_its_first_batch_is_continued_by_the_same_command(photos, tmp_path, monkeypatch, at):
    """The disk is full at every place where something is written, in turn."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    sample(photos, whole, "--seed", 3)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writes = files.write_atomically

    def write(path, content, **options):
        cut = {"first PNG": "000000.png", "last PNG": "000002.png"}.get(at, at)
        return full() if path.name == cut else writes(path, content, **options)

    with monkeypatch.context() as patched:
        for module in (folder, formats):
            patched.setattr(module, "write_atomically", write)
        if at == "samples.npy":
            patched.setattr(batches.Rows, "write", full)
        if at == "batches.jsonl":
            sealed = batches.sealed
            patched.setattr(batches, "sealed", lambda record: full() if "images" in record else sealed(record))
        result = sample(photos, out, "--seed", 3)
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert sample(photos, out, "--seed", 3).exit_code == 0
    for path in [*whole.glob("samples/*"), whole / "samples.npy", whole / "grid.png", whole / "trajectory.npz"]:
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert sorted(images_of(out)) == [0, 1, 2]


def test_a_run_that_made_nothing_yet_makes_way_for_another(photos, tmp_path, monkeypatch):
    """Its images, which no line lists, are not left among the other run's."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(batches.Rows, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample(photos, out, "--seed", 3)
    assert len(list(out.glob("samples/*"))) == 3
    assert sample(photos, out, "--seed", 4, "-n", 1).exit_code == 0
    assert [p.name for p in out.glob("samples/*")] == ["000000.png"]


def test_a_disk_without_room_is_told_before_the_work(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 40_000))
    result = sample(photos, tmp_path / "out", "-n", 500)
    assert result.exit_code == 2
    assert "500 images take up to 3.04 MB and 0.04 MB are free" in result.stderr
    assert not list(tmp_path.glob("out/samples/*"))


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    """Before the source is opened, which may take minutes: here there is none."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    result = sample(tmp_path / "nowhere.npz", tmp_path / "a" / "b")
    assert result.exit_code == 2
    assert f"{tmp_path} cannot be written" in result.stderr
    assert not (tmp_path / "a").exists()


def test_the_same_source_by_another_path_continues(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    sample(photos, out)
    monkeypatch.chdir(photos.parent)
    assert "nothing left to make" in sample("./photos/", out).output


def test_an_output_that_is_a_file_is_refused(photos, tmp_path):
    (tmp_path / "out").write_text("mine")
    result = sample(photos, tmp_path / "out")
    assert result.exit_code == 2
    assert "not a folder" in result.stderr
    assert (tmp_path / "out").read_text() == "mine"


def test_skip_bad_names_or_counts_corrupt_images(photos, tmp_path):
    (photos / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    result = sample(photos, tmp_path / "out")
    assert result.exit_code == 2
    assert "broken.png" in result.stderr
    result = sample(photos, tmp_path / "out", "--skip-bad")
    assert result.exit_code == 0
    assert "1" in result.stderr
    assert "warning" in result.stderr


def test_info_tells_bank_windows_and_engines(photos):
    result = run("info", photos)
    assert result.exit_code == 0
    assert "12 images, 3 x 10 x 12" in result.output
    assert ps.PatchBank.open(photos).fingerprint in result.output
    assert "0 cat (6), 1 dog (6)" in result.output
    assert f"{12 * 8 * 10:,}" in result.output
    assert "reference  ready" in result.output


def test_help_has_examples():
    for command in ("sample", "info"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert f"patchscore {command} fashion-mnist" in result.output
    assert ps.__version__ in run("--version").output


def test_an_interrupted_run_leaves_whole_files_and_continues(photos, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "patchscore", "sample", photos, "--batch-size", 1, "-n", 900, "--steps", 20]
    command = [str(c) for c in [*command, "--table", 3, "--out", out]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "samples" / "000002.png").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command continues" in stderr
    assert "Traceback" not in stderr
    made = len(images_of(out))
    assert made >= 2
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]
    command[command.index("900")] = str(made + 1)
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "made 1 image in" in again.stdout
    assert f"{made} were there" in again.stdout


# An index.


def make_index(photos, out, *more):
    return run("index", photos, "--patch-sizes", "3,5", "--out", out, *more)


def test_index_builds_what_sample_then_uses(photos, tmp_path):
    pytest.importorskip("faiss")
    result = make_index(photos, tmp_path / "i", "--verify")
    assert result.exit_code == 0, result.output
    assert "every file checked" in result.output
    rows = [line.split() for line in result.output.splitlines() if line[:2] in ("3 ", "5 ")]
    assert [row[0] for row in rows] == ["3", "5"]
    assert rows[0][1] == f"{12 * 8 * 10:,}"
    assert make_index(photos, tmp_path / "i").exit_code == 0

    out = tmp_path / "out"
    result = sample(photos, out, "--index", tmp_path / "i", "--budget", 0.5)
    assert result.exit_code == 0, result.output
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["budget"] == 0.5
    assert settings["index"]["patch_sizes"] == [3, 5]
    assert json.loads((out / "run.json").read_text())["noted"]["index"] == str(tmp_path / "i")
    assert "nothing left to make" in sample(photos, out, "--index", tmp_path / "i", "--budget", 0.5).output
    assert "holds a run with" in sample(photos, out, "--index", tmp_path / "i", "--budget", 0.4).stderr
    assert "holds a run with" in sample(photos, out).stderr
    assert "holds a run with" in sample(photos, out, "--index", tmp_path / "i", "--tolerance", 0.1).stderr
    assert sample(photos, tmp_path / "out2", "--index", tmp_path / "i", "--tolerance", 0.1).exit_code == 0


def test_sample_takes_a_tolerance_without_an_index_where_fused_serves(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(engines.Fused, "runs_on", lambda self, device: True)
    monkeypatch.setattr(engines.Fused, "unavailable", lambda self, device: None)
    out = tmp_path / "out"
    result = sample(photos, out, "--tolerance", 0.01, "--engine", "reference")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "run.json").read_text())["settings"]["tolerance"] == 0.01
    assert reopen(out)[0].tolerance == 0.01
    refused = sample(photos, tmp_path / "out2", "--tolerance", 0.01, "--machine", "ls")
    assert refused.exit_code == 2
    assert "--tolerance: takes an --index" in refused.stderr


def test_with_an_index_its_sizes_are_the_candidates_of_a_fit(photos, tmp_path):
    pytest.importorskip("faiss")
    made = run("index", photos, "--patch-sizes", "3,7", "--out", tmp_path / "i", "--max-windows", 500)
    assert made.exit_code == 0, made.output
    words = ("--index", tmp_path / "i", "--budget", 0.5, "--steps", 3, "-n", 1, "--out", tmp_path / "out")
    result = run("sample", photos, *words)
    assert result.exit_code == 0, result.output
    assert set(ps.ScaleTable.load(tmp_path / "out" / "table.json").sizes) <= {3, 7}
    assert "not in the index" not in result.output


def test_index_takes_the_sizes_of_a_table(photos, tmp_path):
    pytest.importorskip("faiss")
    result = run("index", photos, "--table", "cifar10-resnet-zeros", "--out", tmp_path / "i", "--max-windows", 500)
    assert result.exit_code == 0, result.output
    assert "patch sizes 11, 13, 15, 17 are wider than the images" in result.stderr
    assert [line.split()[0] for line in result.output.splitlines() if line[:1] in "3579" and line[1:2] == " "] == [
        "3",
        "5",
        "7",
        "9",
    ]
    assert "images taken at random, for --max-windows" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--patch-sizes, --table: takes one of the two"),
        (["--patch-sizes", "3", "--table", "3"], "takes one of the two"),
        (["--patch-sizes", "3,x"], "--patch-sizes: got '3,x'"),
        (["--patch-sizes", "4"], "patch_sizes: got 4, takes an odd integer"),
        (["--patch-sizes", "11"], "patch_sizes: 11 does not fit in 12 x 10"),
        (["--patch-sizes", "3", "--rank", "0"], "rank: got 0"),
        (["--patch-sizes", "3", "--seed", "-3"], "seed: got -3"),
    ],
)
def test_index_names_what_it_does_not_take_in_one_line(photos, tmp_path, options, message):
    pytest.importorskip("faiss")
    result = run("index", photos, "--out", tmp_path / "i", *options)
    assert result.exit_code == 2
    assert message in result.stderr.replace("10 x 12", "12 x 10")
    assert result.stderr.count("\n") == 1


def test_sample_refuses_a_missing_or_foreign_index_in_one_line(photos, tmp_path):
    pytest.importorskip("faiss")
    make_index(photos, tmp_path / "i")
    next(photos.glob("*/*.png")).unlink()
    cases = {
        ("--index", tmp_path / "none", "--budget", 0.1): "no index here",
        ("--index", tmp_path / "i", "--budget", 0.1): "another bank: it has 12 images, this bank 11; --limit",
        ("--index", tmp_path / "i"): "--index: takes one of --budget and --tolerance",
        ("--machine", "ideal", "--budget", 0.1): "--budget: got one, the ideal machine",
        ("--budget", 2): "budget: got 2",
        ("--tolerance", 0.1, "--device", "cpu"): "--tolerance: takes an --index",
        ("--engine", "pruned"): '"pruned" takes a budget',
    }
    for options, message in cases.items():
        result = sample(photos, tmp_path / "out", *options)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sizes_that_the_index_lacks_are_told_once(photos, tmp_path):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    ps.ScaleTable([0.1, 0.5, 1.0, 2.0], [1, 3, 5, 7]).save(tmp_path / "table.json")
    assert run("index", photos, "--patch-sizes", 3, "--out", tmp_path / "i").exit_code == 0
    made = ("--table", tmp_path / "table.json", "--index", tmp_path / "i", "--budget", 0.5, "--steps", 8, "-n", 1)
    result = run("sample", photos, *made, "--out", tmp_path / "out")
    assert result.exit_code == 0
    told = [line for line in result.output.splitlines() if "patch sizes 1, 5, 7" in line]
    assert len(told) == 1
    assert "warning" not in result.output


# Names and numbers that nobody expects, and errors of others.


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "patchscore", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"patchscore, version {ps.__version__}\n"


def test_nothing_is_imported_from_the_current_folder(tmp_path):
    """A script elsewhere calls `main`, as the one that pip installs does."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "patchscore").write_text("from patchscore.cli import main\nmain()\n")
    (tmp_path / "photos").mkdir()
    for module in ("tqdm", "faiss", "matplotlib", "pyarrow", "lmdb", "scipy", "pillow_heif", "safetensors", "triton"):
        (tmp_path / "photos" / f"{module}.py").write_text("raise SystemExit('imported from the current folder')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = [sys.executable, "../bin/patchscore", "info", "fashion-mnist", "--limit", "3"]
    done = subprocess.run(words, cwd=tmp_path / "photos", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PatchBank(3 images" in done.stdout


HOSTILE = "cat\x1b[2J\x1b]0;owned\x07\r\nengines on mars\u202e\x9b"


def named_bank(path, names, labels=None):
    images = smooth_images(6, 1, 8, 8).numpy()
    labels = np.arange(6) % 2 if labels is None else labels
    np.savez(path, images=images, labels=labels, class_names=np.array(names))
    return path


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    source = named_bank(tmp_path / "bank.npz", [HOSTILE, "dog"])
    results = [
        run("info", source),
        run("sample", source, "--labels", HOSTILE + "x", "--table", 3, "--out", tmp_path / "out"),
        run("info", tmp_path / HOSTILE.replace("/", "")),
    ]
    for result in results:
        assert not [c for c in result.output if c != "\n" and unicodedata.category(c)[0] == "C"]
    assert r"cat\x1b[2J\x1b]0;owned\x07\r\nengines on mars\u202e\x9b (3)" in results[0].output
    assert results[0].output.count("\nengines on ") == 1


def test_info_counts_labels_that_no_name_fits(tmp_path):
    result = run("info", named_bank(tmp_path / "bank.npz", ["cat", "dog"], np.array([-5, 0, 1, 0, 1, 0])))
    assert "Traceback" not in result.output
    assert result.exit_code in (0, 2)
    if result.exit_code == 0:
        assert "-5 (1), 0 cat (3), 1 dog (2)" in result.output


def test_class_names_with_commas_can_be_given(tmp_path):
    source = named_bank(tmp_path / "bank.npz", ["cat, black", "dog"])
    bank = ps.PatchBank.open(source)
    for text, labels in (
        ("cat, black", [0]),
        ('"cat, black",dog', [0, 1]),
        ('dog, "cat, black"', [1, 0]),
        ("dog", [1]),
        ("1, 0", [1, 0]),
    ):
        assert labels_named(text, bank) == labels
    with pytest.raises(ValueError, match="unknown label 'cat'"):
        labels_named("cat,dog", bank)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", 10**10], "steps: got 10000000000, takes an integer from 2 to 10000"),
        (["--steps", 10**10, "--schedule", "karras"], "steps: got 10000000000"),
        (["-n", 10**12], "-n: got 1000000000000, takes an integer from 1 to 1000000"),
        (["--table", "9" * 200], "--table: got"),
        (["--table", "³"], "--table: got"),
        (["--labels", "9" * 400], "unknown label"),
        (["--seed", "9" * 30], None),
        (["--limit", 10**30], None),
    ],
)
def test_huge_numbers_are_one_line_or_served(photos, tmp_path, more, message):
    result = sample(photos, tmp_path / "out", *more)
    assert result.exit_code == (0 if message is None else 2), result.output
    if message is not None:
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: 4096 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
    ],
)
def test_too_little_memory_is_one_line(photos, tmp_path, monkeypatch, error):
    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(ps.PatchBank, "open", exhausted)
    result = sample(photos, tmp_path / "out")
    assert result.exit_code == 2
    assert "not enough memory; take fewer or smaller images" in result.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EOFError("cut")])
def test_an_interruption_says_how_to_go_on(photos, tmp_path, monkeypatch, error):
    """click would say "Aborted!" alone."""

    def stopped(*_, **__):
        raise error

    monkeypatch.setattr(ps.PatchBank, "open", stopped)
    result = sample(photos, tmp_path / "out")
    assert "Aborted!" not in result.output
    if isinstance(error, KeyboardInterrupt):
        assert result.exit_code == 130
        assert "stopped; the same command goes on from what is written" in result.stderr
    else:
        assert result.exit_code == 2
        assert "a file ends too early: cut" in result.stderr


@pytest.mark.parametrize("where", ["make_context", "invoke"])
def test_an_interruption_outside_a_command_is_told_in_the_same_words(monkeypatch, where):
    """While options are read, or after a command's end."""

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, where, stopped)
    result = CliRunner().invoke(main, ["info", "fashion-mnist"])
    assert result.exit_code == 130
    assert result.stderr == "\npatchscore: stopped; the same command goes on from what is written, or begins again\n"


def test_words_that_click_repeats_are_printable():
    result = CliRunner().invoke(main, ["info", "fashion-mnist", "a\x07b"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == r"Error: Got unexpected extra argument (a\x07b)"


def test_exit_codes_are_2_for_errors_and_0_for_help():
    for words, code in ((["--help"], 0), (["info", "--help"], 0), (["inof"], 2), (["info"], 2), ([], 2)):
        assert CliRunner().invoke(main, words).exit_code == code, words


@pytest.mark.parametrize("command", ["calibrate", "compare"])
def test_theory_folders_are_locked_too(photos, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "local_of_test.py").write_text(
        "import patchscore as ps\ndef local(bank): return ps.LocalScore(bank, 3)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        words = (command, photos, "local_of_test:local", "--steps", 3, "-n", 1, "--out", out)
        more = ("--patch-sizes", "3") if command == "calibrate" else ("--table", "3", "--no-baselines")
        with files.locked(out, "taken"):
            result = run(*words, *more)
            assert result.exit_code == 2
            assert f"{out}: another process is writing this folder" in result.stderr
        assert run(*words, *more).exit_code == 0
    finally:
        sys.path.remove(str(tmp_path))


def test_size_out_makes_images_of_another_size_and_is_continued(photos, tmp_path):
    out = tmp_path / "out"
    assert sample(photos, out, "--size-out", "14x20").exit_code == 0
    bank = ps.PatchBank.open(photos)
    images = ps.sample(ps.EquivariantLocalScore(bank, 3), 3, steps=4, size=(14, 20)).numpy()
    assert np.abs(np.load(out / "samples.npy") - images).max() < 1e-5
    assert "nearest" not in images_of(out)[0]
    assert "3 were there" in sample(photos, out, "--size-out", "14x20", "-n", 4).output
    other = sample(photos, out)
    assert other.exit_code == 2
    assert "holds a run with size [14, 20], asked for None" in other.output


def test_explain_names_a_run_of_another_size(photos, tmp_path):
    sample(photos, tmp_path / "out", "--size-out", "14x20")
    result = run("explain", tmp_path / "out", "--image", 0)
    assert result.exit_code == 2
    assert "images of 14 x 20 are not drawn here; patchscore.explain explains them in Python" in result.output


def test_the_banks_own_size_out_is_no_other_run(photos, tmp_path):
    assert sample(photos, tmp_path / "out").exit_code == 0
    assert "3 were there" in sample(photos, tmp_path / "out", "--size-out", "10x12", "-n", 4).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size-out", "14by20"], "--size-out: got '14by20', takes HEIGHTxWIDTH such as 48x80"),
        (["--size-out", "0x20"], "--size-out: got '0x20', takes HEIGHTxWIDTH such as 48x80"),
        (["--size-out", "2x20"], "--size-out: a canvas of 2 x 20 is smaller than the patch size 3"),
        (["--size-out", "14", "--machine", "ls"], "--size-out: got 14 x 14, LocalScore makes images of 10 x 12 alone"),
    ],
)
def test_a_size_out_that_cannot_be_is_told_before_anything_is_written(photos, tmp_path, options, message):
    result = sample(photos, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out" / "run.json").exists()
