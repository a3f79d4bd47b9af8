"""The places in a denoiser where a cached step may stop computing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdiff.anatomy import Anatomy
from fastdiff.errors import BadConfig, UnsupportedModel

from .region import Probe, Region

_LAYER_PARTS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")


def model_output(anatomy: Anatomy) -> Region:
    """The whole denoiser: a cached step runs none of it."""
    return Region("model output", (anatomy.denoiser,))


def block_stack(anatomy: Anatomy, live: int) -> Region:
    """Every transformer block after the first `live`; the live blocks' residual is the probe."""
    blocks = anatomy.blocks
    if anatomy.family.kind != "transformer" or not blocks:
        raise UnsupportedModel(f"{anatomy.family.name} has no stack of transformer blocks")
    if not 1 <= live < len(blocks):
        raise BadConfig(f"{live} live blocks of {len(blocks)}: at least 1 must be live and 1 left to cache")
    entry, exit_ = anatomy.stack_of(blocks[live]), anatomy.stack_of(blocks[-1])
    first, head = anatomy.stack_of(blocks[0]).takes[0], anatomy.stack_of(blocks[live - 1])
    if set(entry.takes) < set(exit_.returns):
        raise UnsupportedModel(f"{anatomy.family.name}: the last block returns more streams than block {live} takes")

    def residual(inputs: dict[str, Any], output: Any) -> Tensor:
        leaving = output[head.returns.index(first)] if isinstance(output, tuple) else output
        return leaving - inputs[first]

    takes = tuple(stream for stream in entry.takes if stream in exit_.returns)
    return Region(
        "block stack", tuple(blocks[live:]), "residual", takes, exit_.returns, Probe(blocks[live - 1], residual)
    )


def unet_inner(anatomy: Anatomy, branch: int) -> Region:
    """All of a UNet inside skip connection `branch`, counted from the outside; 0 leaves the outermost layer live."""
    if anatomy.family.kind != "unet":
        raise UnsupportedModel(f"{anatomy.family.name} is no UNet, it has no skip connections to split at")
    unet: Any = anatomy.denoiser
    down, up = [*unet.down_blocks], [*unet.up_blocks]
    skips = sum(len(block.resnets) for block in up)
    if not 0 <= branch < skips - 1:
        raise BadConfig(f"branch {branch}: this UNet has branches 0 to {skips - 2}")
    inner_down = _after_skip(down, branch)
    inner_up = _before_layer(up, skips - 1 - branch)
    middle = [unet.mid_block] if unet.mid_block is not None else []
    return Region(f"inside skip {branch}", (*inner_down, *middle, *inner_up))


def _layers(block: Any) -> list[list[nn.Module]]:
    """Modules of each layer of a UNet block, in call order."""
    parts = [getattr(block, name) for name in _LAYER_PARTS if getattr(block, name, None) is not None]
    return [[part[k] for part in parts if k < len(part)] for k in range(len(block.resnets))]


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
