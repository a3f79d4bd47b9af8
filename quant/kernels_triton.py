"""4-bit weights on NVIDIA GPUs: a Triton product that unpacks them on the way. Written with care and never run.

Each program makes a tile [BM, BN] of y = x w^T and goes along the inputs a group at a time, so that a tile of weights
has one scale for each output. W4A16 dequantizes the tile to the type of x and sums in float32; W4A8 does not come
here: its weights are unpacked to 8 bits once, for `int_mm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activations import rows_of
from .kernels_cuda import Product, lacks_cuda
from .layers import QLayer, as_output, as_product
from .packing import group_of, power_of_two


class TritonW4(Product):
    """W4A16 of linear layers, and convolutions of one pixel."""

    name = "triton"

    def refuses(self, layer: QLayer) -> str | None:
        if layer.recipe.format != "int4" or layer.recipe.activations != "none":
            return "computes grouped 4-bit weights with float activations only"
        size = group_of(layer.matrix_shape[1], layer.recipe.group)[0]
        if size < 16 or size > 128 or size != power_of_two(size):
            return f"needs groups of 16, 32, 64 or 128, not {size}"
        return lacks_cuda(layer, (8, 0)) or (None if as_product(layer) else "has no convolutions but those of a pixel")

    def pack(self, layer: QLayer) -> Any:
        from .triton_program import product

        return product

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        rows, tensors = rows_of(layer.smoothed(x)).contiguous(), layer.tensors()
        (outputs, inputs), groups = layer.matrix_shape, tensors["scale"].shape[1]
        y = torch.empty(len(rows), outputs, dtype=torch.float32, device=x.device)
        size = group_of(inputs, layer.recipe.group)[0]
        grid = (-(-len(rows) // 64), -(-outputs // 64))
        packed[grid](rows, tensors["q"], tensors["scale"], y, len(rows), outputs, inputs, groups, 64, 64, size)
        if layer.bias is not None:
            y += layer.bias
        return as_output(y.to(x.dtype), x)
