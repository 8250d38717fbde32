"""Held-out errors are what a plain loop over pixels and other images makes of them; tables choose the least."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import smooth_images
from naive import denoise_pixel

import patchscore as ps
from patchscore import heldout
from patchscore.heldout import HeldOutErrors, candidate_sizes, held_out_errors

QUIET = {"progress": False}


@pytest.fixture
def small():
    """6 gray images of 6 x 5 in two classes."""
    return ps.PatchBank(smooth_images(6, 1, 6, 5, seed=3), torch.tensor([0, 0, 0, 1, 1, 1]))


def noisy_inputs(monkeypatch):
    """Every z that an engine is asked to denoise, with its levels."""
    asked, serve_each = [], heldout.engines.serve_each

    def recording(engines, named, z, sigma, *rest):
        asked.append((z, sigma))
        return serve_each(engines, named, z, sigma, *rest)

    monkeypatch.setattr(heldout.engines, "serve_each", recording)
    return asked


@pytest.mark.parametrize(
    ("machine", "padding_mode", "plain"),
    [("els", "zeros", "els-zeros"), ("els", "circular", "els-circular"), ("local", "zeros", "local")],
)
@pytest.mark.parametrize(("images", "conditional"), [(2, False), (6, False), (6, True)])
def test_each_image_is_denoised_by_all_others(small, monkeypatch, machine, padding_mode, plain, images, conditional):
    """Of its class, if asked; also where every image is held out in its turn, so that none is left that never is."""
    asked = noisy_inputs(monkeypatch)
    sizes, sigmas = [3, 5], [0.3, 1.1]
    options = {"images": images, "block": 2, "padding_mode": padding_mode, "machine": machine}
    options["conditional"] = conditional
    found = held_out_errors(small, sizes, sigmas, **options, **QUIET)
    assert found.errors.shape == (2, images, 2)
    # Two calls an image, of the same z, unless nothing is left in the first part.
    noisy = [z for i, (z, _) in enumerate(asked) if i == 0 or not torch.equal(z, asked[i - 1][0])]
    assert len(noisy) == images
    everything = small.chunk(0, 6, torch.float64)
    number = min(range(6), key=lambda n: float((noisy[0][0] - everything[n]).square().sum()))
    competing = small.labels == small.labels[number] if conditional else torch.ones(6, dtype=torch.bool)
    competing[number] = False
    others = everything[competing].numpy()
    generator = torch.Generator().manual_seed(heldout._seed(0, 0))
    rows, cols = heldout._block(small.shape, 2, generator)
    for level, k in itertools.product(range(2), range(2)):
        z, x = noisy[0][level].double().numpy(), everything[number].numpy()
        gaps = [
            denoise_pixel(z, sigmas[level], others, plain, sizes[k], i, j)[0] - x[:, i, j]
            for i, j in itertools.product(rows.tolist(), cols.tolist())
        ]
        assert found.errors[level, 0, k] == pytest.approx(np.mean(np.square(gaps)), abs=1e-6)


def test_an_image_alone_in_its_class_is_not_held_out(small):
    lonely = ps.PatchBank(small.images[[0, 1, 3]], torch.tensor([0, 0, 1]))
    pair = held_out_errors(lonely, [3], [0.5], images=9, conditional=True, **QUIET)
    assert pair.errors.shape[1] == 2
    assert np.isfinite(pair.errors).all()


def test_images_that_are_held_out_elsewhere_meet_the_whole_bank(small):
    same = held_out_errors(small, [5], [0.01], images=6, block=None, held_out=small, **QUIET)
    assert same.errors.max() < 1e-4  # their own windows are in the bank
    assert held_out_errors(small, [5], [0.01], images=6, block=None, **QUIET).errors.max() > 1e-3


def test_every_pixel_is_as_likely_in_a_block():
    """A block wraps: over all places each pixel is in as many blocks as a block has pixels."""
    counts, generator = torch.zeros(4, 3), torch.Generator().manual_seed(0)
    places = set()
    for _ in range(400):
        rows, cols = heldout._block((1, 4, 3), 2, generator)
        assert len(rows) == len(cols) == 2
        places.add((int(rows[0]), int(cols[0])))
        competition = heldout._at(heldout.local_competition(4, 3, 3), (rows, cols))
        pixels = {(i, j) for group in competition.groups for i in group.rows.queries for j in group.cols.queries}
        assert pixels == set(itertools.product(rows.tolist(), cols.tolist()))
        assert sum(group.pixels for group in competition.groups) == 4
    assert len(places) == 12
    for row, col in places:
        counts[(row + torch.arange(2))[:, None] % 4, (col + torch.arange(2)) % 3] += 1
    assert counts.eq(4).all()


def of(errors, sigmas=(0.1, 1.0, 10.0), sizes=(3, 5, 7)):
    return HeldOutErrors(sigmas, sizes, np.asarray(errors, dtype=float), {})


def test_the_least_error_is_chosen_and_the_next_told():
    errors = of(np.repeat([[[1, 2, 3]], [[4, 2, 3]], [[2, 2, 1]]], 5, axis=1))
    assert errors.best == [3, 5, 7]
    assert errors.runner_up == [5, 7, 3]
    assert errors.intervals() == [(3, 3), (5, 5), (7, 7)]
    assert errors.regret == [0, 0, 0]
    row = errors.rows()[1]
    assert (row["best"], row["runner_up"], row["runner_up_excess"]) == (5, 7, 0.5)
    assert of([[[4]], [[4]], [[4]]], sizes=(3,)).runner_up == [None] * 3


@pytest.mark.parametrize("seed", range(5))
def test_monotone_sizes_are_the_best_of_all_that_do_not_fall(seed):
    errors = of(np.random.default_rng(seed).uniform(1, 2, (4, 3, 3)), sigmas=(0.1, 0.5, 1.0, 2.0))
    relative = errors.means / errors.means.min(1, keepdims=True)
    paths = [p for p in itertools.product(range(3), repeat=4) if list(p) == sorted(p)]
    least = min(paths, key=lambda path: sum(relative[i, k] for i, k in enumerate(path)))
    assert errors.monotone == [(3, 5, 7)[k] for k in least]


def test_the_interval_covers_the_best_size_as_often_as_it_says():
    """Images whose errors favour size 5 by a little: of 200 fits the 95% interval holds 5 in 90% at least."""
    rng, covered, wide = np.random.default_rng(0), 0, 0
    for _ in range(200):
        noise = rng.normal(0, 0.3, (1, 16, 3))
        errors = of(np.array([1.1, 1.0, 1.1]) + noise, sigmas=(1.0,))
        ((low, high),) = errors.intervals()
        covered += low <= 5 <= high
        wide += low < high
    assert covered >= 180
    assert wide > 0


def test_more_images_keep_the_ones_there_were(small):
    few, more = (held_out_errors(small, [3, 5], [0.5], images=n, **QUIET).errors for n in (2, 4))
    # The bank without the held-out images is another part, and sums are the same up to rounding.
    np.testing.assert_allclose(more[:, :2], few, atol=1e-6)
    other = held_out_errors(small, [3, 5], [0.5], images=2, seed=1, **QUIET).errors
    assert not np.allclose(other, few)


def test_an_interrupted_fit_continues_and_takes_more(small, tmp_path, monkeypatch):
    path, options = tmp_path / "held-out.json", {"patch_sizes": [3, 5], "sigmas": [0.5], "progress": False}
    whole = held_out_errors(small, images=4, **options)
    asked, serve_each = [], heldout.engines.serve_each

    def interrupted(*given):
        asked.append(given)
        if len(asked) == 5:  # two calls an image
            raise KeyboardInterrupt
        return serve_each(*given)

    monkeypatch.setattr(heldout.engines, "serve_each", interrupted)
    with pytest.raises(KeyboardInterrupt):
        held_out_errors(small, images=4, resume=path, **options)
    assert HeldOutErrors.load(path).errors.shape[1] == 1  # the second image is in the file beside it
    assert path.with_name("held-out.json.added").exists()
    found = held_out_errors(small, images=4, resume=path, **options)
    assert len(asked) == 5 + 4
    np.testing.assert_allclose(found.errors, whole.errors, atol=1e-9)
    assert HeldOutErrors.load(path).errors.shape[1] == 4
    more = held_out_errors(small, images=5, resume=path, **options)
    np.testing.assert_array_equal(more.errors[:, :4], found.errors)
    fewer = held_out_errors(small, images=3, resume=path, **options)
    np.testing.assert_array_equal(fewer.errors, found.errors[:, :3])
    with pytest.raises(ValueError, match=r"held-out\.json: holds a fit with seed 0, asked for 1"):
        held_out_errors(small, images=4, seed=1, resume=path, **options)


def test_a_fit_finds_the_scale_of_what_it_is_fitted_to():
    """Images of independent 4 x 4 tiles of one colour: wider windows see nothing more, and are rarer in the bank."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 2, (40, 1, 4, 4), generator=generator) * 255
    bank = ps.PatchBank(tiles.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8))
    table = ps.ScaleTable.fit(bank, [1, 5, 15], sigmas=[0.5, 2.0], images=8, padding_mode="circular", **QUIET)
    assert table.sigmas == (0.5, 2.0)
    assert 15 not in table.sizes
    assert table(2.0) == 5
    assert ps.ScaleTable.fit(bank, [5], sigmas=[1.0], images=2, monotone=True, **QUIET).sizes == (5,)


def test_candidates_grow_by_a_quarter_to_the_side():
    assert candidate_sizes(32, 32) == (3, 5, 7, 9, 11, 13, 17, 21, 27)
    assert candidate_sizes(64, 40)[-1] <= 40
    assert candidate_sizes(2, 9) == (1,)


def test_errors_are_kept_in_a_file_that_shows_changes(small, tmp_path):
    path = tmp_path / "held-out.json"
    found = held_out_errors(small, [3, 5], [0.5, 1.0], images=2, **QUIET)
    found.save(path)
    again = HeldOutErrors.load(path)
    assert again.settings == json.loads(json.dumps(found.settings)) == found.settings
    assert np.array_equal(again.errors, found.errors)
    assert ps.ScaleTable.of_errors(again) == ps.ScaleTable.of_errors(found)
    text = path.read_text()
    for content in (text.replace('"block": 4', '"block": 5'), text[:100], "[]", "{}"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"held-out\.json: not usable held-out errors"):
            HeldOutErrors.load(path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bank": 3}, TypeError, "bank: got int"),
        ({"patch_sizes": [4]}, ValueError, "patch_sizes: got 4"),
        ({"patch_sizes": []}, ValueError, "patch_sizes: got none"),
        ({"patch_sizes": [7], "padding_mode": "circular"}, ValueError, "patch_sizes: got 7, images of 6 x 5"),
        ({"sigmas": [0.0]}, ValueError, "sigmas"),
        ({"sigmas": []}, ValueError, "sigmas"),
        ({"images": 0}, ValueError, "images: got 0"),
        ({"block": 0}, ValueError, "block: got 0"),
        ({"machine": "ideal"}, ValueError, "machine: got 'ideal'"),
        ({"machine": "local", "padding_mode": "circular"}, ValueError, "padding_mode: got 'circular'"),
        ({"engine": "warp"}, ValueError, "engine: got 'warp'"),
        ({"device": "abacus"}, ValueError, "device: 'abacus'"),
        ({"held_out": ps.PatchBank(smooth_images(2, 1, 8, 8))}, ValueError, "held_out: of"),
        ({"held_out": "photos/"}, TypeError, "held_out: got str"),
        ({"bank": ps.PatchBank(smooth_images(1, 1, 6, 5))}, ValueError, "bank: got one image"),
        ({"bank": ps.PatchBank(smooth_images(2, 1, 6, 5)), "conditional": True}, ValueError, "conditional: got True"),
        (
            {"bank": ps.PatchBank(smooth_images(2, 1, 6, 5), [0, 1]), "conditional": True},
            ValueError,
            "one image in every class",
        ),
    ],
)
def test_bad_input_is_named(small, options, error, message):
    good = {"bank": small, "patch_sizes": [3], "sigmas": [1.0], "images": 1, "progress": False}
    with pytest.raises(error, match=message):
        held_out_errors(**{**good, **options})
