"""Files as people have them: each written by the format's own tool, or byte by byte as it is distributed."""

import gzip
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from patchscore import sources
from patchscore.bank import PatchBank

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([3, 0, 2, 2, 1, 0, 3, 1, 0, 3, 2, 1])
NAMES = ("ant", "bee", "cat", "dog")


def one_line_about(path):
    return rf"\A[^\n]*{re.escape(str(path))}[^\n]*\Z"


def encoded(pixels, kind="png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "webp" else {}))
    return file.getvalue()


def check(bank, labels=LABELS, names=None, images=IMAGES):
    """The bank holds exactly these images, labels and names."""
    np.testing.assert_array_equal(bank.images.numpy(), images.transpose(0, 3, 1, 2))
    assert (None if bank.labels is None else bank.labels.tolist()) == (None if labels is None else list(labels))
    assert bank.class_names == names


# CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html gives the layout.


def planar(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def cifar10_python(protocol=2):
    """Two batches of training images, one of test images, and the names; keys are bytes, as Python 2 wrote them."""

    def batch(part):
        return pickle.dumps(
            {
                b"batch_label": b"b",
                b"labels": LABELS[part].tolist(),
                b"data": planar(IMAGES[part]),
                b"filenames": [b"a"],
            },
            protocol,
        )

    return {
        "data_batch_1": batch(slice(0, 5)),
        "data_batch_2": batch(slice(5, 12)),
        "test_batch": batch(slice(2, 4)),
        "batches.meta": pickle.dumps({"label_names": list(NAMES), "num_vis": 3072}, protocol),
        "readme.html": b"<html>",
    }


def cifar100_python():
    batch = {b"fine_labels": LABELS.tolist(), b"coarse_labels": (LABELS // 2).tolist(), b"data": planar(IMAGES)}
    meta = {b"fine_label_names": [name.encode() for name in NAMES], b"coarse_label_names": [b"insect", b"pet"]}
    return {"train": pickle.dumps(batch, 2), "test": pickle.dumps(batch, 2), "meta": pickle.dumps(meta, 2)}


def cifar10_binary():
    records = np.concatenate([LABELS[:, None].astype(np.uint8), planar(IMAGES)], 1)
    return {
        "data_batch_1.bin": records[:5].tobytes(),
        "data_batch_2.bin": records[5:].tobytes(),
        "test_batch.bin": records[2:4].tobytes(),
        "batches.meta.txt": "\n".join((*NAMES, "")).encode(),
    }


def cifar100_binary():
    records = np.concatenate([(LABELS // 2)[:, None], LABELS[:, None], planar(IMAGES)], 1).astype(np.uint8)
    return {
        "train.bin": records.tobytes(),
        "test.bin": records.tobytes(),
        "fine_label_names.txt": "\n".join(NAMES).encode(),
        "coarse_label_names.txt": b"insect\npet\n",
    }


CIFAR = {
    "cifar-10-batches-py": cifar10_python,
    "cifar-100-python": cifar100_python,
    "cifar-10-batches-bin": cifar10_binary,
    "cifar-100-binary": cifar100_binary,
}


def cifar_at(folder, name, packed):
    """The data set in its folder, or as the archive that is downloaded."""
    files = CIFAR[name]()
    if packed:
        path = folder / f"{name}.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for file, content in files.items():
                info = tarfile.TarInfo(f"{name}/{file}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path
    (folder / name).mkdir()
    for file, content in files.items():
        (folder / name / file).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_as_downloaded(tmp_path, name, packed):
    path = cifar_at(tmp_path, name, packed)
    check(PatchBank.open(path), names=NAMES)
    check(PatchBank.open(path, labels=False), labels=None)
    test = slice(2, 4) if "10-b" in name else slice(None)
    check(PatchBank.open(path, split="test"), LABELS[test], NAMES, IMAGES[test])
    if "100" in name:
        check(PatchBank.open(path, label_key="coarse_labels"), LABELS // 2, ("insect", "pet"))
    with pytest.raises(ValueError, match="split: got 'val', holds train and test"):
        sources.read(path, split="val")


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_of_every_protocol_are_read(tmp_path, protocol):
    for file, content in cifar10_python(protocol).items():
        (tmp_path / file).write_bytes(content)
    check(PatchBank.open(tmp_path), names=NAMES)
    if protocol >= 2:
        check(PatchBank.open(tmp_path / "data_batch_1"), LABELS[:5], NAMES, IMAGES[:5])


def test_batches_of_another_machine_are_read(tmp_path):
    """Python 2 wrote the originals: texts are bytes, and the array's may be in Fortran order or big-endian."""
    batch = {"data": np.asfortranarray(planar(IMAGES).astype(">i8")), "labels": LABELS.astype(">i4")}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, 2))
    check(PatchBank.open(tmp_path / "data_batch_1"))


class Trap:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": Trap(os.system, ("false",))}, 2),
        pickle.dumps({"data": Trap(pytest.fail, ("a pickle was run",))}),
        pickle.dumps({"data": np.array([Trap(list, ())], dtype=object)}),
        pickle.dumps([1, 2]),
        pickle.dumps(planar(IMAGES)),
        pickle.dumps({"data": planar(IMAGES)[:, :-1]}),
        pickle.dumps({"data": planar(IMAGES), "labels": [0]}),
        pickle.dumps({"data": 3}),
        b"\x80\x02",
        b"\x80\x02r\xff\xff\xff\xff.",  # place 2^32 of the memo
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",  # 2^60 bytes
        b"\x80\x02cnumpy\ndtype\n)R.",
        b"\x80\x02cnumpy\nload\n(S'x'\ntR.",
    ],
)
def test_no_pickle_but_one_of_arrays_is_read(tmp_path, content):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "data_batch_1")):
        sources.read(tmp_path / "data_batch_1")


# torchvision roots.


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_at(folder, pack=bytes, suffix=""):
    folder.mkdir(parents=True)
    for split, part in (("train", slice(0, 8)), ("t10k", slice(8, 12))):
        (folder / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(IMAGES[part, ..., 0])))
        (folder / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(LABELS[part])))


def test_torchvision_roots(tmp_path):
    mnist_at(tmp_path / "data" / "MNIST" / "raw")
    for root in ("data", "data/MNIST", "data/MNIST/raw"):
        check(PatchBank.open(tmp_path / root), LABELS[:8], None, IMAGES[:8, ..., :1])
        check(PatchBank.open(tmp_path / root, split="test"), LABELS[8:], None, IMAGES[8:, ..., :1])
    cifar_at(tmp_path / "data", "cifar-10-batches-py", packed=True)  # beside its archive
    cifar_at(tmp_path / "data", "cifar-10-batches-py", packed=False)
    with pytest.raises(ValueError, match=r"data: holds MNIST and cifar-10-batches-py; open one of them"):
        sources.read(tmp_path / "data")


def test_idx_files_of_other_names_are_named(tmp_path):
    mnist_at(tmp_path / "raw")
    for path in list((tmp_path / "raw").iterdir()):
        path.rename(path.with_name(f"digits-{path.name}"))
    with pytest.raises(ValueError, match=r"raw: holds digits-t10k-images-idx3-ubyte and .*; open one of them"):
        sources.read(tmp_path / "raw")
    path = tmp_path / "raw" / "digits-train-images-idx3-ubyte"
    check(PatchBank.open(path), LABELS[:8], None, IMAGES[:8, ..., :1])


def emnist_at(folder, kind, suffix="", pack=lambda content: content):
    mnist_at(folder / kind, pack, suffix)
    for path in list((folder / kind).iterdir()):
        path.rename(folder / f"emnist-{kind}-{path.name.replace('t10k', 'test')}")
    (folder / kind).rmdir()


def test_emnist_has_divisions_that_are_asked_for(tmp_path):
    raw = tmp_path / "data" / "EMNIST" / "raw"
    emnist_at(raw, "letters")
    check(PatchBank.open(tmp_path / "data"), LABELS[:8], None, IMAGES[:8, ..., :1])
    check(PatchBank.open(tmp_path / "data", split="letters-test"), LABELS[8:], None, IMAGES[8:, ..., :1])
    emnist_at(raw, "byclass", ".gz", gzip.compress)
    offered = "byclass-test, byclass-train, letters-test and letters-train"
    with pytest.raises(ValueError, match=rf"raw: holds {offered}; pass split='byclass-test'"):
        sources.read(tmp_path / "data")
    check(PatchBank.open(raw, split="byclass-train"), LABELS[:8], None, IMAGES[:8, ..., :1])


# SVHN: http://ufldl.stanford.edu/housenumbers says X (32 x 32 x 3 x N), y (10 is the digit 0). Files by SciPy; theirs
# are MATLAB's.


def svhn_at(folder, part, split="train", **options):
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    labels = np.where(LABELS[part] == 0, 10, LABELS[part]).astype(np.uint8)[:, None]
    content = {"X": IMAGES[part].transpose(1, 2, 3, 0), "y": labels}
    savemat(folder / f"{split}_32x32.mat", content, **options)


def test_svhn_has_the_digit_0_as_label_0(tmp_path):
    pytest.importorskip("scipy")
    svhn_at(tmp_path / "data", slice(0, 8), do_compression=True)
    svhn_at(tmp_path / "data", slice(8, 12), "test")
    for source in (tmp_path / "data", tmp_path / "data" / "train_32x32.mat"):
        check(PatchBank.open(source), LABELS[:8], None, IMAGES[:8])
    check(PatchBank.open(tmp_path / "data", split="test"), LABELS[8:], None, IMAGES[8:])
    assert PatchBank.open(tmp_path / "data", labels=False).labels is None
    mnist_at(tmp_path / "data" / "MNIST" / "raw")
    with pytest.raises(ValueError, match="data: holds MNIST and SVHN; open one of them"):
        sources.read(tmp_path / "data")


def test_other_matlab_files_are_read_by_their_names_or_told(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    path = tmp_path / "a.mat"
    scipy_io.savemat(path, {"photos": IMAGES.transpose(1, 2, 3, 0), "y": LABELS[None] * 10})
    with pytest.raises(ValueError, match=r"a\.mat: holds photos or y, takes images called X or images"):
        sources.read(path)
    check(PatchBank.open(path, image_key="photos"), LABELS * 10, None, IMAGES)
    for content, message in (
        ({"X": IMAGES}, r"X has shape \[12, 32, 32, 3\], takes \[H, W, C, N\]"),
        ({"X": np.array([{"a": 1}], dtype=object)}, "X is a cell array, takes an array of numbers"),
    ):
        scipy_io.savemat(path, content)
        with pytest.raises(ValueError, match=rf"a\.mat: {message}"):
            sources.read(path)
    scipy_io.savemat(path, {"X": IMAGES.transpose(1, 2, 3, 0)}, do_compression=True)
    with pytest.raises(ValueError, match="more than the memory limit"):
        sources.read(path, memory_limit=30_000)
    whole, told = path.read_bytes(), []
    for at in [*range(120, 400, 3), len(whole) - 5]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            sources.read(path)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 20
    assert all(re.fullmatch(one_line_about(path), line) for line in told)
    path.write_bytes(b"MATLAB 7.3 MAT-file" + bytes(200))
    with pytest.raises(ValueError, match=r"a\.mat: is an HDF5 file of MATLAB 7.3; save it with -v7"):
        sources.read(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.float64])
def test_matlab_files_of_any_type_are_read_as_scipy_reads_them(tmp_path, packed, dtype):
    scipy_io = pytest.importorskip("scipy.io")
    images = IMAGES[:5, :7, :6]
    values = (images / 127.5 - 1 if dtype is np.float64 else images).astype(dtype)
    content = {"a": 3.0, "text": "no", "X": values.transpose(1, 2, 3, 0), "y": LABELS[:5].astype(dtype)}
    scipy_io.savemat(tmp_path / "a.mat", content, do_compression=packed)
    if dtype is np.float64:
        images = values.astype(np.float32)
    check(PatchBank.open(tmp_path / "a.mat"), LABELS[:5], None, images)


# STL-10: https://cs.stanford.edu/~acoates/stl10 says uint8, colours one after the other, each column by column; labels
# from 1.


def test_stl10_has_upright_images_and_labels_from_0(tmp_path):
    images = RNG.integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    root = tmp_path / "data" / "stl10_binary"
    root.mkdir(parents=True)
    for split, part in (("train", slice(0, 3)), ("test", slice(3, 5)), ("unlabeled", slice(1, 4))):
        (root / f"{split}_X.bin").write_bytes(images[part].transpose(0, 3, 2, 1).tobytes())
        if split != "unlabeled":
            (root / f"{split}_y.bin").write_bytes((LABELS[part] + 1).astype(np.uint8).tobytes())
    (root / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    check(PatchBank.open(tmp_path / "data"), LABELS[:3], NAMES, images[:3])
    check(PatchBank.open(root, split="test"), LABELS[3:5], NAMES, images[3:])
    check(PatchBank.open(root, split="unlabeled"), None, None, images[1:4])
    (root / "train_y.bin").write_bytes(b"\1")
    with pytest.raises(ValueError, match=r"train_y\.bin: 1 labels for 3 images"):
        sources.read(root)
    (root / "train_X.bin").write_bytes(b"\1" * 27_649)
    with pytest.raises(ValueError, match=r"train_X\.bin: 27649 bytes, takes whole images of 27648"):
        sources.read(root)


# CelebA: http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; a number of images, then names of attributes, then -1 and 1.


@pytest.fixture
def celeba(tmp_path):
    root = tmp_path / "data" / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    for i, image in enumerate(IMAGES):
        (root / "img_align_celeba" / f"{i + 1:06d}.png").write_bytes(encoded(image))
    names = [f"{i + 1:06d}.png" for i in range(12)]
    rows = [f"{name} {1 if i % 3 == 0 else -1:2d} {1 if i % 2 else -1:2d}" for i, name in enumerate(names)]
    (root / "list_attr_celeba.txt").write_text("\n".join(["12", "Bald Smiling ", *rows]) + "\n")
    parts = [f"{name} {0 if i < 7 else 1 if i < 10 else 2}" for i, name in enumerate(names)]
    (root / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    identities = [f"{name} {i * 10}" for i, name in enumerate(names)]
    (root / "identity_CelebA.txt").write_text("\n".join(identities) + "\n")
    return root


def test_celeba_without_a_split_is_told(celeba):
    (celeba / "list_eval_partition.txt").write_text("000001.png 7\n")
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt: has no line of an image and 0, 1 or 2"):
        sources.read(celeba)


def test_celeba_has_splits_and_labels_by_name(celeba):
    check(PatchBank.open(celeba.parent), None, None, IMAGES[:7])
    check(PatchBank.open(celeba, split="valid"), None, None, IMAGES[7:10])
    smiling = [i % 2 for i in range(10, 12)]
    check(PatchBank.open(celeba, split="test", label_key="Smiling"), smiling, ("not Smiling", "Smiling"), IMAGES[10:])
    check(PatchBank.open(celeba, label_key="identity"), [i * 10 for i in range(7)], None, IMAGES[:7])
    with pytest.raises(ValueError, match="label_key: got 'Old', takes identity, Bald or Smiling"):
        sources.read(celeba, label_key="Old")
    text = (celeba / "identity_CelebA.txt").read_text().splitlines()
    (celeba / "identity_CelebA.txt").write_text("\n".join(text[1:]))
    with pytest.raises(ValueError, match=r"identity_CelebA\.txt: has no line for 000001\.png"):
        sources.read(celeba, label_key="identity")
    (celeba / "list_eval_partition.txt").unlink()
    check(PatchBank.open(celeba), None, None, IMAGES)


def test_idx_with_limit_reads_no_further(tmp_path):
    mnist_at(tmp_path / "raw", gzip.compress, ".gz")
    path = tmp_path / "raw" / "train-images-idx3-ubyte.gz"
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[: 16 + 5 * 1024]))
    (tmp_path / "raw" / "train-labels-idx1-ubyte.gz").unlink()
    check(PatchBank.open(path, limit=3), None, None, IMAGES[:3, ..., :1])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz.*cut short"):
        sources.read(path)


# Trees in archives.


def zip_at(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def edm_files():
    """What EDM's dataset_tool.py writes: images of any class in folders of a thousand, and dataset.json."""
    files = {f"{i // 5:05d}/img{i:08d}.png": encoded(image) for i, image in enumerate(IMAGES)}
    labels = [[name, int(label)] for name, label in zip(files, LABELS, strict=True)]
    return {**files, "dataset.json": json.dumps({"labels": labels})}


def test_edm_zip_has_the_labels_of_its_dataset_json(tmp_path):
    path = zip_at(tmp_path / "cifar10-32x32.zip", edm_files())
    check(PatchBank.open(path))
    check(PatchBank.open(path, labels=False), labels=None)
    assert PatchBank.open(path, limit=4).labels.tolist() == [3, 0, 2, 1]
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    check(PatchBank.open(tmp_path / "unpacked"))


def class_files():
    order = np.argsort(LABELS, kind="stable")
    return order, {f"photos/{NAMES[LABELS[i]]}/{i:03d}.png": encoded(IMAGES[i]) for i in order}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_archive_of_class_folders_is_read_as_the_folder(tmp_path, kind):
    order, files = class_files()
    path = tmp_path / f"photos.{kind}"
    if kind == "zip":
        zip_at(path, files)
    else:
        with tarfile.open(path, f"w:{kind[4:]}") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    check(PatchBank.open(path), LABELS[order], NAMES, IMAGES[order])
    assert PatchBank.open(path, limit=4).labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["../outside.png", "a/../../outside.png", "..\\outside.png"])
def test_entries_that_lead_out_of_an_archive_are_refused(tmp_path, name):
    path = zip_at(tmp_path / "a.zip", {"a.png": encoded(IMAGES[0]), name: encoded(IMAGES[1])})
    with pytest.raises(ValueError, match=one_line_about(path)):
        sources.read(path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "a.tar")):
        sources.read(tmp_path / "a.tar")
    assert sorted(file.name for file in tmp_path.parent.rglob("outside*")) == []


