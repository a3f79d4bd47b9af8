"""Makes quantized layers of float ones, and puts them in their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UnsupportedModel
from fastdiff.weights import hooks

from .activations import Present
from .base import QuantMethod
from .kernels.choice import choose
from .layer import QLayer
from .layers import QConv2d, QLinear
from .packing import Tensors, format_named
from .recipe import Recipe


@dataclass(frozen=True)
class Found:
    """A float layer: its name, and the places (parent, name there) that hold it."""

    name: str
    layer: nn.Linear | nn.Conv2d
    places: tuple[tuple[nn.Module, str], ...]


def layers_of(root: nn.Module) -> Iterator[Found]:
    """Every float Linear and Conv2d that pads with zeros, by name, once however often it is held.

    But not those that somebody patched: what was put on a layer would be lost with it.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in root.modules():
        for name, child in parent.named_children():
            places.setdefault(id(child), []).append((parent, name))
    for name, layer in root.named_modules():
        if type(layer) not in (nn.Linear, nn.Conv2d) or id(layer) not in places:
            continue
        if patched(layer):
            continue
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            continue
        yield Found(name, layer, tuple(places[id(layer)]))


def patched(layer: nn.Module) -> bool:
    """Whether a layer has a forward or hooks of its own, other than those that load its weight."""
    own = vars(layer)
    return not any(hooks(layer)) and bool("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"])


def chosen(method: QuantMethod, root: nn.Module) -> list[tuple[Found, Recipe]]:
    """The layers that a method quantizes, with their recipes. Raises UnsupportedModel for a quantized model."""
    if held := sum(isinstance(module, QLayer) for module in root.modules()):
        raise UnsupportedModel(
            f"{type(root).__name__} is quantized already ({held} layers); load the float model, or leave out `quant`"
        )
    found = [(f, method.recipe(f.name, f.layer)) for f in layers_of(root) if method.takes(f.name)]
    return [(f, recipe) for f, recipe in found if recipe is not None]


def build(
    layer: nn.Linear | nn.Conv2d, recipe: Recipe, present: Present, *, smooth: Tensor | None = None,
    low: Tensor | None = None, high: Tensor | None = None, learned: Callable[[Tensor, Recipe], Tensors] | None = None,
) -> QLayer:  # fmt: skip
    """A quantized layer with the weight of a float one. No kernel is chosen yet.

    smooth [input channels] divides the input and multiplies the weight; low, high [buckets + 1] are static ranges.
    learned: makes the stored tensors of a weight [n, k] in the place of the format's own rounding ("flexround").

    Raises UnsupportedModel for a weight that holds NaN or infinity.
    """
    weight = layer.weight.detach().float().flatten(1)
    if not bool(weight.isfinite().all()):
        raise UnsupportedModel("its weight holds NaN or infinity, which no integer stands for")
    if smooth is not None:
        groups = getattr(layer, "groups", 1)
        if groups > 1:
            smooth = None  # the channels of a weight's row depend on the group
        else:
            weight = weight * smooth.repeat_interleave(weight.shape[1] // len(smooth))
    extra: Tensors = {}
    if recipe.low_rank and not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
        up, down = low_rank(weight, recipe.low_rank)
        weight = weight - up.float() @ down.float()
        extra = _factors(layer, up, down, smooth)
    packed = (
        learned(weight, recipe) if learned else format_named(recipe.format).pack(weight, recipe.group, recipe.rounding)
    )
    bias = None if layer.bias is None else layer.bias.detach().float()
    optional = {"smooth": smooth, "low": low, "high": high, "bias": bias}
    tensors = {**packed, **extra, **{name: t for name, t in optional.items() if t is not None}}
    return made(layer, recipe, tensors, present)


def made(like: nn.Linear | nn.Conv2d, recipe: Recipe, tensors: Tensors, present: Present) -> QLayer:
    """A quantized layer of these buffers, with the settings of the float one."""
    kind: Any = QConv2d if isinstance(like, nn.Conv2d) else QLinear
    layer: QLayer = kind(like, recipe, tensors, present, choose)
    return layer.eval()


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors [n, r] and [r, k] of a weight, in float16; what is left of it has no outliers (SVDQuant,
    https://arxiv.org/abs/2411.05007), and needs no calibration."""
    rank = min(rank, *weight.shape)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    # laid out as a file has them: sums in another order are not the same to the last bit
    return (u[:, :rank] * root).half().contiguous(), (root[:, None] * vt[:rank]).half().contiguous()


def _factors(layer: nn.Linear | nn.Conv2d, up: Tensor, down: Tensor, smooth: Tensor | None) -> Tensors:
    """The residual in the shapes of the layer, for an input that is not smoothed."""
    if smooth is not None:
        down = (down.float() / smooth.repeat_interleave(down.shape[1] // len(smooth))).half()
    if isinstance(layer, nn.Conv2d):
        return {"up": up[:, :, None, None].contiguous(), "down": down.view(-1, layer.in_channels, *layer.kernel_size)}
    return {"up": up.contiguous(), "down": down}
