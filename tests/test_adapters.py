"""Adapters: other people's samplers, the real ones where they are installed, get the numbers of our own."""

import importlib
import importlib.util
import itertools
import math
import sys
import types

import pytest
import torch
from conftest import noisy, smooth_images

import patchscore as ps
from patchscore.adapters.k_diffusion import PatchScoreDenoiser
from patchscore.sampling import image_generator

try:
    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DOutput

    from patchscore.adapters.diffusers import PatchScoreUNet
except ImportError as error:
    diffusers, why = None, str(error)
else:
    why = ""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Should have ta")
needs_diffusers = pytest.mark.skipif(diffusers is None, reason=f"diffusers cannot be imported: {why}")


@pytest.fixture
def machine(bank):
    return ps.LocalScore(bank, 5)


class Recorder(ps.Denoiser):
    """Passes everything on and keeps it."""

    def __init__(self, denoiser):
        self.denoiser, self.shape, self.calls = denoiser, denoiser.shape, []

    def estimate(self, z, sigma, labels=None):
        estimate = self.denoiser.estimate(z, sigma, labels)
        self.calls.append((z, torch.as_tensor(sigma).flatten(), labels, estimate.mean))
        return estimate


def starts(shape, n, seed=0):
    """The noise that image i of `ps.sample` starts from, and the streams it comes from, as they are afterwards."""
    generators = [image_generator(seed, i) for i in range(n)]
    return torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in generators]), generators


def variance_preserving(sigmas, start_std=1.0):
    """A Schedule of noise levels sigma_t / alpha_t, ending clean."""
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    alphas = (1 + sigmas**2) ** -0.5
    return ps.Schedule("of a scheduler", alphas, sigmas * alphas, start_std)


def sigmas_of(scheduler):
    """The scheduler's walk as noise levels sigma_t / alpha_t, ending clean."""
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas.double()
    kept = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1, dtype=torch.float64)])


def loop(unet, scheduler, x, class_labels=None, **options):
    """The loop of diffusers' own examples."""
    for t in scheduler.timesteps:
        predicted = unet(scheduler.scale_model_input(x, t), t, class_labels=class_labels).sample
        x = scheduler.step(predicted, t, x, **options).prev_sample
    return x


# diffusers: what the scheduler makes of our prediction is what the denoiser said.

WALKS = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200}),
    ("DDPMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
]


@needs_diffusers
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("name", "options"), WALKS, ids=lambda value: str(value))
def test_the_denoiser_is_asked_at_the_schedulers_own_level_for_what_it_predicts(
    name, options, prediction_type, machine
):
    """z is the sampler's x brought back to z = x_0 + sigma eps, at every step of every walk."""
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    if prediction_type == "epsilon" and "rescale_betas_zero_snr" in options:
        pytest.skip("epsilon says nothing of x_0 in pure noise")
    if prediction_type == "sample" and name.startswith(("KDPM2", "LMS", "EulerAncestral")):
        pytest.skip(f"{name} does not take sample prediction")
    if prediction_type == "sample" and name.startswith("PNDM"):
        pytest.skip("PNDM combines several predictions into one")
    try:
        scheduler = getattr(diffusers, name)(prediction_type=prediction_type, **options)
        scheduler.set_timesteps(9)
    except ImportError as error:
        pytest.skip(str(error))
    seen = Recorder(machine)
    unet = PatchScoreUNet(seen, scheduler).to(torch.float64)
    x = starts(machine.shape, 2)[0] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        predicted = unet(x_in, t).sample
        z, sigma, _, x0 = seen.calls[-1]
        shrink = (1 + sigma[0] ** 2).sqrt()
        assert torch.allclose(z, x_in * shrink, rtol=1e-12)
        if x_in is not x:  # a scheduler that scales its input walks in z itself, and says at which sigma
            assert torch.allclose(z, x, rtol=1e-6)
        # The three predictions are the same statement about x_0.
        alpha_t, sigma_t = 1 / shrink, sigma[0] / shrink
        recovered = {
            "epsilon": (x_in - sigma_t * predicted) / alpha_t,
            "v_prediction": alpha_t * x_in - sigma_t * predicted,
            "sample": predicted,
        }
        assert torch.allclose(recovered[prediction_type], x0, rtol=0, atol=1e-11 * shrink**2)
        stepped = scheduler.step(predicted, t, x)
        own = getattr(stepped, "pred_original_sample", None)
        if own is not None and not scheduler.config.get("clip_sample"):
            assert (own - x0).abs().max() < 1e-4 * max(1, sigma[0] / 10)
        x = stepped.prev_sample
    assert x.isfinite().all()


