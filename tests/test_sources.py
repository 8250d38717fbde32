import gzip
import io
import json
import re
import struct
import warnings
import zipfile
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from patchscore import sources
from patchscore.bank import PatchBank

RNG = np.random.default_rng(0)
SLOPPY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def random_pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def class_folder(folder, counts, size=8):
    """counts: images of each class, by name. Returns the pixels [N, C, H, W] in the order of their paths."""
    pixels = []
    for name in sorted(counts):
        for i in range(counts[name]):
            pixels.append(random_pixels(size, size, 3))
            save(folder / name / f"{i:03d}.png", pixels[-1])
    return np.stack(pixels).transpose(0, 3, 1, 2)


def idx_bytes(array, code=0x08):
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()


def one_line_about(path):
    return rf"\A[^\n]*{re.escape(str(path))}[^\n]*\Z"


# Folders.


def test_class_subfolders_become_labels_in_name_order(tmp_path):
    pixels = class_folder(tmp_path, {"zebra": 2, "ant": 1, "cat": 3})
    images, labels, names = sources.read(tmp_path)
    np.testing.assert_array_equal(images, pixels)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert names == ("ant", "cat", "zebra")


def test_deeper_folders_belong_to_their_first_level_class(tmp_path):
    save(tmp_path / "cat" / "old" / "a.png", random_pixels(4, 4))
    save(tmp_path / "dog" / "a.png", random_pixels(4, 4))
    _, labels, names = sources.read(tmp_path)
    assert labels.tolist() == [0, 1]
    assert names == ("cat", "dog")


def test_images_directly_in_the_folder_have_no_labels(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", random_pixels(4, 4))
    assert sources.read(tmp_path)[1:] == (None, None)


def test_loose_image_beside_class_folders_drops_the_labels_with_a_warning(tmp_path):
    class_folder(tmp_path, {"cat": 1})
    save(tmp_path / "preview.png", random_pixels(8, 8))
    with pytest.warns(UserWarning, match=r"no labels, as preview\.png") as caught:
        images, labels, _ = sources.read(tmp_path)
    assert len(images) == 2
    assert labels is None
    assert len(caught) == 1


def test_labels_false_ignores_classes(tmp_path):
    class_folder(tmp_path, {"cat": 1, "dog": 1})
    assert sources.read(tmp_path, labels=False)[1:] == (None, None)


def test_hidden_and_other_files_are_ignored(tmp_path):
    pixels = class_folder(tmp_path, {"cat": 1})
    save(tmp_path / "cat" / ".hidden.png", random_pixels(8, 8))
    save(tmp_path / ".cache" / "a.png", random_pixels(8, 8))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "folder.png").mkdir()
    with pytest.warns(UserWarning, match=r"left out: 1 \.txt$"):
        images, _, names = sources.read(tmp_path)
    np.testing.assert_array_equal(images, pixels)
    assert names == ("cat",)


def test_equal_file_names_in_different_classes_are_different_images(tmp_path):
    first, second = random_pixels(4, 4), random_pixels(4, 4)
    save(tmp_path / "a" / "x.png", first)
    save(tmp_path / "b" / "x.png", second)
    save(tmp_path / "b" / "X.PNG", first)
    images, labels, _ = sources.read(tmp_path)
    np.testing.assert_array_equal(images[:, 0], [first, first, second])
    assert labels.tolist() == [0, 1, 1]


def test_linked_folders_are_read_and_loops_end(tmp_path):
    class_folder(tmp_path / "store", {"cat": 2})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "tom").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "store" / "cat" / "loop").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "set" / "up").symlink_to(tmp_path)
    images, _, names = sources.read(tmp_path / "set")
    assert len(images) == 2
    assert names == ("tom",)


def test_gray_folder_has_one_channel_and_any_colour_makes_three(tmp_path):
    gray, colour = random_pixels(4, 4), random_pixels(4, 4, 3)
    save(tmp_path / "a.png", gray)
    save(tmp_path / "b.png", gray)
    assert sources.read(tmp_path)[0].shape == (2, 1, 4, 4)
    save(tmp_path / "c.png", colour)
    save(tmp_path / "d.png", gray)
    images = sources.read(tmp_path)[0]
    np.testing.assert_array_equal(images[[0, 1, 3]], np.broadcast_to(gray, (3, 3, 4, 4)))
    np.testing.assert_array_equal(images[2], colour.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_converts_as_pil_does(tmp_path, channels):
    path = save(tmp_path / "a.png", random_pixels(16, 16, 3))
    expected = np.asarray(Image.open(path).convert({1: "L", 3: "RGB"}[channels])).reshape(16, 16, channels)
    for source in (tmp_path, [Image.open(path)], [np.asarray(Image.open(path))]):
        np.testing.assert_array_equal(sources.read(source, channels=channels)[0][0], expected.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(45, 45), (45, 45, 3)])
def test_size_is_pils_bilinear_for_images_of_the_target_aspect_ratio(tmp_path, shape):
    path = save(tmp_path / "a.png", random_pixels(*shape))
    expected = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)).reshape(32, 32, -1)
    np.testing.assert_array_equal(sources.read(tmp_path, size=32)[0][0], expected.transpose(2, 0, 1))


