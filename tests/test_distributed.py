"""A bank over ranks: the numbers of one process, whoever asks, and one line where ranks do not fit together."""

import itertools

import numpy as np
import pytest
import torch
from conftest import MACHINES, machine_named, noisy, smooth_images
from launched import launched, raised

import patchscore as ps
from patchscore import theories
from patchscore.adapters.k_diffusion import PatchScoreDenoiser
from patchscore.distributed import Ranks, SpreadBank, build_shards, join, open_shards
from patchscore.distributed.parts import owners
from patchscore.posterior import PosteriorSum, merge_all

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 7])
"""The last class has one image, which one rank has and the others have not."""
SAME = 1e-6
"""What exact sums of several ranks may differ by from those of one process, as issue 23 promises."""
ERRORS = 2.0**-9
"""How much standard errors are rounded on their way, as docs/scale.md says: by 0.2% at most."""


def whole_bank():
    return ps.PatchBank(smooth_images(20, 3, 12, 10), LABELS)


def check_sums():
    bank = whole_bank()
    z = noisy(bank, 0.5, batch=3, dtype=torch.float32)
    sigmas, labels = torch.tensor([0.05, 0.5, 2.0]), [None, 1, 7]
    for name, engine in itertools.product(MACHINES, ("sliding", "reference")):
        alone = machine_named(name, bank, 5, engine=engine)
        spread = ps.Sharded(machine_named(name, ps.shard(bank), 5, engine=engine))
        for moments in (False, True):
            expected = alone.estimate(z, sigmas, labels, moments=moments)
            found = spread.estimate(z, sigmas, labels, moments=moments)
            assert (found.mean - expected.mean).abs().max() <= SAME
            assert torch.allclose(found.ess, expected.ess, rtol=1e-4, atol=0)
            assert found.pairs == expected.pairs
            assert not found.stderr.any()
        assert (found.variance - expected.variance).abs().max() <= SAME
        assert (found.entropy - expected.entropy).abs().max() <= 1e-5
        for product in ("vjp", "jvp"):
            expected, found = (getattr(of, product)(z, sigmas, z.flip(0), labels) for of in (alone, spread))
            # What `sliding` promises of gradients (test_sliding_gradients.py), for either of the two.
            largest = expected.abs().max()
            bound = SAME * largest.clamp(min=1) if engine == "reference" else 2e-3 * largest.clamp(min=0.1)
            assert (found - expected).abs().max() <= bound, (name, product)
    return spread.bank.fingerprint == bank.fingerprint


@pytest.mark.parametrize("size", [2, 4])
def test_exact_sums_of_ranks_are_those_of_one_process(size):
    assert launched(size, check_sums) == [True] * size


