"""Quantized layers: plain modules with plain buffers, in the place of nn.Linear and nn.Conv2d.

They are subclasses, so that adapters and other patches of such layers fit them, but hold no float weight: `weight`
makes one when somebody asks. Buffers, by name: `q`, `scale` and others of the format; `bias`; `smooth` [input channels]
divides the input; `down`, `up` are a low-rank residual; `low`, `high` [buckets + 1] are static ranges of the input
(after `smooth`), the last of them that of all timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import Levels, Present, fixed, per_token, picture, ranged, rows_of
from .packing import FORMATS, Format, Rounding, Tensors

Activations = Literal["none", "int8", "fp8"]


@dataclass(frozen=True)
class Recipe:
    """How one layer is quantized."""

    format: str
    activations: Activations = "none"
    group: int = 64
    rounding: Rounding = "mse"
    low_rank: int = 0
    kernel: str = "auto"


class QLayer(nn.Module):
    """What both kinds of quantized layer share; `present`, which tells the timestep bucket, is the whole denoiser's."""

    bias: Tensor | None
    smooth: Tensor | None
    low: Tensor | None
    high: Tensor | None
    down: Tensor | None
    up: Tensor | None
    q: Tensor

    def __init__(self, recipe: Recipe, tensors: Tensors, present: Present) -> None:
        """tensors: the buffers by name. Set the shape before the first call, then choose a kernel."""
        nn.Module.__init__(self)  # not the float layer's, which would make a weight
        self.recipe, self.present = recipe, present
        for name in ("bias", "smooth", "low", "high", "down", "up"):
            self.register_buffer(name, tensors.get(name))
        self._stored = tuple(name for name in tensors if name not in self._buffers)
        for name in self._stored:
            self.register_buffer(name, tensors[name])
        self._kernel: Any = None
        self._packed: Any = None
        self._ranges: list[tuple[float, float]] = []
        self._inverse: Tensor | None = None
        self._smooth_key: int | None = None

    @property
    def format(self) -> Format:
        return FORMATS[self.recipe.format]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs, and inputs of each."""
        raise NotImplementedError

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float layer with a weight [outputs, inputs]."""
        raise NotImplementedError

    def tensors(self) -> Tensors:
        """The stored weight, without bias and options, wherever the kernel keeps it."""
        found = {name: cast(Tensor, getattr(self, name)) for name in self._stored}
        return found if self._plainly else {**found, "q": self._kernel.unpack(self, self._packed, found)}

    def matrix(self) -> Tensor:
        """The float32 weight [outputs, inputs] that the integers stand for, for an input that was smoothed."""
        return self.format.unpack(self.tensors(), self.matrix_shape[1])

    @property
    def quantized_as(self) -> str:
        """What tells a plan made on these weights from one made on others."""
        eight = "" if self.recipe.activations == "none" else f" with {self.recipe.activations} activations"
        return self.recipe.format + eight

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, as they are stored."""
        extra = [b for name, b in self._buffers.items() if b is not None and name not in self._stored]
        return sum(t.numel() * t.element_size() for t in [*self.tensors().values(), *extra])

    def forward(self, x: Tensor) -> Tensor:
        if self._kernel is None:
            self.choose_kernel()
        y = self._kernel(self, self._packed, x)
        return y if self.down is None else y + self._residual(x).to(y.dtype)

    def levels(self, x: Tensor, top: int) -> Levels:
        """The input as 8-bit levels 0 .. top."""
        if self._ranges:
            low, high = self._ranges[-1 if self.present.bucket is None else self.present.bucket]
            key: tuple = (low, high, top, self._smooth_key)
            return self.present.shared(x, key, lambda: fixed(rows_of(x), low, high, top, self._inverse))
        make = ranged if x.ndim == 4 else per_token
        key = (make.__name__, top, self._smooth_key)
        return self.present.shared(x, key, lambda: make(rows_of(x), top, self._inverse))

    @property
    def highest(self) -> float:
        """A value of the smoothed input that is the highest level."""
        return self._ranges[-1][1] if self._ranges else 3.0

    def finite(self, x: Tensor) -> bool:
        """Whether static ranges may be used; they would hide NaN and infinity. Not asked where it would be a wait."""
        return not self._ranges or x.device.type != "cpu" or math.isfinite(float(x.sum()))

    def smoothed(self, x: Tensor) -> Tensor:
        if self.smooth is None:
            return x
        shape = (-1, 1, 1) if x.ndim == 4 else (-1,)
        return x / self.smooth.to(x.dtype).view(shape)

    def choose_kernel(self) -> str:
        """Pack for the fastest kernel that works here; says what was passed over and why, or nothing."""
        from .kernels.base import choose

        self._plain()
        self._ranges = [] if self.low is None or self.high is None else _pairs(self.low, self.high)
        self._inverse = None if self.smooth is None else 1 / self.smooth
        self._smooth_key = None if self.smooth is None else hash(tuple(self.smooth.tolist()))
        self._kernel, self._packed, said = choose(self)
        if self._kernel.replaces_q:
            self.q = self.q[:0].clone()  # empty, but of its type, by which others tell quantized weights
        return said

    @property
    def _plainly(self) -> bool:
        """Whether `q` is there, and not with the kernel alone."""
        return self._kernel is None or not self._kernel.replaces_q

    @property
    def kernel_name(self) -> str:
        return "not chosen yet" if self._kernel is None else self._kernel.name

    @property
    def weight(self) -> Tensor:
        """A float copy of the weight. It cannot be changed in place: that would be lost."""
        with torch.inference_mode():
            matrix = self.matrix()
            if self.smooth is not None:
                matrix = matrix / self.smooth.repeat_interleave(matrix.shape[1] // len(self.smooth))
            if self.down is not None and self.up is not None:
                matrix = matrix + self.up.float().flatten(1) @ self.down.float().flatten(1)
            return matrix.view(self.weight_shape)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.matrix_shape

    def _residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _plain(self) -> None:
        """Back to plain buffers, without a kernel."""
        self.q = self.tensors()["q"]
        self._kernel = self._packed = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLayer:
        """Moves to another device; never changes the type of a buffer, as `pipe.to(dtype)` would."""
        self._plain()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._plainly:
            destination[f"{prefix}q"] = self.tensors()["q"]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: plain tensors, without what a kernel packed."""
        buffers = {**self._buffers, "q": self.tensors()["q"]}
        return {**self.__dict__, "_buffers": buffers, "_kernel": None, "_packed": None}

    def extra_repr(self) -> str:
        outputs, inputs = self.matrix_shape
        return f"{inputs} -> {outputs}, {self.recipe.format}, activations {self.recipe.activations}, {self.kernel_name}"