def test_links_in_a_tar_are_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(IMAGES[0]))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
    with pytest.raises(ValueError, match="no images found"):
        sources.read(tmp_path / "a.tar")


def test_a_bad_image_in_an_archive_is_named_and_skipped_by_skip_bad(tmp_path):
    files = {"a.png": encoded(IMAGES[0]), "b.png": encoded(IMAGES[1])[:100], "c.png": encoded(IMAGES[2])}
    path = zip_at(tmp_path / "a.zip", files)
    with pytest.raises(ValueError, match=one_line_about(path / "b.png")):
        sources.read(path)
    with pytest.warns(UserWarning, match="left out 1 images"):
        assert len(sources.read(path, skip_bad=True)[0]) == 2


# WebDataset.


@pytest.mark.parametrize("kind", ["cls", "json", "text"])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_webdataset_shards(tmp_path, kind, suffix):
    webdataset = pytest.importorskip("webdataset")
    parts = {"cls": lambda i: {"cls": int(LABELS[i])}, "json": lambda i: {"json": {"label": int(LABELS[i]), "w": 1}},
             "text": lambda i: {"cls": NAMES[LABELS[i]].encode(), "txt": "a caption"}}  # fmt: skip
    for shard, rows in enumerate((range(7), range(7, 12))):
        with webdataset.TarWriter(str(tmp_path / f"set-{shard:06d}.{suffix}")) as sink:
            for i in rows:
                sink.write({"__key__": f"sub/{i:06d}", "png": encoded(IMAGES[i]), **parts[kind](i)})
    names = NAMES if kind == "text" else None
    check(PatchBank.open(tmp_path / f"set-000000.{suffix}"), LABELS[:7], names, IMAGES[:7])
    if suffix == "tar":
        (tmp_path / "README.md").write_text("what is in the shards")
        check(PatchBank.open(tmp_path), names=names)
        assert PatchBank.open(tmp_path, limit=4).labels.tolist() == [3, 0, 2, 1]


