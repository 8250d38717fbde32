"""Agreement of diffusers' samplers, through the adapter, with our own, scheduler by scheduler.

Where a scheduler and one of our samplers are the same algorithm (DDIM, DDPM on the same noise, Euler, Heun, first-order
DPM-Solver++ and UniPC) the samples must agree: rms and worst pixel. Where two windows fit a pixel equally well,
rounding decides between them, so one pixel in thousands may differ by more. Higher-order schedulers are compared with
the exact probability flow of a Gaussian. Writes benchmarks/results/adapters.json. Needs diffusers.
"""

import math

import diffusers
import torch
from record import write

import patchscore as ps
from patchscore.adapters.diffusers import PatchScoreUNet
from patchscore.sampling import image_generator

N, STEPS, LABELS = 4, 20, [0, 1, 5, 8]


def start(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Generator]]:
    generators = [image_generator(0, i) for i in range(N)]
    return torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in generators]).to(dtype), generators


def levels_of(scheduler: object) -> torch.Tensor:
    """sigma_t / alpha_t of the scheduler's walk, ending clean."""
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas.double()
    kept = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1, dtype=torch.float64)])


def schedule(ratios: torch.Tensor, z_std: float) -> ps.Schedule:
    """These levels, from z = z_std times white noise."""
    alphas = (1 + ratios**2) ** -0.5
    return ps.Schedule("of a scheduler", alphas, ratios * alphas, z_std * alphas[0].item())


def theirs(scheduler: object, machine: ps.Denoiser, dtype: torch.dtype, clamp: bool = True) -> torch.Tensor:
    x, generators = start(machine.shape, dtype)
    x = x * scheduler.init_noise_sigma
    unet = PatchScoreUNet(machine, scheduler).to(dtype)
    noisy = {"generator": generators} if isinstance(scheduler, diffusers.DDPMScheduler) else {}
    for t in scheduler.timesteps:
        predicted = unet(scheduler.scale_model_input(x, t), t, class_labels=LABELS).sample
        x = scheduler.step(predicted, t, x, **noisy).prev_sample
    return x.clamp(-1, 1) if clamp else x


def main() -> None:
    bank = ps.PatchBank.open("fashion-mnist", limit=200)
    machine = ps.EquivariantLocalScore(bank, ps.ScaleTable.published("fashionmnist-resnet-zeros"))
    clip = {"clip_sample": False}
    same = [
        ("DDIM", diffusers.DDIMScheduler(**clip), "ddim"),
        ("DDPM, same noise", diffusers.DDPMScheduler(**clip), "ddpm"),
        ("Euler", diffusers.EulerDiscreteScheduler(), "euler"),
        ("Euler, Karras sigmas", diffusers.EulerDiscreteScheduler(use_karras_sigmas=True), "euler"),
        ("Heun, Karras sigmas", diffusers.HeunDiscreteScheduler(use_karras_sigmas=True), "heun"),
        ("DPM-Solver++, order 1", diffusers.DPMSolverMultistepScheduler(solver_order=1), "ddim"),
        (
            "UniPC, order 1, no corrector",
            diffusers.UniPCMultistepScheduler(solver_order=1, disable_corrector=list(range(STEPS))),
            "ddim",
        ),
    ]
    rows = []
    for name, scheduler, sampler in same:
        row = {"scheduler": name, "against": f"ps.sample, {sampler}"}
        for dtype in (torch.float32, torch.float64):
            scheduler.set_timesteps(STEPS)
            ratios = levels_of(scheduler)
            if sampler == "heun":
                ratios = torch.cat([ratios[:-1:2], ratios[-1:]])
            scales = name.startswith(("Euler", "Heun"))
            z_std = float(scheduler.init_noise_sigma) if scales else math.sqrt(1 + ratios[0] ** 2)
            # DDPMScheduler draws in the dtype of the images, and only float64 draws are ours.
            if sampler == "ddpm" and dtype == torch.float32:
                continue
            ours = ps.sample(
                machine,
                N,
                schedule=schedule(ratios, z_std),
                sampler=sampler,
                labels=LABELS,
                dtype=dtype,
                progress=False,
            )
            apart = (theirs(scheduler, machine, dtype) - ours).abs()
            row[str(dtype).removeprefix("torch.")] = {
                "rms": apart.square().mean().sqrt().item(),
                "worst": apart.max().item(),
            }
        rows.append(row)
        print(row, flush=True)

    higher = [
        ("DDIM", diffusers.DDIMScheduler(timestep_spacing="trailing", **clip)),
        ("DPM-Solver++ multistep", diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing")),
        ("UniPC", diffusers.UniPCMultistepScheduler(timestep_spacing="trailing")),
    ]
    score, flow = ps.GaussianScore(bank), []
    for name, scheduler in higher:
        row = {"scheduler": name}
        for steps in (10, 20, 50):
            scheduler.set_timesteps(steps)
            top = levels_of(scheduler)[0].item()
            z = start(score.shape, torch.float64)[0] * math.sqrt(1 + top**2)
            exact = score.flow(z, top, 1e-6, LABELS)
            row[str(steps)] = (
                (theirs(scheduler, score, torch.float64, clamp=False) - exact).square().mean().sqrt().item()
            )
        flow.append(row)
        print(row, flush=True)
    what = " ".join((__doc__ or "").split("\n")[0].split())
    write(
        "adapters",
        what,
        steps=STEPS,
        images=N,
        bank=f"{len(bank)} images",
        diffusers=diffusers.__version__,
        rows=rows,
        flow=flow,
    )


if __name__ == "__main__":
    main()
