"""Files of a run's samples in every format: what others read of them, kills at any moment, parts, memory."""

import errno
import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import smooth_images
from PIL import Image

import patchscore as ps
from patchscore.cli import main
from patchscore.runs import Run, RunFolder, batches, formats
from patchscore.runs.formats import NpzShards, PngFiles, ZipArchive

FORMATS = ("png", "npz", "zip")


@pytest.fixture
def small_blocks(monkeypatch):
    """Five images a block, so that a run of a few images has several."""
    monkeypatch.setattr(formats, "BLOCK_IMAGES", 5)
    monkeypatch.setattr(formats, "SUBFOLDER", formats.re.compile(r"\d{6}"))


def bank():
    return ps.PatchBank(smooth_images(6, 3, 6, 7), [0, 1] * 3, ["cat", "dog"])


def run(out, n, form="png", subfolders=True, seed=0, labels=(0, 1), batch_size=2, overwrite=False, settings=None):
    settings = {
        **{"steps": 3, "schedule": "cosine", "sampler": "ddim", "labels": labels and list(labels)},
        **{"seed": seed, "size": None},
    }
    with Run(out, ps.IdealScore(bank()), settings, {}, {}, overwrite, form, subfolders) as opened:
        return opened.sample(n, batch_size, "cpu", progress=False)


def contents(out):
    """Every file of samples by name."""
    place = [out / "samples.zip", *(out / "samples").rglob("*")]
    return {str(path.relative_to(out)): path.read_bytes() for path in place if path.is_file()}


def pixels(out):
    """[n, C, H, W] uint8 of samples.npy."""
    return torch.from_numpy(((np.load(out / "samples.npy").astype(float) + 1) * 127.5).round().astype(np.uint8))


def test_subfolders_of_single_images_are_read_as_edm_folders(tmp_path, small_blocks):
    run(tmp_path, 12)
    assert sorted(contents(tmp_path)) == sorted(
        ["samples/dataset.json", *(f"samples/{i - i % 5:06d}/{i:06d}.png" for i in range(12))]
    )
    made = ps.PatchBank.open(tmp_path / "samples")
    assert torch.equal(made.images, pixels(tmp_path))
    assert made.labels.tolist() == [0, 1] * 6


def test_shards_are_samples_as_adm_writes_them(tmp_path, small_blocks):
    run(tmp_path, 12, "npz")
    assert sorted(contents(tmp_path)) == [f"samples/{first:06d}.npz" for first in (0, 5, 10)]
    for first, count in ((0, 5), (5, 5), (10, 2)):
        with np.load(tmp_path / "samples" / f"{first:06d}.npz") as shard:
            assert sorted(shard.files) == ["arr_0", "arr_1"]
            expected = pixels(tmp_path)[first : first + count].permute(0, 2, 3, 1)
            assert shard["arr_0"].dtype == np.uint8
            assert np.array_equal(shard["arr_0"], expected)
            assert shard["arr_1"].tolist() == [(first + i) % 2 for i in range(count)]


def test_a_zip_is_whole_for_other_readers_and_not_compressed(tmp_path, small_blocks):
    run(tmp_path, 12, "zip")
    with zipfile.ZipFile(tmp_path / "samples.zip") as archive:
        assert archive.testzip() is None
        names = [f"{i - i % 5:06d}/{i:06d}.png" for i in range(12)]
        assert archive.namelist() == [*names, "dataset.json"]
        assert json.loads(archive.read("dataset.json")) == {"labels": [[name, i % 2] for i, name in enumerate(names)]}
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        for name, expected in zip(names, pixels(tmp_path), strict=True):
            content = archive.read(name)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), expected.permute(1, 2, 0))
            assert len(content) > 6 * 7 * 3  # every pixel as it is
    made = ps.PatchBank.open(tmp_path / "samples.zip")
    assert torch.equal(made.images, pixels(tmp_path))
    assert made.labels.tolist() == [0, 1] * 6