def test_webdataset_keys(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as sink:
        for i in range(12):
            sink.write({"__key__": f"{i:06d}", "image.png": encoded(IMAGES[i]), "seg.png": encoded(IMAGES[i, ..., 0]),
                        "json": {"kind": int(LABELS[i])}})  # fmt: skip
    with pytest.raises(ValueError, match=r"its items hold image\.png and seg\.png; pass image_key="):
        sources.read(path)
    check(PatchBank.open(path, image_key="image.png", label_key="kind"))
    with pytest.raises(ValueError, match=r"label_key: got 'sort', an item holds"):
        sources.read(path, image_key="image.png", label_key="sort")
    with pytest.raises(ValueError, match="image_key: got 'sort', its items hold"):
        sources.read(path, image_key="sort")


# Parquet and Arrow.


@pytest.mark.parametrize("form", ["bytes", "struct", "arrays"])
def test_parquet(tmp_path, form):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = {
        "bytes": [encoded(image) for image in IMAGES],
        "struct": [{"bytes": encoded(image), "path": None} for image in IMAGES],
        "arrays": [image.tolist() for image in IMAGES],
    }[form]
    name = "image" if form == "arrays" else "picture"  # a column of files may have any name
    table = pyarrow.table({"number": list(range(12)), name: values, "label": LABELS})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    check(PatchBank.open(tmp_path / "a.parquet"))
    check(PatchBank.open(tmp_path / "a.parquet", label_key="number"), range(12))
    assert PatchBank.open(tmp_path / "a.parquet", limit=4).labels.tolist() == [3, 0, 2, 1]
    with pytest.raises(ValueError, match=r"label_key: got 'sort', holds number, .* or label"):
        sources.read(tmp_path / "a.parquet", label_key="sort")
    text = pyarrow.table({name: values, "label": [NAMES[label] for label in LABELS]})
    parquet.write_table(text, tmp_path / "b.parquet")
    check(PatchBank.open(tmp_path / "b.parquet"), names=NAMES)


def huggingface(datasets):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"image": [Image.fromarray(image) for image in IMAGES], "label": LABELS.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def test_huggingface_datasets_in_memory_streamed_and_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = huggingface(datasets)
    check(PatchBank.open(dataset), names=NAMES)
    assert PatchBank.open(dataset, limit=4).labels.tolist() == [3, 0, 2, 1]
    check(PatchBank.open(dataset.to_iterable_dataset(), limit=5), LABELS[:5], NAMES, IMAGES[:5])
    dataset.to_parquet(tmp_path / "a.parquet")
    check(PatchBank.open(tmp_path / "a.parquet"), names=NAMES)
    dataset.save_to_disk(tmp_path / "disk", num_shards=2)
    check(PatchBank.open(tmp_path / "disk"), names=NAMES)
    dataset.shuffle(seed=0).select(range(4)).save_to_disk(tmp_path / "few")
    assert len(PatchBank.open(tmp_path / "few")) == 4


def test_huggingface_splits_are_asked_about(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = huggingface(datasets)
    both = datasets.DatasetDict({"train": dataset.select(range(8)), "test": dataset.select(range(8, 12))})
    both.save_to_disk(tmp_path / "disk")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, part in both.items():
        part.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    for source in (both, tmp_path / "disk", tmp_path / "hub"):
        with pytest.raises(ValueError, match=r"holds (train and test|test and train); pass split="):
            sources.read(source)
        check(PatchBank.open(source, split="train"), LABELS[:8], NAMES, IMAGES[:8])
        check(PatchBank.open(source, split="test"), LABELS[8:], NAMES, IMAGES[8:])


def test_a_table_beside_images_does_not_take_their_place(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(encoded(IMAGES[0]))
    parquet.write_table(pyarrow.table({"file_name": ["cat/a.png"]}), tmp_path / "metadata.parquet")
    with pytest.warns(UserWarning, match=r"left out: 1 \.parquet$"):
        check(PatchBank.open(tmp_path), [0], ("cat",), IMAGES[:1])


@pytest.mark.parametrize("name", ["../a.arrow", "/etc/passwd", "", 3, None])
def test_state_json_names_no_file_elsewhere(tmp_path, name):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "state.json")):
        sources.read(tmp_path)


# LMDB.


@pytest.mark.parametrize("count", [1, 12, 250])
def test_lmdb_holds_the_values_in_the_order_of_their_keys(tmp_path, count):
    lmdb = pytest.importorskip("lmdb")
    images = RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    small = RNG.integers(0, 256, (3, 4, 4), dtype=np.uint8)
    keys = [b"%08x" % number for number in RNG.permutation(count)]
    with lmdb.open(str(tmp_path / "bedroom_train_lmdb"), map_size=1 << 28) as database:
        for first in range(0, count, 100):  # of many transactions, with values deleted again
            with database.begin(write=True) as transaction:
                for key, image in zip(keys[first : first + 100], images[first : first + 100], strict=True):
                    transaction.put(key, encoded(image, "webp"))
                    transaction.put(b"gone", encoded(small[0]))
        with database.begin(write=True) as transaction:
            transaction.delete(b"gone")
    check(PatchBank.open(tmp_path / "bedroom_train_lmdb"), None, None, images[np.argsort(keys)])
    check(
        PatchBank.open(tmp_path / "bedroom_train_lmdb" / "data.mdb", limit=1), None, None, images[np.argsort(keys)][:1]
    )


def test_lmdb_of_small_values_and_of_several_a_key(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "small")) as database, database.begin(write=True) as transaction:
        for i in range(40):  # in the leaves themselves
            transaction.put(b"%03d" % i, encoded(IMAGES[i % 12, :2, :2]))
    check(PatchBank.open(tmp_path / "small"), None, None, IMAGES[np.arange(40) % 12, :2, :2])
    with lmdb.open(str(tmp_path / "empty")):
        pass
    with pytest.raises(ValueError, match="no images found"):
        sources.read(tmp_path / "empty")
    with lmdb.open(str(tmp_path / "sub"), max_dbs=2) as database:
        inner = database.open_db(b"inner")
        with database.begin(write=True, db=inner) as transaction:
            transaction.put(b"a", b"b")
    with pytest.raises(ValueError, match="an LMDB database within an LMDB database"):
        sources.read(tmp_path / "sub")