def unclipped(name, **options):
    """A scheduler that leaves x_0 as it is; a denoiser's means need no clipping."""
    clip = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    return getattr(diffusers, name)(**clip, **options)


FIRST_ORDER = [
    ("DDIMScheduler", {}, "ddim"),
    ("DDIMScheduler", {"timestep_spacing": "trailing"}, "ddim"),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, "ddim"),
    ("EulerDiscreteScheduler", {}, "euler"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, "euler"),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, "heun"),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, "ddim"),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "use_karras_sigmas": True}, "ddim"),
    ("UniPCMultistepScheduler", {"solver_order": 1, "disable_corrector": list(range(10))}, "ddim"),
]


@needs_diffusers
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("name", "options", "sampler"), FIRST_ORDER, ids=lambda value: str(value))
def test_schedulers_give_our_own_samples_where_they_coincide(name, options, sampler, prediction_type, machine):
    scheduler = unclipped(name, prediction_type=prediction_type, **options)
    scheduler.set_timesteps(10)  # divides 1,000, as DDIMScheduler assumes
    sigmas = sigmas_of(scheduler)
    if sampler == "heun":
        sigmas = torch.cat([sigmas[:-1:2], sigmas[-1:]])  # each inner level is listed twice
    noise, _ = starts(machine.shape, 3, seed=2)
    labels = ["red", None, "blue"]
    x = noise * scheduler.init_noise_sigma
    ours = ps.sample(
        machine,
        3,
        schedule=variance_preserving(sigmas, float(scheduler.init_noise_sigma) * start_scale(scheduler)),
        sampler=sampler,
        labels=labels,
        seed=2,
    )
    theirs = loop(PatchScoreUNet(machine, scheduler), scheduler, x.float(), labels)
    assert (theirs.clamp(-1, 1) - ours).abs().max() < 1e-4


def start_scale(scheduler):
    """alpha_t at the start where the scheduler's x is z itself: `Schedule.start_std` is for x = alpha z."""
    scales = type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")
    return 1 / math.sqrt(1 + float(scheduler.sigmas[0]) ** 2) if scales else 1.0


@needs_diffusers
def test_ddim_pipeline_gives_the_samples_of_ours(machine):
    scheduler = diffusers.DDIMScheduler(1000)
    pipeline = diffusers.DDIMPipeline(unet=PatchScoreUNet(machine, scheduler), scheduler=scheduler).to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(torch.float64)
    noise, _ = starts(machine.shape, 2, seed=5)
    generators = [image_generator(5, i) for i in range(2)]
    theirs = pipeline(batch_size=2, generator=generators, num_inference_steps=20, output_type="pt").images * 2 - 1
    ours = ps.sample(machine, 2, schedule=variance_preserving(sigmas_of(pipeline.scheduler)), seed=5, dtype=noise.dtype)
    assert (theirs - ours).abs().max() < 1e-6


@needs_diffusers
def test_ddpm_pipeline_draws_the_samples_of_ours(machine):
    """The same noise in the same order; variance and mean of every step are the same posterior's."""
    scheduler = diffusers.DDPMScheduler(1000, clip_sample=False)
    unet = PatchScoreUNet(machine, scheduler, class_labels=["red", "green"]).to(torch.float64)
    pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [image_generator(1, i) for i in range(2)]
    theirs = pipeline(batch_size=2, generator=generators, num_inference_steps=20, output_type="pt").images * 2 - 1
    levels = variance_preserving(sigmas_of(scheduler))
    ours = ps.sample(machine, 2, schedule=levels, sampler="ddpm", labels=[0, 1], seed=1, dtype=torch.float64)
    assert (theirs - ours).abs().max() < 1e-4