def test_size_is_height_then_width_and_other_aspect_ratios_are_cropped_about_the_centre(tmp_path):
    pixels = np.zeros((40, 90), dtype=np.uint8)
    pixels[:, 5:85] = 200  # The middle 80 x 40 is what fits 2:1.
    save(tmp_path / "a.png", pixels)
    image = sources.read(tmp_path, size=(10, 20))[0]
    assert image.shape == (1, 1, 10, 20)
    assert (image[..., 1:-1] == 200).all()


def test_exif_orientation_is_applied(tmp_path):
    pixels = random_pixels(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to display"
    save(tmp_path / "a.png", pixels, exif=exif)
    np.testing.assert_array_equal(sources.read(tmp_path)[0][0, 0], np.rot90(pixels, -1))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 1000, 32768], [40000, 65000, 65406, 65535]], dtype=np.uint16)
    save(tmp_path / f"a{suffix}", values)
    np.testing.assert_array_equal(sources.read(tmp_path)[0][0, 0], np.rint(values / 257))


def test_transparency_is_over_black(tmp_path):
    pixels = np.full((2, 2, 4), 200, dtype=np.uint8)
    pixels[..., 3] = [[0, 255], [255, 51]]
    save(tmp_path / "a.png", pixels)
    image = sources.read(tmp_path)[0][0]
    assert image.shape == (3, 2, 2)
    np.testing.assert_array_equal(image[0], [[0, 200], [200, 40]])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_common_mode_is_read(tmp_path, mode):
    image = Image.fromarray(random_pixels(5, 7, 3))
    image.convert("L").convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    images = sources.read(tmp_path)[0]
    assert images.shape == (1, 1 if mode in ("1", "L", "LA") else 3, 5, 7)


def test_mixed_sizes_name_two_files_and_ask_for_size(tmp_path):
    save(tmp_path / "a.png", random_pixels(4, 4))
    save(tmp_path / "b.png", random_pixels(4, 4))
    save(tmp_path / "c.png", random_pixels(4, 6))
    with pytest.raises(ValueError, match=r"a\.png is 4 x 4 .*c\.png is 4 x 6; pass size"):
        sources.read(tmp_path)
    assert sources.read(tmp_path, size=4)[0].shape == (3, 1, 4, 4)


def spoil(folder, *names):
    for name in names:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])


def test_truncated_image_is_named(tmp_path):
    class_folder(tmp_path, {"cat": 3}, size=32)
    spoil(tmp_path, "cat/001.png")
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "cat" / "001.png")):
        sources.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "a.png")):
        sources.read(tmp_path)


def test_dangling_link_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "a.png")):
        sources.read(tmp_path)


def test_skip_bad_leaves_out_bad_images_and_counts_them_in_one_warning(tmp_path):
    pixels = class_folder(tmp_path, {"cat": 4, "dog": 3}, size=32)
    spoil(tmp_path, "cat/001.png", "dog/002.png")
    with pytest.warns(UserWarning, match="left out 2 images") as caught:
        images, labels, _ = sources.read(tmp_path, skip_bad=True)
    assert len(caught) == 1
    np.testing.assert_array_equal(images, pixels[[0, 2, 3, 4, 5]])
    assert labels.tolist() == [0, 0, 0, 1, 1]


def test_skip_bad_is_silent_where_nothing_is_bad(tmp_path):
    class_folder(tmp_path, {"cat": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(sources.read(tmp_path, skip_bad=True)[0]) == 2


def test_skip_bad_with_limit_takes_the_next_good_images_of_the_class(tmp_path):
    pixels = class_folder(tmp_path, {"cat": 5, "dog": 5}, size=32)
    spoil(tmp_path, "cat/000.png", "cat/002.png")
    with pytest.warns(UserWarning, match="left out 2 images"):
        images, labels, _ = sources.read(tmp_path, skip_bad=True, limit=4)
    np.testing.assert_array_equal(images, pixels[[1, 3, 5, 6]])
    assert labels.tolist() == [0, 0, 1, 1]


def test_skip_bad_with_only_bad_images_is_an_error(tmp_path):
    class_folder(tmp_path, {"cat": 2}, size=32)
    spoil(tmp_path, "cat/000.png", "cat/001.png")
    with pytest.raises(ValueError, match=one_line_about(tmp_path)):
        sources.read(tmp_path, skip_bad=True)


def test_limit_decodes_no_further_files(tmp_path):
    class_folder(tmp_path, {"cat": 4, "dog": 4}, size=32)
    spoil(tmp_path, "cat/002.png", "cat/003.png", "dog/002.png", "dog/003.png")
    assert sources.read(tmp_path, limit=4)[1].tolist() == [0, 0, 1, 1]


def test_empty_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=one_line_about(tmp_path)):
        sources.read(tmp_path)
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "gone")):
        sources.read(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no such file or folder.*fashion-mnist"):
        sources.read("fashion-mnits")
    with pytest.raises(ValueError, match="empty path"):
        sources.read("")


@SLOPPY
@given(data=st.data())
def test_damaged_images_give_a_bank_or_a_value_error(tmp_path, data):
    kind = data.draw(st.sampled_from(["png", "jpg", "gif", "tif", "bmp"]))
    whole = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(
        whole, format={"jpg": "jpeg", "tif": "tiff"}.get(kind, kind)
    )
    (tmp_path / "set").mkdir(exist_ok=True)
    for old in (tmp_path / "set").iterdir():
        old.unlink()
    (tmp_path / "set" / f"a.{kind}").write_bytes(damaged(data, whole.getvalue()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank_or_value_error(tmp_path / "set", tmp_path / "set")


# What paths say of labels.


def image_at(path):
    return save(path, random_pixels(8, 8, 3))


def edm_folder(folder, labels, count=20):
    """A dataset as EDM's dataset_tool.py unpacks it: a folder for every thousand images, and dataset.json."""
    entries = []
    for i in range(count):
        name = f"{i // 10:05d}/img{i:08d}.png"
        image_at(folder / name)
        entries.append([name, labels(i)])
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))


@pytest.mark.parametrize("label", [lambda i: i % 3, lambda i: [float(i % 3 == c) for c in range(3)]])
def test_labels_of_dataset_json_go_before_folders(tmp_path, label):
    edm_folder(tmp_path, label)
    _, labels, names = sources.read(tmp_path)
    assert labels.tolist() == [i % 3 for i in range(20)]
    assert names is None


def test_dataset_json_without_labels_has_none(tmp_path):
    edm_folder(tmp_path, int)
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert sources.read(tmp_path)[1] is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "[" * 100_000,
        "3",
        '{"labels": 3}',
        '{"labels": [3]}',
        '{"labels": [["a.png", 0]]}',
        '{"labels": [[[], 1]]}',
    ],
)
def test_dataset_json_of_wrong_content_is_refused_by_name(tmp_path, content):
    edm_folder(tmp_path, int)
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "dataset.json")):
        sources.read(tmp_path)
    assert sources.read(tmp_path, labels=False)[1] is None


