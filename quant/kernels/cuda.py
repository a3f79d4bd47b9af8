"""8 bit on NVIDIA GPUs through PyTorch's own matrix products. Run by the tests on CPUs, never on a GPU.

`_scaled_mm`: E4M3 times E4M3 with a scale for each row and column (compute capability 8.9), bfloat16 result.
 `_int_mm`: int8 times int8 to int32, more than 16 rows, sizes in multiples of 8; the scales that follow are one
expression, which torch.compile fuses. Convolutions of one pixel are matrix products; others are made ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.quant.activations import Levels, rows_of, shaped
from fastdiff.quant.layer import Kernel, QLayer
from fastdiff.quant.layers import QConv2d
from fastdiff.quant.packing import Integers
from fastdiff.quant.reference import reference

_MOST = 1 << 29  # bytes that what all output pixels see may take


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


class Product(Kernel):
    """A kernel that keeps the plain `q`, and computes the reference's numbers."""

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
        eight, scale = self.rows(layer, x)
        weight, scales, bias = packed
        y = torch._scaled_mm(eight, weight, scale, scales, bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        return shaped(y.to(x.dtype), x, layer)

    def rows(self, layer: QLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input's rows as E4M3 [n, inputs], and their scales [n, 1]."""
        rows = rows_of(layer.smoothed(x), layer)
        scale = (rows.abs().amax(-1, keepdim=True).float() / 448).clamp_min(1e-12)
        return (rows.float() / scale).to(torch.float8_e4m3fn), scale


def levels_of(layer: QLayer, x: Tensor) -> Levels:
    """The input as levels, less 128."""
    return layer.levels(x, 255).signed


def scaled(
    product: Tensor, levels: Levels, scale: Tensor, sums: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """The result of an int32 product [n, outputs] of signed levels; sums: of each output's integers."""
    total = product if levels.by_row is not None else product - levels.zero * sums  # a row's own levels are symmetric
    y = total * (scale * levels.scale)
    return (y if bias is None else y + bias).to(dtype)


class IntMM(Product):
    """int8 by rows: levels less 128, and one expression for all that follows."""

    name = "int_mm"
    levels: ClassVar[Callable[..., Levels]] = staticmethod(levels_of)
    scaled: ClassVar[Callable[..., Tensor]] = staticmethod(scaled)

    def refuses(self, layer: QLayer) -> str | None:
        if layer.recipe.activations != "int8" or not isinstance(layer.format, Integers):
            return "computes 8-bit weights with 8-bit activations only"
        if any(size % 8 for size in layer.matrix_shape):
            return f"needs sizes in multiples of 8, not {layer.matrix_shape}"
        return lacks_cuda(layer, (8, 0)) or self.lacks(layer)

    def lacks(self, layer: QLayer) -> str | None:
        return lacks_convolutions(layer)

    def pack(self, layer: QLayer) -> tuple[Tensor, Tensor, Tensor]:
        """The weight [inputs, outputs], the scales of its outputs and, for the zero point, the sums over its inputs."""
        assert isinstance(layer.format, Integers)
        tensors = layer.tensors()
        integers = layer.format.eight_bits(tensors, layer.matrix_shape[1])
        return integers.t(), tensors["scale"], integers.sum(-1, dtype=torch.int32)

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        return shaped(self.product(layer, packed, x, lambda levels: levels.q), x, layer)

    def product(self, layer: QLayer, packed: Any, x: Tensor, rows_in: Callable[[Levels], Tensor]) -> Tensor:
        """[n, outputs]; rows_in makes int8 [n, inputs] of the levels."""
        weight, scale, sums = packed
        levels = self.levels(layer, x)
        rows = rows_in(levels)
        missing = max(0, 17 - len(rows))
        padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        return self.scaled(torch._int_mm(padded, weight)[: len(rows)], levels, scale, sums, layer.bias, x.dtype)


class IntConv(IntMM):
    """Convolutions of several pixels as products of what each output pixel sees (im2col): a copy of as many bytes as
    the kernel has pixels for each that comes in, so that only the clock tells where it is worth it."""

    name = "int_conv"

    def lacks(self, layer: QLayer) -> str | None:
        if lacks_convolutions(layer) is None:
            return "is for convolutions of several pixels"
        plain = isinstance(layer, QConv2d) and layer.groups == 1 and not isinstance(layer.padding, str)
        return None if plain else "has no groups, and pads by numbers"

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        assert isinstance(layer, QConv2d)
        sides = layer.sides(x)
        if len(x) * math.prod(sides) * layer.matrix_shape[1] > _MOST:
            return reference(layer, x)
        y = self.product(layer, packed, x, lambda levels: self.patches(layer, levels, x))
        return y.view(len(x), *sides, -1).permute(0, 3, 1, 2)

    def patches(self, layer: QConv2d, levels: Levels, x: Tensor) -> Tensor:
        """int8 [pixels of the output, inputs]: what each sees, and the level of zero beyond the edges."""
        (batch, channels, height, width), (above, left) = x.shape, layer.pads
        shape, zero = (batch, height + 2 * above, width + 2 * left, channels), levels.zero
        if isinstance(zero, Tensor):
            whole = zero.to(torch.int8).expand(shape).contiguous()
        else:
            whole = levels.q.new_full(shape, zero)
        whole[:, above : above + height, left : left + width] = levels.q.view(batch, height, width, channels)
        picture, row, pixel, _ = whole.stride()
        (down, right), (low, wide) = layer.stride, layer.dilation
        seen = whole.as_strided(
            (batch, *layer.sides(x), channels, *layer.kernel_size),
            (picture, down * row, right * pixel, 1, low * row, wide * pixel),
        )  # fmt: skip
        return seen.reshape(-1, layer.matrix_shape[1])