def check_combinations():
    """Everything that takes a machine takes one over ranks; the largest difference from one process, by name."""
    bank = whole_bank()
    own = ps.shard(bank)
    z = noisy(bank, 0.5, batch=2, dtype=torch.float32)
    table = ps.ScaleTable([0.3, 1.0, 5.0], [3, 5, 7])
    alone = ps.EquivariantLocalScore(bank, table)
    spread = ps.Sharded(ps.EquivariantLocalScore(own, table))
    options = {"n": 2, "steps": 5, "labels": [0, 7], "progress": False}
    canvas = torch.randn(1, 3, 17, 19, generator=torch.Generator().manual_seed(0))

    def both(function):
        expected, found = function(alone), function(spread)
        return (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())

    differences = {
        sampler: both(lambda machine, sampler=sampler: ps.sample(machine, sampler=sampler, **options))
        for sampler in ("ddim", "ddpm", "heun", "ddpm-optimal")
    }
    differences["gaussian start"] = both(lambda machine: ps.sample(machine, gaussian_until=1.0, **options))
    differences["canvas"] = both(lambda machine: machine.denoise(canvas, 0.5))
    differences["canvas, vjp"] = both(lambda machine: machine.vjp(canvas, 0.5, canvas))
    differences["guided"] = both(lambda machine: ps.Guided(machine, machine, 2.0).denoise(z, 0.5, 1))
    differences["switched"] = both(
        lambda machine: ps.Switch([(1.0, machine), (9.0, ps.GaussianScore(bank))]).denoise(z, torch.tensor([0.5, 2.0]))
    )
    differences["symmetric of sharded"] = both(lambda machine: ps.Symmetric(machine).denoise(z, 0.5))
    measured = ps.conditioned.downsampling(2)
    differences["conditioned"] = both(
        lambda machine: ps.Conditioned(machine, measured, measured(z.clamp(-1, 1)), 0.1).denoise(z, 0.5)
    )
    differences["likelihood"] = both(
        lambda machine: ps.log_likelihood(machine, z.clamp(-1, 1), sigma_min=0.3, steps=3, progress=False).nats
    )
    differences["classify"] = both(lambda machine: ps.classify(machine, z.clamp(-1, 1), 0.5, progress=False).posterior)
    differences["k-diffusion"] = both(lambda machine: PatchScoreDenoiser(machine)(z, torch.tensor([0.5, 0.9]), [1, 7]))
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    differences["differentiable"] = both(lambda machine: _gradient(ps.Differentiable(machine), z, gradient))
    network = ps.GaussianScore(bank)
    differences["compare"] = both(
        lambda machine: ps.compare(network, {"els": machine}, n=2, steps=4, progress=False).machines["els"].images
    )
    latents = ps.PatchBank(3 * bank.chunk(0, 20), LABELS, value_range="data")
    expected = ps.LocalScore(latents, 3).denoise(3 * z, 1.5, [7, None])
    found = ps.Sharded(ps.LocalScore(ps.shard(latents), 3)).denoise(3 * z, 1.5, [7, None])
    differences["latents"] = (found - expected).abs().max().item() / 3
    settings = {"patch_sizes": [3, 5], "steps": 4, "n": 2, "progress": False}
    calibrations = [ps.calibrate(network, part, **settings) for part in (bank, own)]
    differences["calibrate"] = np.abs(calibrations[0].agreement - calibrations[1].agreement).max()
    assert calibrations[0].settings == calibrations[1].settings
    for composed in (ps.Symmetric, lambda machine: ps.Pooled([machine])):
        expected = composed(ps.EquivariantLocalScore(bank, 5)).denoise(z, 0.5, [0, 7])
        found = ps.Sharded(composed(ps.EquivariantLocalScore(own, 5))).denoise(z, 0.5, [0, 7])
        differences[repr(composed)] = (found - expected).abs().max().item()
    return differences


def _gradient(machine, z, u):
    z = z.clone().requires_grad_()
    return torch.autograd.grad((machine.denoise(z, 0.5) * u).sum(), z)[0]


def check_explanations():
    bank, differences = whole_bank(), []
    z = noisy(bank, 0.5, batch=2, dtype=torch.float32)
    own = ps.shard(bank)
    for name in MACHINES:
        for images, pixel in ((z, None), (z, (0, 3))):
            alone, spread = (
                ps.explain(machine, images, 0.5, [None, 2], 6, pixel)
                for machine in (machine_named(name, bank, 5), ps.Sharded(machine_named(name, own, 5)))
            )
            for part in ("image", "row", "col"):
                assert torch.equal(getattr(alone, part), getattr(spread, part)), (name, part)
            differences.append((alone.weight - spread.weight).abs().max().item())
    canvas = torch.randn(1, 3, 17, 19, generator=torch.Generator().manual_seed(0))
    alone, spread = (
        ps.explain(machine, canvas, 0.5, 7, 6)
        for machine in (ps.EquivariantLocalScore(bank, 5), ps.Sharded(ps.EquivariantLocalScore(own, 5)))
    )
    assert torch.equal(alone.image, spread.image)
    return max(differences)