@pytest.mark.parametrize("splits", [("train", "val"), ("Train", "test", "valid")])
def test_splits_above_classes_are_asked_about(tmp_path, splits):
    for split in splits:
        for name in ("cat", "dog"):
            image_at(tmp_path / split / name / "a.png")
    with pytest.raises(ValueError, match=rf"{splits[0]}.*pass split='{splits[0]}' \(on the command line --split"):
        sources.read(tmp_path)
    bank = PatchBank.open(tmp_path, split=splits[0])
    assert (len(bank), bank.class_names) == (2, ("cat", "dog"))
    with pytest.raises(ValueError, match="split: got 'other', holds"):
        sources.read(tmp_path, split="other")


def test_split_of_a_source_without_splits_is_refused(tmp_path):
    class_folder(tmp_path, {"cat": 1, "train": 1})
    assert sources.read(tmp_path)[2] == ("cat", "train")
    for source in (tmp_path, random_pixels(4, 8, 8), [random_pixels(8, 8)], "fashion-mnist"):
        with pytest.raises(ValueError, match=r"split: got 'train', but .* has no splits"):
            sources.read(source, split="train")


def test_folders_named_by_numbers_have_those_labels(tmp_path):
    pixels = {}
    for c in (0, 1, 2, 9, 10, 11):
        pixels[c] = random_pixels(8, 8, 3)
        save(tmp_path / str(c) / "a.png", pixels[c])
    bank = PatchBank.open(tmp_path)
    for c in pixels:
        for label in (c, str(c)):
            np.testing.assert_array_equal(bank.select(label).chunk(0, 1)[0], to_values(pixels[c]))
    assert bank.classes == (0, 1, 2, 9, 10, 11)


def to_values(pixels):
    return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1


def test_numbers_with_leading_zeros_keep_their_names_and_words_their_order(tmp_path):
    for name in ("00", "02", "10"):
        image_at(tmp_path / "padded" / name / "a.png")
    _, labels, names = sources.read(tmp_path / "padded")
    assert labels.tolist() == [0, 2, 10]
    assert [names[i] for i in labels] == ["00", "02", "10"]
    for name in ("1", "01", "2"):  # one number for two folders
        image_at(tmp_path / "doubled" / name / "a.png")
    assert sources.read(tmp_path / "doubled")[2] == ("01", "1", "2")
    for name in ("20240131", "3", "20231231"):  # too large to be labels
        image_at(tmp_path / "dates" / name / "a.png")
    assert sources.read(tmp_path / "dates")[2] == ("3", "20231231", "20240131")


