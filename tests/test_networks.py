"""The small networks, their files, their training, and networks of others as denoisers."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noisy, smooth_images
from safetensors.torch import save_file

import patchscore as ps
from patchscore.adapters.network import from_diffusers, from_network
from patchscore.networks import ARCHITECTURES, Attention, CircularConv, ResNet, UNet, Wrap, load_network, save_network

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "examples" / "train_cnn.py"


def randomised(network, seed=0):
    """A network as it might be after training: no layer is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return network.eval()


def predicted(network, x):
    return network(x, torch.full((len(x),), 0.7))


def test_a_resnet_sees_exactly_its_receptive_field():
    network = randomised(ResNet(1, width=4, depth=2)).double()
    x = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    middle = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(predicted(network, middle)[0, 0, 15, 15], middle)
    seen = gradient[0, 0].abs() > 0
    reach = 2 * 2 + 2  # two convolutions a block, one on either side
    assert seen[15 - reach : 16 + reach, 15 - reach : 16 + reach].all()
    assert int(seen.sum()) == (2 * reach + 1) ** 2


def test_attention_lets_a_unet_see_the_whole_image(tmp_path):
    """Without it the gradient of a pixel ends at the receptive field; with it every pixel counts, and files keep it."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for attention in (False, True):
        network = randomised(UNet(1, (0, 1), 4, 1, attention=attention)).double()
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(predicted(network, given)[0, 0, 2, 2], given)
        assert bool((gradient[0, 0, 60:, 60:] != 0).any()) == attention
        save_network(network, tmp_path / "unet.safetensors", {}, torch.float64)
        again, _ = load_network(tmp_path / "unet.safetensors")
        assert again.config.get("attention", False) == attention
        torch.testing.assert_close(predicted(again, x.float()), predicted(network, x).float(), atol=1e-4, rtol=1e-4)


def test_attention_is_the_softmax_of_products_and_begins_as_the_identity():
    layer, h = Attention(8), torch.randn(2, 8, 3, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(h), h)
    layer = randomised(layer)
    parts = layer.into(layer.norm(h)).flatten(2)  # [B, 3 x 8, pixels]
    expected = torch.empty(2, 8, 6)
    for head in range(4):
        own = slice(2 * head, 2 * head + 2)
        q, k, v = (parts[:, 8 * i : 8 * i + 8][:, own] for i in range(3))
        weights = torch.einsum("bdi,bdj->bij", q, k).div(2**0.5).softmax(2)
        expected[:, own] = torch.einsum("bij,bdj->bdi", weights, v)
    torch.testing.assert_close(layer(h), h + layer.out(expected.view(2, 8, 3, 2)), atol=1e-5, rtol=1e-5)


def test_circular_padding_makes_a_resnet_equivariant_and_zeros_do_not():
    x = torch.randn(1, 2, 12, 10, generator=torch.Generator().manual_seed(1))
    rolled = x.roll((3, 4), (2, 3))
    for padding_mode, equivariant in (("circular", True), ("zeros", False)):
        network = randomised(ResNet(2, (0, 1), 8, 2, padding_mode))
        apart = (predicted(network, rolled) - predicted(network, x).roll((3, 4), (2, 3))).abs().max()
        assert (apart < 1e-4) == equivariant


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 1, 3), (1, 1, 2, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_wrapping_is_circular_padding_and_has_its_gradient(shape, layout):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    assert torch.equal(Wrap.apply(x), F.pad(x, (1, 1, 1, 1), mode="circular"))
    assert torch.autograd.gradcheck(Wrap.apply, x)
    convolution = CircularConv(shape[1], 2, 3, padding=1, padding_mode="circular").double()
    torch.testing.assert_close(convolution(x), torch.nn.Conv2d.forward(convolution, x))


@pytest.mark.parametrize("architecture", ARCHITECTURES.values())
def test_untrained_networks_answer_noise_for_noise(architecture):
    network = architecture(3, (0, 1), 8, 1)
    x = torch.randn(2, 3, 13, 11)
    torch.testing.assert_close(network(x, torch.tensor([1e3, 1e3])), x, atol=1e-2, rtol=0)
    assert network(x, torch.tensor([0.1, 2.0]), torch.tensor([-1, 1])).shape == x.shape


@pytest.mark.parametrize("architecture", [ResNet, UNet])
def test_files_come_back_as_they_were(tmp_path, architecture):
    network = randomised(architecture(1, (3, 5), 8, 1, "circular"))
    save_network(network, tmp_path / "n.safetensors", {"command": "how"}, torch.float32)
    again, notes = load_network(tmp_path / "n.safetensors")
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(predicted(again, x), predicted(network, x))
    assert notes == {"command": "how"}
    assert again.config == network.config
    save_network(network, tmp_path / "half.safetensors", {})
    half, _ = load_network(tmp_path / "half.safetensors")
    torch.testing.assert_close(predicted(half, x), predicted(network, x), atol=0.05, rtol=0.05)


def test_files_that_are_no_networks_are_refused_by_name(tmp_path):
    path = tmp_path / "n.safetensors"
    with pytest.raises(OSError, match="no such file"):
        load_network(path)
    path.write_bytes(b"not at all")
    with pytest.raises(ValueError, match=r"n\.safetensors: not a usable network"):
        load_network(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a patchscore network"):
        load_network(path)
    save_network(ResNet(1, width=4, depth=1), path, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="not a usable network"):
        load_network(path)
    network = ResNet(1, width=4, depth=1)
    torch.nn.init.constant_(network.enter.weight, math.nan)
    save_network(network, path, {})
    with pytest.raises(ValueError, match="NaN"):
        load_network(path)


CONVENTIONS = {
    "epsilon": lambda x, x0, alpha, sigma: (x - alpha * x0) / sigma,
    "v": lambda x, x0, alpha, sigma: alpha * (x - alpha * x0) / sigma - sigma * x0,
    "x0": lambda x, x0, alpha, sigma: x0,
    "score": lambda x, x0, alpha, sigma: (alpha * x0 - x) / sigma**2,
}


@pytest.mark.parametrize("scaling", ["preserving", "exploding"])
@pytest.mark.parametrize("prediction", CONVENTIONS)
def test_every_convention_gives_the_machine_back(bank, prediction, scaling):
    if (prediction, scaling) == ("v", "exploding"):
        with pytest.raises(ValueError, match="prediction"):
            ps.NetworkDenoiser(lambda x, level: x, bank.shape, "v", "exploding")
        return
    machine = ps.LocalScore(bank, 3)

    def network(x, level, labels=None):
        ratio = level.double().exp()[:, None, None, None]
        alpha = 1.0 if scaling == "exploding" else (1 + ratio**2) ** -0.5
        x0 = machine.denoise(x.double() / alpha, ratio.flatten(), labels)
        return CONVENTIONS[prediction](x, x0, alpha, ratio * alpha).float()

    denoiser = ps.NetworkDenoiser(network, bank.shape, prediction, scaling, level=math.log)
    z = noisy(bank, 0.8, batch=2)
    for labels in (None, [2, 0]):
        expected = machine.denoise(z, torch.tensor([0.8, 0.3]), labels)
        found = denoiser.denoise(z, torch.tensor([0.8, 0.3]), labels)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert ps.sample(denoiser, 2, steps=5, progress=False).shape == (2, *bank.shape)


def test_bad_networks_are_named(bank):
    with pytest.raises(TypeError, match="network"):
        ps.NetworkDenoiser("resnet", bank.shape)
    with pytest.raises(TypeError, match="level: got 't', takes a function"):
        ps.NetworkDenoiser(lambda x, level: x, bank.shape, level="t")
    with pytest.raises(ValueError, match="prediction"):
        ps.NetworkDenoiser(lambda x, level: x, bank.shape, "velocity")
    with pytest.raises(ValueError, match="returned"):
        ps.NetworkDenoiser(lambda x, level: x[:, :1], bank.shape).denoise(noisy(bank, 1.0), 1.0)
    with pytest.raises(ValueError, match="channels"):
        from_network(ResNet(1, width=4, depth=1), bank.shape)
    denoiser = from_network(randomised(ResNet(3, (2, 4), 4, 1)), bank.shape)
    with pytest.raises(ValueError, match="unknown label 3"):
        denoiser.denoise(noisy(bank, 1.0), 1.0, labels=3)
    assert not torch.equal(*(denoiser.denoise(noisy(bank, 1.0), 1.0, labels=label) for label in (2, 4)))


def test_a_diffusers_unet_is_a_denoiser(bank):
    pytest.importorskip("diffusers")
    from diffusers import DDPMScheduler

    from patchscore.adapters.diffusers import PatchScoreUNet

    machine = ps.LocalScore(bank, 3)
    for prediction in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(prediction_type=prediction)
        unet = PatchScoreUNet(machine, scheduler)
        unet.register_parameter("placement", torch.nn.Parameter(torch.zeros(())))
        denoiser = from_diffusers(unet, scheduler, bank.shape)
        z = noisy(bank, 0.7, batch=2)
        found = denoiser.denoise(z, 0.7, labels=[1, 1])
        torch.testing.assert_close(found, machine.denoise(z, 0.7, labels=[1, 1]), atol=2e-4, rtol=0)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """examples/train_cnn.py on twelve small images, in this process."""
    source = tmp_path / "bank.npz"
    np.savez(source, images=smooth_images(12, 1, 8, 8).numpy(), labels=np.arange(12) % 2)
    main = runpy.run_path(str(TRAIN))["main"]

    def run(out, *more):
        words = [TRAIN, source, out, "--width", 8, "--depth", 1, "--batch-size", 4, "--images", 400, *more]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        main()
        return load_network(out) if out.exists() else None

    return run


def test_training_repeats_itself_and_resumes_where_it_was(train, tmp_path):
    network, notes = train(tmp_path / "whole.safetensors", "--keep", 200)
    assert notes["command"].startswith("python ")
    assert notes["images_seen"] == 400
    assert load_network(tmp_path / "whole.200.safetensors")[1]["images_seen"] == 200

    parted = tmp_path / "parted.safetensors"
    assert train(parted, "--stop-after", 60) is None
    again, _ = train(parted)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    with pytest.raises(SystemExit, match="other settings"):
        train(parted, "--lr", 0.1)


def test_the_mean_with_the_least_validation_loss_is_kept(train, tmp_path):
    others = tmp_path / "others.npz"
    # What is learnt of smooth images is soon wrong of a chessboard.
    board = np.indices((8, 8)).sum(0) % 2 * 255
    np.savez(others, images=np.broadcast_to(board, (6, 1, 8, 8)).astype(np.uint8), labels=np.arange(6) % 2)
    words = ("--validation", others, "--validate-every", 20, "--lr", 0.03)
    _, notes = train(tmp_path / "best.safetensors", *words, "--keep", 80, 160, 240, 320)
    assert notes["images_seen"] < 400
    for images in (80, 160, 240, 320):
        of = load_network(tmp_path / f"best.{images}.safetensors")[1]
        assert of["validation_loss"] >= notes["validation_loss"]
        assert (of["validation_loss"] == notes["validation_loss"]) == (images == notes["images_seen"])
    # A validation draws nothing from the training's stream, and an interrupted one keeps its best.
    assert train(tmp_path / "parted.safetensors", *words, "--stop-after", 85) is None
    again, of = train(tmp_path / "parted.safetensors", *words)
    best, _ = load_network(tmp_path / "best.safetensors")
    assert of["images_seen"] == notes["images_seen"]
    for name, weight in best.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    with pytest.raises(SystemExit, match="12 of its 12 images are trained on"):
        train(tmp_path / "own.safetensors", "--validation", tmp_path / "bank.npz")


def test_a_unet_with_attention_is_trained_and_resumed(train, tmp_path):
    words = ("--network", "UNet", "--attention", "--images", 40)
    network, _ = train(tmp_path / "whole.safetensors", *words)
    assert network.config["attention"]
    assert train(tmp_path / "parted.safetensors", *words, "--stop-after", 4) is None
    again, _ = train(tmp_path / "parted.safetensors", *words)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    with pytest.raises(SystemExit):
        train(tmp_path / "resnet.safetensors", "--attention")


def test_the_shipped_network_is_small_and_says_how_it_was_made():
    path = ROOT / "examples" / "fashion-mnist-resnet-zeros.safetensors"
    assert path.stat().st_size < 3_000_000
    network, notes = load_network(path)
    bank = ps.PatchBank.open("fashion-mnist")
    assert notes["command"].startswith("python examples/train_cnn.py fashion-mnist examples/")
    assert notes["bank"]["fingerprint"] == bank.fingerprint
    assert not re.search(r"[ \"'](/|\.\.)", json.dumps(notes))  # no paths of the machine it was made on
    table = ps.ScaleTable.load(path.with_suffix(".json"))
    assert list(table.sizes) == sorted(table.sizes)
    # It denoises better than the mean image does.
    x0 = bank.chunk(0, 8)
    z = x0 + 0.5 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    denoised = from_network(network, bank.shape).denoise(z, 0.5, labels=bank.labels[:8])
    assert (denoised - x0).square().mean() < 0.03
