import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from patchscore.bank import PatchBank
from patchscore.pixels import to_bytes, to_values

QUICK = settings(max_examples=100, deadline=None, derandomize=True)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_uint8_stays_uint8_and_is_not_copied(kind):
    images = pixels(5, 3, 6, 7) if kind == "numpy" else torch.from_numpy(pixels(5, 3, 6, 7))
    bank = PatchBank(images)
    assert bank.images.dtype == torch.uint8
    assert np.shares_memory(bank.images.numpy(), np.asarray(images))
    assert (len(bank), bank.shape, bank.classes) == (5, (3, 6, 7), ())


def test_chunk_reads_uint8_as_u_over_127_5_minus_1():
    images = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    chunk = PatchBank(images).chunk(1, 3, torch.float64)
    torch.testing.assert_close(chunk, torch.from_numpy(images[1:3] / 127.5 - 1), rtol=0, atol=0)
    assert PatchBank(images).chunk(0, 4).aminmax() == (-1, 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "longdouble"])
def test_floats_are_held_as_float32(dtype):
    values = np.random.default_rng(0).uniform(-1, 1, (3, 2, 4, 5)).astype(dtype)
    bank = PatchBank(values)
    assert bank.images.dtype == torch.float32
    np.testing.assert_array_equal(bank.chunk(0, 3), values.astype(np.float32))


def test_strided_and_read_only_arrays_are_taken():
    images = pixels(4, 5, 6, 3)
    images.flags.writeable = False
    for view in (images.transpose(0, 3, 1, 2), images[::-1, ..., ::-1].transpose(0, 3, 1, 2)):
        np.testing.assert_array_equal(PatchBank(view).images, view)


# Bad input.

FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@QUICK
@given(hnp.arrays(np.float32, (2, 1, 3, 3), elements=st.one_of(st.floats(-1, 1, width=32), FLOATS)))
def test_float_pixels_outside_minus_one_to_one_are_refused(values):
    if np.isfinite(values).all() and (np.abs(values) <= 1).all():
        assert torch.equal(PatchBank(values).images, torch.from_numpy(values))
    elif not np.isfinite(values).all():
        with pytest.raises(ValueError, match="images: NaN or infinite"):
            PatchBank(values)
    elif np.abs(values).max() > 1.01:
        with pytest.raises(ValueError, match=r"images: values from .* \[-1, 1\]"):
            PatchBank(values)


@QUICK
@given(st.lists(st.integers(0, 4), max_size=6), st.sampled_from([np.uint8, np.float32]))
def test_only_four_axes_with_nothing_empty_are_taken(shape, dtype):
    images = np.zeros(shape, dtype)
    if len(shape) == 4 and 0 not in shape:
        assert PatchBank(images).shape == tuple(shape[1:])
    else:
        with pytest.raises(ValueError, match=r"images: got shape .* takes \[N, C, H, W\]"):
            PatchBank(images)


@pytest.mark.parametrize("shape", [(8, 32, 32, 3), (8, 5, 32, 1), (1, 9, 5, 4)])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_channels_last_is_refused_with_the_remedy(shape, kind):
    images = kind(pixels(*shape))
    with pytest.raises(
        ValueError, match=r"images: shape .* has its channels last, takes .* PatchBank\.open takes both"
    ):
        PatchBank(images)
    assert PatchBank.open(images).shape == (shape[3], *shape[1:3])


@QUICK
@given(
    st.one_of(hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.complex_number_dtypes(), hnp.boolean_dtypes())
)
def test_other_dtypes_are_type_errors(dtype):
    if dtype != np.uint8:
        with pytest.raises(TypeError, match="images: got dtype"):
            PatchBank(np.zeros((1, 1, 2, 2), dtype))


@pytest.mark.parametrize("images", [None, 3, "photos", [[1, 2]], torch.zeros(1, 1, 2, 2, dtype=torch.int32)])
def test_other_types_are_type_errors(images):
    with pytest.raises(TypeError, match="images: got"):
        PatchBank(images)


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        ([0, 1], ValueError),
        ([[0], [1], [2]], ValueError),
        (3, ValueError),
        ([[0], [1, 2], []], ValueError),
        ([0.0, 1.0, 2.0], TypeError),
        ([True, False, True], TypeError),
        (["a", "b", "c"], TypeError),
        (torch.zeros(3), TypeError),
        (np.array([0, 1, 2**63], dtype=np.uint64), ValueError),
    ],
)
def test_bad_labels_are_named(labels, error):
    with pytest.raises(error, match="labels: "):
        PatchBank(pixels(3, 1, 4, 4), labels)


def test_too_few_class_names_are_refused():
    with pytest.raises(ValueError, match="class_names: 2 names for labels up to 2"):
        PatchBank(pixels(3, 1, 4, 4), [0, 1, 2], ["a", "b"])


def test_class_names_need_labels_from_zero():
    with pytest.raises(ValueError, match="class_names: takes labels from 0, got -5"):
        PatchBank(pixels(3, 1, 4, 4), [-5, 0, 1], ["a", "b"])


# select.


@pytest.fixture
def bank():
    return PatchBank(pixels(6, 3, 5, 4), [4, 2, 4, 0, 2, 4], ["ant", "bee", "cat", "dog", "eel"])


def test_select_shares_memory_and_keeps_order(bank):
    selection = bank.select([4, 0])
    assert selection.images.data_ptr() == bank.images.data_ptr()
    assert selection.labels.tolist() == [4, 4, 0, 4]
    assert torch.equal(selection.chunk(0, 4), bank.chunk(0, 6)[[0, 2, 3, 5]])
    assert torch.equal(selection.chunk(1, 3), bank.chunk(0, 6)[[2, 3]])
    assert (len(selection), selection.shape, selection.classes) == (4, bank.shape, (0, 4))


def test_selections_of_selections_are_selections(bank):
    assert bank.select([4, 0]).select(0).fingerprint == bank.select(0).fingerprint
    assert torch.equal(bank.select([0, 2]).select("cat").chunk(0, 2), bank.select(2).chunk(0, 2))


def test_select_takes_names_numbers_and_tensors(bank):
    for labels in (2, "cat", "2", np.int64(2), [2], ["cat", 2], torch.tensor([2]), torch.tensor(2), np.array([2])):
        assert bank.select(labels) is bank.select(2)


def test_class_name_goes_before_number():
    numbers = PatchBank(pixels(3, 1, 4, 4), [0, 1, 2], ["0", "1", "10"])
    assert numbers.select("10").labels.tolist() == [2]
    assert numbers.select("2").labels.tolist() == [2]


def test_text_that_is_a_name_and_another_classes_number_is_refused():
    bank = PatchBank(pixels(4, 1, 4, 4), [0, 1, 2, 2], ["1", "2", "eel"])
    with pytest.raises(ValueError, match="labels: '1' is the name of class 0 and the number of another"):
        bank.select("1")
    assert bank.select(1).labels.tolist() == [1]
    assert bank.select("0").labels.tolist() == [0]
    assert bank.select([0, 2]).select("1").labels.tolist() == [0]


@pytest.mark.parametrize("label", [1, -1, 99, "fox", "bee", "--2", "\N{SUPERSCRIPT TWO}", "", 2**70])
def test_unknown_label_is_refused_with_those_there_are(bank, label):
    with pytest.raises(ValueError, match=r"labels: unknown label .* 0 \(ant\), 2 \(cat\), 4 \(eel\)"):
        bank.select(label)


@pytest.mark.parametrize("label", [1.5, None, True, [None], [[2]]])
def test_labels_of_other_types_are_type_errors(bank, label):
    with pytest.raises(TypeError, match="labels: got"):
        bank.select(label)


def test_select_needs_labels(bank):
    with pytest.raises(ValueError, match="labels: got none"):
        bank.select([])
    with pytest.raises(ValueError, match="this bank has no labels"):
        PatchBank(pixels(3, 1, 4, 4)).select(0)


# fingerprint.


def test_fingerprint_is_of_the_content_wherever_it_came_from(tmp_path):
    images, labels = pixels(6, 8, 8, 3), [0, 0, 0, 1, 1, 2]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "folder" / "abc"[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folder" / "abc"[label] / f"{i}.png")
    np.savez(tmp_path / "set.npz", images=images, labels=np.array(labels, dtype=np.uint8))
    expected = PatchBank(images.transpose(0, 3, 1, 2), labels)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    for source in (tmp_path / "folder", tmp_path / "set.npz", list(zip(images, labels, strict=True)),
                   torch.utils.data.TensorDataset(tensor, torch.tensor(labels))):  # fmt: skip
        assert PatchBank.open(source).fingerprint == expected.fingerprint


def test_fingerprint_of_a_selection_is_that_of_its_images_alone(bank):
    chosen = [0, 2, 5]
    alone = PatchBank(bank.images[chosen], bank.labels[chosen])
    assert bank.select(4).fingerprint == alone.fingerprint != bank.fingerprint


def test_fingerprint_tells_pixels_labels_shape_and_dtype_apart():
    images = pixels(6, 1, 4, 4)
    changed = images.copy()
    changed[5, 0, 3, 3] ^= 1
    banks = [
        PatchBank(images),
        PatchBank(changed),
        PatchBank(images[::-1]),
        PatchBank(images.reshape(6, 4, 4, 1)),
        PatchBank(images, [0] * 6),
        PatchBank(images, [0] * 5 + [1]),
        PatchBank((images / 127.5 - 1).astype(np.float32)),
        PatchBank(images[:5]),
    ]
    assert len({bank.fingerprint for bank in banks}) == len(banks)
    assert len(banks[0].fingerprint) == 64


def test_labels_are_the_banks_own(bank):
    labels = torch.tensor([0, 1])
    bank = PatchBank(pixels(2, 1, 4, 4), labels)
    labels[0] = 1
    assert bank.classes == (0, 1)


# Pixels.


def test_bytes_and_values_are_each_others_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        values = to_values(levels, dtype)
        assert values.dtype == dtype
        assert (values[0], values[-1]) == (-1, 1)
        assert torch.equal(to_bytes(values), levels)
    assert torch.equal(to_values(torch.tensor([-0.5, 0.25])), torch.tensor([-0.5, 0.25]))
    assert to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_images_are_taken_by_number_and_share_memory():
    images, labels = torch.from_numpy(pixels(9, 3, 8, 8)), torch.arange(9) % 3
    bank = PatchBank(images, labels)
    some = bank.take([4, 1, 1])
    assert some.images.data_ptr() == images.data_ptr()
    torch.testing.assert_close(some.chunk(0, 3), bank.chunk(0, 9)[[4, 1, 1]])
    assert some.labels.tolist() == [1, 1, 1]
    assert some.fingerprint == PatchBank(images[[4, 1, 1]], labels[[4, 1, 1]]).fingerprint
    assert bank.select(1).take(torch.tensor([2])).indices.tolist() == [7]
    for wrong, error in (([], ValueError), ([9], ValueError), ([-1], ValueError), ([0.5], TypeError)):
        with pytest.raises(error, match="images: got"):
            bank.take(wrong)