def test_class_without_images_keeps_its_number(tmp_path):
    image_at(tmp_path / "cat" / "a.png")
    image_at(tmp_path / "emu" / "a.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "clip.mov").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"no images|left out") as caught:
        _, labels, names = sources.read(tmp_path)
    assert labels.tolist() == [0, 2]
    assert names == ("cat", "dog", "emu")
    texts = sorted(str(warning.message) for warning in caught)
    assert texts == [f"{tmp_path}: left out: 1 .mov", f"{tmp_path}: no images of class dog"]


def test_files_left_out_are_counted_by_suffix(tmp_path):
    image_at(tmp_path / "a.png")
    for name in ("b.mov", "c.MOV", "d.txt", "README"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.warns(
        UserWarning, match=r"left out: 2 \.mov, 1 \.txt and 1 README$|left out: 2 \.mov, 1 README and 1 \.txt$"
    ):
        sources.read(tmp_path)


def test_one_folder_around_the_classes_is_no_class(tmp_path):
    for name in ("cat", "dog"):
        image_at(tmp_path / "photos" / name / "a.png")
    assert sources.read(tmp_path)[2] == ("cat", "dog")


def test_control_characters_in_names_are_written_out(tmp_path):
    image_at(tmp_path / "\x1b[31mred" / "a.png")
    (tmp_path / "\x1b[31mred" / "b\n.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^[^\n\x1b]*\\x1b\[31mred/b\\n\.png: not an image that Pillow can read$"):
        sources.read(tmp_path)
    with pytest.warns(UserWarning, match=r"^[^\n\x1b]*left out 1 images.*\\x1b\[31mred/b\\n\.png"):
        sources.read(tmp_path, skip_bad=True)
    (tmp_path / "\x1b[31mred" / "b\n.png").rename(tmp_path / "a.\x1b[32m")
    with pytest.warns(UserWarning, match=r"^[^\n\x1b]*left out: 1 \.\\x1b\[32m$"):
        sources.read(tmp_path)


# Axes.


def test_one_image_is_one_image():
    image = random_pixels(9, 8, 3)
    images = sources.read(image)[0]
    np.testing.assert_array_equal(images, image.transpose(2, 0, 1)[None])
    assert sources.read(image[..., :1])[0].shape == (1, 1, 9, 8)
    assert sources.read(image[..., 0][None])[0].shape == (1, 1, 9, 8)
    with pytest.raises(
        ValueError, match=r"shape \[3, 9, 8\] is one colour image or three gray ones; give \[1, 3, 9, 8\]"
    ):
        sources.read(image.transpose(2, 0, 1))
    # A file of gray images by its format, or by its labels, is what it says.
    labelled = {"images": random_pixels(3, 9, 8), "labels": [0, 1, 2]}
    assert sources.read(labelled)[0].shape == (3, 1, 9, 8)
    with pytest.raises(ValueError, match=r"shape \[8, 9\], takes .*one gray image is \[1, H, W\]"):
        sources.read(random_pixels(8, 9))


# limit.


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    limit=st.integers(1, 70),
)
@settings(deadline=None, max_examples=100)
def test_limit_takes_the_first_of_every_class_in_equal_shares(labels, limit):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None]
    kept, kept_labels, _ = sources.read(list(zip(images, labels, strict=True)), limit=limit)
    kept = kept.flatten().tolist()
    assert len(kept) == min(limit, len(labels))
    assert kept == sorted(kept)
    assert kept_labels.tolist() == [labels[i] for i in kept]
    shares = {c: sum(labels[i] == c for i in kept) for c in set(labels)}
    for c in shares:
        members = [i for i, label in enumerate(labels) if label == c]
        assert [i for i in kept if labels[i] == c] == members[: shares[c]]
        # A class with less than another's share less one has given all it has.
        assert shares[c] >= max(shares.values()) - 1 or shares[c] == len(members)


def test_limit_without_labels_takes_the_first(tmp_path):
    np.save(tmp_path / "a.npy", random_pixels(9, 8, 8))
    np.testing.assert_array_equal(sources.read(tmp_path / "a.npy", limit=4)[0][:, 0], np.load(tmp_path / "a.npy")[:4])


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"size": 0}, ValueError, "size: got 0"),
        ({"size": (8, -1)}, ValueError, "size: got -1"),
        ({"size": (8, 8, 8)}, ValueError, "size: got"),
        ({"size": 8.0}, TypeError, "size: got 8.0"),
        ({"size": "8"}, TypeError, "size: got '8'"),
        ({"size": True}, TypeError, "size: got True"),
        ({"size": 1_000_000}, ValueError, "size: got 1000000 x 1000000, takes images of at most 100,000,000 pixels"),
        ({"memory_limit": 0}, ValueError, "memory_limit: got 0"),
        ({"channels": 2}, ValueError, "channels: got 2, takes 1, 3 or None"),
        ({"channels": True}, ValueError, "channels: got True"),
        ({"limit": 0}, ValueError, "limit: got 0"),
        ({"limit": 1.5}, TypeError, "limit: got 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        sources.read("fashion-mnist", **arguments)


@pytest.mark.parametrize("source", [None, 3, b"photos", {1, 2}])
def test_sources_of_other_kinds_are_type_errors(source):
    with pytest.raises(TypeError, match="source: got"):
        sources.read(source)


# .npy and .npz.


@pytest.mark.parametrize(
    ("shape", "read_shape"),
    [
        ((5, 9, 8), (5, 1, 9, 8)),
        ((5, 9, 2), (5, 1, 9, 2)),
        ((1, 1, 1), (1, 1, 1, 1)),
        ((5, 3, 9, 8), (5, 3, 9, 8)),
        ((5, 9, 8, 3), (5, 3, 9, 8)),
        ((5, 9, 8, 1), (5, 1, 9, 8)),
        ((5, 2, 9, 8), (5, 2, 9, 8)),
        ((5, 3, 4, 4), (5, 3, 4, 4)),
        ((5, 4, 4, 3), (5, 3, 4, 4)),
    ],
)
def test_npy_layout_is_told_by_the_channel_axis(tmp_path, shape, read_shape):
    pixels = random_pixels(*shape)
    np.save(tmp_path / "a.npy", pixels)
    images, labels, names = sources.read(tmp_path / "a.npy")
    assert images.shape == read_shape
    assert (labels, names) == (None, None)
    if shape[-1] != read_shape[-1]:
        pixels = pixels.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images, pixels.reshape(read_shape))
    np.testing.assert_array_equal(sources.read(torch.from_numpy(pixels))[0], images)


