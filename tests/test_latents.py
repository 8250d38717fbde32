"""Latents and other value ranges: scores in the data's own units, nothing clamped, files as they stand."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import MACHINES, machine_named, noisy, smooth_images
from PIL import Image
from safetensors.torch import load_file, save_file

import patchscore as ps
from patchscore.adapters.latents import decode, encode
from patchscore.cli import main

SCALE = 7.5


def latents(n=6, channels=8, height=12, width=10, low=-1.0, seed=0):
    values = smooth_images(n, channels, height, width, seed, torch.float32)
    return SCALE * values.clamp(min=low)


@pytest.mark.parametrize("engine", ["reference", "sliding"])
@pytest.mark.parametrize("name", MACHINES)
def test_a_scaled_bank_has_the_scaled_posterior(name, engine):
    """D(z; sigma) = s D'(z / s; sigma / s): the same numbers as of the bank in [-1, 1], in the data's own units."""
    values = latents()
    bank, unit = ps.PatchBank(values, value_range="data"), ps.PatchBank(values / values.abs().max())
    scale = float(values.abs().max())
    assert bank.scale == pytest.approx(scale)
    k = 3
    own, in_unit = (machine_named(name, some, k, engine=engine) for some in (bank, unit))
    z = noisy(bank, 2.0)
    for sigma in (0.3, 3.0):
        found, expected = own.estimate(z, sigma, moments=True), in_unit.estimate(z / scale, sigma / scale, moments=True)
        assert torch.allclose(found.mean, scale * expected.mean, atol=1e-5 * scale)
        assert torch.allclose(found.variance, scale**2 * expected.variance, atol=1e-5 * scale**2)
        assert torch.allclose(found.ess, expected.ess, rtol=1e-4)
    alpha, sigma = 0.6, 0.8
    score = own.score(alpha * z, alpha, sigma)
    assert torch.allclose(score, (alpha * own.denoise(z, sigma / alpha) - alpha * z) / sigma**2, atol=1e-4)


def test_values_are_the_data_and_zero_stays_zero():
    values = latents(low=-0.2)
    bank = ps.PatchBank(values, torch.arange(6) % 2, value_range="data")
    assert torch.allclose(bank.chunk(0, 6), values, atol=1e-6 * SCALE)
    assert torch.allclose(bank.select(1).chunk(0, 3), values[1::2], atol=1e-6 * SCALE)
    assert bank.images.abs().max() == 1
    z = torch.zeros(1, 8, 12, 10)
    # Zero padding: the corner window of an image of ones has zeros in three quarters.
    ones = ps.PatchBank(torch.full((1, 1, 5, 5), 4.0), value_range="data")
    assert ps.LocalScore(ones, 3).denoise(torch.zeros(1, 1, 5, 5), 1.0).unique().item() == pytest.approx(4.0)
    assert ps.GaussianScore(bank).denoise(z, 1e4).abs().max() < 2 * SCALE


def test_samples_are_not_clamped_and_lie_in_the_data():
    values = latents() + 20
    bank = ps.PatchBank(values, value_range="data")
    images = ps.sample(ps.EquivariantLocalScore(bank, 3), 2, schedule=ps.noise.karras(8, 0.01, 200.0), progress=False)
    assert images.min() > 10
    assert images.max() < 30


def test_a_class_a_canvas_and_an_explanation_are_in_the_same_units():
    bank = ps.PatchBank(latents(), torch.arange(6) % 2, value_range="data")
    machine = ps.EquivariantLocalScore(bank, 3)
    z = bank.chunk(0, 1) + 0.01
    found = ps.explain(machine, z, 0.02, labels=0, top=1)
    assert (found.image[0, 0] == 0).all()
    assert torch.allclose(found.mean, bank.chunk(0, 1), atol=1e-3)
    assert (machine.denoise(torch.full((1, 8, 20, 20), 30.0), 0.5).abs() <= SCALE * 1.001).all()


def test_gradients_have_no_unit():
    values = latents(3, 2, 7, 6)
    bank = ps.PatchBank(values, value_range="data")
    machine, z = ps.EquivariantLocalScore(bank, 3), noisy(bank, 2.0)
    t = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = (machine.denoise(z + 1e-4 * t, 2.0) - machine.denoise(z - 1e-4 * t, 2.0)) / 2e-4
    assert torch.allclose(machine.jvp(z, 2.0, t), difference, atol=1e-3)


def test_a_stated_range_is_the_scale():
    bank = ps.PatchBank(latents(), value_range=(-10, 8))
    assert bank.scale == 10
    assert bank.fingerprint != ps.PatchBank(latents() / 10).fingerprint
    assert repr(bank) == "PatchBank(6 images, 8 x 12 x 10, float32, values up to 10)"


def test_files_are_read_as_they_stand(tmp_path):
    values = latents(5, 16, 4, 4) + 3
    np.save(tmp_path / "a.npy", values.numpy())
    torch.save(values, tmp_path / "a.pt")
    save_file({"latents": values.contiguous()}, tmp_path / "a.safetensors")
    save_file({"latents": values.contiguous(), "other": torch.zeros(2)}, tmp_path / "two.safetensors")
    for name in ("a.npy", "a.pt", "a.safetensors"):
        bank = ps.PatchBank.open(tmp_path / name, value_range="data")
        assert bank.shape == (16, 4, 4)
        assert torch.allclose(bank.chunk(0, 5), values)
    bank = ps.PatchBank.open(tmp_path / "two.safetensors", value_range="data", image_key="latents")
    assert len(bank) == 5
    assert len(ps.PatchBank.open(tmp_path / "a.npy", value_range="data", limit=2)) == 2
    torch.save({"a": object}, tmp_path / "code.pt")
    for name, message in (
        ("two.safetensors", "holds latents, other; image_key"),
        ("code.pt", "no file of tensors alone"),
    ):
        with pytest.raises(ValueError, match=message):
            ps.PatchBank.open(tmp_path / name, value_range="data")


@pytest.mark.parametrize("name", ["a.npy", "a.pt", "a.safetensors"])
def test_commands_refuse_latents_in_one_line(tmp_path, name):
    values = latents(4, 4, 8, 8) + 3
    np.save(tmp_path / "a.npy", values.numpy())
    torch.save(values, tmp_path / "a.pt")
    save_file({"latents": values.contiguous()}, tmp_path / "a.safetensors")
    given = ["sample", str(tmp_path / name), "--table", "3", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, given)
    assert refused.exit_code == 2
    (line,) = refused.output.splitlines()
    assert line.startswith("patchscore: error:")
    takes = "floating point images take [-1, 1], and latents a value_range (patchscore sample --value-range data)"
    assert line.endswith(takes)
    assert not (tmp_path / "out" / "samples.npy").exists()


def sampled(tmp_path, *options):
    given = ["sample", tmp_path / "a.safetensors", "--table", "3", "--steps", "10", "--out", tmp_path / "out", *options]
    return CliRunner().invoke(main, list(map(str, given)))


@pytest.mark.parametrize("value_range", ["data", "-20,20"])
def test_the_command_samples_latents_as_python_does_and_goes_on(tmp_path, value_range):
    """In the data's own units, in one file of float32 and in shards; a larger -n adds to what is there."""
    values = latents(6, 4, 8, 8) + 3
    save_file({"latents": values.contiguous()}, tmp_path / "a.safetensors")
    for count in (2, 3):
        done = sampled(tmp_path, "--value-range", value_range, "-n", count)
        assert done.exit_code == 0, done.output
    assert "made 1 image" in done.output
    given = value_range if value_range == "data" else (-20.0, 20.0)
    bank = ps.PatchBank(values, value_range=given)
    expected = ps.sample(ps.EquivariantLocalScore(bank, 3), 3, steps=10, progress=False)
    made = np.load(tmp_path / "out" / "samples.npy")
    assert expected.abs().max() > 3
    assert np.abs(made - expected.numpy()).max() < 1e-4
    assert np.array_equal(load_file(tmp_path / "out" / "samples" / "000000.safetensors")["images"].numpy(), made)
    assert not list((tmp_path / "out").rglob("*.png"))
    other = sampled(tmp_path, "--value-range", "-30,30")
    assert "holds a run over other training images" in other.output
    for command, words in (("explain", "which are not drawn here"), ("info", "4 x 8 x 8")):
        told = CliRunner().invoke(main, [command, str(tmp_path / "out")])
        assert words in told.output.splitlines()[-1 if command == "explain" else 1]
    save_file({"a": torch.zeros(2, 1, 8, 8)}, tmp_path / "b.safetensors")
    told = CliRunner().invoke(main, ["evaluate", str(tmp_path / "out"), "fashion-mnist", "--limit", "2"])
    assert "a run of latents; takes pictures of them" in told.output