@needs_diffusers
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_multistep_schedulers_come_nearer_to_the_flow_than_ddim(name, bank):
    """At 25 steps they are nearer to the exact solution, and their error falls faster than DDIM's."""
    score, errors = ps.GaussianScore(bank), {}
    noise, _ = starts(score.shape, 2)
    for scheduler_name in (name, "DDIMScheduler"):
        for steps in (25, 50):
            scheduler = unclipped(scheduler_name, timestep_spacing="trailing")
            scheduler.set_timesteps(steps)
            sigmas = sigmas_of(scheduler)
            x = noise * scheduler.init_noise_sigma
            z = x * (1 + sigmas[0] ** 2).sqrt()
            exact = score.flow(z, sigmas[0], 1e-6)
            images = loop(PatchScoreUNet(score, scheduler).to(torch.float64), scheduler, x)
            errors[scheduler_name, steps] = (images - exact).square().mean().sqrt().item()
    assert errors[name, 25] < errors["DDIMScheduler", 25] / 2
    assert errors[name, 50] < errors[name, 25] / 2


@needs_diffusers
def test_guidance_runs_inside_a_pipeline(machine):
    guided, scheduler = ps.Guided(machine, machine, 3.0), diffusers.DDIMScheduler(1000, clip_sample=False)
    unet = PatchScoreUNet(guided, scheduler, class_labels="red").to(torch.float64)
    pipeline = diffusers.DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(1, generator=[image_generator(0, 0)], num_inference_steps=8, output_type="pt").images * 2 - 1
    levels = variance_preserving(sigmas_of(pipeline.scheduler))
    ours = ps.sample(guided, 1, schedule=levels, labels="red", dtype=torch.float64)
    assert (images - ours).abs().max() < 1e-6


@needs_diffusers
def test_every_form_of_timestep_means_the_same(machine):
    scheduler = diffusers.DDPMScheduler(1000)
    unet, x = PatchScoreUNet(machine, scheduler), noisy(ps.PatchBank(smooth_images(3, 3, 12, 10)), 0.5, 3).float()
    expected = unet(x, 400).sample
    for t in (400.0, torch.tensor(400), torch.tensor([400]), torch.tensor([400, 400, 400]), torch.tensor(400.0)):
        assert torch.equal(unet(x, t).sample, expected)
    mixed = unet(x, torch.tensor([10, 400, 990])).sample
    for i, t in enumerate((10, 400, 990)):
        assert torch.allclose(mixed[i : i + 1], unet(x[i : i + 1], t).sample, atol=1e-5)


@needs_diffusers
def test_between_whole_timesteps_log_sigma_is_interpolated(machine):
    scheduler = diffusers.DDPMScheduler(1000)
    unet, kept = PatchScoreUNet(machine, scheduler), scheduler.alphas_cumprod.double()
    sigmas = ((1 - kept) / kept).sqrt()
    assert unet.sigmas_at(0, 1)[0] == pytest.approx(sigmas[0].item(), rel=1e-9)
    assert unet.sigmas_at(999, 1)[0] == pytest.approx(sigmas[999].item(), rel=1e-9)
    assert unet.sigmas_at(torch.tensor([20.25]), 1)[0] == pytest.approx(
        (sigmas[20] ** 0.75 * sigmas[21] ** 0.25).item()
    )


@needs_diffusers
def test_a_unet_says_what_pipelines_ask(machine):
    unet = PatchScoreUNet(machine, diffusers.DDIMScheduler(1000))
    assert (unet.config.in_channels, unet.config.out_channels, unet.config.sample_size) == (3, 3, (12, 10))
    assert unet.config["in_channels"] == unet.config.get("in_channels") == 3
    square = ps.IdealScore(ps.PatchBank(smooth_images(3, 1, 8, 8)))
    assert PatchScoreUNet(square, diffusers.DDIMScheduler(1000)).config.sample_size == 8
    assert (unet.dtype, unet.device) == (torch.float32, torch.device("cpu"))
    assert unet.to(torch.float16) is unet
    assert unet.dtype == torch.float16
    x = torch.randn(2, 3, 12, 10)
    assert unet(x.half(), 500).sample.dtype == torch.float16
    assert (unet(x.half(), 500).sample.float() - unet(x, 500).sample).abs().max() < 0.01
    output = unet(x, 500)
    assert isinstance(output, UNet2DOutput)
    (bare,) = unet(x, 500, return_dict=False)
    assert torch.equal(bare, output.sample)


@needs_diffusers
def test_class_labels_reach_the_machine(machine):
    unet, x = PatchScoreUNet(machine, diffusers.DDIMScheduler(1000)), torch.randn(3, 3, 12, 10)
    expected = unet(x, 500, class_labels=["red", None, "blue"]).sample
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1.0]])
    assert torch.equal(unet(x, 500, class_labels=one_hot).sample, expected)
    assert torch.equal(unet(x, 500, class_labels=[0, None, 2]).sample, expected)
    assert torch.equal(unet(x, 500, torch.tensor([1, 1, 1])).sample, unet(x, 500, "green").sample)
    bound = PatchScoreUNet(machine, diffusers.DDIMScheduler(1000), class_labels=["red", None, "blue"])
    assert torch.equal(bound(x, 500).sample, expected)


@needs_diffusers
def test_mismatches_between_pipeline_and_bank_name_both(machine):
    unet = PatchScoreUNet(machine, diffusers.DDIMScheduler(1000))
    x = torch.zeros(2, 3, 12, 10)
    for shape in ([2, 1, 12, 10], [2, 3, 32, 32]):
        with pytest.raises(ValueError, match=rf"sample: the sampler gives \[2, {shape[1]}, {shape[2]}, .*3 x 12 x 10"):
            unet(torch.zeros(shape), 5)
    with pytest.raises(ValueError, match=r"unknown label 12; this bank has 0 \(red\), 1 \(green\), 2 \(blue\)"):
        unet(x, 5, class_labels=torch.tensor([1, 12]))
    with pytest.raises(ValueError, match="one-hot rows over 10 classes, the bank has 3"):
        unet(x, 5, class_labels=torch.eye(10)[:2])
    with pytest.raises(ValueError, match="labels: got 3 for a batch of 2"):
        unet(x, 5, class_labels=[0, 1, 2])


@needs_diffusers
@pytest.mark.parametrize(
    ("timestep", "error", "message"),
    [
        (1000, ValueError, "timestep: got 1000, the scheduler has 0 to 999"),
        (-1, ValueError, "timestep: got -1"),
        (math.nan, ValueError, "timestep: got nan"),
        ([1, 2, 3], ValueError, "timestep: got 3 for a batch of 2"),
        (None, TypeError, "timestep: got None"),
        ("last", TypeError, "timestep: got 'last'"),
    ],
)
def test_bad_timesteps_are_named(timestep, error, message, machine):
    with pytest.raises(error, match=message):
        PatchScoreUNet(machine, diffusers.DDIMScheduler(1000))(torch.zeros(2, 3, 12, 10), timestep)