# .npz.


def test_adm_and_edm_samples(tmp_path):
    np.savez(tmp_path / "samples_12x32x32x3.npz", IMAGES, LABELS)
    check(PatchBank.open(tmp_path / "samples_12x32x32x3.npz"))
    np.savez(tmp_path / "unlabelled.npz", IMAGES)
    check(PatchBank.open(tmp_path / "unlabelled.npz"), None)


def test_medmnist(tmp_path):
    """The layout of medmnist: {split}_images and {split}_labels [N, 1]."""
    arrays = {}
    for split, part in (("train", slice(0, 6)), ("val", slice(6, 9)), ("test", slice(9, 12))):
        arrays |= {f"{split}_images": IMAGES[part], f"{split}_labels": LABELS[part, None].astype(np.uint8)}
    np.savez_compressed(tmp_path / "bloodmnist.npz", **arrays)
    check(PatchBank.open(tmp_path / "bloodmnist.npz"), LABELS[:6], None, IMAGES[:6])
    check(PatchBank.open(tmp_path / "bloodmnist.npz", split="val"), LABELS[6:9], None, IMAGES[6:9])
    check(PatchBank.open(tmp_path / "bloodmnist.npz", image_key="test_images", label_key="test_labels"), LABELS[9:],
          None, IMAGES[9:])  # fmt: skip
    arrays["train_labels"] = np.ones((6, 14), dtype=np.uint8)
    np.savez(tmp_path / "chestmnist.npz", **arrays)
    with pytest.raises(ValueError, match=r"labels of shape \[6, 14\] that are not one-hot.*labels=False"):
        sources.read(tmp_path / "chestmnist.npz")
    check(PatchBank.open(tmp_path / "chestmnist.npz", labels=False), None, None, IMAGES[:6])