@pytest.mark.parametrize("shape", [(5, 8), (8,), (), (5, 9, 8, 7), (5, 3, 9, 1), (5, 4, 4, 4), (0, 3, 8, 8), (2,) * 5])
def test_npy_of_ambiguous_or_wrong_shape_is_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", random_pixels(*shape))
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "a.npy")):
        sources.read(tmp_path / "a.npy")


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("data", "labels"), ("arr_0", "y")])
def test_npz_keys(tmp_path, keys):
    pixels = random_pixels(4, 8, 8)
    np.savez(tmp_path / "a.npz", **{keys[0]: pixels, keys[1]: np.array([3, 1, 1, 0], dtype=np.uint8)})
    images, labels, _ = sources.read(tmp_path / "a.npz")
    np.testing.assert_array_equal(images[:, 0], pixels)
    assert labels.tolist() == [3, 1, 1, 0]
    assert labels.dtype == np.int64
    assert sources.read(tmp_path / "a.npz", labels=False)[1] is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"pictures": np.zeros((4, 8, 8))},
        {},
        {"images": random_pixels(4, 8, 8), "labels": np.zeros(3, dtype=int)},
        {"images": random_pixels(4, 8, 8), "labels": np.zeros(4)},
        {"images": random_pixels(4, 8, 8), "labels": np.array([0, -5, 1, 0]), "class_names": np.array(["a", "b"])},
        {"images": random_pixels(4, 8, 8), "labels": np.full(4, 2**64 - 1, dtype=np.uint64)},
        {"images": random_pixels(4, 8, 8), "labels": np.array([0, 1, 2, 3]), "class_names": np.array(["a"])},
        {"images": np.full((4, 8, 8), "x")},
        {"images": np.full((4, 8, 8), None)},
        {"images": np.zeros((4, 8, 8), dtype=bool)},
        {"images": np.zeros((4, 8, 8), dtype=complex)},
        {"images": np.full((4, 8, 8), 256)},
        {"images": np.full((4, 8, 8), -1)},
        {"images": np.full((4, 8, 8), np.nan)},
        {"images": np.linspace(-1, 1.1, 256).reshape(4, 8, 8)},
        {"images": np.linspace(0, 255, 256).reshape(4, 8, 8)},
        {"images": np.full((4, 8, 8), 1e300)},
    ],
)
def test_npz_of_wrong_content_is_refused_by_name(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises((ValueError, TypeError), match=one_line_about(tmp_path / "a.npz")):
        PatchBank.open(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "labels", [["eel", "ant", "eel", "bee"], np.array(["eel", "ant", "eel", "bee"])], ids=["list", "array"]
)
def test_texts_are_labels_numbered_in_their_order(tmp_path, labels):
    pixels = random_pixels(4, 8, 8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array(labels))
    items = [{"image": image, "label": label} for image, label in zip(pixels, labels, strict=True)]
    for source in (tmp_path / "a.npz", {"image": pixels, "label": labels}, items):
        _, numbers, names = sources.read(source)
        assert (numbers.tolist(), names) == ([2, 0, 2, 1], ("ant", "bee", "eel"))
    # The numbers do not depend on how much is read.
    assert sources.read(items, limit=3)[1:][1] == ("ant", "bee", "eel")
    with pytest.raises(ValueError, match=r"source\[1\]: a label that is a number, where others are texts"):
        sources.read([(pixels[0], "ant"), (pixels[1], 3)])


def test_one_hot_labels_are_the_classes(tmp_path):
    pixels, one_hot = random_pixels(4, 8, 8), np.eye(3)[[2, 0, 2, 1]]
    np.savez(tmp_path / "a.npz", images=pixels, labels=one_hot)
    items = list(zip(pixels, torch.from_numpy(one_hot), strict=True))
    for source in (tmp_path / "a.npz", {"images": torch.from_numpy(pixels), "labels": one_hot}, items):
        assert sources.read(source)[1].tolist() == [2, 0, 2, 1]
    several = {"images": pixels, "labels": np.ones((4, 3))}
    with pytest.raises(ValueError, match=r"labels of shape \[4, 3\] that are not one-hot.*labels=False"):
        sources.read(several)
    assert sources.read(several, labels=False)[1] is None


@pytest.mark.parametrize("dtype", ["int64", "int16", ">u4", "int32"])
def test_other_integers_from_0_to_255_are_pixels(tmp_path, dtype):
    pixels = random_pixels(4, 8, 8)
    np.save(tmp_path / "a.npy", pixels.astype(dtype))
    images = sources.read(tmp_path / "a.npy")[0]
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[:, 0], pixels)


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4", "float16"])
def test_floats_in_minus_one_to_one_stay(tmp_path, dtype):
    values = RNG.uniform(-1, 1, (4, 8, 8)).astype(dtype)
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    images = sources.read(tmp_path / "a.npy")[0]
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images[:, 0], values.astype(np.float32))


def test_float_images_are_resized_without_rounding():
    ramp = np.linspace(-1, 1, 64, dtype=np.float32)
    images = sources.read(np.broadcast_to(ramp, (1, 2, 64, 64)), size=32)[0]
    assert images.dtype == np.float32
    np.testing.assert_allclose(images[0, 1, :, 1:-1], np.tile((ramp[::2] + ramp[1::2])[1:-1] / 2, (32, 1)), atol=1e-5)


