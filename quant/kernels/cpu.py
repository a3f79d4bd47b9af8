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
from fastdiff.quant.layer import Kernel, QLayer
from fastdiff.quant.layers import QConv2d
from fastdiff.quant.packing import Integers, Tensors
from fastdiff.quant.reference import reference

_OPERATORS = ("qlinear_pointwise", "qlinear_prepack", "qconv2d_pointwise", "qconv_prepack")


@dataclass(frozen=True)
class OneDNN(Kernel):
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
        by_row = levels.by_row  # which the operator does not take
        tail = (weight, scale, zeros, None if by_row is not None else layer.bias)
        if isinstance(layer, QConv2d) and weight.ndim == 4:
            q, geometry = shaped(levels.q, x, layer), _geometry(layer)
            y = _called(_convolution, _convolution_operator, q, levels.scale, levels.zero, tail=(*tail, *geometry))
            return y.to(x.dtype)
        factor = 1.0 if by_row is not None else levels.scale
        y = _called(_linear, _linear_operator, levels.q, factor, levels.zero, tail=tail)
        if by_row is not None:
            y = y.mul_(by_row) if layer.bias is None else torch.addcmul(layer.bias, y, by_row)
        return shaped(y, x, layer).to(x.dtype)

    def expected(self, layer: QLayer, x: Tensor) -> Tensor:
        return reference(layer, x, self.top)


def _pointwise(operator: Any, q: Tensor, scale: Any, zero: Any, *tail: Any) -> Tensor:
    """tail: the packed weight, its scales and zero points, and the bias; of convolutions also stride, padding,
    dilation and groups."""
    return operator(q, float(scale), int(zero), *tail, 1.0, 0, torch.float32, "none", [], "")


def _linear(*args: Any) -> Tensor:
    return _pointwise(torch.ops.onednn.qlinear_pointwise, *args)


def _convolution(*args: Any) -> Tensor:
    return _pointwise(torch.ops.onednn.qconv2d_pointwise, *args)


def _called(direct: Any, in_graph: Any, q: Tensor, *numbers: Any, tail: tuple) -> Any:
    """Eager calls go without an operator of our own, which takes time."""
    if not torch.compiler.is_compiling():
        return direct(q, *numbers, *tail)
    return in_graph(q, *(n if isinstance(n, Tensor) else torch.full((), float(n)) for n in numbers), *tail)


# oneDNN's own operators do not say what shape they give of a packed weight, so that no graph can hold them.
_OPERATOR = "(Tensor q, Tensor scale, Tensor zero, Tensor w, Tensor scales, Tensor zeros, Tensor? bias{}) -> Tensor"
_SHAPED = _OPERATOR.format(", int[] stride, int[] padding, int[] dilation, int groups")
_linear_operator = torch.library.custom_op(
    "fastdiff::onednn_linear", _linear, mutates_args=(), schema=_OPERATOR.format("")
)


@_linear_operator.register_fake
def _(q: Tensor, scale: Tensor, zero: Tensor, w: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((len(q), len(scales)), dtype=torch.float32)


@torch.library.custom_op("fastdiff::onednn_convolution", mutates_args=(), schema=_SHAPED)
def _convolution_operator(*args: Any) -> Tensor:
    return _convolution(*args).contiguous(memory_format=torch.channels_last)


@_convolution_operator.register_fake
def _(
    q: Tensor, scale: Tensor, zero: Tensor, w: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    sides = [
        (size + 2 * pad - wide * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, wide in zip(q.shape[2:], w.shape[-2:], stride, padding, dilation, strict=True)
    ]
    found = q.new_empty((len(q), len(scales), *sides), dtype=torch.float32)
    return found.contiguous(memory_format=torch.channels_last)


def _geometry(conv: QConv2d) -> tuple[list[int], list[int], list[int], int]:
    return list(conv.stride), [int(size) for size in conv.padding], list(conv.dilation), conv.groups
