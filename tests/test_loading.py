"""Networks of others from files: diffusers folders with real UNets of random weights, TorchScript, EDM's convention."""

import json
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import noisy, smooth_images

import patchscore as ps
from patchscore.adapters.load import LEVELS, load_diffusers, load_torchscript
from patchscore.adapters.network import from_diffusers, from_edm
from patchscore.cli import main

try:
    import diffusers
except ImportError:
    diffusers = None
needs_diffusers = pytest.mark.skipif(diffusers is None, reason="diffusers cannot be imported")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SHAPE = (1, 16, 16)


@pytest.fixture
def gray():
    return ps.PatchBank(smooth_images(12, *SHAPE), torch.arange(12) % 2)


def unet(classes=None):
    """A UNet2DModel with attention, of random weights."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    ).eval()


def save(folder, model, scheduler, nested=True):
    """As a pipeline's folder, or both in one place."""
    model.save_pretrained(folder / "unet" if nested else folder)
    scheduler.save_pretrained(folder / "scheduler" if nested else folder)


@needs_diffusers
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_folder_of_diffusers_is_its_unet_at_the_schedulers_levels(gray, tmp_path, prediction, nested):
    model, scheduler = unet(), diffusers.DDPMScheduler(prediction_type=prediction)
    save(tmp_path, model, scheduler, nested)
    denoiser = load_diffusers(tmp_path)
    assert denoiser.shape == SHAPE
    z = noisy(gray, 1.0, 2, dtype=torch.float32)
    for step in (20, 500):
        alpha2 = scheduler.alphas_cumprod[step].double()
        alpha, sigma_t = alpha2.sqrt(), (1 - alpha2).sqrt()
        x = (alpha * z.double()).float()
        with torch.no_grad():
            out = model(x, torch.tensor(step)).sample.double()
        expected = {
            "epsilon": (x - sigma_t * out) / alpha,
            "v_prediction": alpha * x - sigma_t * out,
            "sample": out,
        }[prediction]
        found = denoiser.denoise(z, (sigma_t / alpha).item()).double()
        # The timestep is interpolated back from sigma, to about 1e-4 of a step in float32.
        torch.testing.assert_close(found, expected, atol=2e-3 * (1 + (sigma_t / alpha).item()), rtol=0)


@needs_diffusers
def test_a_flow_matching_folder_predicts_velocities(gray, tmp_path):
    model = unet()
    save(tmp_path, model, diffusers.FlowMatchEulerDiscreteScheduler())
    denoiser = load_diffusers(tmp_path)
    z = noisy(gray, 1.0, 2, dtype=torch.float32)
    for t in (0.25, 0.8):
        x = (1 - t) * z
        with torch.no_grad():
            expected = x - t * model(x, torch.tensor([1000 * t] * 2)).sample
        torch.testing.assert_close(denoiser.denoise(z, t / (1 - t)), expected, atol=1e-4, rtol=0)


def test_velocities_of_a_known_denoiser_give_it_back(gray):
    """u = eps - x_0 = (x - D) / t, at t told as it is by default."""
    machine = ps.LocalScore(gray, 3)

    def network(x, t):
        at = t[:, None, None, None]
        return (x - machine.denoise(x / (1 - at), t / (1 - t))) / at

    denoiser = ps.NetworkDenoiser(network, SHAPE, "flow", "flow")
    z, sigmas = noisy(gray, 0.8, 2), torch.tensor([0.3, 2.0])
    torch.testing.assert_close(denoiser.denoise(z, sigmas), machine.denoise(z, sigmas), atol=1e-4, rtol=0)
    for prediction, scaling in (("flow", "preserving"), ("v", "flow")):
        with pytest.raises(ValueError, match=f'prediction: got "{prediction}"'):
            ps.NetworkDenoiser(network, SHAPE, prediction, scaling)


