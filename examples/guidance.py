"""Classifier-free guidance, one row per scale and one column per class: python examples/guidance.py out.png"""

import sys

import torch

import patchscore as ps
from patchscore.draw import images

bank = ps.PatchBank.open("fashion-mnist", limit=500)
machine = ps.LocalScore(bank, ps.ScaleTable.published("fashionmnist-resnet-zeros"))
rows = [
    ps.sample(ps.Guided(machine, machine, scale), n=4, steps=10, labels=["trouser", "dress", "sneaker", "bag"])
    for scale in (0.0, 1.0, 2.0, 4.0)
]
images.grid(torch.cat(rows), columns=4).save(sys.argv[1])