def test_any_number_of_channels_is_resized_and_not_converted():
    images = random_pixels(3, 2, 8, 8)
    assert sources.read(images, size=4)[0].shape == (3, 2, 4, 4)
    with pytest.raises(ValueError, match="2 channels"):
        sources.read(images, channels=3)


def test_pickle_is_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", images=np.array([Trap()], dtype=object))
    for name in ("a.npy", "b.npz"):
        with pytest.raises(ValueError, match=one_line_about(tmp_path / name)):
            sources.read(tmp_path / name)


def test_npy_header_cannot_ask_for_more_than_the_file_holds(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 1, 32, 32)}
    )
    (tmp_path / "a.npy").write_bytes(header.getvalue())
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    for name in ("a.npy", "b.npz"):
        with pytest.raises(ValueError, match=one_line_about(tmp_path / name)):
            sources.read(tmp_path / name)


# Hypothesis: any damage gives a bank or a ValueError that names the file.


def damaged(data, whole):
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4), label="flips")):
        # Headers matter most.
        position = data.draw(st.one_of(st.integers(0, min(150, len(content) - 1)), st.integers(0, len(content) - 1)))
        content[position] = data.draw(st.integers(0, 255))
    return bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))), label="length")])


def bank_or_value_error(source, path):
    try:
        bank = PatchBank.open(source)
    except ValueError:
        with pytest.raises(ValueError, match=one_line_about(path)):
            PatchBank.open(source)
    else:
        assert len(bank) >= 1
        assert bank.images.ndim == 4


@SLOPPY
@given(data=st.data(), gzipped=st.booleans())
def test_damaged_idx_gives_a_bank_or_a_value_error(tmp_path, data, gzipped):
    whole = idx_bytes(np.arange(60, dtype=np.uint8).reshape(3, 5, 4))
    pack = (lambda content: gzip.compress(content, mtime=0)) if gzipped else bytes
    content = pack(damaged(data, whole)) if data.draw(st.booleans(), label="inside") else damaged(data, pack(whole))
    (tmp_path / "images-idx3-ubyte").write_bytes(content)
    bank_or_value_error(tmp_path / "images-idx3-ubyte", tmp_path)


@SLOPPY
@given(data=st.data())
def test_damaged_idx_labels_give_a_bank_or_a_value_error(tmp_path, data):
    (tmp_path / "images-idx3-ubyte").write_bytes(idx_bytes(np.arange(60, dtype=np.uint8).reshape(3, 5, 4)))
    (tmp_path / "labels-idx1-ubyte").write_bytes(damaged(data, idx_bytes(np.array([0, 1, 2], dtype=np.uint8))))
    bank_or_value_error(tmp_path / "images-idx3-ubyte", tmp_path / "labels-idx1-ubyte")


