"""A tiny pipeline with a ControlNet whose word counts."""

from __future__ import annotations

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tests import tiny


def controlled() -> DiffusionPipeline:
    base = tiny.make("sd15")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        control = diffusers.ControlNetModel.from_unet(base.unet, conditioning_channels=3).eval()
        for layer in control.modules():  # zero convolutions would make the control invisible
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.2)
    pipe = diffusers.StableDiffusionControlNetPipeline(**base.components, controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def control_image(seed: int) -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
