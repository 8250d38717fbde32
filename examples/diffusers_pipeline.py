"""New images from a diffusers pipeline whose UNet is a score machine: python examples/diffusers_pipeline.py out.png"""

import sys

from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.utils import make_image_grid

import patchscore as ps
from patchscore.adapters.diffusers import PatchScoreUNet

bank = ps.PatchBank.open("fashion-mnist", limit=200)
machine = ps.EquivariantLocalScore(bank, ps.ScaleTable.published("fashionmnist-resnet-zeros"))
scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
unet = PatchScoreUNet(machine, scheduler, class_labels=["sneaker", "coat"])
images = DDIMPipeline(unet, scheduler)(batch_size=2, num_inference_steps=20).images
make_image_grid(images, rows=1, cols=2).save(sys.argv[1])
