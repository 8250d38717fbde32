"""Schedules and tables: the published numbers, and tables that serve other schedules."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import patchscore as ps
from patchscore import noise
from patchscore.scales import PUBLISHED


def test_cosine_is_the_published_schedule():
    levels = noise.cosine(20)
    assert len(levels) == 19
    for index, j in enumerate(range(19, -1, -1)):
        beta = 1 - math.cos(j / 20 / 1.008 * math.pi / 2) ** 2
        assert levels.alphas[index].item() == pytest.approx(math.sqrt(1 - beta), abs=1e-12)
        assert levels.sigmas[index].item() == pytest.approx(math.sqrt(beta), abs=1e-12)
    assert levels.start_std == 1.0


def test_linear_is_ddpms_schedule():
    alpha2, expected = 1.0, []
    for i in range(1000):
        alpha2 *= 1 - (1e-4 + i * (0.02 - 1e-4) / 999)
        expected.append(alpha2)
    every = noise.linear(1000)
    assert len(every) == 1000
    assert torch.allclose(every.alphas[:-1] ** 2, torch.tensor(expected[::-1], dtype=torch.float64), atol=1e-12)
    few = noise.linear(10)
    assert few.alphas[0] == every.alphas[0]
    assert few.alphas[-2] == every.alphas[-2]
    assert torch.allclose(few.alphas**2 + few.sigmas**2, torch.ones(11, dtype=torch.float64))


def test_karras_is_edms_schedule():
    levels = noise.karras(5)
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)] + [0.0]
    assert torch.allclose(levels.sigmas, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    assert (levels.alphas == 1).all()
    assert levels.start_std == 80


@given(st.sampled_from(sorted(noise.SCHEDULES)), st.integers(2, 300))
def test_every_schedule_falls_to_clean_images(name, steps):
    levels = ps.get_schedule(name, steps)
    assert (levels.ratios.diff() < 0).all()
    assert levels.sigmas[-1] == 0
    assert levels.alphas[-1] == 1


@pytest.mark.parametrize("steps", [0, 1, -5])
def test_too_few_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps: got {steps}"):
        noise.cosine(steps)


def test_bad_schedules_are_named():
    with pytest.raises(ValueError, match="schedule: got 'sine'"):
        ps.get_schedule("sine", 20)
    with pytest.raises(TypeError, match=r"steps: got 2\.5"):
        noise.cosine(2.5)
    with pytest.raises(ValueError, match="sigma_min, sigma_max"):
        noise.karras(10, sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="to 1000"):
        noise.linear(1001)
    for alphas, sigmas, start_std, error, message in [
        ([1, 1, 1], [1, 2, 0], 1.0, ValueError, "must fall strictly"),
        ([0.5, 0.5], [1, 0], 1.0, ValueError, "alpha = 1"),
        ([-1, 1], [1, 0], 1.0, ValueError, "positive"),
        ([1, 1], [1, 0], -1.0, ValueError, "positive"),
        ([1, 1, 1], [1, 0], 1.0, ValueError, "as many of each"),
        (["x"], [1], 1.0, TypeError, "alphas"),
    ]:
        with pytest.raises(error, match=message):
            ps.Schedule("mine", alphas, sigmas, start_std)
    with pytest.raises(ValueError, match="rho: got 0"):
        noise.karras(10, rho=0)


def test_a_schedule_takes_lists():
    levels = ps.Schedule("mine", [1, 1, 1], [2, 1, 0], 2.0)
    assert levels.ratios.tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_table_gives_entry_j_at_step_j(name):
    table = ps.ScaleTable.published(name)
    assert len(PUBLISHED[name]) == 20
    ratios = noise.cosine(20).ratios[:-1].tolist()
    assert [table(sigma) for sigma in ratios] == list(PUBLISHED[name][:0:-1])


def test_lookup_takes_the_nearest_noise():
    table = ps.ScaleTable([0.1, 1.0, 10.0], [3, 7, 17])
    assert [table(s) for s in (1e-9, 0.3, 0.32, 3.1, 3.2, 1e9)] == [3, 3, 7, 7, 17, 17]
    assert ps.ScaleTable.constant(9)(0.01) == ps.ScaleTable.constant(9)(100) == 9


def test_a_table_survives_its_file(tmp_path):
    path = tmp_path / "table.json"
    table = ps.ScaleTable.published("mnist-unet-zeros")
    table.save(path)
    loaded = ps.ScaleTable.load(path)
    assert loaded == table
    assert loaded.name == table.name
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("sigmas", "sizes", "message"),
    [
        ([], [], "got 0 and 0"),
        ([1.0], [3, 5], "got 1 and 2"),
        ([1.0, 0.5], [3, 5], "ascending"),
        ([0.0, 0.5], [3, 5], "positive"),
        ([float("nan")], [3], "positive"),
        ([1.0], [4], "sizes: got 4"),
        ([1.0], [3.0], r"sizes: got 3\.0"),
        ([1.0], [-1], "sizes: got -1"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(sigmas, sizes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ps.ScaleTable(sigmas, sizes)


def valid_table():
    return {"format": "patchscore-scale-table", "version": 1, "name": "x", "sigmas": [1.0], "sizes": [3]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",
        b"[]",
        b"{}",
        json.dumps({**valid_table(), "version": 2}).encode(),
        json.dumps({**valid_table(), "sizes": [2]}).encode(),
        json.dumps({**valid_table(), "sigmas": None}).encode(),
        json.dumps({**valid_table(), "sigmas": ["x"]}).encode(),
        json.dumps(valid_table()).encode()[:-5],
    ],
)
def test_a_foreign_or_broken_table_file_is_refused_by_name(content, tmp_path):
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.json: not a usable scale table") as raised:
        ps.ScaleTable.load(path)
    assert "\n" not in str(raised.value)


def test_an_unknown_table_lists_the_known():
    with pytest.raises(ValueError, match="cifar10-resnet-zeros"):
        ps.ScaleTable.published("imagenet")


@pytest.mark.parametrize("form", [list, torch.tensor, lambda sizes: torch.tensor(sizes).float()])
@pytest.mark.parametrize("name", ["cifar10-resnet-zeros", "mnist-unet-zeros"])
def test_scale_files_of_kamb_and_ganguli_are_read_as_their_tables(name, form, tmp_path):
    for zipped in (True, False):
        path = tmp_path / "scales_median.pt"
        torch.save(form(list(PUBLISHED[name])), path, _use_new_zipfile_serialization=zipped)
        table = ps.ScaleTable.load(path)
        assert table == ps.ScaleTable.published(name)
        assert table.name == "scales_median"


@pytest.mark.parametrize("content", [3, [3], [3, "x"], [3, 4, 5], torch.ones(3, 3), {"a": 1}, [3, 2.5], [3, math.nan]])
def test_other_torch_files_are_no_tables(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: not a usable scale table: "):
        ps.ScaleTable.load(tmp_path / "a.pt")


TABLE = '{"format": "patchscore-scale-table", "version": 1, "name": "a", "sigmas": [1%s], "sizes": [3]}'


@pytest.mark.parametrize("content", ["[" * 100_000, TABLE % ("0" * 400)], ids=["nested", "huge"])
def test_a_table_that_overflows_is_refused_by_name(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not a usable scale table: "):
        ps.ScaleTable.load(tmp_path / "a.json")