def test_keras_mnist(tmp_path):
    gray = IMAGES[..., 0]
    np.savez(tmp_path / "mnist.npz", x_train=gray[:8], y_train=LABELS[:8], x_test=gray[8:], y_test=LABELS[8:])
    check(PatchBank.open(tmp_path / "mnist.npz"), LABELS[:8], None, IMAGES[:8, ..., :1])
    check(PatchBank.open(tmp_path / "mnist.npz", split="test"), LABELS[8:], None, IMAGES[8:, ..., :1])


def test_imagenet32_batches_keep_their_labels_from_1_and_are_named(tmp_path):
    for batch, part in ((1, slice(0, 5)), (2, slice(5, 12))):
        np.savez(tmp_path / f"train_data_batch_{batch}.npz", data=planar(IMAGES[part]), labels=LABELS[part] + 1,
                 mean=planar(IMAGES).mean(0))  # fmt: skip
    np.savez(tmp_path / "val_data.npz", data=planar(IMAGES[:3]), labels=LABELS[:3] + 1)
    check(PatchBank.open(tmp_path), LABELS + 1)
    check(PatchBank.open(tmp_path, split="val"), LABELS[:3] + 1, None, IMAGES[:3])
    check(PatchBank.open(tmp_path / "train_data_batch_1.npz"), LABELS[:5] + 1, None, IMAGES[:5])
    names = [f"n{i:08d} {i} {name}" for i, name in enumerate(("crane", "kit_fox", "crane", "dog"), 1)]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(names))
    bank = PatchBank.open(tmp_path)
    assert bank.class_names == ("(none)", "crane (1)", "kit_fox", "crane (3)", "dog")
    assert bank.select("kit_fox").labels.tolist() == [2] * 3