def test_without_labels_a_zip_says_so(tmp_path):
    run(tmp_path, 3, "zip", labels=None)
    with zipfile.ZipFile(tmp_path / "samples.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


@pytest.mark.parametrize("form", FORMATS)
def test_a_run_in_pieces_has_the_bytes_of_one_at_once(tmp_path, small_blocks, form):
    for n in (3, 4, 11, 12):
        run(tmp_path / "pieces", n, form)
    run(tmp_path / "once", 12, form, batch_size=5)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "once")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "once").glob("sam*/**/*.[pn]*")}
    assert run(tmp_path / "once", 12, form) == 12
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.filterwarnings("ignore:.*lines are damaged")
@pytest.mark.parametrize("form", FORMATS)
def test_a_disk_that_fills_at_any_write_is_named_and_the_run_goes_on(tmp_path, small_blocks, monkeypatch, form):
    """Every write of a run of six images fails in turn, half done; the same call completes it."""
    run(tmp_path / "whole", 6, form, batch_size=3)
    done, named = False, set()
    for at in range(200):
        out = tmp_path / f"cut-{at}"
        left = [at]
        opened = open

        class Filling:
            def __init__(self, file, name, left=left):
                self.file, self.name, self.left = file, name, left

            def write(self, content):
                if self.left[0] == 0:
                    self.left[0] = -1
                    self.file.write(content[: len(content) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.left[0] -= 1
                return self.file.write(content)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                self.file.__enter__()
                return self

            def __exit__(self, *arguments):
                return self.file.__exit__(*arguments)

        def filling(path, mode="r", *more, left=left, opened=opened):
            file = opened(path, mode, *more)
            return file if mode in ("r", "rb") else Filling(file, path, left)

        with monkeypatch.context() as patched:
            for module in (ps.files, batches, formats):
                patched.setattr(module, "open", filling, raising=False)
            try:
                run(out, 6, form, batch_size=3)
                done = True
            except OSError as error:
                named.add(str(error.filename).startswith(str(out)))
        if done:
            break
        run(out, 6, form, batch_size=3)
        assert contents(out) == contents(tmp_path / "whole"), at
    assert done
    assert at > 10
    assert named == {True}


@pytest.mark.parametrize("form", ["npz", "zip"])
def test_damaged_files_of_several_images_are_written_again_from_the_rows(tmp_path, small_blocks, form):
    run(tmp_path, 12, form)
    whole = contents(tmp_path)
    rng = np.random.default_rng(0)
    for name, content in whole.items():
        for at in [0, len(content) - 1, *rng.integers(len(content), size=2).tolist()]:
            damaged = content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]
            for wrong in (damaged, content[:at], content + b"more"):
                (tmp_path / name).write_bytes(wrong)
                assert run(tmp_path, 12, form) == 12
                assert contents(tmp_path) == whole
        (tmp_path / name).unlink()
        assert run(tmp_path, 12, form) == 12
        assert contents(tmp_path) == whole


@pytest.mark.parametrize("form", FORMATS)
def test_rows_that_are_lost_are_made_again(tmp_path, small_blocks, form):
    run(tmp_path, 12, form)
    whole = contents(tmp_path)
    rows = np.load(tmp_path / "samples.npy", mmap_mode="r+")
    rows[6] = 0
    rows.flush()
    assert run(tmp_path, 12, form) == 11
    assert contents(tmp_path) == whole


def test_a_run_of_one_format_is_not_continued_in_another(tmp_path):
    run(tmp_path, 3, "zip")
    with pytest.raises(ValueError, match=r"run.json: holds a run whose samples are zip, asked for npz"):
        run(tmp_path, 3, "npz")
    before = {path.name for path in tmp_path.iterdir()}
    run(tmp_path, 3, "npz", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == (before - {"samples.zip"}) | {"samples"}


@pytest.mark.parametrize("form", FORMATS)
def test_overwriting_removes_every_file_of_samples_and_nothing_else(tmp_path, small_blocks, form):
    run(tmp_path, 12, form)
    (tmp_path / "samples").mkdir(exist_ok=True)
    (tmp_path / "samples" / "mine.txt").write_text("mine")
    run(tmp_path, 1, "png", subfolders=False, seed=1, overwrite=True)
    assert sorted(contents(tmp_path)) == ["samples/000000.png", "samples/mine.txt"]


def test_a_run_keeps_the_layout_that_it_began_with(tmp_path, small_blocks):
    run(tmp_path, 3, subfolders=False)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["samples"] == {"format": "png", "subfolders": False}
    run(tmp_path, 7, subfolders=True)
    assert sorted(contents(tmp_path)) == [f"samples/{i:06d}.png" for i in range(7)]


def test_a_run_that_says_nothing_of_its_files_has_single_pngs(tmp_path, small_blocks):
    """As those had that were written before there were formats."""
    run(tmp_path, 3, subfolders=False)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["sha256"], record["samples"]
    (tmp_path / "run.json").write_text(json.dumps(ps.files.sealed(record)))
    assert run(tmp_path, 7, subfolders=True) == 3
    assert sorted(contents(tmp_path)) == [f"samples/{i:06d}.png" for i in range(7)]


@pytest.mark.parametrize("form", FORMATS)
def test_parts_of_other_processes_become_the_run_of_one(tmp_path, small_blocks, form):
    """Images 6 to 14 are made by two others, one of which was killed while it wrote its last line."""
    run(tmp_path / "whole", 15, form)
    run(tmp_path / "parts", 6, form)
    rows = np.load(tmp_path / "whole" / "samples.npy")
    other = RunFolder(tmp_path / "parts", rows.shape[1:], form, form == "png")
    for part, images in ((2, range(6, 9)), (1, range(9, 12)), (2, range(12, 15))):
        other.save_batch(images, rows[images.start : images.stop], [{"label": i % 2} for i in images], {}, part)
    lines = tmp_path / "parts" / "parts" / "002" / "batches.jsonl"
    lines.write_bytes(lines.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="1 of 2 lines are damaged"):
        assert run(tmp_path / "parts", 15, form) == 12
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert np.array_equal(np.load(tmp_path / "parts" / "samples.npy"), rows)
    assert not (tmp_path / "parts" / "parts").exists()


def test_parts_alone_are_images_of_the_run(tmp_path):
    """Another run does not take their place unasked."""
    run(tmp_path, 1)
    (tmp_path / "batches.jsonl").unlink()
    row = np.load(tmp_path / "samples.npy")[:1]
    RunFolder(tmp_path, row.shape[1:]).save_batch(range(1, 2), row, [{}], {}, 1)
    with pytest.raises(ValueError, match="holds a run with seed 0"):
        run(tmp_path, 1, seed=1)
    run(tmp_path, 1, seed=1, overwrite=True)
    assert not (tmp_path / "parts").exists()


def test_zips_beyond_four_gigabytes_and_65535_files_have_64_bit_records(tmp_path):
    """A sparse file of images that were never written, and its directory as Python's zipfile reads it."""
    archive = ZipArchive(tmp_path)
    content = b"x" * 10
    archive.images, archive.end = 70_000, 5 << 30
    for image in range(70_000):
        archive.directory += formats._central(
            formats.place_of(image).encode(), content, 0 if image < 60_000 else 5 << 30
        )
    with open(archive.place, "wb") as file:
        file.truncate(archive.end)
    archive.pack(batches.Rows(tmp_path / "none.npy", (1, 2, 2)), None, 70_000, last=True)
    with zipfile.ZipFile(archive.place) as read:
        assert len(read.infolist()) == 70_001
        assert read.infolist()[0].header_offset == 0
        assert read.infolist()[69_999].header_offset == 5 << 30
        assert json.loads(read.read("dataset.json")) == {"labels": None}


def test_the_command_takes_a_format_and_its_runs_are_read_everywhere(tmp_path):
    np.savez(tmp_path / "bank.npz", images=smooth_images(6, 1, 8, 8).numpy(), labels=np.arange(6) % 2)
    made = {}
    for form in FORMATS:
        out = tmp_path / form
        words = ["sample", str(tmp_path / "bank.npz"), "--table", "3", "--steps", "3", "-n", "4", "--labels", "all"]
        done = CliRunner().invoke(main, [*words, "--format", form, "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert f"see {out / ('samples.zip' if form == 'zip' else 'samples')}" in done.output
        explained = CliRunner().invoke(main, ["explain", str(out), "--levels", "1"])
        assert explained.exit_code == 0, explained.output
        assert "came out otherwise" not in explained.output
        assert (out / "explain.html").exists()
        told = CliRunner().invoke(main, ["info", str(out)]).output
        assert f"run          4 images in {out / ('samples.zip' if form == 'zip' else 'samples')}, made by" in told
        assert "machine      els, padding zeros, patch sizes constant-3" in told
        assert "seed         0, labels 0, 1" in told
        assert "PatchBank(4 images, 1 x 8 x 8" in told
        made[form] = ps.PatchBank.open(out).images
        assert torch.equal(made[form], pixels(out))
    assert torch.equal(made["png"], made["zip"])


def test_what_a_batch_writes_does_not_grow_with_the_run(tmp_path, small_blocks, monkeypatch):
    written = []
    for kind in (PngFiles, NpzShards, ZipArchive):
        writer = kind(tmp_path / kind.name)
        (tmp_path / kind.name).mkdir()
        rows = batches.Rows(tmp_path / kind.name / "samples.npy", (1, 2, 2))
        writer.begin({})
        counts = []
        for first in range(0, 60, 2):
            values = np.zeros((2, 1, 2, 2), "<f4")
            rows.write(first, values)
            with monkeypatch.context() as patched:
                total = [0]
                writes = formats.write_atomically

                def count(path, content, total=total, writes=writes, **options):
                    total[0] += len(content)
                    writes(path, content, **options)

                patched.setattr(formats, "write_atomically", count)
                size = writer.place.stat().st_size if kind is ZipArchive and writer.place.exists() else 0
                writer.save(range(first, first + 2), values, True)
                writer.pack(rows, None, first + 2, last=False)
                total[0] += writer.place.stat().st_size - size if kind is ZipArchive else 0
            counts.append(total[0])
        written.append(counts)
    png, npz, archive = written
    assert len(set(png)) == len(set(archive)) == 1
    assert sum(count > 0 for count in npz) == 12  # whole shards of five, once each
    assert len(set(npz)) == 2


def test_info_tells_of_runs_without_samples_and_of_damaged_ones(tmp_path):
    run(tmp_path, 2, "zip")
    (tmp_path / "samples.zip").unlink()
    (tmp_path / "batches.jsonl").unlink()
    record = json.loads((tmp_path / "run.json").read_text())
    del record["sha256"]
    record["settings"] |= {"machine": "ideal", "patch_sizes": None}
    record["noted"] = {"source": "cats"}
    (tmp_path / "run.json").write_text(json.dumps(ps.files.sealed(record)))
    told = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert told.exit_code == 0
    assert f"run          0 images in {tmp_path / 'samples.zip'}, made by patchscore" in told.output
    assert "from         6 images, 3 x 6 x 7, of cats" in told.output
    (tmp_path / "run.json").write_text((tmp_path / "run.json").read_text().replace("cats", "dogs"))
    told = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert told.exit_code == 2
    assert "run.json: not a usable run: was changed since it was written" in told.stderr
