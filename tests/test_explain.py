"""explain against a loop over every window in float64, sharing no code with the package."""

import math

import pytest
import torch
from conftest import MACHINES, machine_named, noisy, smooth_images
from naive import inside, may_meet, window_distance

import patchscore as ps
from patchscore import nearest
from patchscore.explain import explain


def heaviest(z, sigma, train, machine, k, i, j):
    """[(weight, image, row, column)] of one pixel, heaviest first; train [N, C, H, W]."""
    found = []
    _, _, height, width = train.shape
    for number, image in enumerate(train):
        for a in range(height):
            for b in range(width):
                if machine in ("ideal", "local"):
                    meets = (a, b) == (i, j)
                elif machine == "els-circular":
                    meets = inside(a, height, k) and inside(b, width, k)
                else:
                    meets = may_meet(i, a, height, k) and may_meet(j, b, width, k)
                if not meets:
                    continue
                if machine == "ideal":
                    distance = float(((z.astype(float) - image) ** 2).sum())
                else:
                    distance = window_distance(z, image, i, j, a, b, k, wrap=machine == "els-circular")
                found.append((-distance / (2 * sigma**2), number, a, b))
    largest = max(logit for logit, *_ in found)
    total = math.fsum(math.exp(logit - largest) for logit, *_ in found)
    return sorted(((math.exp(logit - largest) / total, *rest) for logit, *rest in found), reverse=True)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("k", "sigma"), [(3, 0.1), (5, 0.5), (7, 2.0)])
def test_the_heaviest_windows_are_those_of_a_loop_over_all(bank, machine, k, sigma):
    z = noisy(bank, sigma, batch=2)
    found = explain(machine_named(machine, bank, k), z, sigma, top=4)
    train = bank.chunk(0, len(bank), torch.float64).numpy()
    for b, i, j in [(0, 0, 0), (0, 0, 5), (1, 6, 4), (1, 11, 9), (1, 7, 0)]:
        expected = heaviest(z[b].numpy(), sigma, train, machine, k, i, j)[:4]
        for t, (weight, *place) in enumerate(expected):
            assert found.weight[b, t, i, j] == pytest.approx(weight, rel=2e-3, abs=1e-9)
            if weight > 1e-6:  # below, places are decided by rounding
                assert [int(part[b, t, i, j]) for part in (found.image, found.row, found.col)] == place


@pytest.mark.parametrize("machine", MACHINES)
def test_all_windows_together_make_the_denoised_image(machine):
    bank = ps.PatchBank(smooth_images(3, 2, 6, 7))
    z = noisy(bank, 0.6)
    found = explain(machine_named(machine, bank, 3), z, 0.6, top=3 * 42)
    train = bank.chunk(0, 3, torch.float64)
    values = train[found.image.clamp(min=0), :, found.row.clamp(min=0), found.col.clamp(min=0)]  # [B, T, H, W, C]
    made = (found.weight[..., None] * values).sum(1).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.share, torch.ones_like(found.share), atol=1e-5, rtol=0)
    torch.testing.assert_close(made, found.mean, atol=1e-5, rtol=0)
    assert (found.weight[found.image < 0] == 0).all()


def test_selections_are_told_by_the_numbers_of_the_whole_bank(bank):
    machine = ps.EquivariantLocalScore(bank, 3)
    z = noisy(bank, 0.3, batch=2)
    found = explain(machine, z, 0.3, labels=["green", 2], top=3)
    assert (bank.labels[found.image[0]] == 1).all()
    assert (bank.labels[found.image[1]] == 2).all()
    nested = ps.EquivariantLocalScore(bank.select([1, 2]), 3)
    again = explain(nested, z, 0.3, labels=[1, 2], top=3)
    torch.testing.assert_close(again.weight, found.weight)
    assert (nested.bank.labels[again.image[1]] == 2).all()