def test_the_packages_own_samples(tmp_path):
    """Of its first release: `image` are the numbers of the images, and a label of -1 is none."""
    arrays = {"image": np.arange(12), "images": IMAGES.transpose(0, 3, 1, 2), "alphas": np.ones(3)}
    np.savez(tmp_path / "samples.npz", label=LABELS, **arrays)
    check(PatchBank.open(tmp_path / "samples.npz"))
    np.savez(tmp_path / "unlabelled.npz", label=np.full(12, -1), **arrays)
    check(PatchBank.open(tmp_path / "unlabelled.npz"), None)


def test_npz_declares_no_more_than_it_holds(tmp_path):
    for fortran in (False, True):
        header = io.BytesIO()
        shape = {"descr": "|u1", "fortran_order": fortran, "shape": (1 << 40, 1, 32, 32)}
        np.lib.format.write_array_header_1_0(header, shape)
        path = zip_at(tmp_path / "a.npz", {"images.npy": header.getvalue()})
        with pytest.raises(ValueError, match=one_line_about(path)):
            sources.read(path)


# torch and safetensors.


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", ["tensor", "pair", "dict", "list"])
def test_torch_files(tmp_path, form, legacy):
    images, labels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2), torch.from_numpy(LABELS)
    content = {"tensor": images, "pair": (images, labels), "dict": {"images": images, "labels": labels},
               "list": list(images)}[form]  # fmt: skip
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    check(PatchBank.open(tmp_path / "a.pt"), LABELS if form in ("pair", "dict") else None)
    check(PatchBank.open(tmp_path / "a.pt", labels=False), None)


