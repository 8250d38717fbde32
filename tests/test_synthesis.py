"""Coarse to fine: every level is the machine's own sampler on its canvas; what is kept, tiled, resumed and refused."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import smooth_images
from PIL import Image

import patchscore as ps
from patchscore.cli import main
from patchscore.sampling import image_generator

QUICK = {"steps": 3, "patch_size": 5, "progress": False}


@pytest.fixture
def exemplar():
    """One colour image of 24 x 28."""
    return smooth_images(1, 3, 24, 28)[0]


def test_one_level_is_the_sampler_on_that_canvas(exemplar):
    made = ps.synthesize(exemplar, (20, 36), levels=1, sampler="ddim", sigma_max=3.0, **QUICK)
    machine = ps.EquivariantLocalScore(ps.PatchBank(exemplar[None]), 5)
    sigmas = [*ps.noise.karras(3, 0.02, 3.0).sigmas[:-1].tolist(), 0.0]
    z = sigmas[0] * torch.randn(1, 3, 20, 36, generator=image_generator(0, 0), dtype=torch.float64).float()
    for sigma, after in itertools.pairwise(sigmas):
        x0 = machine.denoise(z, sigma)
        z = x0 + after / sigma * (z - x0)
    assert torch.equal(made.image, z[0])
    assert made.levels[0].stderr == 0
    assert made.levels[0].engine == "sliding"


def test_levels_double_and_end_at_the_size(exemplar):
    made = ps.synthesize(exemplar, (37, 50), **QUICK)
    assert [level.image.shape[1:] for level in made.levels] == [torch.Size((18, 25)), torch.Size((37, 50))]
    assert made.image.shape == (3, 37, 50)
    values = exemplar.float() / 127.5 - 1
    assert made.image.min() >= values.min() - 1e-4
    assert made.image.max() <= values.max() + 1e-4
    assert torch.equal(made.image, ps.synthesize(exemplar, (37, 50), **QUICK).image)
    assert not torch.equal(made.image, ps.synthesize(exemplar, (37, 50), seed=1, **QUICK).image)


def test_at_low_noise_every_pixel_is_one_of_the_exemplars(exemplar):
    """The last step denoises at sigma_min, where the nearest window has all the weight."""
    made = ps.synthesize(exemplar, (30, 30), sigma_min=1e-3, **QUICK).image
    pixels = (exemplar.float() / 127.5 - 1).flatten(1).T
    apart = torch.cdist(made.flatten(1).T, pixels).min(1).values
    assert apart.max() < 1e-3


def test_a_tile_wraps_around(exemplar):
    """Moved by any pixels it is as likely: across the seam, windows are as near to the exemplar's as inside."""
    made = ps.synthesize(exemplar, (24, 32), tile=True, levels=2, seed=3, steps=6, patch_size=5, progress=False).image

    def to_nearest(image, rows):
        windows = torch.nn.functional.pad(image[None], (2, 2, 2, 2), mode="circular").unfold(2, 5, 1).unfold(3, 5, 1)
        own = (exemplar[None].float() / 127.5 - 1).unfold(2, 5, 1).unfold(3, 5, 1)
        own = own.permute(0, 2, 3, 1, 4, 5).reshape(-1, 75)
        return torch.cdist(windows[0][:, rows].permute(1, 2, 0, 3, 4).reshape(-1, 75), own).min(1).values.mean()

    assert to_nearest(made, [0, 1, 22, 23]) < 1.25 * to_nearest(made, [9, 10, 12, 13])
    plain = ps.synthesize(exemplar, (24, 32), levels=2, seed=3, steps=6, patch_size=5, progress=False).image
    assert to_nearest(plain, [0, 1, 22, 23]) > 1.25 * to_nearest(plain, [9, 10, 12, 13])


