"""What classifier-free guidance does to a machine's samples: one row per scale, one column per class and noise.

The unconditional half sums over the whole bank, so a guided step costs as much as eleven conditional ones. Writes
docs/images/guidance.png and benchmarks/results/guidance.json: how many of the samples a classifier puts into their
class (a LocalScore over other images), and how far beyond [-1, 1] the denoised images reach.

    python benchmarks/guidance.py
"""

import argparse

import torch
from record import PICTURES, write

import patchscore as ps

SCALES = (0.0, 1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=400, help="training images")
    options = parser.parse_args()
    bank = ps.PatchBank.open("fashion-mnist", limit=options.bank)
    table = ps.ScaleTable.published("fashionmnist-resnet-zeros")
    els = ps.EquivariantLocalScore(bank, table, padding_mode="zeros")
    labels = list(bank.classes)
    judge = ps.LocalScore(ps.PatchBank.open("fashion-mnist", limit=4000), 9)

    rows, shown = [], []
    for scale in SCALES:
        beyond = []
        images = ps.sample(
            ps.Guided(els, els, scale),
            len(labels),
            labels=labels,
            batch_size=len(labels),
            progress=False,
            callback=lambda step, beyond=beyond: beyond.append(step.x0.abs().max().item()),
        )
        judged = ps.classify(judge, images, [0.25, 0.5, 1.0])
        rows.append(
            {
                "scale": scale,
                "in_class": (judged.labels == torch.tensor(labels)).double().mean().item(),
                "posterior": judged.posterior[range(len(labels)), labels].mean().item(),
                "largest": max(beyond),
            }
        )
        shown.append(images)
        print(rows[-1], flush=True)
    images.grid(torch.cat(shown), columns=len(labels), zoom=3).save(PICTURES / "guidance.png")
    what = " ".join((__doc__ or "").split("\n")[0].split())
    write("guidance", what, bank=f"{len(bank)} images", samples=len(labels), rows=rows)


if __name__ == "__main__":
    main()
