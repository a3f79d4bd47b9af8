"""The int8 and fp8 products with what comes before and after them in one Triton program each.

Written as PyTorch's operators, quantizing a row is eight programs and scaling a product six, most of them over float32
tensors; a graph of torch.compile fuses them itself. Compiled for GPUs and run in Triton's interpreter by the tests;
never run on a GPU.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdiff.quant.activations import Levels, Range, rows_of
from fastdiff.quant.layer import QLayer
from fastdiff.quant.layers import QConv2d

from .cuda import IntConv, IntMM, ScaledMM, scaled

_BLOCK = 1024  # numbers of a row that a program has at hand


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its tensors are on; a graph launches where they are."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def _launched(x: Tensor, numbers: tuple[Any, ...] = ()) -> tuple[list[Any], int]:
    """Numbers as programs take them, and the KIND that tells them how: floats, or tensors where one is."""
    there = any(isinstance(n, Tensor) for n in numbers)
    kept = [
        n if isinstance(n, Tensor) else x.new_full((), n, dtype=torch.float32) if there else float(n) for n in numbers
    ]
    return kept, int(there)


def fused_levels(layer: QLayer, x: Tensor) -> Levels:
    """The input as levels, less 128."""
    if torch.compiler.is_compiling():
        return layer.levels(x, 255).signed
    return layer.levels(x, 255, lambda rows, top, inverse, own: _rounded(rows, inverse, own, torch.int8, 127)).signed


def _rounded(
    rows: Tensor, inverse: Tensor | None, own: Range | None, kind: torch.dtype, most: float
) -> Levels:  # fmt: skip
    """As `quantized`: int8 or E4M3."""
    from .triton_program import levels

    rows = rows.contiguous()
    q, scales = rows.new_empty(rows.shape, dtype=kind), rows.new_empty((len(rows), 1), dtype=torch.float32)
    (scale, zero), there = _launched(rows, (0.0, 0.0) if own is None else own)
    with device_of(rows):
        levels[(len(rows),)](
            rows, rows if inverse is None else inverse, scale, zero, q, scales, rows.shape[1], float(most),
            own is None, inverse is not None, there, _BLOCK,
        )  # fmt: skip
    return Levels(q, scales, 0) if own is None else Levels(q, own[0], own[1] - 128)


def fused_scaled(
    product: Tensor, levels: Levels, scale: Tensor, sums: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """As `scaled`, from int32 to the type of the result in one pass."""
    if torch.compiler.is_compiling():
        return scaled(product, levels, scale, sums, bias, dtype)
    from .triton_program import finish

    product = product.contiguous()
    (count, outputs), by_row = product.shape, levels.by_row
    y = product.new_empty(product.shape, dtype=dtype)
    (own, zero), there = ([by_row, 0.0], 0) if by_row is not None else _launched(product, (levels.scale, levels.zero))
    with device_of(product):
        finish[(count, -(-outputs // _BLOCK))](
            product, own, zero, scale, sums, product if bias is None else bias, y, outputs, by_row is not None, there,
            bias is not None, _BLOCK,
        )  # fmt: skip
    return y


def fused_patches(layer: QConv2d, levels: Levels, x: Tensor) -> Tensor:
    """As `IntConv.patches`, without a padded copy."""
    from .triton_program import patches

    batch, channels, height, width = x.shape
    sides, inputs = layer.sides(x), layer.matrix_shape[1]
    out = levels.q.new_empty((batch * sides[0] * sides[1], inputs))
    (zero,), there = _launched(out, (levels.zero,))
    with device_of(out):
        patches[(len(out), -(-inputs // _BLOCK))](
            levels.q, zero, out, height, width, channels, *sides, inputs, *layer.stride, *layer.pads,
            *layer.dilation, *layer.kernel_size, there, _BLOCK,
        )  # fmt: skip
    return out


def _lacks_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "needs Triton"


class FusedScaledMM(ScaledMM):
    """The rows in one program."""

    name = "triton_scaled_mm"

    def refuses(self, layer: QLayer) -> str | None:
        return super().refuses(layer) or _lacks_triton()

    def rows(self, layer: QLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return super().rows(layer, x)
        found = _rounded(rows_of(layer.smoothed(x), layer), None, None, torch.float8_e4m3fn, 448)
        assert isinstance(found.scale, Tensor)
        return found.q, found.scale


class FusedIntMM(IntMM):
    """The rows in one program, and what follows the product in another."""

    name = "triton_int_mm"
    levels, scaled = staticmethod(fused_levels), staticmethod(fused_scaled)

    def refuses(self, layer: QLayer) -> str | None:
        return super().refuses(layer) or _lacks_triton()


class FusedIntConv(FusedIntMM, IntConv):
    """And what each output pixel sees in a third."""

    name = "triton_int_conv"

    def patches(self, layer: QConv2d, levels: Levels, x: Tensor) -> Tensor:
        found = super().patches if torch.compiler.is_compiling() else fused_patches
        return found(layer, levels, x)