def test_a_start_keeps_its_structure_at_low_strength(exemplar):
    values = exemplar.float() / 127.5 - 1
    near = ps.synthesize(exemplar, (24, 28), start="source", strength=0.05, **QUICK).image
    far = ps.synthesize(exemplar, (24, 28), start="source", strength=3.0, **QUICK).image
    assert (near - values).square().mean().sqrt() < 0.1
    assert (far - values).square().mean().sqrt() > 0.2
    given = ps.synthesize(exemplar, (24, 28), start=values, strength=0.05, **QUICK).image
    assert torch.allclose(given, near, atol=1e-5)


def test_kept_pixels_stay(exemplar):
    keep = torch.zeros(24, 28, dtype=torch.bool)
    keep[:, :10] = True
    made = ps.synthesize(exemplar, (24, 28), start="source", keep=keep, strength=3.0, **QUICK).image
    values = exemplar.float() / 127.5 - 1
    assert torch.equal(made[:, keep], values[:, keep])
    assert (made - values)[:, :, 14:].abs().max() > 0.2


def test_labels_say_which_exemplars_serve_where():
    dark, light = torch.full((1, 16, 16), 20, dtype=torch.uint8), torch.full((1, 16, 16), 230, dtype=torch.uint8)
    bank = ps.PatchBank(torch.stack([dark, light]), [4, 9], None)
    painted = np.full((2, 2), 4)
    painted[:, 1] = 9
    made = ps.synthesize(bank, (20, 20), labels=painted, **QUICK).image
    assert torch.allclose(made[:, :, :10], torch.tensor(20 / 127.5 - 1), atol=1e-5)
    assert torch.allclose(made[:, :, 10:], torch.tensor(230 / 127.5 - 1), atol=1e-5)
    assert torch.allclose(
        ps.synthesize(bank, (20, 20), labels=9, **QUICK).image, torch.tensor(230 / 127.5 - 1), atol=1e-5
    )


def test_exemplars_of_several_sizes_serve_together(tmp_path):
    """Each keeps its own scale, and the map of sources names them by their numbers."""
    dark, light = np.full((1, 16, 20), 20, np.uint8), np.full((1, 22, 14), 230, np.uint8)
    bank = ps.MixedBank([dark, light], [4, 9])
    painted = np.repeat([[4, 9]], 2, 0)
    made = ps.synthesize(bank, (20, 24), labels=painted, levels=2, source_map=True, out=tmp_path, **QUICK)
    assert torch.allclose(made.image[:, :, :12], torch.tensor(20 / 127.5 - 1), atol=1e-5)
    assert torch.allclose(made.image[:, :, 12:], torch.tensor(230 / 127.5 - 1), atol=1e-5)
    assert (made.source[0, :, :12] == 0).all()
    assert (made.source[0, :, 12:] == 1).all()
    again = ps.synthesize(bank, (20, 24), labels=painted, levels=2, start="source", **QUICK)
    assert again.image.shape == (1, 20, 24)
    with pytest.raises(ValueError, match="tolerance: takes exemplars of one size, as an index does"):
        ps.synthesize(bank, (20, 24), tolerance=0.1, **QUICK)


def test_a_symmetry_lets_mirrored_exemplars_serve():
    """Of an exemplar that is dark left and light right, only its mirror has light left of dark."""
    ramp = torch.linspace(-1, 1, 24).expand(1, 24, 24)
    options = {"levels": 1, "start": ramp.flip(2), "strength": 0.3, "patch_size": 5, "steps": 4, "progress": False}
    plain = ps.synthesize(ramp, (24, 24), **options).image
    mirrored = ps.synthesize(ramp, (24, 24), symmetry="flip", **options).image
    wanted = ramp.flip(2)[:, 4:20, 4:20]
    assert (mirrored[:, 4:20, 4:20] - wanted).abs().mean() < 0.1
    steps = plain[:, 4:20, 4:20].diff(dim=2)
    assert (mirrored[:, 4:20, 4:20].diff(dim=2) < 1e-3).float().mean() > (steps < 1e-3).float().mean() + 0.1