@SLOPPY
@given(data=st.data())
def test_damaged_npy_gives_a_bank_or_a_value_error(tmp_path, data):
    whole = io.BytesIO()
    np.save(whole, np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 5, 4))
    (tmp_path / "a.npy").write_bytes(damaged(data, whole.getvalue()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank_or_value_error(tmp_path / "a.npy", tmp_path / "a.npy")


@SLOPPY
@given(data=st.data(), compressed=st.booleans())
def test_damaged_npz_gives_a_bank_or_a_value_error(tmp_path, data, compressed):
    whole = io.BytesIO()
    write = np.savez_compressed if compressed else np.savez
    write(whole, images=np.arange(60, dtype=np.uint8).reshape(3, 5, 4), labels=np.arange(3))
    (tmp_path / "a.npz").write_bytes(damaged(data, whole.getvalue()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank_or_value_error(tmp_path / "a.npz", tmp_path / "a.npz")


# IDX.


def write_idx(folder, prefix="train-", suffix="", images=None, labels=(1, 0, 1)):
    images = random_pixels(3, 5, 6) if images is None else images
    pack = gzip.compress if suffix == ".gz" else bytes
    (folder / f"{prefix}images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(images)))
    if labels is not None:
        (folder / f"{prefix}labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(np.array(labels, dtype=np.uint8))))
    return images


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_is_read_with_the_labels_beside_it(tmp_path, suffix):
    pixels = write_idx(tmp_path, suffix=suffix)
    for source in (tmp_path / f"train-images-idx3-ubyte{suffix}", str(tmp_path)):
        images, labels, _ = sources.read(source)
        np.testing.assert_array_equal(images[:, 0], pixels)
        assert labels.tolist() == [1, 0, 1]


def test_idx_labels_may_be_gzipped_where_the_images_are_not(tmp_path):
    write_idx(tmp_path)
    packed = gzip.compress((tmp_path / "train-labels-idx1-ubyte").read_bytes())
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert sources.read(tmp_path)[1] is None
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(packed)
    assert sources.read(tmp_path)[1].tolist() == [1, 0, 1]


def test_idx_labels_of_another_number_are_refused_by_name(tmp_path):
    write_idx(tmp_path, labels=(1, 0))
    with pytest.raises(ValueError, match=one_line_about(tmp_path / "train-labels-idx1-ubyte")):
        sources.read(tmp_path)


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\0\0", "not an IDX file"),
        (b"\0\0\x08\0", "not an IDX file"),
        (b"\0\0\x07\x03" + bytes(12), "not an IDX file"),
        (struct.pack(">HBB2I", 0, 8, 3, 3, 5), "header is cut short"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "more than the file can hold"),
        (idx_bytes(random_pixels(3, 5, 6)) + b"\0", "goes on"),
        (idx_bytes(random_pixels(30)), "1 axes"),
        (idx_bytes(random_pixels(3, 2, 2, 2, 2)), "5 axes"),
        (idx_bytes(random_pixels(0, 5, 6)), "shape"),
    ],
)
def test_idx_of_wrong_content_is_refused_by_name(tmp_path, content, text, gzipped):
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(content) if gzipped else content)
    with pytest.raises(ValueError, match=one_line_about(path)) as caught:
        sources.read(path)
    assert text in str(caught.value)


def test_gzip_bomb_is_read_no_further_than_its_header_declares(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(random_pixels(3, 5, 6)) + bytes(1 << 26)))
    with pytest.raises(ValueError, match="goes on after the 90 bytes"):
        sources.read(path)


def test_other_files_are_refused_by_name(tmp_path):
    for name, content in {"a.txt": b"hello", "b": b"", "c.npy": b"not numpy", "d.pt": b"\x80\x02."}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=one_line_about(tmp_path / name)):
            sources.read(tmp_path / name)


# The built-in set.


def test_fashion_mnist_has_400_images_a_class_and_its_licence():
    bank = PatchBank.open("fashion-mnist")
    assert (len(bank), bank.shape, bank.images.dtype) == (4000, (1, 28, 28), torch.uint8)
    assert torch.bincount(bank.labels).tolist() == [400] * 10
    assert len(bank.class_names) == 10
    assert len(bank.select("ankle-boot")) == 400
    assert bank.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # As the original file begins.
    notice = (resources.files("patchscore") / "data" / "LICENSE-fashion-mnist.txt").read_text()
    assert "MIT License" in notice
    assert "Zalando" in notice


def test_fashion_mnist_at_32_is_pils_bilinear():
    original, resized = PatchBank.open("fashion-mnist", limit=20), PatchBank.open("fashion-mnist", size=32, limit=20)
    for before, after in zip(original.images, resized.images, strict=True):
        expected = Image.fromarray(before[0].numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(after[0], expected)


# Dataset objects.


class Dataset:
    """A torchvision-style dataset; `asked` counts the items it was asked for."""

    def __init__(self, items, **attributes):
        self.items, self.asked = items, 0
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.asked += 1
        return self.items[i]


def as_pil(pixels):
    return Image.fromarray(pixels.transpose(1, 2, 0))


@pytest.mark.parametrize(
    "convert",
    [
        as_pil,
        np.asarray,
        torch.from_numpy,
        lambda pixels: pixels.transpose(1, 2, 0),
        lambda pixels: torch.from_numpy(pixels).float() / 255,  # torchvision's ToTensor
        lambda pixels: (torch.from_numpy(pixels).float() / 255).requires_grad_(),
    ],
    ids=["pil", "numpy", "tensor", "hwc", "ToTensor", "requires_grad"],
)
@pytest.mark.parametrize(
    "item",
    [
        lambda image, label: (image, label),
        lambda image, label: (image, torch.tensor(label)),
        lambda image, label: {"image": image, "label": label},
        lambda image, label: {"img": image, "fine_label": np.int64(label), "coarse_label": 7},
        lambda image, label: {"pixel_values": image, "labels": label},
    ],
)
def test_dataset_items_of_every_kind_give_the_same_bank(convert, item):
    pixels = random_pixels(6, 3, 8, 8)
    source = Dataset([item(convert(image), i % 3) for i, image in enumerate(pixels)])
    expected = PatchBank(pixels, [0, 1, 2, 0, 1, 2])
    assert PatchBank.open(source).fingerprint == expected.fingerprint
    assert PatchBank.open(source, labels=False).labels is None
    assert len(PatchBank.open(source, limit=3).classes) == 3
    resized = PatchBank.open([as_pil(image) for image in pixels], size=5)
    assert torch.equal(PatchBank.open(source, size=5).images, resized.images)


def test_bare_images_and_one_tuples_have_no_labels():
    pixels = random_pixels(4, 8, 8)
    for items in (list(pixels), [(image,) for image in pixels], [torch.from_numpy(image) for image in pixels]):
        images, labels, _ = sources.read(Dataset(items))
        np.testing.assert_array_equal(images[:, 0], pixels)
        assert labels is None


def test_normalised_tensors_stay_floats():
    values = torch.from_numpy(random_pixels(4, 3, 8, 8)).float() / 127.5 - 1
    # One image that is bright all over does not change what the rest say.
    values[0] = values[0].abs()
    images = sources.read(Dataset(list(values)))[0]
    np.testing.assert_allclose(images, values.numpy(), rtol=0, atol=1e-7)


def test_multiples_of_1_255_among_normalised_images_stay_what_they_are():
    images = [np.zeros((1, 8, 8), dtype=np.float32), np.full((1, 8, 8), -0.3, dtype=np.float32)]
    for order in (images, images[::-1]):
        np.testing.assert_array_equal(sources.read(Dataset(order))[0], np.stack(order))


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 64),  # Resized after ToTensor, perhaps.
        np.full(64, 1.0),
        np.full(64, 0.0),
        (2 * np.arange(64) + 1) / 255,  # The bright half of [-1, 1] in 8 bits.
    ],
)
def test_floats_that_could_be_either_range_are_refused_with_the_remedy(values):
    with pytest.raises(ValueError, match=r"could mean \[0, 1\] or \[-1, 1\].*Normalize\(0\.5, 0\.5\)"):
        sources.read([values.reshape(1, 8, 8).astype(np.float32)])


