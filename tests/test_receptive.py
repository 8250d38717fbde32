"""The input pixels that an output pixel depends on: rows of the Jacobian, many of them from one product."""

import pytest
import torch
from conftest import MACHINES, machine_named, noisy, smooth_images

import patchscore as ps


def test_sensitivity_is_rows_of_the_jacobian_and_ends_at_the_window(bank):
    machine, z = ps.EquivariantLocalScore(bank, 5, engine="reference"), noisy(bank, 0.5, batch=2)
    rows = ps.sensitivity(machine, z, 0.5, (6, 4), [0, 1])
    assert rows.shape == (2, 3, 3, 12, 10)
    for channel, y, x in ((0, 6, 4), (2, 7, 3)):
        t = torch.zeros_like(z)
        t[:, channel, y, x] = 1
        torch.testing.assert_close(rows[:, :, channel, y, x], machine.jvp(z, 0.5, t, [0, 1])[:, :, 6, 4])
    outside = rows.clone()
    outside[..., 4:9, 2:7] = 0
    assert not outside.any()
    with pytest.raises(ValueError, match=r"^pixel: got 12"):
        ps.sensitivity(machine, z, 0.5, (12, 4))
    with pytest.raises(TypeError, match=r"^pixel: got 3"):
        ps.sensitivity(machine, z, 0.5, 3)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("k", [3, 7])
def test_maps_are_the_norms_of_rows(name, k, bank):
    """Whichever pixels share a product: (12, 10) images hold 4 x 3 windows side by side at k = 3, 4 x 4 pixels at 7."""
    bank = bank.select(0)
    machine, z = machine_named(name, bank, k, engine="reference"), noisy(bank, 0.7, batch=2)
    fields = ps.receptive_fields(machine, z, 0.7)
    size = 23 if name == "ideal" else k
    assert fields.maps.shape == (2, len(fields.rows), len(fields.cols), size, size)
    assert (len(fields.rows), len(fields.cols)) == (4, 4)
    r = size // 2
    for a, b in ((0, 0), (1, 2), (3, 1), (3, 3)):
        i, j = fields.rows[a], fields.cols[b]
        row = ps.sensitivity(machine, z, 0.7, (i, j)).square().sum((1, 2)).sqrt()
        for y in range(-r, r + 1):
            for x in range(-r, r + 1):
                at = (i + y, j + x)
                if name == "els-circular":
                    at = (at[0] % 12, at[1] % 10)
                inside = 0 <= at[0] < 12 and 0 <= at[1] < 10
                expected = row[:, at[0], at[1]] if inside else torch.zeros(2).double()
                torch.testing.assert_close(fields.maps[:, a, b, r + y, r + x], expected, rtol=1e-8, atol=1e-12)
        # Nothing of the row is outside the map.
        torch.testing.assert_close(fields.maps[:, a, b].square().sum((1, 2)), row.square().sum((1, 2)))


def test_windows_side_by_side_share_a_product(bank, monkeypatch):
    machine = ps.EquivariantLocalScore(ps.PatchBank(smooth_images(4, 3, 24, 18)), 3, "circular", engine="reference")
    batches, vjp = [], machine.vjp
    monkeypatch.setattr(machine, "vjp", lambda z, *rest: batches.append(len(z)) or vjp(z, *rest))
    fields = ps.receptive_fields(machine, torch.randn(1, 3, 24, 18, generator=torch.Generator().manual_seed(1)), 1.0)
    assert batches == [3]  # one for each channel
    assert (len(fields.rows), len(fields.cols)) == (8, 6)
    assert fields.apart == (list(range(8)), list(range(6)))


def test_widths_tell_how_many_pixels_count():
    alike, alone = torch.ones(1, 1, 1, 5, 5), torch.zeros(1, 1, 1, 5, 5)
    alone[..., 2, 2] = 0.3
    for maps, width in ((alike, 5), (alone, 1), (torch.zeros_like(alone), 0)):
        assert ps.ReceptiveFields((2,), (2,), maps, 1.0, 5).widths.item() == pytest.approx(width)
    wide = ps.ReceptiveFields((2, 5, 7, 12), (0,), torch.ones(1, 4, 1, 5, 5), 1.0, 5)
    assert wide.apart == ([0, 2, 3], [0])
    assert repr(wide) == "ReceptiveFields(4 x 1 pixels of 1 depend on 5 pixels across, sigma 1, patch size 5)"


def test_a_gaussian_listens_to_the_whole_image(bank):
    gaussian, z = ps.GaussianScore(bank), noisy(bank, 0.5, batch=1)
    fields = ps.receptive_fields(gaussian, z, 0.5)
    assert fields.patch_size is None
    row = ps.sensitivity(gaussian, z, 0.5, (fields.rows[1], fields.cols[2])).square().sum((1, 2)).sqrt()
    i, j = 11 - fields.rows[1], 11 - fields.cols[2]
    torch.testing.assert_close(fields.maps[:, 1, 2, i : i + 12, j : j + 10], row)


def test_bad_input_is_named(bank):
    machine, z = ps.EquivariantLocalScore(bank, 3), noisy(bank, 0.5)
    with pytest.raises(TypeError, match=r"^sigma"):
        ps.receptive_fields(machine, z, "loud")
    with pytest.raises(ValueError, match=r"^labels"):
        ps.receptive_fields(machine, z, 0.5, [0] * (len(z) + 1))
    with pytest.raises(ValueError, match=r"^z"):
        ps.receptive_fields(machine, z[0], 0.5)
