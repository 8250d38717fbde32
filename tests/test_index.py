"""PatchIndex: what it stores, what search finds, and that no folder on disk is ever half valid."""

import builtins
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import noisy, smooth_images
from safetensors.torch import load_file, save

import patchscore as ps
from patchscore import index as index_module

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def images():
    return ps.PatchBank(smooth_images(12, 3, 12, 10), torch.arange(12) % 3)


@pytest.fixture(scope="module")
def built(images, tmp_path_factory):
    return ps.PatchIndex.build(images, [3, 5], tmp_path_factory.mktemp("index") / "of-images", progress=False)


@pytest.fixture
def copied(built, tmp_path):
    """The folder of an index that a test may damage."""
    shutil.copytree(built.path, tmp_path / "copy")
    return tmp_path / "copy"


def build(bank, sizes, path, **options):
    return ps.PatchIndex.build(bank, sizes, path, progress=False, **options)


def brute_force(bank, z, k, pixel, count):
    """Squared distances of the nearest interior windows and where they are: [(distance, image, row, column)]."""
    r, (i, j) = k // 2, pixel
    train = bank.chunk(0, len(bank), torch.float64)
    query = z[:, i - r : i + r + 1, j - r : j + r + 1].double()
    found = [
        (float((train[n, :, y - r : y + r + 1, x - r : x + r + 1] - query).square().sum()), n, y, x)
        for n in range(len(bank))
        for y in range(r, bank.shape[1] - r)
        for x in range(r, bank.shape[2] - r)
    ]
    return sorted(found)[:count]


# What is stored.


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_every_window_is_in_one_cell(images, tmp_path, padding_mode):
    part = build(images, 3, tmp_path / "i", padding_mode=padding_mode).at(3)
    assert part.meta["windows"] == 12 * 10 * 8
    assert sorted(part.ids.tolist()) == list(range(12 * 10 * 8))
    assert part.cells.size.sum() == 12 * 10 * 8


