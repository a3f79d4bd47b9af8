"""Regional torch.compile: the repeated blocks, one compiled graph for all of a kind."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from fastdiff.anatomy import Anatomy
from fastdiff.config import Compile
from fastdiff.patch import PatchSet


def compile_blocks(anatomy: Anatomy, settings: Compile, patches: PatchSet) -> None:
    """Compile each block's forward; installed before the cache, so that its decisions stay outside the graphs."""
    compiled = partial(torch.compile, mode=settings.mode, fullgraph=settings.fullgraph, dynamic=settings.dynamic)
    for block in _repeated(anatomy):
        patches.wrap_forward(block, compiled)


def _repeated(anatomy: Anatomy) -> list[nn.Module]:
    if anatomy.family.kind == "transformer":
        return anatomy.blocks
    unet: Any = anatomy.denoiser
    blocks = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]
    return [
        layer for block in blocks for name in ("resnets", "attentions") for layer in getattr(block, name, None) or ()
    ]