@needs_diffusers
def test_class_embeddings_ask_for_a_class(gray, tmp_path):
    save(tmp_path, unet(classes=2), diffusers.DDPMScheduler())
    denoiser = load_diffusers(tmp_path)
    z = noisy(gray, 1.0, dtype=torch.float32)
    assert not torch.equal(denoiser.denoise(z, 1.0, 0), denoiser.denoise(z, 1.0, 1))
    with pytest.raises(ValueError, match="labels: this network takes a class for every image"):
        denoiser.denoise(z, 1.0)
    with pytest.raises(ValueError, match="unknown label 2"):
        denoiser.denoise(z, 1.0, 2)


class Edm(torch.nn.Module):
    """EDM's convention: D(z; sigma) with one-hot class labels; it keeps what it is called with."""

    img_channels, img_resolution, label_dim = 1, 16, 2

    def forward(self, z, sigma, class_labels=None):
        self.given = class_labels
        shift = 0 if class_labels is None else class_labels @ torch.tensor([1.0, 2.0])
        return z / (1 + sigma[:, None, None, None] ** 2) + torch.as_tensor(shift).reshape(-1, 1, 1, 1)


def test_edm_networks_take_one_hot_labels(gray):
    network = Edm()
    denoiser = from_edm(network)
    assert denoiser.shape == SHAPE
    z, sigmas = noisy(gray, 1.0, 3, dtype=torch.float32), torch.tensor([0.5, 1.0, 2.0])
    found = denoiser.denoise(z, sigmas, [1, None, 0])
    assert network.given.tolist() == [[0, 1], [0, 0], [1, 0]]
    scaled = z / (1 + sigmas[:, None, None, None] ** 2)
    torch.testing.assert_close(found, scaled + torch.tensor([2.0, 0.0, 1.0])[:, None, None, None])
    denoiser.denoise(z, 1.0)
    assert network.given.tolist() == [[0, 0]] * 3
    network.label_dim = 0
    plain = from_edm(network)
    plain.denoise(z, 1.0)
    assert network.given is None
    with pytest.raises(ValueError, match="labels: this network was trained without labels"):
        plain.denoise(z, 1.0, 0)
    with pytest.raises(ValueError, match="shape: the network has no img_channels"):
        from_edm(lambda z, sigma, labels: z)


