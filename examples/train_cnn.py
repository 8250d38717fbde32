"""Trains a small network to predict noise: python examples/train_cnn.py fashion-mnist out.safetensors

The network predicts eps in x = alpha x_0 + sigma_t eps, at levels drawn uniformly from the cosine schedule. An error of
eps is an error sigma_t / alpha times as large in the image, so the loss is |error of eps|^2 / alpha^2, which is the
squared error of v and weighs all levels alike. Every batch depends only on the seed and its number, so an interrupted
run continues, from out.training.safetensors, with the same result. What is written is the mean of the weights over
time; with --validation, the mean that had the least loss on images that were not trained on.
"""

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

import patchscore as ps
from patchscore.files import write_atomically
from patchscore.networks import ARCHITECTURES, save_network
from patchscore.pixels import to_values

EMA = 0.999
DROPPED_LABELS = 0.1
"""The fraction of images trained without their class, so that the network also learns the unconditional score."""
LATER = ("attention", "validation", "validation_images", "validate_every")
"""Options that settings of older checkpoints lack."""


def main() -> None:
    options = arguments()
    bank = ps.PatchBank.open(options.source, size=options.size, limit=options.limit)
    held_out = validation_bank(options, bank)
    torch.manual_seed(options.seed)
    network = build(options, bank).to(options.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.lr, betas=(0.9, 0.99))
    ema = {name: weight.clone() for name, weight in network.state_dict().items()}
    best = {name: weight.clone() for name, weight in ema.items()}

    # What decides the numbers; a checkpoint of other settings is refused.
    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in ("source", "out", "device", "threads", "keep", "save_every", "stop_after")
        and (name not in LATER or value)  # checkpoints from before there were any go on
    }
    settings["bank"] = bank.fingerprint
    if held_out is not None:
        settings["validation"] = held_out.fingerprint
    checkpoint = options.out.with_suffix(".training.safetensors")
    done, seconds, losses, validated = resume(checkpoint, settings, network, optimizer, ema, best)

    steps = math.ceil(options.images / options.batch_size)
    keep = {math.ceil(images / options.batch_size) for images in options.keep}
    start, saved = time.perf_counter() - seconds, time.perf_counter()

    def store() -> None:
        elapsed = time.perf_counter() - start
        save_training(checkpoint, settings, network, optimizer, ema, best, step + 1, elapsed, losses, validated)

    def export(path: Path, weights: dict, seen: int) -> None:
        trained = build(options, bank)
        trained.load_state_dict(weights)
        notes = {
            "command": shlex.join(["python", *sys.argv]),
            "bank": {"fingerprint": bank.fingerprint, "images": len(bank), "shape": bank.shape},
            "images_seen": seen * options.batch_size,
            "seconds": round(time.perf_counter() - start, 1),
            "loss": losses[-1] if losses else None,
            "torch": torch.__version__,
        }
        if validated:
            notes["validation_loss"] = dict(validated)[seen]
        save_network(trained, path, notes)

    step, running = done - 1, 0.0
    bar = tqdm(range(done, steps), initial=done, total=steps, unit="step", desc="training", mininterval=5)
    for step in bar:
        # The batch of this step, from (seed, step) alone, drawn on the CPU.
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        chosen = torch.randint(len(bank), (options.batch_size,), generator=generator)

        # One step of Adam, with a short rise and a cosine fall of its rate.
        rate = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = options.lr * rate
        loss = loss_of(network, noised(bank, bank.classes, chosen, generator, options), options)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in network.state_dict().items():
                ema[name].lerp_(weight, 1 - decay)

        running += loss.item()
        if (step + 1) % 200 == 0:
            losses.append(round(running / 200, 6))
            running = 0.0
            bar.set_postfix(loss=losses[-1], refresh=False)
            if time.perf_counter() - saved > options.save_every:
                store()
                saved = time.perf_counter()
        if held_out is not None and ((step + 1) % options.validate_every == 0 or step + 1 in keep or step + 1 == steps):
            found = validation_loss(ema, held_out, bank, options)
            if not validated or found <= min(loss for _, loss in validated):
                best = {name: weight.clone() for name, weight in ema.items()}
            validated.append((step + 1, found))
        if step + 1 in keep:
            export(options.out.with_suffix(f".{(step + 1) * options.batch_size}.safetensors"), ema, step + 1)
        if options.stop_after is not None and step + 1 - done >= options.stop_after:
            store()
            return
    store()
    if validated:
        least = min(loss for _, loss in validated)
        export(options.out, best, max(seen for seen, loss in validated if loss == least))
    else:
        export(options.out, ema, step + 1)


def validation_bank(options, bank) -> ps.PatchBank | None:
    """The images of --validation; exits where they are of another shape or class, or were trained on."""
    if not options.validation:
        return None
    held_out = ps.PatchBank.open(options.validation, size=options.size, limit=options.validation_images)
    if held_out.shape != bank.shape:
        sys.exit(f"--validation: images of {held_out.shape}, those of SOURCE are {bank.shape}")
    if not set(held_out.classes) <= set(bank.classes):
        sys.exit(f"--validation: classes {held_out.classes}, those of SOURCE are {bank.classes}")
    trained_on = {image.numpy().tobytes() for image in bank.images}
    if shared := sum(image.numpy().tobytes() in trained_on for image in held_out.images):
        sys.exit(f"--validation: {shared} of its {len(held_out)} images are trained on; take others")
    return held_out