@needs_diffusers
def test_schedulers_we_do_not_know_are_named(machine):
    with pytest.raises(
        ValueError, match="scheduler: DPMSolverMultistepScheduler predicts 'flow_prediction', takes 'eps"
    ):
        PatchScoreUNet(machine, diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"))
    with pytest.raises(ValueError, match="scheduler: NoneType is not known"):
        PatchScoreUNet(machine, None)
    with pytest.raises(TypeError, match="denoiser: got str, takes a machine"):
        PatchScoreUNet("machine", diffusers.DDIMScheduler())


def test_missing_diffusers_says_which_extra_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "patchscore.adapters.diffusers", raising=False)
    for name in ("diffusers", "diffusers.configuration_utils", "diffusers.models.unets.unet_2d"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "patchscore\[diffusers\]"'):
        importlib.import_module("patchscore.adapters.diffusers")


# k-diffusion and EDM.


@pytest.fixture(scope="module")
def k_sampling():
    """k-diffusion's real sampling functions, without the rest of the package, which imports torchvision, CLIP, ..."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip("k-diffusion is not installed")
    with pytest.MonkeyPatch.context() as patch:
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(found.submodule_search_locations)
        patch.setitem(sys.modules, "k_diffusion", package)
        if importlib.util.find_spec("torchvision") is None:
            for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]
        try:
            yield importlib.import_module("k_diffusion.sampling")
        except ImportError as error:
            pytest.skip(f"k-diffusion's samplers cannot be imported: {error}")


def karras(steps=10):
    levels = ps.get_schedule("karras", steps)
    return levels, levels.ratios


@pytest.mark.parametrize(("name", "sampler"), [("sample_euler", "euler"), ("sample_heun", "heun")])
def test_k_diffusion_samplers_give_our_own_samples(name, sampler, k_sampling, machine):
    levels, sigmas = karras()
    x = starts(machine.shape, 3)[0] * sigmas[0]
    theirs = getattr(k_sampling, name)(
        PatchScoreDenoiser(machine).to(torch.float64),
        x,
        sigmas,
        extra_args={"class_labels": ["red", None, 2]},
        disable=True,
    )
    ours = ps.sample(machine, 3, schedule=levels, sampler=sampler, labels=["red", None, 2], dtype=torch.float64)
    assert (theirs.clamp(-1, 1) - ours).abs().max() < 1e-6


def test_k_diffusions_ancestral_sampler_draws_the_samples_of_our_ddpm(k_sampling, machine):
    levels, sigmas = karras()
    noise, generators = starts(machine.shape, 2)

    def fresh(sigma, sigma_next):
        return torch.stack([torch.randn(machine.shape, generator=g, dtype=torch.float64) for g in generators])

    model = PatchScoreDenoiser(machine).to(torch.float64)
    x = noise * sigmas[0]
    theirs = k_sampling.sample_euler_ancestral(model, x, sigmas, disable=True, noise_sampler=fresh)
    ours = ps.sample(machine, 2, schedule=levels, sampler="ddpm", dtype=torch.float64)
    assert (theirs.clamp(-1, 1) - ours).abs().max() < 1e-6


@pytest.mark.parametrize(
    "name",
    ["sample_dpm_2", "sample_dpm_2_ancestral", "sample_lms", "sample_dpmpp_2s_ancestral", "sample_dpmpp_sde",
     "sample_dpmpp_2m", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"],
)  # fmt: skip
def test_every_k_diffusion_sampler_is_served(name, k_sampling, machine):
    _, sigmas = karras()
    x = starts(machine.shape, 2)[0].float() * sigmas[0].float()
    extra = {"class_cond": torch.tensor([0, 1])}
    images = getattr(k_sampling, name)(PatchScoreDenoiser(machine), x, sigmas.float(), extra_args=extra, disable=True)
    assert images.dtype == torch.float32
    assert images.abs().max() < 1.05


def test_k_diffusions_adaptive_solver_reaches_the_exact_flow(k_sampling, bank):
    score = ps.GaussianScore(bank)
    x = starts(score.shape, 2)[0] * 20.0
    model = PatchScoreDenoiser(score).to(torch.float64)
    images = k_sampling.sample_dpm_adaptive(model, x, 0.02, 20.0, rtol=1e-4, atol=1e-4, disable=True)
    assert (images - score.flow(x, 20.0, 0.02)).abs().max() < 5e-3


def edm_sampler(net, latents, class_labels=None, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7):
    """Karras et al. 2022, algorithm 2 with no churn, in the words of EDM's generate.py."""
    # Adjust noise levels based on what's supported by the network.
    sigma_min, sigma_max = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    # Time step discretization.
    step_indices = torch.arange(num_steps, dtype=torch.float64, device=latents.device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    t_steps = (high + step_indices / (num_steps - 1) * (low - high)) ** rho
    t_steps = torch.cat([net.round_sigma(t_steps), torch.zeros_like(t_steps[:1])])
    # Main sampling loop.
    x_next = latents.to(torch.float64) * t_steps[0]
    for i, (t_cur, t_next) in enumerate(itertools.pairwise(t_steps)):
        # Euler step.
        x_cur = x_next
        d_cur = (x_cur - net(x_cur, t_cur, class_labels).to(torch.float64)) / t_cur
        x_next = x_cur + (t_next - t_cur) * d_cur
        # Apply 2nd order correction.
        if i < num_steps - 1:
            d_prime = (x_next - net(x_next, t_next, class_labels).to(torch.float64)) / t_next
            x_next = x_cur + (t_next - t_cur) * (0.5 * d_cur + 0.5 * d_prime)
    return x_next


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edms_sampler_gives_the_samples_of_our_heun(dtype, machine):
    net = PatchScoreDenoiser(machine).eval().requires_grad_(False).to(dtype)
    assert (net.img_channels, net.img_resolution, net.label_dim) == (3, (12, 10), 3)
    noise, _ = starts((net.img_channels, *net.img_resolution), 3)
    theirs = edm_sampler(net, noise, class_labels=torch.eye(net.label_dim))
    ours = ps.sample(machine, 3, steps=18, schedule="karras", sampler="heun", labels=[0, 1, 2], dtype=torch.float64)
    assert (theirs.clamp(-1, 1) - ours).abs().max() < (1e-6 if dtype == torch.float64 else 1e-3)


def test_every_form_of_sigma_means_the_same(machine, bank):
    net, x = PatchScoreDenoiser(machine), noisy(bank, 0.7, 2, dtype=torch.float32)
    expected = machine.denoise(x, 0.7)
    for sigma in (0.7, torch.tensor(0.7), torch.full((2,), 0.7), torch.full((2, 1, 1, 1), 0.7), torch.tensor([0.7])):
        assert torch.allclose(net(x, sigma), expected, atol=1e-6)
    mixed = net(x, torch.tensor([0.2, 5.0]))
    assert torch.allclose(mixed, machine.denoise(x, torch.tensor([0.2, 5.0])))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, x: net(x[:, :1], 1.0), ValueError, r"x: the sampler gives \[2, 1, 12, 10\], .* 3 x 12 x 10"),
        (lambda net, x: net(x.int(), 1.0), TypeError, r"x: got torch\.int32"),
        (lambda net, x: net(x, 0.0), ValueError, r"sigma: got 0\.0"),
        (lambda net, x: net(x, torch.ones(3)), ValueError, r"sigma: got shape \[3\], takes a number or \[2\]"),
        (lambda net, x: net(x, 1.0, 7), ValueError, "unknown label 7"),
        (lambda net, x: net(x, 1.0, torch.ones(2, 3)), ValueError, "rows that are not one-hot"),
        (lambda net, x: net(x, 1.0, torch.eye(4)[:2]), ValueError, "one-hot rows over 4 classes, the bank has 3"),
        (lambda net, x: net(x, 1.0, class_labels=1, class_cond=1), ValueError, "class_labels, class_cond: got both"),
        (lambda net, x: PatchScoreDenoiser(net.denoiser, 2.0, 1.0), ValueError, r"sigma_max: got 2\.0 and 1\.0"),
        (lambda net, x: PatchScoreDenoiser(3), TypeError, "denoiser: got int"),
    ],
)
def test_bad_input_is_named(call, error, message, machine):
    with pytest.raises(error, match=message):
        call(PatchScoreDenoiser(machine), torch.zeros(2, 3, 12, 10))


