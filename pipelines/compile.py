"""torch.compile, of the repeated blocks (one graph for all of a kind) or of the whole denoiser."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from fastdiff.anatomy import Anatomy
from fastdiff.config import Compile
from fastdiff.errors import UnsupportedModel
from fastdiff.patch import PatchSet


def compile_blocks(anatomy: Anatomy, settings: Compile, patches: PatchSet) -> None:
    """Compile each block's forward; installed before the cache, so that its decisions stay outside the graphs."""
    for block in _repeated(anatomy):
        patches.wrap_forward(block, _compiled(settings))


def compile_denoiser(anatomy: Anatomy, settings: Compile, patches: PatchSet) -> None:
    """Compile the denoiser's forward with what the cache patched inside it: one graph of a computed step, one of a
    cached step. Which of them runs is decided outside, before it is entered."""
    patches.wrap_forward(anatomy.denoiser, _compiled(settings))


def _compiled(settings: Compile) -> partial:
    mode = settings.mode if settings.backend == "inductor" else None
    return partial(
        torch.compile, backend=settings.backend, mode=mode, fullgraph=settings.fullgraph, dynamic=settings.dynamic
    )


def _repeated(anatomy: Anatomy) -> list[nn.Module]:
    if anatomy.family.kind == "transformer":
        return anatomy.blocks
    if anatomy.family.kind == "language":
        name = anatomy.family.name
        raise UnsupportedModel(f"the blocks of a {name} model are not known; set compile.scope = denoiser")
    unet: Any = anatomy.denoiser
    blocks = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]
    return [
        layer for block in blocks for name in ("resnets", "attentions") for layer in getattr(block, name, None) or ()
    ]