def test_a_source_map_names_the_pixel_that_made_each_pixel(exemplar, tmp_path):
    """At low noise a pixel is the centre of one window: its own."""
    made = ps.synthesize(exemplar, (30, 33), sigma_min=1e-3, source_map=True, out=tmp_path, **QUICK)
    image, row, col = made.source
    values = exemplar.float() / 127.5 - 1
    assert (image == 0).all()
    assert ((values[:, row, col] - made.image).abs().amax(0) < 1e-3).float().mean() > 0.8
    assert np.array_equal(np.load(tmp_path / "source.npy"), made.source.numpy())
    assert Image.open(tmp_path / "source.png").size == (33, 30)
    # Where labels say which exemplars serve, only these made the pixels.
    bank = ps.PatchBank(smooth_images(2, 1, 16, 16), [4, 9])
    painted = np.repeat([[4, 9]], 2, 0)
    origin = ps.synthesize(bank, (20, 20), labels=painted, source_map=True, **QUICK).source
    assert (origin[0, :, :10] == 0).all()
    assert (origin[0, :, 10:] == 1).all()


def test_a_tolerance_states_the_error_of_every_level(exemplar):
    """The engine that samples serves, and what it states is no more than was asked for."""
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    options = {"levels": 1, "sigma_max": 1.0, "sigma_min": 0.5, "tolerance": 0.1, "engine": "pruned", **QUICK}
    (level,) = ps.synthesize(exemplar, (24, 28), **options).levels
    assert "pruned" in level.engine
    assert 0 <= level.stderr <= 0.1
    (level,) = ps.synthesize(exemplar, (24, 28), symmetry="flip", **options).levels
    assert "pruned" in level.engine


def test_levels_are_told_and_an_interrupted_synthesis_continues(exemplar, tmp_path):
    whole, told = ps.synthesize(exemplar, (40, 48), levels=2, **QUICK), []

    def stop(level):
        told.append(level.index)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ps.synthesize(exemplar, (40, 48), levels=2, out=tmp_path, callback=stop, **QUICK)
    assert {path.name for path in tmp_path.iterdir()} >= {"synthesis.json", "level-1.npy", "level-1.png"}
    made = ps.synthesize(exemplar, (40, 48), levels=2, out=tmp_path, callback=lambda x: told.append(x.index), **QUICK)
    assert told == [0, 1]
    assert torch.equal(made.image, whole.image)
    assert np.array_equal(np.load(tmp_path / "image.npy"), whole.image.numpy())
    assert Image.open(tmp_path / "image.png").size == (48, 40)
    ps.synthesize(exemplar, (40, 48), levels=2, out=tmp_path, callback=lambda x: told.append(x.index), **QUICK)
    assert told == [0, 1]