@pytest.mark.parametrize("check", [check_combinations, check_explanations])
def test_whatever_takes_a_machine_takes_one_over_ranks(check):
    for found in launched(2, check):
        worst = max(found.values()) if isinstance(found, dict) else found
        assert worst <= 2e-5, found


def check_parts_of_files():
    """Parts that are banks of their own, as where every rank reads a file."""
    rank, size = join().rank, join().size
    images, sizes = smooth_images(20, 3, 12, 10), [0, 3, 9, 20]
    parts = [ps.PatchBank(images[a:b], LABELS[a:b]) for a, b in itertools.pairwise(sizes)]
    whole = ps.PatchBank(images, LABELS)
    z = noisy(whole, 0.5, batch=2, dtype=torch.float32)
    alone, spread = (ps.EquivariantLocalScore(bank, 5) for bank in (whole, parts[rank]))
    spread = ps.Sharded(spread)
    assert isinstance(spread.bank, SpreadBank)
    assert size == 3
    assert torch.equal(spread.bank.chunk(2, 11), whole.chunk(2, 11))
    assert torch.equal(spread.bank.select(7).chunk(0, 1), whole.select(7).chunk(0, 1))
    assert (spread.denoise(z, 0.5, [None, 7]) - alone.denoise(z, 0.5, [None, 7])).abs().max() <= SAME
    assert torch.equal(*(ps.explain(machine, z, 0.5, [None, 2], 4).image for machine in (alone, spread)))
    gaussian, expected = ps.GaussianScore(spread.bank), ps.GaussianScore(whole)
    assert (gaussian.denoise(z, 3.0) - expected.denoise(z, 3.0)).abs().max() <= SAME
    return spread.bank.fingerprint


def test_every_rank_may_have_a_file_of_its_own():
    assert len(set(launched(3, check_parts_of_files))) == 1


def check_samples(folder):
    """The rms error of estimates over ranks in units of the rms that they state, by design."""
    bank = ps.PatchBank(smooth_images(400, 3, 12, 12, seed=3))
    own, ranks = ps.shard(bank), join()
    exact = ps.EquivariantLocalScore(bank, 3)
    index = ps.PatchIndex.build(own, 3, f"{folder}/{ranks.rank}", cells=64, progress=False)
    designs = {"images": {"budget": 0.2}, "cells": {"index": index, "budget": 0.05}}
    found = {}
    for name, options in designs.items():
        squares = torch.zeros(2)
        for seed in range(DRAWS):
            machine = ps.Sharded(ps.EquivariantLocalScore(own, 3, engine="pruned", seed=seed, **options))
            z = noisy(bank, 1.0, seed=seed, dtype=torch.float32)
            estimate = machine.estimate(z, 1.0)
            assert "pruned" in estimate.engine
            assert torch.equal(estimate.mean, machine.denoise(z, 1.0))
            # The definition: the sums of all ranks, merged.
            mine, _ = machine.machine.sums_of(None, z, torch.ones(1, dtype=torch.float64), 3)
            parts = [ranks.stack(field).unbind() for field in mine.fields.values()]
            merged = merge_all(
                PosteriorSum(**dict(zip(mine.fields, part, strict=True))) for part in zip(*parts, strict=True)
            )
            assert (merged.mean - estimate.mean).abs().max() <= SAME
            assert torch.allclose(estimate.stderr.double(), merged.stderr, rtol=ERRORS, atol=SAME)
            interior = (..., slice(1, -1), slice(1, -1))
            wrong, stated = (estimate.mean - exact.denoise(z, 1.0))[interior], estimate.stderr[interior]
            squares += torch.stack([wrong.square().mean(), stated.square().mean()])
        found[name] = (squares[0] / squares[1]).sqrt().item()
    return found


DRAWS = 8