def noised(bank, classes, chosen, generator, options) -> tuple[torch.Tensor, ...]:
    """The chosen images with noise, at one level each: x, angle, labels and eps, drawn on the CPU."""
    x0 = to_values(bank.images[chosen])
    if options.flip:
        flipped = torch.rand(len(x0), generator=generator) < 0.5
        x0 = torch.where(flipped[:, None, None, None], x0.flip(-1), x0)
    labels = torch.full((len(x0),), -1)
    if bank.labels is not None:
        positions = {label: position for position, label in enumerate(classes)}
        labels = torch.tensor([positions[label] for label in bank.labels[chosen].tolist()])
        labels[torch.rand(len(x0), generator=generator) < DROPPED_LABELS] = -1
    # One angle from each of as many equal strata: fewer surprises in the mean than independent draws.
    strata = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    angle = (0.01 + 0.97 * strata) * (math.pi / 2)
    eps = torch.randn(x0.shape, generator=generator)
    x0, labels, angle, eps = (part.to(options.device) for part in (x0, labels, angle, eps))
    alpha, sigma = (part[:, None, None, None] for part in (angle.cos(), angle.sin()))
    x = (alpha * x0 + sigma * eps).contiguous(memory_format=torch.channels_last)
    return x, angle, labels, eps


def loss_of(network, batch, options) -> torch.Tensor:
    """Mean squared error of eps over alpha^2, which is that of v."""
    x, angle, labels, eps = batch
    with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.bf16):
        predicted = network(x, angle.tan(), labels)
    return ((predicted.float() - eps) / angle.cos()[:, None, None, None]).square().mean()


@torch.no_grad()
def validation_loss(weights, held_out, bank, options) -> float:
    """The loss of these weights on the held-out images, with the same noise every time."""
    network = build(options, bank).to(options.device, memory_format=torch.channels_last)
    network.load_state_dict(weights)
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(held_out), generator=generator)  # every class at every level
    losses = [
        loss_of(network, noised(held_out, bank.classes, some, generator, options), options).item() * len(some)
        for some in chosen.split(options.batch_size)
    ]
    return round(sum(losses) / len(held_out), 6)


def build(options, bank) -> torch.nn.Module:
    architecture, more = ARCHITECTURES[options.network], {"attention": True} if options.attention else {}
    return architecture(bank.shape[0], bank.classes, options.width, options.depth, options.padding_mode, **more)


def save_training(path, settings, network, optimizer, ema, best, step, seconds, losses, validated) -> None:
    """Weights, their mean over time and the best such mean, and Adam's moments, in float32."""
    tensors = {f"network.{name}": weight for name, weight in network.state_dict().items()}
    tensors |= {f"ema.{name}": weight for name, weight in ema.items()}
    if validated:
        tensors |= {f"best.{name}": weight for name, weight in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    metadata = {"settings": settings, "step": step, "seconds": seconds, "losses": losses, "validated": validated}
    content = save(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"notes": json.dumps(metadata)}
    )
    write_atomically(path, content)


def resume(path, settings, network, optimizer, ema, best) -> tuple[int, float, list[float], list[tuple[int, float]]]:
    """Takes up where an earlier run of the same settings stopped: steps done, seconds, losses and validation losses."""
    if not path.exists():
        return 0, 0.0, [], []
    with safe_open(path, "pt") as file:
        notes = json.loads(file.metadata()["notes"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if notes["settings"] != settings:
        sys.exit(f"{path}: of a training with other settings; choose another file, or remove it")
    network.load_state_dict({name: tensors[f"network.{name}"] for name in ema})
    for name, weight in ema.items():
        weight.copy_(tensors[f"ema.{name}"])
        best[name].copy_(tensors.get(f"best.{name}", weight))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    validated = [(int(seen), float(loss)) for seen, loss in notes.get("validated", [])]
    return notes["step"], notes["seconds"], notes["losses"], validated


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help='training images: a folder, .npy, .npz or IDX file, or "fashion-mnist"')
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    parser.add_argument("--size", type=int, help="resize to SIZE x SIZE")
    parser.add_argument("--limit", type=int, help="use at most so many images")
    parser.add_argument("--network", choices=list(ARCHITECTURES), default="ResNet")
    parser.add_argument("--padding-mode", choices=["zeros", "circular"], default="zeros")
    parser.add_argument("--width", type=int, default=32, help="channels of the hidden layers")
    parser.add_argument("--depth", type=int, default=4, help="residual blocks (of a UNet: at each size)")
    parser.add_argument("--attention", action="store_true", help="self-attention at the lower resolutions of a UNet")
    parser.add_argument("--images", type=int, default=400_000, help="how many images to train on, repeats counted")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16 (twice as fast with AVX512-BF16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--validation", metavar="SOURCE", help="images not trained on; the best mean is kept")
    parser.add_argument("--validation-images", type=int, help="at most so many of them")
    parser.add_argument("--validate-every", type=int, help="steps between validations (with --validation: 500)")
    parser.add_argument("--keep", type=int, nargs="*", default=[], help="also write the network after so many images")
    parser.add_argument("--stop-after", type=int, help="stop after so many steps; the same command continues")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    options = parser.parse_args()
    if options.attention and options.network != "UNet":
        parser.error("--attention: takes --network UNet")
    if options.validation is None and (options.validation_images or options.validate_every):
        parser.error("--validation-images, --validate-every: take --validation")
    if options.validation is not None and options.validate_every is None:
        options.validate_every = 500
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


if __name__ == "__main__":
    main()
