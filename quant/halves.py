"""Where a UNet joins what comes from below with what skipped the middle: layers whose input has two halves.

Both halves have ranges of their own (Q-Diffusion, https://arxiv.org/abs/2302.04304).
"""

from __future__ import annotations

from typing import Any

from fastdiff.anatomy import Anatomy


def halves(anatomy: Anatomy) -> dict[str, int]:
    """Of each layer after such a join, by name: how many of its input channels come from below."""
    unet: Any = anatomy.denoiser
    if anatomy.family.kind != "unet":
        return {}
    middle = getattr(unet.mid_block, "resnets", None) or unet.down_blocks[-1].resnets
    below, found = middle[-1].out_channels, {}
    for number, block in enumerate(unet.up_blocks):
        for place, resnet in enumerate(block.resnets):
            if below < resnet.in_channels:
                for layer in ("conv1", "conv_shortcut"):
                    if getattr(resnet, layer, None) is not None:
                        found[f"up_blocks.{number}.resnets.{place}.{layer}"] = below
            below = resnet.out_channels
    return found