@pytest.mark.parametrize("k", [3, 5, 9])
def test_cells_hold_the_moments_of_their_windows(images, tmp_path, k):
    part = build(images, k, tmp_path / "i").at(k)
    windows = part.pixels(part.ids[:])
    features, rest = part.project(windows)
    values = windows[:, :, k // 2, k // 2]
    cells = part.cells
    for c, (start, size) in enumerate(zip(part.starts, cells.size.tolist(), strict=True)):
        inside = slice(start, start + size)
        if size == 0:
            continue
        f = features[inside].double()
        torch.testing.assert_close(cells.mean[c].double(), f.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(cells.variance[c].double(), f.var(0, correction=0), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(cells.rest[c].double(), rest[inside].double().mean(), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(cells.value[c], values[inside].mean(0), atol=1e-5, rtol=1e-4)
        assert ((f - cells.mean[c].double()).square().sum(1).sqrt() <= part.radius[c]).all()


def test_small_windows_are_stored_as_bytes_and_wide_ones_are_not(images, tmp_path):
    index = build(images, [3, 9], tmp_path / "i")
    part = index.at(3)
    pairs = 14
    tiles = torch.from_numpy(part.tiles.reshape(-1, pairs, 8, 2).copy())
    bytes_ = (part.pixels(part.ids[:]).flatten(1) + 1) * 127.5
    tile = 0
    for start, size in zip(part.starts, part.cells.size.tolist(), strict=True):
        for first in range(0, size, 8):
            count = min(8, size - first)
            held = tiles[tile].permute(1, 0, 2).flatten(1)[:count, :27].float() + 128
            assert torch.equal(held, bytes_[start + first : start + first + count].round())
            tile += 1
    assert tile == len(tiles)
    assert index.at(9).tiles is None


def test_max_windows_takes_some_images_and_says_so(images, tmp_path):
    index = build(images, 3, tmp_path / "i", max_windows=500)
    part = index.at(3)
    assert part.meta["windows"] <= 500
    assert part.meta["subsampled_images"] == 500 // 80
    assert index.meta["max_windows"] == 500
    assert build(images, 3, tmp_path / "all", max_windows=10**6).at(3).meta["subsampled_images"] is None


def test_rank_and_cells_are_taken_as_asked(images, tmp_path):
    part = build(images, 3, tmp_path / "i", rank=8, cells=40).at(3)
    assert part.rank == 8
    assert len(part.cells.size) == 32


def test_the_same_seed_builds_the_same_index_on_any_number_of_threads(images, tmp_path):
    threads, found = torch.get_num_threads(), []
    try:
        for count, seed in ((1, 4), (2, 4), (3, 4), (4, 4), (1, 5)):
            torch.set_num_threads(count)
            folder = build(images, [3, 9], tmp_path / f"{count}-{seed}", seed=seed).path
            found.append([(folder / k / name).read_bytes() for k in ("k03", "k09") for name in
                          ("ids.bin", "rows.bin", "cells.safetensors")])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2] == found[3] != found[4]


def test_files_take_few_bytes_a_window(images, tmp_path):
    part = build(images, 9, tmp_path / "i").at(9)
    size = sum((part.folder / name).stat().st_size for name in ("ids.bin", "rows.bin"))
    assert size == 8 * part.meta["windows"]


@pytest.mark.parametrize("form", [1, 2, 3])
def test_earlier_formats_are_refused_by_name_with_what_to_do(images, copied, form):
    (copied / "meta.json").write_text(json.dumps({"format": form, "bank": images.fingerprint}))
    with pytest.raises(
        ValueError, match=f"index format {form}, this version reads 4; build it again elsewhere: patchscore index"
    ):
        ps.PatchIndex.open(copied, images)


def test_ids_beyond_32_bits_name_their_window(built):
    part = built.at(3)
    image, row, col = part.windows_of(torch.tensor([10**10 * 80 + 3 * 8 + 5]).numpy())
    assert (image.item(), row.item(), col.item()) == (10**10, 4, 6)


# Search.


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_search_finds_the_heaviest_windows(images, built, k, sigma):
    z = noisy(images, sigma, dtype=torch.float32)[0]
    pixels = [(2, 2), (5, 4), (9, 7)]
    hits = built.search(z, sigma, k=7, patch_size=k, pixels=pixels)
    for p, pixel in enumerate(pixels):
        truth = brute_force(images, z, k, pixel, 7)
        assert hits.distance[p].tolist() == pytest.approx([t[0] for t in truth], abs=1e-5)
        assert list(zip(hits.image[p].tolist(), hits.row[p].tolist(), hits.col[p].tolist(), strict=True)) == [
            t[1:] for t in truth
        ]
        expected = torch.tensor([-(t[0] - truth[0][0]) / (2 * sigma**2) for t in truth]).exp()
        assert hits.weight[p].tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("rank", [4, 12, None])
@pytest.mark.parametrize("nprobe", [None, 3])
def test_what_search_calls_proven_is_true(images, tmp_path, rank, nprobe):
    index = build(images, 3, tmp_path / "i", rank=rank)
    for sigma in (0.02, 0.3, 2.0):
        z = noisy(images, sigma, dtype=torch.float32)[0]
        pixels = [(i, j) for i in range(1, 11, 3) for j in range(1, 9, 3)]
        hits = index.search(z, sigma, k=3, pixels=pixels, nprobe=nprobe)
        assert hits.proven.all() if nprobe is None else not hits.proven.any()
        for p in hits.proven.nonzero().flatten().tolist():
            truth = brute_force(images, z, 3, pixels[p], 3)
            assert hits.distance[p].tolist() == pytest.approx([t[0] for t in truth], abs=1e-5)


def test_search_says_where_cells_held_too_few(images, built):
    hits = built.search(noisy(images, 0.1, dtype=torch.float32)[0], 0.1, k=200, patch_size=3, pixels=[(4, 4)], nprobe=1)
    absent = hits.distance[0].isinf()
    assert absent.any()
    assert (hits.image[0][absent] == -1).all()
    assert (hits.weight[0][absent] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": None}, r"this index has \[3, 5\]"),
        ({"patch_size": 7}, r"this index has \[3, 5\], not 7"),
        ({"sigma": 0.0}, "sigma: got 0.0"),
        ({"sigma": float("nan")}, "sigma: got nan"),
        ({"k": 0}, "k: got 0"),
        ({"pixels": [(0, 4)]}, r"the window of \(0, 4\) reaches over the border"),
        ({"z": torch.zeros(3, 12, 11)}, r"z: got shape \[3, 12, 11\]"),
    ],
)
def test_search_names_what_it_does_not_take(built, change, message):
    with pytest.raises(ValueError, match=message):
        built.search(**{"z": torch.zeros(3, 12, 10), "sigma": 0.5, "k": 2, "patch_size": 3, **change})


# Building: whole or not at all.


def test_an_interrupted_build_keeps_whole_sizes_and_goes_on(images, tmp_path, monkeypatch):
    path, run = tmp_path / "i", index_module.Builder.run

    def fail_at_five(self):
        if self.k == 5:
            (self.folder / "ids.bin").write_bytes(b"half")
            raise KeyboardInterrupt
        run(self)

    with monkeypatch.context() as patched:
        patched.setattr(index_module.Builder, "run", fail_at_five)
        with pytest.raises(KeyboardInterrupt):
            build(images, [3, 5], path)
    assert sorted(p.name for p in path.iterdir() if p.is_dir()) == ["k03"]
    assert ps.PatchIndex.open(path, images).patch_sizes == [3]
    before = (path / "k03" / "ids.bin").stat().st_mtime_ns
    index = build(images, [3, 5], path)
    assert index.patch_sizes == [3, 5]
    assert (path / "k03" / "ids.bin").stat().st_mtime_ns == before


def test_what_a_killed_build_left_is_built_afresh(images, tmp_path):
    path = tmp_path / "i"
    build(images, 3, path)
    for left in ("k05", "k05.partial"):
        (path / left).mkdir()
        (path / left / "ids.bin").write_bytes(b"half")
    assert ps.PatchIndex.open(path, images).patch_sizes == [3]
    assert build(images, 5, path).patch_sizes == [3, 5]
    assert not (path / "k05.partial").exists()


def test_a_second_builder_is_turned_away(images, tmp_path, monkeypatch):
    path, run, seen = tmp_path / "i", index_module.Builder.run, []

    def build_again(self):
        monkeypatch.setattr(index_module.Builder, "run", run)
        with pytest.raises(ValueError, match="is being built by another process"):
            build(images, 3, path)
        seen.append(self.k)
        run(self)

    monkeypatch.setattr(index_module.Builder, "run", build_again)
    assert build(images, 3, path).patch_sizes == [3]
    assert seen == [3]


@pytest.mark.parametrize("at", ["fsync", "safetensors"])
def test_a_full_disk_leaves_nothing_half_valid(images, tmp_path, monkeypatch, at):
    path = tmp_path / "i"
    build(images, 3, path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if at == "fsync":
            patched.setattr(os, "fsync", full)
        else:
            patched.setattr("patchscore.index.build.write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            build(images, 5, path)
    assert not [p.name for p in path.iterdir() if "k05" in p.name or p.name.endswith(".tmp")]
    assert ps.PatchIndex.open(path, images).patch_sizes == [3]
    assert build(images, 5, path).patch_sizes == [3, 5]


def test_another_bank_or_other_options_do_not_mix_into_an_index(images, copied):
    other = ps.PatchBank(smooth_images(12, 3, 12, 10, seed=9))
    with pytest.raises(ValueError, match="the index of another bank: as many images of the same shape, 12, but other"):
        build(other, 3, copied)
    with pytest.raises(ValueError, match="was built with rank=None, now 8; take another folder"):
        build(images, 7, copied, rank=8)
    assert ps.PatchIndex.open(copied, images).patch_sizes == [3, 5]


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (4, {}, "patch_sizes: got 4"),
        ([], {}, "patch_sizes: got none"),
        (11, {}, "patch_sizes: 11 does not fit in 12 x 10"),
        (3, {"padding_mode": "mirror"}, "padding_mode: got 'mirror'"),
        (3, {"rank": 0}, "rank: got 0"),
        (3, {"cells": 0}, "cells: got 0"),
        (3, {"max_windows": 0}, "max_windows: got 0"),
        (3, {"seed": -1}, "seed: got -1"),
    ],
)
def test_build_names_what_it_does_not_take(images, tmp_path, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        build(images, sizes, tmp_path / "i", **options)
    assert not (tmp_path / "i").exists()


def test_a_folder_of_something_else_is_left_alone(images, tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"sea")
    with pytest.raises(ValueError, match="holds something other than an index"):
        build(images, 3, tmp_path)
    with pytest.raises(ValueError, match="is a file, takes a folder"):
        build(images, 3, tmp_path / "holiday.png")
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.png"]


@pytest.mark.parametrize("lock", ["file", "symlink", "folder", "pipe"])
def test_a_folder_with_a_lock_of_something_else_is_left_alone(images, tmp_path, lock):
    """What another program calls .lock makes a folder no index, and is neither emptied nor followed."""
    (tmp_path / "victim").write_text("precious")
    path = tmp_path / "project"
    (path / "k03").mkdir(parents=True)
    (path / "k03" / "thesis.tex").write_text("precious")
    place = path / ".lock"
    {
        "file": lambda: place.write_text("precious"),
        "symlink": lambda: place.symlink_to("../victim"),
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
    }[lock]()
    with pytest.raises(ValueError, match=r"holds something other than an index \('k03', but no meta.json"):
        build(images, 3, path)
    assert (path / "k03" / "thesis.tex").read_text() == "precious"
    assert (tmp_path / "victim").read_text() == "precious"
    if lock == "file":
        assert place.read_text() == "precious"

    (path / "k03" / "thesis.tex").unlink()
    (path / "k03").rmdir()
    if lock == "file":
        assert build(images, 3, path).patch_sizes == [3]
        assert place.read_text() == "precious"
    else:
        with pytest.raises(ValueError, match=r"\.lock: not a lock file of patchscore"):
            build(images, 3, path)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_foreign_meta_json_makes_no_index(images, tmp_path):
    (tmp_path / "meta.json").write_text('{"title": "my paper"}')
    (tmp_path / "k03").mkdir()
    with pytest.raises(ValueError, match=r"meta\.json: damaged, not the description of an index"):
        build(images, 3, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k03", "meta.json"]


def test_without_faiss_it_says_what_to_install(images, tmp_path, monkeypatch):
    found = builtins.__import__

    def without(name, *arguments, **options):
        if name == "faiss":
            raise error
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    error = ModuleNotFoundError("no faiss", name="faiss")
    with pytest.raises(ImportError, match=r'pip install "patchscore\[cpu\]", or "patchscore\[gpu\]"'):
        build(images, 3, tmp_path / "i")
    error = ImportError("libfaiss.so: failed to map segment from shared object")
    with pytest.raises(ImportError, match=r"installed but cannot be loaded: libfaiss\.so: failed to map segment"):
        build(images, 3, tmp_path / "i")


# Opening: anything but the whole index of this bank is refused by name.


def test_open_maps_what_build_made(images, built):
    opened = ps.PatchIndex.open(built.path, images, verify=True)
    assert opened.patch_sizes == [3, 5]
    assert "patch sizes 3, 5" in repr(opened)
    with pytest.raises(ValueError, match=r"this index has \[3, 5\], not 9"):
        opened.at(9)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((12, 3, 12, 10, 9), "as many images of the same shape, 12, but other pixels or labels"),
        ((7, 3, 12, 10), "it has 12 images, this bank 7; --limit and --skip-bad must be as they were"),
        ((12, 3, 10, 10), "images of 3 x 12 x 10, this bank of 3 x 10 x 10; --size and --channels must be as they"),
    ],
)
def test_another_bank_is_refused_with_what_differs(built, other, message):
    with pytest.raises(ValueError, match=f"the index of another bank: .*{message}"):
        ps.PatchIndex.open(built.path, ps.PatchBank(smooth_images(*other)))


def test_no_index_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="no index here"):
        ps.PatchIndex.open(tmp_path / "nowhere", images)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 99}', "\udcff"])