def test_gray_among_colour_is_colour():
    gray, colour = random_pixels(8, 8), random_pixels(8, 8, 3)
    for items in ([gray, colour], [colour, gray]):
        images = sources.read([Image.fromarray(item) for item in items])[0]
        assert images.shape == (2, 3, 8, 8)
        np.testing.assert_array_equal(images[[item is gray for item in items].index(True)], [gray] * 3)


@pytest.mark.parametrize(
    ("items", "error", "text"),
    [
        ([], ValueError, "no images found"),
        (["a.png"], TypeError, r"source\[0\]: got str"),
        ([np.zeros((8, 8), dtype=np.uint8), None], TypeError, r"source\[1\]: got NoneType"),
        ([{"text": 1}], TypeError, r"source\[0\]: got a dict of \['text'\]"),
        ([(1, 2, 3)], TypeError, r"source\[0\]: got 3 things"),
        ([(np.zeros((8, 8), dtype=np.uint8), 1.5)], TypeError, r"source\[0\]: got a label of type float"),
        ([(np.zeros((8, 8), dtype=np.uint8), 2**70)], TypeError, r"source\[0\]: got a label of type int"),
        ([np.zeros((8, 9, 7), dtype=np.uint8)], ValueError, r"source\[0\]: in shape \[8, 9, 7\]"),
        ([np.zeros((1, 3, 8, 8), dtype=np.uint8)], ValueError, r"source\[0\]: got shape"),
        ([np.zeros((8, 8), dtype=bool)], TypeError, r"source\[0\]: got dtype bool"),
        ([np.full((8, 8), 300)], ValueError, r"source\[0\]: integers from 300"),
        ([np.full((8, 8), np.inf)], ValueError, r"source\[0\]: NaN or infinite"),
        ([np.full((8, 8), -1.5)], ValueError, r"source\[0\]: values from -1.5"),
        ([random_pixels(8, 8), random_pixels(9, 8)], ValueError, r"source\[0\] is 8 x 8 .* source\[1\] is 9 x 8"),
        ([random_pixels(2, 8, 8), random_pixels(3, 8, 8)], ValueError, "mixed channels"),
        ([random_pixels(8, 8), -np.ones((8, 8))], ValueError, r"source\[1\]: floating point image among 8-bit"),
        ([(random_pixels(8, 8), 1), (random_pixels(8, 8), None)], ValueError, r"source\[1\]: no label"),
    ],
)
def test_bad_dataset_items_are_named(items, error, text):
    with pytest.raises(error, match=text):
        sources.read(Dataset(items))


def test_dataset_that_raises_is_reported_by_item_and_skipped_by_skip_bad():
    class Failing(Dataset):
        def __getitem__(self, i):
            if i == 2:
                raise OSError("disk on fire")
            return super().__getitem__(i)

    source = Failing([(image, i % 2) for i, image in enumerate(random_pixels(6, 8, 8))])
    with pytest.raises(ValueError, match=r"source\[2\].*disk on fire"):
        sources.read(source)
    for limit in (None, 4):
        with pytest.warns(UserWarning, match="left out 1 images"):
            images, labels, _ = sources.read(source, skip_bad=True, limit=limit)
        assert (len(images), labels.tolist()) == ((5, [0, 1, 1, 0, 1]) if limit is None else (4, [0, 1, 1, 0]))


def test_class_names_come_from_the_dataset():
    items = [(image, i % 2) for i, image in enumerate(random_pixels(4, 8, 8))]
    torchvision = Dataset(items, classes=["cat", "dog"])
    features = {"image": None, "label": SimpleNamespace(names=["cat", "dog"])}
    for source in (torchvision, torch.utils.data.Subset(torchvision, [0, 1, 3]), Dataset(items, features=features)):
        assert PatchBank.open(source).class_names == ("cat", "dog")
        assert PatchBank.open(source, labels=False).class_names is None
    # Names that cannot be the labels' are none.
    assert PatchBank.open(Dataset(items, classes=["cat"])).class_names is None


@pytest.mark.parametrize("known", ["targets", "column"])
def test_limit_asks_a_dataset_that_knows_its_labels_for_no_other_image(known):
    labels = [0] * 10 + [1] * 10
    items = [(image, label) for image, label in zip(random_pixels(20, 8, 8), labels, strict=True)]
    source = Dataset(items, targets=labels)
    if known == "column":

        class HuggingFace(Dataset):
            column_names = ("image", "label")

            def __getitem__(self, i):
                return labels if i == "label" else super().__getitem__(i)

        source = HuggingFace([dict(zip(("image", "label"), item, strict=True)) for item in items])
    assert sources.read(source, limit=6)[1].tolist() == [0] * 3 + [1] * 3
    assert source.asked == 6