class QLinear(QLayer, nn.Linear):  # type: ignore[misc, override]
    """y = x W^T + b for x [..., inputs]."""

    def __init__(self, shape: tuple[int, int], recipe: Recipe, tensors: Tensors, present: Present) -> None:
        QLayer.__init__(self, recipe, tensors, present)
        self.out_features, self.in_features = shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _residual(self, x: Tensor) -> Tensor:
        assert self.down is not None and self.up is not None
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class QConv2d(QLayer, nn.Conv2d):  # type: ignore[override]
    """A convolution of x [b, channels, h, w] that pads with zeros; `padding` is read at each call."""

    def __init__(self, like: nn.Conv2d, recipe: Recipe, tensors: Tensors, present: Present) -> None:
        """like: a Conv2d, or a QConv2d, whose settings it takes over."""
        QLayer.__init__(self, recipe, tensors, present)
        for name in _CONV:
            setattr(self, name, getattr(like, name))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_channels, math.prod(self.weight_shape[1:])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.view(self.weight_shape)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _residual(self, x: Tensor) -> Tensor:
        assert self.down is not None and self.up is not None
        inner = F.conv2d(x, self.down.to(x.dtype), None, self.stride, self.padding, self.dilation)
        return F.conv2d(inner, self.up.to(x.dtype))


_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "transposed", "output_padding", "_reversed_padding_repeated_twice",
)  # fmt: skip


def as_product(layer: QLayer) -> bool:
    """Whether the layer is one matrix product of its rows."""
    if not isinstance(layer, QConv2d):
        return True
    plain = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    return bool(plain)


def as_output(y: Tensor, x: Tensor) -> Tensor:
    """Rows [n, outputs] in the shape that the layer gives for x."""
    return picture(y, x) if x.ndim == 4 else y.view(*x.shape[:-1], -1)


def reference(layer: QLayer, x: Tensor, top: int = 255) -> Tensor:
    """What every kernel must compute: the float layer on what the integers stand for, in the type of the input."""
    weight = layer.matrix()
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if layer.recipe.activations == "int8" and layer.finite(x):
        rows = layer.levels(x, top).values().to(x.dtype)
        x = picture(rows, x) if x.ndim == 4 else rows.view(x.shape)
    else:
        x = layer.smoothed(x)
        if layer.recipe.activations == "fp8":
            x = float8(x).to(x.dtype)
    return layer.apply_weight(x, weight.to(x.dtype), bias)


def float8(x: Tensor) -> Tensor:
    """x [..., c] rounded to E4M3 with a scale for each row (each picture of [b, c, h, w]), in float32."""
    over = (1, 2, 3) if x.ndim == 4 else (-1,)
    scale = (x.abs().amax(over, keepdim=True).float() / 448).clamp_min(1e-12)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _pairs(low: Tensor, high: Tensor) -> list[tuple[float, float]]:
    return list(zip(low.tolist(), high.tolist(), strict=True))