def test_a_damaged_level_is_made_again(exemplar, tmp_path):
    ps.synthesize(exemplar, (40, 48), levels=2, out=tmp_path, **QUICK)
    content = bytearray((tmp_path / "level-1.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "level-1.npy").write_bytes(content)
    told = []
    ps.synthesize(exemplar, (40, 48), levels=2, out=tmp_path, callback=lambda x: told.append(x.index), **QUICK)
    assert told == [0, 1]


def test_another_synthesis_in_the_folder_is_named(exemplar, tmp_path):
    ps.synthesize(exemplar, (24, 28), levels=1, out=tmp_path, **QUICK)
    with pytest.raises(ValueError, match="holds a synthesis with other seed; choose another out, or overwrite"):
        ps.synthesize(exemplar, (24, 28), levels=1, out=tmp_path, seed=1, **QUICK)
    ps.synthesize(exemplar, (24, 28), levels=1, out=tmp_path, seed=1, overwrite=True, **QUICK)
    assert json.loads((tmp_path / "synthesis.json").read_text())["settings"]["seed"] == 1


BAD = [
    ({"size": 40}, TypeError, r"size: got 40, takes \(height, width\)"),
    ({"size": (0, 40)}, ValueError, "size: got 0, takes an integer from 1"),
    ({"levels": 4}, ValueError, "levels: at level 1 of 4 the exemplar of 3 x 4 is smaller than the patch size 5"),
    (
        {"size": (8, 40), "levels": 2},
        ValueError,
        "at level 1 of 2 the canvas of 4 x 20 is smaller than the patch size 5",
    ),
    ({"patch_size": [5, 5, 5], "levels": 2}, ValueError, "patch_size: got 3, takes one or 2, one for each level"),
    ({"patch_size": 4}, ValueError, "patch_size: got 4, takes an odd integer"),
    (
        {"strength": 0.01, "levels": 2},
        ValueError,
        "strength, sigma_max: got 0.01, takes numbers above sigma_min = 0.02",
    ),
    ({"strength": math.nan, "levels": 2}, ValueError, "strength, sigma_max: got nan"),
    (
        {"tile": True, "size": (31, 32), "levels": 2},
        ValueError,
        "size: got 31 x 32, with tile and 2 levels takes multi",
    ),
    ({"sampler": "plms"}, ValueError, "sampler: got 'plms'"),
    ({"keep": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "keep: takes a start whose pixels are kept"),
    ({"keep": torch.ones(2, 2), "start": "source"}, ValueError, "keep: got torch.float32"),
    ({"start": torch.zeros(1, 8, 8)}, ValueError, "start: has 1 channels, the exemplars have 3"),
    ({"labels": 3}, ValueError, "labels: got .3., but this bank has no labels"),
    ({"symmetry": "mirror"}, ValueError, "symmetry: got .mirror., takes .flip."),
    ({"symmetry": "flip", "source_map": True}, ValueError, "symmetry, source_map: got both"),
    ({"tolerance": -1}, ValueError, "tolerance: got -1, takes a positive rms error or None"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_what_cannot_be_made_is_named(arguments, error, message, exemplar):
    with pytest.raises(error, match=message) as raised:
        ps.synthesize(exemplar, **{"size": (32, 32), "patch_size": 5, "steps": 2, "progress": False, **arguments})
    assert "\n" not in str(raised.value)


def test_the_command_makes_the_same_image(exemplar, tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(exemplar.numpy().transpose(1, 2, 0)).save(photo)
    command = ["synthesize", photo, "--size", "32x40", "--patch-size", 5, "--steps", "3,2", "--out", out]
    done = CliRunner().invoke(main, list(map(str, command)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "level 2 of 2: 32 x 40, sliding" in done.output
    made = ps.synthesize(exemplar, (32, 40), patch_size=5, steps=[3, 2], progress=False).image
    assert np.array_equal(np.load(out / "image.npy"), made.numpy())
    again = CliRunner().invoke(main, list(map(str, [*command, "--seed", 1])))
    assert again.exit_code == 2
    assert "holds a synthesis with other seed" in again.output


def test_the_command_takes_pictures_for_start_keep_and_labels(tmp_path):
    for name, value in (("a", 20), ("b", 230)):
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.fromarray(np.full((16, 16), value, np.uint8)).save(tmp_path / "two" / name / "0.png")
    painted = np.zeros((2, 2), np.uint8)
    painted[:, 1] = 1
    Image.fromarray(painted).save(tmp_path / "map.png")
    Image.fromarray(np.full((4, 4), 120, np.uint8)).save(tmp_path / "start.png")
    Image.fromarray(np.array([[255], [0]], np.uint8)).save(tmp_path / "keep.png")
    options = ["--labels", "map.png", "--start", "start.png", "--keep", "keep.png"]
    options = [str(tmp_path / part) if part.endswith(".png") else part for part in options]
    command = ["synthesize", str(tmp_path / "two"), "--size", "20", "--steps", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*command, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    image = np.asarray(Image.open(tmp_path / "out" / "image.png"))
    assert (image[:10] == 120).all()
    assert (image[10:, :10] == 20).all()
    assert (image[10:, 10:] == 230).all()
