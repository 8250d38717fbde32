"""Products with the Jacobian by `sliding`: those of `reference` in float64, by running sums forwards and back."""

import numpy as np
import pytest
import torch
from competitions import LIMIT, broken, circular, local
from conftest import smooth_images

import patchscore as ps
from patchscore.engines.reference import Reference
from patchscore.engines.sliding.cpu import SlidingCpu
from patchscore.windows import WHOLE_IMAGE, Axis, Competition, Group

native = pytest.importorskip("patchscore._native", reason="the C++ extension was not built")


def compare(bank, competition, sigma, seed=1, scale=1.0):
    """Both products against `reference`: 1e-3 of the largest entry of each item."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x0 = bank.chunk(0, 1).expand(len(sigma), -1, -1, -1)
    z = scale * x0 + sigma.float()[:, None, None, None] * torch.randn(x0.shape, generator=generator)
    direction = torch.randn(z.shape, generator=generator)
    for transposed in (True, False):
        got = SlidingCpu().product(transposed, z, sigma, direction, bank, competition, LIMIT)
        expected = Reference().product(transposed, z.double(), sigma, direction.double(), bank, competition, LIMIT)
        # Where one window has all the weight the Jacobian vanishes, and what is left is rounding: 1e-4 of D itself.
        largest = expected.abs().flatten(1).amax(1).clamp(min=0.1)
        error = (got - expected).abs().flatten(1).amax(1)
        assert (error <= 1e-3 * largest).all(), (transposed, error / largest)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3, 5, 9, 11])
@pytest.mark.parametrize("kind", [circular, broken, local])
def test_products_are_the_references(kind, k, channels):
    height, width = (11, 14) if channels % 2 else (13, 11)
    compare(ps.PatchBank(smooth_images(19, channels, height, width)), kind(k, height, width), [0.1, 0.4, 2.0])


@pytest.mark.parametrize("simd", native.simd_levels())
@pytest.mark.parametrize("kind", [circular, broken])
def test_every_instruction_set_and_few_images(simd, kind, monkeypatch):
    monkeypatch.setenv("PATCHSCORE_SIMD", simd)
    for count in (1, 17):
        compare(ps.PatchBank(smooth_images(count, 3, 13, 11)), kind(7, 13, 11), [0.2, 20.0])


@pytest.mark.parametrize("k", [13, 21])
def test_windows_wider_than_the_image(k):
    compare(ps.PatchBank(smooth_images(9, 3, 14, 12)), local(k, 14, 12), [0.3, 1.0])
    compare(ps.PatchBank(smooth_images(9, 3, 14, 12)), broken(k, 14, 12), [0.3, 1.0])


def test_distances_of_thousands_of_nats_are_taken_in_float64():
    bank = ps.PatchBank(smooth_images(9, 3, 12, 12))
    compare(bank, circular(5, 12, 12), [0.05], scale=2.0)
    compare(bank, local(23, 12, 12), [0.1], scale=2.0)


def test_whole_images():
    compare(ps.PatchBank(smooth_images(30, 3, 6, 5)), WHOLE_IMAGE, [0.3, 1.0])


def test_images_wider_than_a_strip():
    compare(ps.PatchBank(smooth_images(2, 1, 18, 170)), circular(9, 18, 170), [0.5])


def test_any_part_of_the_pixels():
    # Queries that are a part of a circular axis, whose boxes wrap; and a part of a free one against other windows.
    bank = ps.PatchBank(smooth_images(9, 2, 12, 10))
    compare(
        bank, Competition(5, "circular", (Group(Axis(range(3, 12), range(2, 10)), Axis(range(6), range(2, 8))),)), [0.5]
    )
    compare(
        bank, Competition(3, "zeros", (Group(Axis(range(1, 5), range(2, 9)), Axis(range(2, 9), range(1, 3))),)), [0.5]
    )
    compare(bank, Competition(3, "zeros", (Group(Axis(range(4)), Axis(range(2, 9), range(1, 9))),)), [0.5])


def test_products_do_not_depend_on_threads_batch_or_selection():
    bank = ps.PatchBank(smooth_images(50, 3, 11, 12), torch.arange(50) % 2)
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    z, u = torch.randn(2, 2, 3, 11, 12, generator=torch.Generator().manual_seed(4))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = SlidingCpu().product(True, z, sigma, u, bank, broken(5, 11, 12), LIMIT)
        torch.set_num_threads(3)
        three = SlidingCpu().product(True, z, sigma, u, bank, broken(5, 11, 12), LIMIT)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)
    alone = SlidingCpu().product(True, z[1:], sigma[1:], u[1:], bank, broken(5, 11, 12), LIMIT)
    assert torch.equal(alone, one[1:])
    chosen = SlidingCpu().product(True, z, sigma, u, bank.select(1), broken(5, 11, 12), LIMIT)
    copied = ps.PatchBank(bank.images[1::2].clone())
    assert torch.equal(chosen, SlidingCpu().product(True, z, sigma, u, copied, broken(5, 11, 12), LIMIT))


def test_vjp_is_the_dual_of_jvp(bank):
    machine = ps.EquivariantLocalScore(bank, 5, engine="sliding")
    z = bank.chunk(0, 2) + 0.5 * torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    u, t = torch.randn(2, *z.shape, generator=torch.Generator().manual_seed(5))
    left, right = (machine.vjp(z, 0.5, u) * t).double().sum(), (machine.jvp(z, 0.5, t) * u).double().sum()
    scale = (machine.vjp(z, 0.5, u).norm() * t.norm()).item()
    assert abs(left - right).item() < 1e-5 * scale


def test_what_does_not_fit_is_refused(bank):
    machine = ps.EquivariantLocalScore(bank, 5, engine="sliding")
    z = torch.zeros(1, 3, 12, 10)
    with pytest.raises(ValueError, match=r'^z: got float64, engine "sliding" has gradients in float32'):
        machine.vjp(z.double(), 0.5, z.double())
    with pytest.raises(ValueError, match=r"memory_limit: got 1000 bytes, one thread takes"):
        SlidingCpu().product(True, z, torch.ones(1), z, bank, broken(5, 12, 10), 1000)
    arguments = {
        "transposed": True,
        "averaging": False,
        "z": z.numpy(),
        "sigma": np.ones(1),
        "images": bank.images.numpy(),
        "indices": None,
        "patch_size": 5,
        "circular": False,
        "groups": np.array([[2, 10, 2, 10, 2, 8, 2, 8]], np.int64),
        "evidence": np.zeros((1, 1, 12, 10)),
        "mean": np.zeros((1, 3, 12, 10)),
        "direction": z.numpy(),
        "result": np.zeros((1, 3, 12, 10)),
        "threads": 1,
        "memory_limit": LIMIT,
        "simd": "",
    }
    native.sliding_product(**arguments)
    for change in (
        {"patch_size": 0},
        {"evidence": np.zeros((1, 12, 10))},
        {"mean": np.zeros((1, 3, 12, 10), np.float32)},
        {"direction": np.zeros((1, 3, 12, 10))},
        {"result": np.zeros((1, 3, 10, 12))},
        {"groups": np.array([[2, 10, 0, 10, 2, 8, 2, 8]], np.int64)},
    ):
        with pytest.raises(ValueError, match=r"\w+: "):
            native.sliding_product(**arguments | change)
