"""8 bit on NVIDIA GPUs through PyTorch's own matrix products. Run by the tests on CPUs, never on a GPU.

`_scaled_mm`: E4M3 times E4M3 with a scale for each row and column (compute capability 8.9), bfloat16 result.
 `_int_mm`: int8 times int8 to int32, more than 16 rows, sizes in multiples of 8; the scales that follow are one
expression, which torch.compile fuses. Convolutions of one pixel are matrix products; others go to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.quant.activations import Levels, rows_of, shaped
from fastdiff.quant.layer import QLayer
from fastdiff.quant.layers import QConv2d
from fastdiff.quant.packing import Integers, Tensors
from fastdiff.quant.reference import reference


def lacks_cuda(layer: QLayer, capability: tuple[int, int]) -> str | None:
    device = layer.tensors()["q"].device
    if device.type != "cuda":
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}"
    return None


def lacks_convolutions(layer: QLayer) -> str | None:
    real = isinstance(layer, QConv2d) and not layer.is_product
    return "has no convolutions but those of a pixel" if real else None


class Product:
    """What kernels of matrix products share: they keep the plain `q`."""

    replaces_q = False

    def unpack(self, layer: QLayer, packed: Any, tensors: Tensors) -> Tensor:
        raise NotImplementedError

    def expected(self, layer: QLayer, x: Tensor) -> Tensor:
        return reference(layer, x)


class ScaledMM(Product):
    """fp8 by rows."""

    name = "scaled_mm"

    def refuses(self, layer: QLayer) -> str | None:
        if layer.recipe.activations != "fp8" or layer.recipe.format != "float8":
            return "computes 8-bit floats only"
        if any(size % 16 for size in layer.matrix_shape):
            return f"needs sizes in multiples of 16, not {layer.matrix_shape}"
        return lacks_cuda(layer, (8, 9)) or lacks_convolutions(layer)

    def pack(self, layer: QLayer) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weight [inputs, outputs], column-major as the product wants it, its scales [1, outputs], and the bias."""
        tensors, bias = layer.tensors(), layer.bias
        scale = tensors["scale"][None, :].contiguous()
        return tensors["q"].t(), scale, None if bias is None else bias.to(torch.bfloat16)

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        rows = rows_of(layer.smoothed(x), layer)
        scale = (rows.abs().amax(-1, keepdim=True).float() / 448).clamp_min(1e-12)
        eight = (rows.float() / scale).to(torch.float8_e4m3fn)
        weight, scales, bias = packed
        y = torch._scaled_mm(eight, weight, scale, scales, bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        return shaped(y.to(x.dtype), x, layer)


class IntMM(Product):
    """int8 by rows: (q - 128) as int8, and one expression for all that follows."""

    name = "int_mm"

    def refuses(self, layer: QLayer) -> str | None:
        if layer.recipe.activations != "int8" or not isinstance(layer.format, Integers):
            return "computes 8-bit weights with 8-bit activations only"
        if any(size % 8 for size in layer.matrix_shape):
            return f"needs sizes in multiples of 8, not {layer.matrix_shape}"
        return lacks_cuda(layer, (8, 0)) or lacks_convolutions(layer)

    def pack(self, layer: QLayer) -> tuple[Tensor, Tensor, Tensor]:
        """The weight [inputs, outputs], the scales of its outputs and, for the zero point, the sums over its inputs."""
        assert isinstance(layer.format, Integers)
        tensors = layer.tensors()
        integers = layer.format.eight_bits(tensors, layer.matrix_shape[1])
        return integers.t(), tensors["scale"], integers.sum(-1).float()

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        weight, scale, sums = packed
        levels = layer.levels(x, 255)
        rows = signed(levels)
        missing = max(0, 17 - len(rows))
        padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        y = scaled(torch._int_mm(padded, weight)[: len(rows)], levels, scale, sums)
        if layer.bias is not None:
            y = y + layer.bias
        return shaped(y.to(x.dtype), x, layer)


def signed(levels: Levels) -> Tensor:
    """Levels less 128, as int8."""
    return (levels.q ^ 128).view(torch.int8)


def scaled(product: Tensor, levels: Levels, scale: Tensor, sums: Tensor) -> Tensor:
    """The float result of an int32 product [n, outputs] of signed levels; sums: of each output's integers."""
    return (product + (128 - levels.zero) * sums) * (scale * levels.scale)