class Scaled(torch.nn.Module):
    """Predicts what its level says, to see how it is called."""

    def forward(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return level.reshape(-1, 1, 1, 1).expand_as(x)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "scaled.ts"
    torch.jit.save(torch.jit.script(Scaled()), path)
    return path


@pytest.mark.parametrize(
    ("level", "expected"), [("sigma", 0.7), ("edm", np.log(0.7) / 4), ("flow", 0.7 / 1.7), ("ddpm", None)]
)
def test_a_torchscript_network_is_told_the_level_in_its_own_units(gray, script, level, expected):
    found = load_torchscript(script, SHAPE, "x0", level=level).denoise(noisy(gray, 0.7), 0.7)
    value = found.flatten()[0].item()
    if level == "ddpm":
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        alphas = (1 - betas).cumprod(0)
        below = int(((1 - alphas) / alphas < 0.49).sum())
        assert below - 1 <= value <= below
    else:
        assert value == pytest.approx(expected, abs=1e-6)


def test_what_a_torchscript_network_predicts_is_named(gray, script):
    z = noisy(gray, 0.7)
    eps = load_torchscript(script, SHAPE).denoise(z, 0.7)
    torch.testing.assert_close(eps, z - 0.7 * 0.7, atol=1e-6, rtol=0)
    flow = load_torchscript(script, SHAPE, "flow", level="flow").denoise(z, 0.7)
    t = 0.7 / 1.7
    torch.testing.assert_close(flow, (1 - t) * z - t * t, atol=1e-6, rtol=0)


def test_levels_of_ddpm_are_its_timesteps():
    level = LEVELS["ddpm"]()
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    for step in (0, 10, 999):
        sigma = ((1 - alphas[step]) / alphas[step]).sqrt().item()
        assert level(sigma) == pytest.approx(step, abs=1e-6)
    assert level(1e-6) == 0
    assert level(1e6) == 999


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def source(tmp_path, gray):
    np.savez(tmp_path / "bank.npz", images=gray.images.numpy(), labels=gray.labels.numpy())
    return tmp_path / "bank.npz"


@needs_diffusers
def test_commands_take_a_folder_of_diffusers(source, tmp_path):
    save(tmp_path / "model", unet(classes=2), diffusers.DDPMScheduler())
    words = ("--steps", 3, "-n", 1, "--table", 3, "--theories", "els-zeros,ideal", "--out", tmp_path / "out")
    done = run("compare", source, f"diffusers:{tmp_path / 'model'}", *words)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report["labels"] == [0]  # the network takes labels, so auto gives it the bank's
    words = ("--steps", 3, "-n", 1, "--patch-sizes", "3,5", "--out", tmp_path / "c")
    assert run("calibrate", source, f"diffusers:{tmp_path / 'model'}", *words).exit_code == 0


def test_commands_take_torchscript(source, script, tmp_path):
    words = ("--steps", 3, "-n", 1, "--table", 3, "--theories", "ideal", "--out", tmp_path / "out")
    done = run("compare", source, script, *words, "--prediction", "flow", "--level", "flow")
    assert done.exit_code == 0, done.output
    assert "labels none: the network takes none" in done.output


@needs_diffusers
@pytest.mark.parametrize(
    ("network", "more", "message"),
    [
        ("diffusers:empty", [], "empty: no unet of diffusers there"),
        ("diffusers:absent/model", [], "absent/model: no such folder, not in the hub's cache, and the hub cannot be"),
        ("diffusers:no/such/model", [], "no/such/model: no such folder, and no model of that name on the hub"),
        ("diffusers:vae", [], "its unet is a AutoencoderKL, takes UNet2DModel"),
        ("diffusers:unet-alone", [], "no scheduler of diffusers there"),
        ("diffusers:edm", [], "scheduler: got EDMEulerScheduler, takes one of flow matching"),
        ("diffusers:model", ["--size", "12"], "is for 1 x 16 x 16 images, SOURCE has 1 x 12 x 12; --size"),
        ("diffusers:model", ["--prediction", "v"], "--prediction, --scaling, --level: take a TorchScript file"),
        ("broken.ts", [], "not a TorchScript file"),
        ("scaled.ts", ["--prediction", "v", "--scaling", "exploding"], 'prediction: got "v"'),
        ("nothing", [], "NETWORK: got 'nothing', takes a file"),
    ],
)
def test_a_network_that_cannot_be_taken_is_one_line(source, script, tmp_path, monkeypatch, network, more, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    if network == "diffusers:unet-alone":
        unet().save_pretrained(tmp_path / "unet-alone")
    if network == "diffusers:edm":
        save(tmp_path / "edm", unet(), diffusers.EDMEulerScheduler())
    if network == "diffusers:model":
        save(tmp_path / "model", unet(), diffusers.DDPMScheduler())
    with zipfile.ZipFile(tmp_path / "broken.ts", "w") as archive:
        archive.writestr("broken/code/__torch__.py", "no code")
    done = run("compare", source, network, "--steps", 3, "-n", 1, "--table", 3, *more)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert len([line for line in done.output.splitlines() if line.startswith("patchscore: error")]) == 1


@needs_diffusers
def test_no_pickle_is_loaded(tmp_path):
    """Weights as a pickle alone are refused, whatever is in them."""
    model = unet()
    model.save_pretrained(tmp_path, safe_serialization=False)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(ValueError, match="its unet cannot be loaded"):
        load_diffusers(tmp_path)
    assert from_diffusers(model, diffusers.DDPMScheduler()).shape == SHAPE
