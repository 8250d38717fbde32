"""Classifies images by their denoising errors under every class: python examples/classification.py"""

import torch

import patchscore as ps

everything = ps.PatchBank.open("fashion-mnist")
held_out = torch.arange(len(everything)) % 200 == 0
bank = ps.PatchBank(everything.images[~held_out], everything.labels[~held_out], everything.class_names)
images, truth = everything.chunk(0, len(everything))[held_out], everything.labels[held_out]

found = ps.classify(ps.LocalScore(bank, 9), images, sigmas=[0.25, 0.5, 1.0])
for label, guess, posterior in zip(truth.tolist(), found.labels.tolist(), found.posterior, strict=True):
    print(f"{bank.class_names[label]:<12} taken for {bank.class_names[guess]:<12} with p = {posterior.max():.2f}")
print(f"{(found.labels == truth).sum()} of {len(truth)} right")