def test_a_selection_in_any_order_with_repeats_is_told_by_its_own_numbers(bank):
    shuffled = bank.take([5, 0, 3, 1, 4, 2, 5])
    for name in (0, 1, 2):
        members = (shuffled.labels == name).nonzero().flatten().tolist()
        found = explain(ps.IdealScore(shuffled), shuffled.chunk(members[0], members[0] + 1), 0.3, name, len(members))
        assert sorted(found.image[0, :, 0, 0].tolist()) == members
        nearest = shuffled.chunk(found.image[0, 0, 0, 0].item(), found.image[0, 0, 0, 0].item() + 1)
        torch.testing.assert_close(nearest, shuffled.chunk(members[0], members[0] + 1))


def test_a_training_image_at_low_noise_comes_from_itself(bank):
    x = bank.chunk(4, 5)
    found = explain(ps.IdealScore(bank), x, 0.05, top=2)
    assert (found.image[:, 0] == 4).all()
    found = explain(ps.EquivariantLocalScore(bank, 5), x, 0.02, top=1)
    assert (found.image[:, 0] == 4).double().mean() > 0.95
    torch.testing.assert_close(found.effective, torch.ones_like(found.effective), atol=0.2, rtol=0)


@pytest.mark.parametrize("engine", ["reference", "auto"])
@pytest.mark.parametrize("machine", MACHINES)
def test_one_pixel_is_the_same_as_that_pixel_of_all(bank, machine, engine):
    machine = machine_named(machine, bank, 5, engine=engine)
    z = noisy(bank, 0.4, dtype=torch.float32)
    whole = explain(machine, z, 0.4, top=3)
    for i, j in [(0, 0), (5, 4), (11, 3)]:
        one = explain(machine, z, 0.4, top=3, pixel=(i, j))
        assert one.weight.shape == (1, 3, 1, 1)
        torch.testing.assert_close(one.weight[..., 0, 0], whole.weight[..., i, j])
        assert (one.image[..., 0, 0] == whole.image[..., i, j]).all()
        torch.testing.assert_close(one.mean[..., 0, 0], whole.mean[..., i, j])
        torch.testing.assert_close(one.effective[..., 0, 0], whole.effective[..., i, j])


def test_chunks_and_blocks_change_nothing(bank, monkeypatch):
    machine = ps.EquivariantLocalScore(bank, 3, padding_mode="circular")
    z = noisy(bank, 0.4, batch=3)
    whole = explain(machine, z, 0.4, top=2)
    module = nearest
    monkeypatch.setattr(module, "TILE_BYTES", 1000)
    monkeypatch.setattr(module, "BLOCK", 1)
    parts = explain(machine, z, 0.4, top=2)
    torch.testing.assert_close(parts.weight, whole.weight)
    assert (parts.image == whole.image).all()
    assert (parts.row == whole.row).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"top": 0}, "top"),
        ({"pixel": (12, 0)}, "pixel row"),
        ({"pixel": (0, -1)}, "pixel column"),
        ({"labels": 7}, "unknown label"),
    ],
)
def test_bad_input_is_named(bank, options, message):
    with pytest.raises(ValueError, match=message):
        explain(ps.LocalScore(bank, 3), **{"z": noisy(bank, 1.0), "sigma": 1.0, **options})


def test_an_index_changes_nothing_in_what_explains(tmp_path):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    bank = ps.PatchBank(smooth_images(150, 3, 12, 10))  # of fewer images every window is evaluated
    index = ps.PatchIndex.build(bank, [3], tmp_path / "i", progress=False)
    z = noisy(bank, 0.5, dtype=torch.float32)
    exact = explain(ps.EquivariantLocalScore(bank, 3), z, 0.5, top=3)
    machine = ps.EquivariantLocalScore(bank, 3, engine="pruned", index=index, budget=0.02)
    found = explain(machine, z, 0.5, top=3)
    assert torch.equal(found.weight, exact.weight)
    assert torch.equal(found.mean, exact.mean)
    assert not torch.equal(machine.denoise(z, 0.5), exact.mean)


def test_what_has_no_windows_cannot_be_explained(bank):
    with pytest.raises(TypeError, match="training windows"):
        explain(ps.GaussianScore(bank), noisy(bank, 1.0), 1.0)