def test_torch_file_runs_nothing(tmp_path):
    for legacy in (False, True):
        path = tmp_path / "a.pt"
        torch.save(
            {"images": Trap(pytest.fail, ("a pickle was run",))}, path, _use_new_zipfile_serialization=not legacy
        )
        with pytest.raises(ValueError, match=one_line_about(path)) as caught:
            sources.read(path)
        assert "holds other things than tensors" in str(caught.value)


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    images, labels = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()), torch.from_numpy(LABELS)
    save_file({"images": images, "labels": labels}, tmp_path / "a.safetensors")
    check(PatchBank.open(tmp_path / "a.safetensors"))
    save_file({"anything": images}, tmp_path / "b.safetensors")
    check(PatchBank.open(tmp_path / "b.safetensors"), None)
    save_file({"p": images, "q": labels}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c\.safetensors: holds p or q, takes images called"):
        sources.read(tmp_path / "c.safetensors")
    check(PatchBank.open(tmp_path / "c.safetensors", image_key="p", label_key="q"))


# Single images, HEIC.


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "ppm"])
def test_one_image_file_is_a_bank_of_one(tmp_path, suffix):
    Image.fromarray(IMAGES[0]).save(tmp_path / f"a.{suffix}")
    bank = PatchBank.open(tmp_path / f"a.{suffix}")
    assert (len(bank), bank.shape, bank.labels) == (1, (3, 32, 32), None)
    assert len(PatchBank.open(tmp_path / f"a.{suffix}", size=8)) == 1
    check(PatchBank.open(Image.fromarray(IMAGES[0])), None, None, IMAGES[:1])


def test_heic_is_read_where_pillow_heif_is(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    smooth = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (64, 64, 3))
    (tmp_path / "cat").mkdir()
    pillow_heif.from_pillow(Image.fromarray(smooth)).save(tmp_path / "cat" / "IMG_1.HEIC", quality=-1)
    bank = PatchBank.open(tmp_path)
    assert bank.class_names == ("cat",)
    np.testing.assert_allclose(bank.images[0].permute(1, 2, 0).numpy(), smooth, atol=2)
    assert len(PatchBank.open(tmp_path / "cat" / "IMG_1.HEIC")) == 1


def test_heic_is_counted_where_pillow_heif_is_not(tmp_path, monkeypatch):
    from patchscore.sources import tree

    suffixes = {suffix: kind for suffix, kind in tree.image_formats()[0].items() if kind != "HEIF"}
    monkeypatch.setattr(tree, "image_formats", lambda: (suffixes, ("PNG",)))
    for name in ("cat", "dog", "emu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("IMG_1.HEIC" if name == "dog" else "a.png")).write_bytes(encoded(IMAGES[0]))
    with pytest.warns(UserWarning, match=r"left out: 1 \.heic; pip install 'patchscore\[heif\]' reads HEIC"):
        bank = PatchBank.open(tmp_path)
    assert (bank.labels.tolist(), bank.class_names) == ([0, 2], ("cat", "dog", "emu"))


# Datasets that are iterated, columns, keys.


def test_iterables_are_read_as_far_as_limit():
    def items():
        for image, label in zip(IMAGES, LABELS, strict=True):
            yield {"image": Image.fromarray(image), "label": int(label)}
        while True:
            yield {"image": Image.fromarray(IMAGES[0]), "label": 0}

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return items()

    for source in (items(), Stream()):
        check(PatchBank.open(source, limit=12))
    with pytest.raises(ValueError, match="limit: got None, takes a number of images, as a generator is read"):
        sources.read(items())
    with pytest.raises(TypeError, match=r"pass loader\.dataset"):
        sources.read(torch.utils.data.DataLoader([1]))


def test_dicts_of_arrays_and_of_columns():
    images = [Image.fromarray(image) for image in IMAGES]
    check(PatchBank.open({"images": IMAGES, "labels": LABELS}))
    check(PatchBank.open({"image": images, "label": list(LABELS)}))
    check(PatchBank.open({"x": torch.from_numpy(IMAGES)}), None)
    check(PatchBank.open({"p": IMAGES, "q": LABELS}, image_key="p", label_key="q"))
    with pytest.raises(ValueError, match=r"source \(dict\): holds train, takes images called"):
        sources.read({"train": IMAGES})
    with pytest.raises(ValueError, match=r"source \(dict\): 12 images and 3 labels"):
        sources.read({"image": images, "label": [1, 2, 3]})


def test_keys_of_dataset_items():
    items = [
        {"left": image, "right": image[::-1], "kind": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)
    ]
    check(PatchBank.open(items, image_key="left", label_key="kind"))
    check(PatchBank.open(items, image_key="right"), None, None, IMAGES[:, ::-1])
    with pytest.raises(TypeError, match=r"source\[0\]: got a dict of \['left', 'right', 'kind'\].*image_key="):
        sources.read(items)
    with pytest.raises(TypeError, match=r"source\[0\]: label_key: got 'sort', the dict has left"):
        sources.read(items, image_key="left", label_key="sort")
    for wish in ("image_key", "label_key"):
        with pytest.raises(ValueError, match=f"{wish}: got 'a', but .* has no names to choose from"):
            sources.read(IMAGES, **{wish: "a"})
        with pytest.raises(TypeError, match=f"{wish}: got 3, takes a text"):
            sources.read(items, **{wish: 3})


def test_items_may_hold_files():
    files = [encoded(image) for image in IMAGES]
    check(PatchBank.open([{"image": {"bytes": file, "path": None}, "label": 1} for file in files]), [1] * 12)
    check(PatchBank.open(list(zip(files, LABELS, strict=True))))
    with pytest.raises(ValueError, match=r"source\[0\]: cannot be read \(holds only the path a\.png"):
        sources.read([{"image": {"bytes": None, "path": "a.png"}}])


def test_a_run_of_sample_is_its_samples(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "grid.png").write_bytes(encoded(np.concatenate(IMAGES)))
    for i, image in enumerate(IMAGES):
        (tmp_path / "samples" / f"{i:06d}.png").write_bytes(encoded(image))
    check(PatchBank.open(tmp_path), None)


# Limits.


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind, content):
        import zlib

        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 13_300, 13_300, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"a\.png: 13300 x 13300 pixels, takes images of at most 100,000,000"):
        sources.read(tmp_path, size=8)


