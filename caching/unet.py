"""The parts of a UNet that a cached step may leave out."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from fastdiff.anatomy import Anatomy
from fastdiff.errors import BadConfig, UnsupportedModel

from .region import Region

Level = Literal["block", "layer", "unit"]
LAYER_PARTS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")


def _unet(anatomy: Anatomy, lacks: str) -> Any:
    if anatomy.opaque:
        raise anatomy.without(lacks)
    if anatomy.family.kind != "unet":
        raise UnsupportedModel(f"{anatomy.family.name} is no UNet, it has no {lacks}")
    return anatomy.denoiser


def unet_inner(anatomy: Anatomy, branch: int) -> Region:
    """All of a UNet inside skip connection `branch`, counted from the outside; 0 leaves the outermost layer live."""
    unet = _unet(anatomy, "skip connections to split at")
    down, up = [*unet.down_blocks], [*unet.up_blocks]
    skips = sum(len(block.resnets) for block in up)
    if not 0 <= branch < skips - 1:
        raise BadConfig(f"branch {branch}: this UNet has branches 0 to {skips - 2}")
    inner_down = _after_skip(down, branch)
    inner_up = _before_layer(up, skips - 1 - branch)
    middle = [unet.mid_block] if unet.mid_block is not None else []
    return Region(f"inside skip {branch}", (*inner_down, *middle, *inner_up))


def unet_encoder(anatomy: Anatomy) -> list[Region]:
    """What makes the skip connections and the middle of a UNet, a region each: all that the decoder is given."""
    unet = _unet(anatomy, "encoder whose features could be propagated")
    named = [("conv_in", unet.conv_in), *((f"down_blocks.{k}", block) for k, block in enumerate(unet.down_blocks))]
    named += [("mid_block", unet.mid_block)] if unet.mid_block is not None else []
    return [Region(name, (module,), hides_control=True) for name, module in named]


def unet_parts(anatomy: Anatomy, level: Level) -> list[Region]:
    """Blocks, or layers (a ResNet with its attention), or units (each of them, and each attention and feed-forward
    layer inside), named by their paths."""
    unet = _unet(anatomy, "blocks, layers and units of one")
    paths = {module: path for path, module in unet.named_modules()}
    blocks = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]
    if level == "block":
        return [Region(paths[block], (block,)) for block in blocks]
    layers = [group for block in blocks for group in _layers(block)]
    if level == "layer":
        return [Region(paths[group[-1]], tuple(group)) for group in layers]
    units = [module for group in layers for module in group]
    inside = [
        module for unit in units for path, module in unit.named_modules()
        if path.rpartition(".")[2] in ("attn1", "attn2", "ff")
    ]  # fmt: skip
    return [Region(paths[module], (module,)) for module in (*units, *inside)]


def _layers(block: Any) -> list[list[nn.Module]]:
    """Modules of each layer of a UNet block, in call order."""
    parts = [getattr(block, name) for name in LAYER_PARTS if getattr(block, name, None) is not None]
    layers = len(block.resnets)
    each = [max(1, len(part) // layers) for part in parts]  # AudioLDM2 has several attentions in a layer
    return [
        [
            module
            for part, n in zip(parts, each, strict=True)
            for module in part[k * n : (k + 1) * n]
            if module is not None
        ]
        for k in range(layers)
    ]


def _after_skip(down: list[Any], branch: int) -> list[nn.Module]:
    """What runs after the module that produces skip `branch`; skip 0 comes from conv_in."""
    units: list[nn.Module] = []
    produced = 0
    for block in down:
        groups = _layers(block)
        if getattr(block, "downsamplers", None):
            groups.append([*block.downsamplers])
        if produced >= branch:
            units.append(block)
        else:
            units += [module for k, group in enumerate(groups) if produced + k >= branch for module in group]
        produced += len(groups)
    return units


def _before_layer(up: list[Any], layer: int) -> list[nn.Module]:
    """What runs in the up path before its layer number `layer`."""
    units: list[nn.Module] = []
    for block in up:
        groups = _layers(block)
        if layer >= len(groups):
            units.append(block)
        else:
            units += [module for group in groups[: max(layer, 0)] for module in group]
        layer -= len(groups)
    return units
