"""Every scheduler of diffusers is served at the noise level that it means, or refused by name."""

import importlib.util
import inspect
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import smooth_images

import patchscore as ps

pytest.importorskip("diffusers.models.unets.unet_2d", reason="diffusers cannot be imported")

import diffusers
from diffusers import schedulers
from test_adapters import Recorder, starts

from patchscore.adapters.diffusers import PatchScoreUNet, convention

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = {
    name: getattr(schedulers, name)
    for name in dir(schedulers)
    if name.endswith("Scheduler") and inspect.isclass(getattr(schedulers, name, None))
}
TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
NOISY = "Ancestral|DDPM|SDE|LCM|SASolver|TCD|UnCLIP|Cosine|RF"
"""Schedulers that add noise on the way; all others follow the probability flow."""

SLOW = ("DPMSolverSDEScheduler", "LMSDiscreteScheduler")
"""Schedulers that take seconds by themselves."""

SPACINGS = (
    {},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"shift": 3.0},
    {"flow_shift": 3.0},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
)


class OneImage(ps.Denoiser):
    """The posterior mean where the only image is x0: at every level z = x0 + sigma eps tells eps."""

    shape = (3, 16, 16)

    def __init__(self):
        self.x0 = 2 * torch.rand(1, *self.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
        self.noise = []

    def estimate(self, z, sigma, labels=None):
        self.noise.append((z - self.x0) / torch.as_tensor(sigma).to(z).reshape(-1, 1, 1, 1))
        return ps.Estimate(self.x0.expand_as(z), torch.zeros_like(z), torch.ones_like(z[:, 0]), 1, "one image")


def built(name, prediction, flow_sigmas, options):
    """A scheduler with these options, or None where it has no such."""
    takes = inspect.signature(CLASSES[name].__init__).parameters
    if not set(options) <= set(takes) or (flow_sigmas and "use_flow_sigmas" not in takes):
        return None
    given = dict(options) | {"clip_sample": False, "prediction_type": prediction, "use_flow_sigmas": flow_sigmas}
    if name.startswith("KDPM2"):
        given |= {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}  # it takes seconds with 1,000
    try:
        return CLASSES[name](**{option: value for option, value in given.items() if option in takes})
    except ImportError as error:
        pytest.skip(str(error))


def served():
    for name, kind in CLASSES.items():
        for flow_sigmas in (False, True):
            if flow_sigmas and "use_flow_sigmas" not in inspect.signature(kind.__init__).parameters:
                continue
            try:
                _, predictions = convention(kind, flow_sigmas)
            except ValueError:
                continue
            yield from ((name, flow_sigmas, prediction) for prediction in predictions)


@pytest.mark.parametrize(("name", "flow_sigmas", "prediction"), list(served()))
def test_every_scheduler_is_served_at_its_own_level(name, flow_sigmas, prediction):
    """z - x0 is sigma times white noise at every step; where a scheduler adds none, always the same noise."""
    tested = 0
    for options in SPACINGS:
        if flow_sigmas and options and set(options) != {"flow_shift"}:
            continue
        if name.startswith("Heun") and "beta_schedule" in options:
            continue  # from sigma = 20,000 to 6 in a step, Heun's method multiplies float32's rounding by 3,000
        zero_snr = "rescale_betas_zero_snr" in options
        if options and (name in SLOW or (prediction not in ("epsilon", "flow_prediction") and not zero_snr)):
            continue  # the level depends on the spacing, not on what is predicted
        scheduler = built(name, prediction, flow_sigmas, options)
        if scheduler is None:
            continue
        one = OneImage()
        unet = PatchScoreUNet(one, scheduler).to(torch.float64)
        scheduler.set_timesteps(10)
        x = starts(one.shape, 1)[0] * getattr(scheduler, "init_noise_sigma", 1.0)
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        if zero_snr and prediction == "epsilon" and float(scheduler.alphas_cumprod[-1]) == 0:
            with pytest.raises(ValueError, match="pure noise"):
                unet(x, scheduler.timesteps[0])
            continue
        for t, after in itertools.zip_longest(scheduler.timesteps, scheduler.timesteps[1:]):
            more = {"prev_timestep": after} if name == "UnCLIPScheduler" else {}
            stepped = scheduler.step(unet(scale(x, t), t).sample, t, x, **more)
            x, own = stepped.prev_sample, getattr(stepped, "pred_original_sample", None)
            assert own is None or (own - one.x0).abs().max() < 3e-2, options
        # The first noise is x's own scale, a little more than its noise; 768 numbers have std 1 +- 0.026.
        if name == "PNDMScheduler" and prediction == "v_prediction":
            tested += 1
            continue  # it adds up velocities of several levels, which are not the same noise
        assert all(0.87 < noise.std() < 1.13 for noise in one.noise[1:]), (options, [n.std() for n in one.noise])
        if not any(part in name for part in NOISY.split("|")):
            assert all((noise - one.noise[0]).abs().max() < 2e-2 for noise in one.noise), options
        tested += 1
    assert tested


@pytest.mark.parametrize("name", CLASSES)
def test_every_other_prediction_and_scheduler_is_refused_by_name(name):
    for flow_sigmas, prediction in itertools.product((False, True), TYPES):
        if (
            not set(inspect.signature(CLASSES[name].__init__).parameters) & {"prediction_type"}
            and prediction != TYPES[0]
        ):
            continue
        try:
            scheduler = built(name, prediction, flow_sigmas, {})
        except TypeError:  # schedulers of tokens and proteins take arguments of their own
            with pytest.raises(ValueError, match=f"scheduler: {name} is not served: it samples"):
                convention(CLASSES[name])
            continue
        if scheduler is None or (name, flow_sigmas, prediction) in SERVED or "FlowMatch" in name or "RF" in name:
            continue
        with pytest.raises(ValueError, match=f"^scheduler: {name} (is not|predicts '{prediction}')"):
            PatchScoreUNet(OneImage(), scheduler)


SERVED = set(served())


def test_the_table_in_docs_is_fresh(monkeypatch):
    spec = importlib.util.spec_from_file_location("schedulers_table", ROOT / "tools" / "schedulers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if f"diffusers {diffusers.__version__}" not in module.PAGE.read_text():
        pytest.skip("the table is of another version of diffusers")
    monkeypatch.setattr(sys, "argv", ["tools/schedulers.py", "--check"])
    module.main()


def test_learned_variances_are_refused_by_name():
    for name in ("DDPMScheduler", "DPMSolverMultistepScheduler", "UnCLIPScheduler"):
        scheduler = CLASSES[name](variance_type="learned_range")
        with pytest.raises(ValueError, match=f"scheduler: {name} has a learned variance"):
            PatchScoreUNet(OneImage(), scheduler)


def test_what_is_no_scheduler_is_named():
    with pytest.raises(
        ValueError, match=r"scheduler: object is not known; docs/adapters\.md lists those that are served"
    ):
        PatchScoreUNet(OneImage(), object())


def test_a_derived_class_is_served_as_its_parent():
    class Own(CLASSES["DDIMScheduler"]):
        pass

    assert PatchScoreUNet(OneImage(), Own()).sigmas_at(500, 1) == PatchScoreUNet(
        OneImage(), CLASSES["DDIMScheduler"]()
    ).sigmas_at(500, 1)


# Flow matching.


@pytest.fixture
def machine():
    return ps.LocalScore(ps.PatchBank(smooth_images(20, 3, 12, 10)), 5)


def walked(unet, scheduler, x):
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_gives_the_samples_of_our_flow_schedule(shift, machine):
    scheduler = CLASSES["FlowMatchEulerDiscreteScheduler"](shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    noise, _ = starts(machine.shape, 2, seed=4)
    theirs = walked(PatchScoreUNet(machine, scheduler).to(torch.float64), scheduler, noise)
    ours = ps.sample(machine, 2, schedule=ps.noise.flow(8, shift), sampler="euler", seed=4, dtype=torch.float64)
    assert (theirs - ours).abs().max() < 1e-4  # diffusers steps in float32


@pytest.mark.parametrize("given", [{"sigmas": [1.0, 0.7, 0.3, 0.05]}, {"timesteps": [900.0, 500.0, 20.0]}])
def test_levels_of_custom_steps_are_read_from_the_schedulers_own_list(given, machine):
    """With a shift the timesteps given are not 1000 sigma; a level of t / 1000 would be wrong."""
    scheduler = CLASSES["FlowMatchEulerDiscreteScheduler"](shift=3.0)
    scheduler.set_timesteps(**given)
    seen = Recorder(machine)
    walked(PatchScoreUNet(seen, scheduler), scheduler, starts(machine.shape, 1)[0].float())
    for (_, sigma, _, _), own in zip(seen.calls, scheduler.sigmas[:-1].double(), strict=True):
        assert float(sigma) == pytest.approx(float(own / (1 - own).clamp(min=2.0**-20)), rel=1e-6)


def test_a_timestep_that_a_flow_scheduler_has_not_is_named(machine):
    scheduler = CLASSES["FlowMatchEulerDiscreteScheduler"]()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="timestep: got 123, which is none of the scheduler's"):
        PatchScoreUNet(machine, scheduler)(torch.randn(1, *machine.shape), 123)


def test_inverted_sigmas_are_those_of_the_image():
    """Mochi counts from noise to image and predicts x_0 - eps."""
    scheduler, one = CLASSES["FlowMatchEulerDiscreteScheduler"](invert_sigmas=True), OneImage()
    scheduler.set_timesteps(8)
    x = walked(PatchScoreUNet(one, scheduler).to(torch.float64), scheduler, starts(one.shape, 1)[0])
    assert all((noise - one.noise[0]).abs().max() < 1e-2 for noise in one.noise)
    assert (x - one.x0).abs().max() < 1e-2


def test_flow_modes_and_flow_matching_meet(machine):
    """DPM-Solver++ of order 1 with flow sigmas is Euler's method on the same flow."""
    scheduler = CLASSES["DPMSolverMultistepScheduler"](
        use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=1, flow_shift=3.0
    )
    scheduler.set_timesteps(8)
    noise, _ = starts(machine.shape, 1, seed=4)
    theirs = walked(PatchScoreUNet(machine, scheduler).to(torch.float64), scheduler, noise)
    sigmas = scheduler.sigmas.double()
    alphas = 1 - sigmas
    ours = ps.sample(
        machine, 1, schedule=ps.Schedule("flow", alphas, sigmas, 1.0), sampler="ddim", seed=4, dtype=torch.float64
    )
    assert (theirs.clamp(-1, 1) - ours).abs().max() < 1e-4


def test_the_flow_schedule_is_its_equation():
    levels = ps.get_schedule("flow", 10)
    assert torch.allclose(levels.sigmas, torch.arange(10, -1, -1, dtype=torch.float64) / 10)
    assert torch.allclose(levels.alphas[1:], 1 - levels.sigmas[1:])
    assert levels.alphas[0] == 2.0**-20
    shifted = ps.noise.flow(10, shift=3.0)
    assert float(shifted.sigmas[5]) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    for bad in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"shift: got {bad}, takes a positive number"):
            ps.noise.flow(10, shift=bad)