def test_samples_over_ranks_have_the_standard_error_of_their_sum(tmp_path):
    for scores in launched(2, check_samples, str(tmp_path)):
        # Pixels share what is drawn, so there are as many independent errors as draws: three standard errors of a rms.
        assert max(scores.values()) <= 1 + 3 / (2 * DRAWS) ** 0.5, scores


def check_shards(folder):
    """What a machine over four shards of an index makes of an image, by however many ranks."""
    bank, ranks = ps.PatchBank(smooth_images(120, 3, 12, 12, seed=3), torch.arange(120) % 3), join()
    if ranks.size == 2:
        build_shards(bank, 3, folder, 4, cells=64, progress=False)
    ranks.agree({}, "")
    indexes = open_shards(folder, bank)
    machines = [ps.EquivariantLocalScore(index.bank, 3, engine="pruned", index=index, budget=0.05) for index in indexes]
    machine = ps.Sharded(ps.Pooled(machines))
    assert len(indexes) == 4 // ranks.size
    z = noisy(bank, 1.0, batch=2, dtype=torch.float32)
    found = machine.estimate(z, 1.0, [None, 1])
    assert "pruned" in found.engine
    alone, spread = (ps.explain(of, z, 1.0, [None, 2], 4) for of in (ps.EquivariantLocalScore(bank, 3), machine))
    assert torch.equal(alone.image, spread.image)
    return found.mean.tolist(), found.stderr.tolist(), found.pairs


def test_an_index_in_shards_gives_the_same_numbers_on_any_number_of_ranks(tmp_path):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    found = [launched(size, check_shards, str(tmp_path / "index"))[0] for size in (2, 1, 4)]
    for mean, stderr, pairs in found[1:]:
        assert np.abs(np.array(mean) - np.array(found[0][0])).max() <= SAME
        assert np.allclose(stderr, found[0][1], rtol=2 * ERRORS, atol=SAME)
        assert pairs == found[0][2]
    bank = ps.PatchBank(smooth_images(120, 3, 12, 12, seed=3), torch.arange(120) % 3)
    with pytest.raises(ValueError, match="in 4 shards for 5 ranks"):
        open_shards(tmp_path / "index", bank, Ranks(0, 5))
    with pytest.raises(ValueError, match="in 4 shards, asked for 3"):
        build_shards(bank, 3, tmp_path / "index", 3)
    with pytest.raises(ValueError, match="no index in shards here"):
        open_shards(tmp_path, bank)
    (tmp_path / "index" / "shard-001-of-004").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="shard-001-of-004: no index here"):
        open_shards(tmp_path / "index", bank)


def check_refusals():
    """The message that each wrong call has on this rank."""
    ranks = join()
    bank, other = whole_bank(), ps.PatchBank(smooth_images(20, 3, 12, 10, seed=9), LABELS)
    own = ps.shard(bank)
    last = ranks.rank == ranks.size - 1
    machine = ps.Sharded(ps.LocalScore(own, 3))
    z = noisy(bank, 0.5, batch=2, dtype=torch.float32)

    def over(own, *arguments, **options):
        return lambda: ps.Sharded(ps.LocalScore(own, *arguments, **options))

    calls = {
        "another bank": over(ps.shard(other if last else bank), 3),
        "another part": over(bank if last else own, 3),
        "the same images": over(bank, 3),
        "another size": over(own, 5 if last else 3),
        "another seed": over(own, 3, budget=0.5, seed=3 * last),
        "another z": lambda: machine.denoise(z + last, 0.5),
        "another sigma": lambda: machine.denoise(z, 0.5 + last),
        "another label": lambda: machine.denoise(z, 0.5, 1 + last),
        "another batch": lambda: machine.denoise(z[: 2 - last], 0.5),
        "another sample seed": lambda: ps.sample(machine, n=1, steps=4, seed=3 * last, progress=False),
        "another vjp": lambda: machine.vjp(z, 0.5, z + last),
    }
    found = {name: raised(ValueError, call) for name, call in calls.items()}
    # One rank fails by itself: the others say which, and why.
    broken = ps.Sharded(ps.LocalScore(own, 3, memory_limit=1 if last else 2**31, engine="reference"))
    for name in ("denoise", "vjp"):
        arguments = (z, 0.5, z)[: 3 if name == "vjp" else 2]
        found[name] = raised(ValueError if last else ps.RankError, getattr(broken, name), *arguments)
    assert torch.isfinite(machine.denoise(z, 0.5)).all()  # and the ranks still understand each other
    return found


