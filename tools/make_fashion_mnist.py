"""Makes the built-in bank, patchscore/data/fashion-mnist.npz: the first 400 training images of each class.

Reads the files of Debian's package dataset-fashion-mnist (MIT licence, see patchscore/data/LICENSE-fashion-mnist.txt).
The images stay in the order of the original file, and the same input gives the same bytes.

    python tools/make_fashion_mnist.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from patchscore import sources

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
OUTPUT = Path(__file__).resolve().parent.parent / "patchscore" / "data" / "fashion-mnist.npz"
IMAGES = 4000
CLASS_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip


def main(folder: str = DEBIAN_FOLDER) -> None:
    images, labels, _ = sources.read(folder, limit=IMAGES)
    assert labels is not None
    assert (np.bincount(labels) == IMAGES // len(CLASS_NAMES)).all()
    np.savez_compressed(
        OUTPUT,
        images=images[:, 0],
        labels=labels.astype(np.uint8),
        class_names=np.array(CLASS_NAMES),
    )
    print(f"{OUTPUT}: {len(images)} images, {OUTPUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
