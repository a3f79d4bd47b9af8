"""4-bit weights on NVIDIA GPUs: a Triton product that unpacks them on the way, so that memory holds 4 bits.

Each program makes a tile [BM, BN] of y = x w^T and goes along the inputs a group at a time, so that a tile of weights
has one scale for each output. W4A16 dequantizes the tile to the type of x and sums in float32; W4A8 unpacks it to
8-bit integers and sums in int32. Compiled for GPUs and run in Triton's interpreter by the tests; never run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.quant.activations import rows_of, shaped
from fastdiff.quant.layer import QLayer
from fastdiff.quant.packing import Integers
from fastdiff.quant.reference import reference
from fastdiff.quant.rounding import group_of, power_of_two

from .cuda import Product, lacks_convolutions, lacks_cuda
from .fused import device_of, fused_levels, fused_scaled

_TILE = 64
_FEW = 64  # rows; for more of them a library's product on the weight made float is faster than unpacking on the way


class TritonW4(Product):
    """W4A16 and W4A8 of linear layers, and of convolutions of one pixel."""

    name = "triton"

    def refuses(self, layer: QLayer) -> str | None:
        smallest = {("int4", "none"): 16, ("dual4", "int8"): 32}.get((layer.recipe.format, layer.recipe.activations))
        if smallest is None:
            return "computes grouped 4-bit weights only"
        size = group_of(layer.matrix_shape[1], layer.recipe.group)[0]
        if size < smallest or size > 128 or size != power_of_two(size):
            return f"needs groups of {'16, ' * (smallest == 16)}32, 64 or 128, not {size}"
        return lacks_cuda(layer, (8, 0)) or lacks_convolutions(layer)

    def pack(self, layer: QLayer) -> Tensor | None:
        """The weight stays as it is; for a zero point, its sums over the inputs."""
        if not isinstance(layer.format, Integers):
            return None
        return layer.format.eight_bits(layer.tensors(), layer.matrix_shape[1]).sum(-1, dtype=torch.int32)

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        from .triton_program import product

        if packed is None and x.numel() // layer.matrix_shape[1] > _FEW:
            return reference(layer, x)
        (outputs, inputs), tensors = layer.matrix_shape, layer.tensors()
        size, groups = group_of(inputs, layer.recipe.group)
        levels = None if packed is None else fused_levels(layer, x)
        if levels is None:
            rows, fine, kind = rows_of(layer.smoothed(x), layer).contiguous(), tensors["scale"], torch.float32
        else:
            rows, fine, kind = levels.q, tensors["group"], torch.int32
        y = torch.empty(len(rows), outputs, dtype=kind, device=x.device)
        sizes = (len(rows), outputs, inputs, groups)
        grid = (-(-len(rows) // _TILE), -(-outputs // _TILE))
        with device_of(rows):
            product[grid](rows, tensors["q"], fine, y, *sizes, levels is not None, _TILE, _TILE, size)
        if levels is not None:
            y = fused_scaled(y, levels, tensors["scale"], packed, layer.bias, x.dtype)
        elif layer.bias is not None:
            y += layer.bias
        return shaped(y.to(x.dtype), x, layer)