def test_a_damaged_or_foreign_description_is_refused(images, copied, content):
    (copied / "meta.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"damaged, not the description|index format (2|99), this version reads"):
        ps.PatchIndex.open(copied, images)


@pytest.mark.parametrize("name", ["ids.bin", "rows.bin", "cells.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_refused_by_its_path(images, copied, name, damage):
    file = copied / "k05" / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1] if name != "meta.json" else content[:-9])
    elif name == "meta.json":
        file.write_bytes(content.replace(b'"sha256": "', b'"sha256": "0', 1))
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    with pytest.raises(ValueError, match=str(file)):
        ps.PatchIndex.open(copied, images)


@pytest.mark.parametrize("difference", ["bank", "max_windows", "patch_size"])
def test_a_part_of_another_index_is_refused_by_name(images, copied, tmp_path, difference):
    other = ps.PatchBank(smooth_images(12, 3, 12, 10, seed=9)) if difference == "bank" else images
    limit = 500 if difference == "max_windows" else None
    ps.PatchIndex.build(other, [3, 5], tmp_path / "other", max_windows=limit, progress=False)
    shutil.rmtree(copied / "k05")
    shutil.copytree(tmp_path / "other" / ("k03" if difference == "patch_size" else "k05"), copied / "k05")
    with pytest.raises(ValueError, match=f"k05: part of an index of another {difference}"):
        ps.PatchIndex.open(copied, images)


def test_the_description_of_a_part_is_not_that_of_the_index(images, copied):
    shutil.copy(copied / "k03" / "meta.json", copied / "meta.json")
    for use in (
        lambda: ps.PatchIndex.open(copied, images),
        lambda: ps.PatchIndex.build(images, 3, copied, progress=False),
    ):
        with pytest.raises(ValueError, match=r"meta\.json: damaged, not the description of an index"):
            use()


@pytest.mark.parametrize("window", [-1, 12 * 10 * 8, 2**62])
def test_a_place_outside_the_images_is_refused_before_it_is_used(images, copied, monkeypatch, window):
    monkeypatch.setattr(index_module.storage, "VERIFIED_AT_OPEN", 0)
    ids = np.memmap(copied / "k03" / "ids.bin", np.int64, "r+")
    ids[5] = window
    ids.flush()
    with pytest.raises(ValueError, match=r"ids\.bin: damaged; build the index again"):
        ps.PatchIndex.open(copied, images).at(3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays["mean"].view(-1)[3:4].fill_(torch.nan),
        lambda arrays: arrays["value_square"].view(-1)[0:1].fill_(torch.inf),
        lambda arrays: arrays["sizes"][:2].copy_(torch.tensor([-1, int(arrays["sizes"][:2].sum()) + 1])),
        lambda arrays: arrays.update(sizes=torch.cat([arrays["sizes"], torch.zeros(1, dtype=torch.int64)])),
        lambda arrays: arrays.update(axes=arrays["axes"][:-1].contiguous()),
        lambda arrays: arrays.update(rest=arrays["rest"].double()),
        lambda arrays: arrays.pop("radius"),
    ],
)
def test_moments_that_the_engine_cannot_take_are_refused_where_no_checksum_was_read(
    images, copied, monkeypatch, damage
):
    monkeypatch.setattr(index_module.storage, "VERIFIED_AT_OPEN", 0)
    path = copied / "k03" / "cells.safetensors"
    arrays = load_file(path)
    length = path.stat().st_size
    damage(arrays)
    path.write_bytes(save(arrays))
    if path.stat().st_size != length:
        meta = json.loads((copied / "k03" / "meta.json").read_text())
        meta["files"][path.name]["bytes"] = path.stat().st_size
        index_module.storage._write(copied / "k03" / "meta.json", {n: v for n, v in meta.items() if n != "sha256"})
    with pytest.raises(ValueError, match=r"cells\.safetensors: damaged; build the index again"):
        ps.PatchIndex.open(copied, images).at(3)


def test_a_large_file_is_checked_whole_on_request(images, copied, monkeypatch):
    monkeypatch.setattr(index_module.storage, "VERIFIED_AT_OPEN", 0)
    file = copied / "k03" / "ids.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    ps.PatchIndex.open(copied, images)
    with pytest.raises(ValueError, match="was changed since it was written"):
        ps.PatchIndex.open(copied, images, verify=True)