def test_bank_beyond_the_memory_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 1000, 100, 100) + bytes(10**7)))
    with pytest.raises(ValueError, match=r"1000 images of 1 x 100 x 100 take 0.01 GB, more than the memory limit of"):
        sources.read(path, memory_limit=10**6)
    assert len(sources.read(path, limit=10, memory_limit=10**6)[0]) == 10
    assert len(sources.read(path, size=8, memory_limit=10**6)[0]) == 1000


def test_an_archive_declares_no_more_than_is_read(tmp_path):
    path = zip_at(tmp_path / "a.zip", {"a.png": bytes(1 << 20)})
    whole = bytearray(path.read_bytes())
    at = whole.rindex(b"PK\x01\x02") + 24
    whole[at : at + 4] = struct.pack("<I", (1 << 32) - 2)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"a\.png: declares 4294967294 bytes, takes at most"):
        sources.read(path)


def test_tar_header_of_great_length_is_not_read_into_memory(tmp_path):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(info.tobuf() + bytes(1 << 20)))
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "a.tar.gz")):
        sources.read(tmp_path / "a.tar.gz")


@pytest.mark.parametrize("block", ["exif", "xmp"])
def test_broken_exif_and_xmp_blocks_leave_the_pixels(tmp_path, block):
    """Pillow raises on some of these only when the block is looked at, the pixels being whole."""
    broken = b"Exif\x00\x00II*\x00\xff\xff\xff\xff" if block == "exif" else b"\xa8\xff"
    Image.fromarray(IMAGES[0]).save(tmp_path / "plain.png")
    Image.fromarray(IMAGES[0]).save(tmp_path / "broken.jpg", quality=100, **{block: broken})
    assert len(PatchBank.open(tmp_path)) == 2


def test_an_orientation_that_cannot_be_read_is_none(tmp_path, monkeypatch):
    def fails(self):
        raise SyntaxError("not a TIFF file")

    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "getexif", fails)
    check(PatchBank.open(tmp_path), None, None, IMAGES[:1])


def test_an_address_is_shown_as_it_was_given():
    with pytest.raises(ValueError, match=r"^http://host/a\.zip: an address, takes a file or a folder"):
        sources.read("http://host/a.zip")


def test_errors_of_images_are_value_errors(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not an image") as caught:
        sources.read(tmp_path)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize(
    ("package", "extra", "name"), [("pyarrow", "parquet", "a.parquet"), ("pillow_heif", "heif", "a.heic")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, extra, name):
    from patchscore.sources import image

    (tmp_path / name).write_bytes(b"PAR1" + bytes(100) if extra == "parquet" else b"\0\0\0\x18ftypheic" + bytes(100))
    monkeypatch.setitem(sys.modules, package, None)
    if extra == "heif":
        formats = {k: v for k, v in Image.registered_extensions().items() if v != "HEIF"}
        monkeypatch.setattr("patchscore.sources.opening.image_formats", lambda: (formats, ("PNG", "JPEG")))
        monkeypatch.setattr(image, "image_formats", lambda: (formats, ("PNG", "JPEG")))
    with pytest.raises(ImportError, match=rf"patchscore\[{extra}\]"):
        sources.read(tmp_path / name)


# The command line.


def test_the_command_line_takes_what_the_library_takes(tmp_path):
    from click.testing import CliRunner

    from patchscore.cli import main

    for split in ("train", "val"):
        for name in NAMES:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "a.png").write_bytes(encoded(IMAGES[0]))
    asked = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert asked.exit_code == 2
    assert "holds train and val; pass split='train' (on the command line --split train)" in asked.output
    shown = CliRunner().invoke(main, ["info", str(tmp_path), "--split", "val"])
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.output for name in NAMES)
    np.savez(tmp_path / "a.npz", p=IMAGES, q=LABELS)
    keys = CliRunner().invoke(main, ["info", str(tmp_path / "a.npz"), "--image-key", "p", "--label-key", "q"])
    assert keys.exit_code == 0, keys.output