def test_a_gradient_through_an_adapter_is_an_error_not_a_wrong_number(machine, bank):
    """k-diffusion's log_likelihood differentiates what the denoiser returns, which carries no graph."""
    x = torch.randn(1, *bank.shape, requires_grad=True)
    ddim = diffusers.DDIMScheduler(clip_sample=False)
    calls = {
        "x": lambda x: PatchScoreDenoiser(machine)(x, 1.0),
        "sample": lambda x: PatchScoreUNet(machine, ddim)(x, 500),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: requires grad, and this denoiser has no gradient"):
            call(x)
        with torch.no_grad():
            call(x)
        call(x.detach())


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_of_repeated_timesteps_the_level_is_the_one_that_diffusers_starts_at(name, machine):
    scheduler = getattr(diffusers, name)(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    scheduler.set_timesteps(200)
    timesteps = scheduler.timesteps.tolist()
    repeated = {t for t in timesteps if timesteps.count(t) > 1}
    assert repeated
    unet = PatchScoreUNet(machine, scheduler)
    for t in repeated:
        expected = float(scheduler.sigmas[scheduler.index_for_timestep(t)])
        assert unet.sigmas_at(t, 1) == pytest.approx([expected])
    scheduler.set_begin_index(timesteps.index(t) + 1)
    assert unet.sigmas_at(t, 1) == pytest.approx([float(scheduler.sigmas[timesteps.index(t) + 1])])
