"""8 bit on a CPU: oneDNN's pointwise linear and convolution on plain integer tensors, float32 results.

Machines with VNNI add products of unsigned and signed 8-bit numbers in 32 bits; others add pairs in 16, which overflow
unless one factor has 7 bits. Which it is, the self-test finds out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.quant.activations import shaped
from fastdiff.quant.layer import QLayer
from fastdiff.quant.layers import QConv2d
from fastdiff.quant.packing import Integers, Tensors
from fastdiff.quant.reference import reference

_OPERATORS = ("qlinear_pointwise", "qlinear_prepack", "qconv2d_pointwise", "qconv_prepack")


@dataclass(frozen=True)
class OneDNN:
    """`top` is the largest level of the input: 255, or 127 for 7 bits."""

    name: str
    top: int
    replaces_q: bool = True

    def refuses(self, layer: QLayer) -> str | None:
        if layer.recipe.activations != "int8" or not isinstance(layer.format, Integers):
            return "computes 8-bit weights with 8-bit activations only"
        if layer.tensors()["q"].device.type != "cpu":
            return "is for CPUs"
        if not all(hasattr(torch.ops.onednn, name) for name in _OPERATORS):
            return "needs a PyTorch that was built with oneDNN"
        if isinstance(layer, QConv2d) and isinstance(layer.padding, str):
            return f"takes no padding {layer.padding!r}"
        return None

    def pack(self, layer: QLayer) -> tuple[Tensor, Tensor, Tensor]:
        """The integers in oneDNN's blocked layout, scales and zero points of the outputs."""
        assert isinstance(layer.format, Integers)
        tensors = layer.tensors()
        integers, scale = layer.format.eight_bits(tensors, layer.matrix_shape[1]), tensors["scale"]
        zeros = torch.zeros(len(scale), dtype=torch.int32)
        if isinstance(layer, QConv2d) and not layer.is_product:
            weight = integers.view(layer.weight_shape)
            # with a zero point: else oneDNN adds what that needs to a copy of the weight at each call
            packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 1, *_geometry(layer), None)
        else:
            packed = torch.ops.onednn.qlinear_prepack(integers, None)
        return packed, scale, zeros

    def unpack(self, layer: QLayer, packed: Any, tensors: Tensors) -> Tensor:
        assert isinstance(layer.format, Integers)
        dense = packed[0].to_dense()
        integers = dense.reshape(layer.matrix_shape) if dense.ndim == 4 else dense.t().contiguous()
        return layer.format.back(integers, tensors, layer.recipe.group)

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        if not layer.finite(x):
            return reference(layer, x)
        weight, scale, zeros = packed
        levels = layer.levels(x, self.top)
        by_row = levels.scale if isinstance(levels.scale, Tensor) else None  # which the operator does not take
        tail = (weight, scale, zeros, None if by_row is not None else layer.bias)
        if isinstance(layer, QConv2d) and weight.ndim == 4:
            q, geometry = shaped(levels.q, x, layer), _geometry(layer)
            y = torch.ops.onednn.qconv2d_pointwise(
                q, levels.scale, levels.zero, *tail, *geometry, 1.0, 0, torch.float32, "none", [], ""
            )
            return y.to(x.dtype)
        factor = 1.0 if by_row is not None else levels.scale
        y = torch.ops.onednn.qlinear_pointwise(
            levels.q, factor, levels.zero, *tail, 1.0, 0, torch.float32, "none", [], ""
        )
        if by_row is not None:
            y = y.mul_(by_row) if layer.bias is None else torch.addcmul(layer.bias, y, by_row)
        return shaped(y, x, layer).to(x.dtype)

    def expected(self, layer: QLayer, x: Tensor) -> Tensor:
        return reference(layer, x, self.top)


def _geometry(conv: QConv2d) -> tuple[list[int], list[int], list[int], int]:
    return list(conv.stride), [int(size) for size in conv.padding], list(conv.dilation), conv.groups