def test_ranks_that_do_not_fit_together_are_named():
    first, _, last = launched(3, check_refusals)
    assert {name: text for name, text in first.items() if text != last[name]}.keys() == {"denoise", "vjp"}
    for name, text in first.items():
        assert "\n" not in text
        assert "rank 2" in text or "ranks 0 and 1" in text, (name, text)
    for name, begins in {
        "another bank": "bank: rank 0 has",
        "another size": "patch_size: rank 0 has 3, rank 2 has 5",
    }.items():
        assert first[name].startswith(begins), first[name]
    assert first["another seed"].startswith("seed: rank 0 has 0, rank 2 has 3")
    assert first["denoise"].startswith("rank 2 of 3 failed: memory_limit: got 1 bytes")


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("labels", [None, [0] * 9 + [1] * 5 + [2] * 2, [i % 5 for i in range(33)], list(range(9))])
def test_ranks_get_equal_shares_of_every_class_in_one_piece(labels, ranks):
    count = 40 if labels is None else len(labels)
    owned = owners(None if labels is None else torch.tensor(labels), count, ranks)
    counts = torch.bincount(owned, minlength=ranks)
    assert counts.max() - counts.min() <= 1
    for label in set(labels or [0]):
        some = owned if labels is None else owned[torch.tensor(labels) == label]
        each = torch.bincount(some, minlength=ranks)
        assert each.max() - each.min() <= 1
        assert (some.diff() >= 0).all()


def test_one_process_is_one_rank():
    bank = whole_bank()
    machine = ps.Sharded(ps.EquivariantLocalScore(ps.shard(bank), 5))
    z = noisy(bank, 0.5, dtype=torch.float32)
    assert torch.equal(machine.denoise(z, 0.5), ps.EquivariantLocalScore(bank, 5).denoise(z, 0.5))
    assert machine.bank is bank
    assert machine.ranks == Ranks()
    assert repr(machine).endswith("rank 0 of 1)")


def test_what_is_no_machine_over_a_part_is_refused(bank):
    machine = ps.LocalScore(bank, 3)
    measured = ps.conditioned.downsampling(2)
    zeros = torch.zeros(1, *measured(torch.zeros(1, *bank.shape)).shape[1:])
    for other in (
        3,
        bank,
        ps.GaussianScore(bank),
        ps.PatchAverage(bank, 3),
        theories.SmoothedScore(bank, 0.1),
        theories.GoldenSubset(bank),
        theories.NearestScore(bank),
        theories.PcaLocality(bank),
        theories.PatchComposition(bank, 3),
        ps.Guided(machine, machine, 2.0),
        ps.Switch([(1.0, machine), (9.0, machine)]),
        ps.Conditioned(machine, measured, zeros, 0.1),
        ps.Differentiable(machine),
        ps.Sharded(machine),
    ):
        match = f"^machine: got {type(other).__name__}, takes IdealScore, LocalScore, EquivariantLocalScore, or [^\n]*$"
        with pytest.raises(TypeError, match=match):
            ps.Sharded(other)
    with pytest.raises(TypeError, match="bank: got int"):
        ps.shard(3)
    with pytest.raises(ValueError, match="bank: 20 images for 21 ranks"):
        ps.shard(bank, Ranks(0, 21))
    with pytest.raises(ValueError, match="bank: part 0 of 2 is on none of 1 ranks"):
        ps.Sharded(ps.IdealScore(ps.shard(bank, Ranks(1, 2))))
