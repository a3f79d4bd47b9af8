"""What every kernel must compute, in plain float operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .activations import shaped
from .layer import QLayer


def reference(layer: QLayer, x: Tensor, top: int = 255) -> Tensor:
    """The float layer on what the integers stand for, in the type of the input."""
    if layer.by_picture and len(x) > 1:
        return torch.cat([reference(layer, one, top) for one in x.split(1)])
    weight = layer.matrix(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if layer.recipe.activations == "int8" and layer.finite(x):
        x = shaped(layer.levels(x, top).values().to(x.dtype), x, layer)
    else:
        x = layer.smoothed(x)
        if layer.recipe.activations == "fp8":
            x = float8(x, layer).to(x.dtype)
    return layer.apply_weight(x, weight, bias)


def float8(x: Tensor, layer: nn.Module) -> Tensor:
    """x rounded to E4M3 in float32, with a scale for each row, or each picture of a convolution."""
    over = (-3, -2, -1) if isinstance(layer, nn.Conv2d) else (-1,)
    scale = (x.abs().amax(over, keepdim=True).float() / 448).clamp_min(1e-12)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale
