"""A UNet split by rows: each rank is given its rows of the latents, every layer asks for what lies beyond them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy, named
from fastdiff.clock import StepClock
from fastdiff.errors import UnsupportedModel
from fastdiff.patch import PatchSet

from .attention import split_attention
from .base import ParallelMethod
from .bus import Bus
from .halves import in_halves
from .layers import split_layers
from .shares import Speeds
from .split import Split, around

# inputs that have the rows of the latents, at some level of the UNet: ControlNet, T2I-Adapter
_LEVELS = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
_LOCAL = ("AdaGroupNorm", "SpatialNorm")  # normalize by functions that no rule sees


class Rows:
    """Layout of a UNet's attention: tokens are rows of pixels, at some level of down-sampling."""

    text_first, keys = False, None

    def __init__(self, split: Split) -> None:
        self.split = split

    def counts(self, own: int) -> list[int]:
        return [rows * width for rows, width in self._level(own)]

    def edge(self, place: int, count: int, portion: float) -> int:
        rows, width = self._level(count, place)[place]
        return math.ceil(portion * rows) * width

    def text(self, keys: int) -> int:
        return 0

    def crosses(self, given: dict[str, Any]) -> bool:
        return given.get("encoder_hidden_states") is not None

    def _level(self, own: int, place: int | None = None) -> list[tuple[int, int]]:
        """Rows of each rank, and columns, where a rank (this one by default) has `own` tokens."""
        split = self.split
        rows, width = [end - begin for begin, end in split.parts], split.width
        while rows[split.place if place is None else place] * width > own:
            rows, width = [-(-count // 2) for count in rows], -(-width // 2)
        return [(count, width) for count in rows]


def split_unet(method: ParallelMethod, anatomy: Anatomy, bus: Bus, clock: StepClock, patches: PatchSet) -> None:
    """Raises UnsupportedModel, with the reason, before anything is patched."""
    unet: Any = anatomy.denoiser
    if anatomy.family.name != "unet2d" or method.split or method.sharing(bus.topology.patch) > 1:
        raise UnsupportedModel(
            f"{method.method} cannot split a {anatomy.family.name} denoiser by rows; cfg and parastep work on any model"
        )
    for name, module in unet.named_modules():
        if type(module).__name__ in _LOCAL or getattr(module, "added_kv_proj_dim", None) is not None:
            raise UnsupportedModel(f"{name} ({type(module).__name__}) has no rule for split rows")
    unit = 2 ** sum(bool(getattr(block, "downsamplers", None)) for block in unet.down_blocks)
    split = Split(method, bus, clock)
    by_name = named(unet)

    def change(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        split.rules(lambda: _rules(split, unet, patches))
        given = by_name(args, kwargs)
        split.shape = tuple(given["sample"].shape)
        height, split.width = split.shape[-2:]
        split.parts = rows_of(height, unit, len(split.ranks), bus.speeds)
        given["sample"] = _cut(given["sample"], split, height)
        for key in _LEVELS:
            if given.get(key) is not None:
                given[key] = pytree.tree_map_only(Tensor, lambda leaf: _cut(leaf, split, height), given[key])
        return (), given

    _rules(split, unet, patches)
    split.belongs_to(anatomy)
    whole = partial(split.whole, dim=-2)
    patches.wrap_forward(unet, lambda forward: around(split, in_halves(split, anatomy, forward), change, whole))


def split_decoder(method: ParallelMethod, vae: nn.Module, bus: Bus, patches: PatchSet) -> None:
    """Decode by rows, exactly: every layer waits for what it needs. Raises UnsupportedModel for no VAE of images."""
    decoder: Any = getattr(vae, "decoder", None)
    odd = [type(m).__name__ for m in vae.modules() if isinstance(m, nn.Conv3d) or type(m).__name__ in _LOCAL]
    if not isinstance(decoder, nn.Module) or odd:
        reason = f"it holds {odd[0]}" if odd else "it has no decoder"
        raise UnsupportedModel(f"parallel.vae: {type(vae).__name__} cannot decode by rows, {reason}; set vae = false")
    split = Split(method, bus, None)
    by_name = named(decoder)

    def change(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = by_name(args, kwargs)
        name = next(iter(given))
        rows = given[name].shape[-2]
        split.parts, split.width = rows_of(rows, 1, len(split.ranks)), given[name].shape[-1]
        given[name] = _cut(given[name], split, rows)
        return (), given

    whole = partial(split.whole, dim=-2, what="the decoded picture")
    _rules(split, decoder, patches)
    patches.wrap_forward(decoder, lambda forward: around(split, forward, change, whole))


def _rules(split: Split, root: nn.Module, patches: PatchSet) -> None:
    split_layers(split, root, patches)
    split_attention(split, root, Rows(split), patches)


def rows_of(height: int, unit: int, parts: int, speeds: Speeds | None = None) -> list[tuple[int, int]]:
    """Rows of each rank: whole units (what all levels of down-sampling divide), the last rank's may be cut short.

    Raises UnsupportedModel where there are more ranks than units.
    """
    units = -(-height // unit)
    if units < parts:
        raise UnsupportedModel(
            f"{height} rows of latents make {units} units of {unit} rows, the least that can be split off, too few for "
            f"{parts} patch ranks; draw a taller picture or take fewer devices"
        )
    return [(begin * unit, min(end * unit, height)) for begin, end in (speeds or Speeds()).cut(units, parts)]


def _cut(tensor: Tensor, split: Split, height: int) -> Tensor:
    """This rank's rows of a tensor with the rows of some level."""
    factor = round(height / tensor.shape[-2])
    begin, end = split.parts[split.place]
    return tensor[..., begin // factor : -(-end // factor), :].contiguous()