def test_the_command_draws_latents_that_it_can_decode(tmp_path, monkeypatch):
    save_file({"latents": latents(6, 4, 8, 8).contiguous()}, tmp_path / "a.safetensors")
    (tmp_path / "decoders.py").write_text(
        "import torch\n"
        "def twice(x):\n    return torch.nn.functional.interpolate(x[:, :3] / 8, scale_factor=2)\n"
        "def wide(x):\n    return x\n"
    )
    monkeypatch.chdir(tmp_path)
    done = sampled(tmp_path, "--value-range", "data", "-n", 2, "--decode", "decoders:twice")
    assert done.exit_code == 0, done.output
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "samples").iterdir())]
    made = torch.from_numpy(np.load(tmp_path / "out" / "samples.npy"))
    shown = ((made[:, :3] / 8).clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert [picture.shape for picture in pictures] == [(16, 16, 3)] * 2
    assert np.array_equal(pictures[1][::2, ::2], shown[1])
    assert {"grid.png", "trajectory.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "asked for" in sampled(tmp_path, "--value-range", "data", "--decode", "decoders:wide").output
    for options, message in (
        (["--decode", "decoders:twice"], "--decode: got decoders:twice, takes latents, --value-range"),
        (["--value-range", "wide"], "--value-range: got 'wide', takes data or LOW,HIGH such as -4,4"),
        (["--value-range", "-1,1"], "images: values from"),
        (["--value-range", "data", "--format", "png"], "--format: got png, with --value-range takes safetensors; with"),
        (["--value-range", "data", "--decode", "decoders:none"], "--decode: decoders:none: module"),
        (["--value-range", "data", "--decode", "decoders:wide", "--overwrite"], "--decode: decoders:wide gives [6, 4"),
        (["--value-range", "data", "--size", "2"], "size: got 2, with a value_range images stay as they are"),
        (["--value-range", "data", "--table", "cifar10-resnet-zeros"], "--table: cifar10-resnet-zeros is for pixels"),
    ):
        refused = sampled(tmp_path, "-n", 6, *options)
        assert refused.exit_code == 2
        assert message in refused.output.splitlines()[-1]


def test_sizes_are_fitted_at_levels_in_units_of_the_data(tmp_path):
    values = latents(6, 4, 8, 8)
    bank, unit = ps.PatchBank(values, value_range="data"), ps.PatchBank(values / values.abs().max())
    found, expected = (ps.held_out_errors(some, [3, 5], images=3, progress=False) for some in (bank, unit))
    assert found.sigmas == pytest.approx([sigma * bank.scale for sigma in expected.sigmas])
    assert np.allclose(found.errors, bank.scale**2 * expected.errors, rtol=1e-4)


BAD = [
    ({"images": latents()}, ValueError, r"floating point images take \[-1, 1\], and latents a value_range"),
    ({"images": latents() * float("nan"), "value_range": "data"}, ValueError, "images: NaN or infinite values"),
    ({"images": latents(), "value_range": (-1, 1)}, ValueError, "images: values from .* outside value_range"),
    ({"images": latents(), "value_range": "wide"}, ValueError, 'value_range: got .wide., takes None, "data" or'),
    ({"images": latents(), "value_range": (1, -1)}, ValueError, "value_range: got .1, -1., takes finite numbers"),
    ({"images": smooth_images(2, 3, 8, 8), "value_range": "data"}, TypeError, "images: got dtype torch.uint8"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_what_is_no_bank_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ps.PatchBank(**arguments)


def test_options_that_would_change_values_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", latents().numpy())
    with pytest.raises(ValueError, match="size: got 8, with a value_range images stay as they are"):
        ps.PatchBank.open(tmp_path / "a.npy", size=8, value_range="data")
    with pytest.raises(ValueError, match=r"with a value_range takes a \.npy, \.pt or \.safetensors file"):
        ps.PatchBank.open(tmp_path / "a.png", value_range="data")


@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize("size", [(12, 10), (15, 18)])
def test_a_sample_of_latents_states_its_error_in_their_units(channels, size):
    """Without an index, of any number of channels: the numbers of the bank in [-1, 1], times the scale."""
    values = latents(60, channels)
    bank, unit = ps.PatchBank(values, value_range="data"), ps.PatchBank(values / values.abs().max())
    sampled, in_unit = (ps.EquivariantLocalScore(some, 3, budget=0.3) for some in (bank, unit))
    z = bank.scale * noisy(unit, 1.0, dtype=torch.float32)
    z = torch.nn.functional.interpolate(z, size=size)
    found, expected = sampled.estimate(z, bank.scale), in_unit.estimate(z / bank.scale, 1.0)
    assert "pruned" in found.engine
    assert torch.allclose(found.mean, bank.scale * expected.mean, atol=1e-4 * bank.scale)
    assert torch.allclose(found.stderr, bank.scale * expected.stderr, atol=1e-3 * bank.scale)
    exact = ps.EquivariantLocalScore(bank, 3, engine="sliding").denoise(z, bank.scale)
    assert 0 < (found.mean - exact).square().mean().sqrt() < 3 * found.stderr.square().mean().sqrt()


def test_what_little_weight_was_found_says_is_bounded_by_the_values():
    """Where no weight was found a mean may be off by the whole span of the values, in their own units."""
    nothing = ps.PosteriorSum.empty((1, 1, 2, 2), "cpu", sampled=True, moments=True).scaled(SCALE)
    assert (nothing.stderr == 2 * SCALE).all()
    assert (nothing.variance_stderr == SCALE**2).all()
    assert (ps.merge(nothing, nothing).stderr == 2 * SCALE).all()


@pytest.mark.parametrize("channels", [4, 16])
def test_an_index_of_latents_finds_the_heaviest_windows_in_their_own_units(channels, tmp_path):
    """Opened again; k = 3 of four channels lies in the cells, of 16 it is read from the images."""
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    bank = ps.PatchBank(latents(8, channels), value_range="data")
    ps.PatchIndex.build(bank, 3, tmp_path / "index", progress=False)
    index = ps.PatchIndex.open(tmp_path / "index", bank, verify=True)
    z, sigma, pixels = noisy(bank, 2.0, dtype=torch.float32)[0], 2.0, [(1, 1), (5, 4)]
    hits = index.search(z, sigma, k=6, pixels=pixels)
    windows = bank.chunk(0, len(bank), torch.float64).unfold(2, 3, 1).unfold(3, 3, 1)  # [N, C, rows, cols, 3, 3]
    for pixel, (i, j) in enumerate(pixels):
        query = z[None, :, i - 1 : i + 2, j - 1 : j + 2].double()
        away = (windows - query[:, :, None, None]).square().sum((1, 4, 5)).flatten()
        nearest = away.sort().values[:6]
        assert torch.allclose(hits.distance[pixel], nearest, rtol=1e-5)
        assert torch.allclose(hits.weight[pixel], torch.exp(-(nearest - nearest[0]) / (2 * sigma**2)), rtol=1e-3)
        where = hits.image[pixel] * windows[0, 0, ..., 0, 0].numel() + (hits.row[pixel] - 1) * windows.shape[3]
        assert torch.allclose(away[where + hits.col[pixel] - 1], nearest, rtol=1e-5)
    assert hits.proven.all()


@pytest.mark.parametrize("engine", ["reference", "sliding"])
@pytest.mark.parametrize("size", [(12, 10), (15, 18)])
def test_products_and_averages_are_in_the_same_units(engine, size):
    """A Jacobian has no unit; averages of windows have the data's."""
    values = latents(5, 8)
    bank, unit = ps.PatchBank(values, value_range="data"), ps.PatchBank(values / values.abs().max())
    z, t = (torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for name in ("jvp", "vjp"):
        a, b = (getattr(ps.EquivariantLocalScore(some, 3, engine=engine), name) for some in (bank, unit))
        assert torch.allclose(a(bank.scale * z, bank.scale, t), b(z, 1.0, t), atol=1e-4)
    a, b = (ps.PatchAverage(some, 3, engine=engine) for some in (bank, unit))
    assert torch.allclose(a.denoise(bank.scale * z, bank.scale), bank.scale * b.denoise(z, 1.0), atol=1e-4 * SCALE)


# Autoencoders.


def test_a_callable_encodes_and_decodes():
    images = smooth_images(5, 1, 8, 8, dtype=torch.float32)
    codes = encode(lambda x: 3 * torch.nn.functional.pixel_unshuffle(x, 2), images, batch_size=2)
    assert codes.shape == (5, 4, 4, 4)
    assert torch.allclose(decode(lambda x: torch.nn.functional.pixel_shuffle(x / 3, 2), codes, batch_size=3), images)
    with pytest.raises(TypeError, match="autoencoder: got str"):
        decode("vae", codes)
    with pytest.raises(ValueError, match=r"latents: got torch.float32 \[4, 4, 4\]"):
        decode(lambda x: x, codes[0])


@pytest.mark.parametrize("shift", [None, 0.3])
def test_a_latent_round_trip_through_an_autoencoder(shift):
    """Latents are in the model's units, and at no noise the machine gives back a training latent, so its image."""
    diffusers = pytest.importorskip(
        "diffusers.models.autoencoders.autoencoder_kl", reason="diffusers cannot be imported"
    )
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4, scaling_factor=0.5, shift_factor=shift,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    images = smooth_images(4, 3, 16, 16, dtype=torch.float32)
    codes = encode(vae, images)
    with torch.no_grad():
        own = vae.encode(images).latent_dist.mean
        assert torch.allclose(codes, (own - (shift or 0)) * 0.5, atol=1e-5)
        assert torch.allclose(decode(vae, codes), vae.decode(own).sample, atol=1e-4)
    bank = ps.PatchBank(codes, value_range="data")
    x0 = ps.EquivariantLocalScore(bank, 3).denoise(codes, 1e-3)
    assert (decode(vae, x0) - decode(vae, codes)).abs().max() < 1e-3
