"""Both kinds of quantized layer. They are subclasses of the float ones, so that adapters and other patches fit them."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from .activations import Present, batched
from .layer import Choose, QLayer
from .packing import Tensors
from .recipe import Recipe


class QLinear(QLayer, nn.Linear):  # type: ignore[misc, override]
    """y = x W^T + b for x [..., inputs]."""

    float_kind = nn.Linear

    def __init__(
        self, like: nn.Linear, recipe: Recipe, tensors: Tensors, present: Present, choose: Choose
    ) -> None:  # fmt: skip
        """like: a Linear, or a QLinear, whose sizes it takes over."""
        QLayer.__init__(self, recipe, tensors, present, choose, like.weight.dtype)
        self.out_features, self.in_features = like.out_features, like.in_features

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _residual(self, x: Tensor) -> Tensor:
        assert self.down is not None and self.up is not None
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class QConv2d(QLayer, nn.Conv2d):  # type: ignore[override]
    """A convolution of x [b, channels, h, w] or [channels, h, w], padded with zeros; `padding` is read at each call."""

    float_kind = nn.Conv2d

    def __init__(
        self, like: nn.Conv2d, recipe: Recipe, tensors: Tensors, present: Present, choose: Choose
    ) -> None:  # fmt: skip
        """like: a Conv2d, or a QConv2d, whose settings it takes over."""
        QLayer.__init__(self, recipe, tensors, present, choose, like.weight.dtype)
        for name in _CONV:
            setattr(self, name, getattr(like, name))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_channels, math.prod(self.weight_shape[1:])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def geometry(self) -> str:
        return f" / {self.stride} {self.padding} {self.dilation} {self.groups}"

    @property
    def is_product(self) -> bool:
        """Whether it is one matrix product of its pixels."""
        plain = self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)
        return bool(plain and self.groups == 1)

    def sides(self, x: Tensor) -> tuple[int, int]:
        """Height and width of what it makes of pictures x [b, channels, h, w]."""
        told = zip(x.shape[2:], self.pads, self.dilation, self.kernel_size, self.stride, strict=True)
        high, wide = ((n + 2 * pad - apart * (k - 1) - 1) // step + 1 for n, pad, apart, k, step in told)
        return high, wide

    @property
    def by_picture(self) -> bool:
        return self.low is None and self.recipe.activations == "int8"

    @property
    def pads(self) -> tuple[int, int]:
        """Zeros above and below, and at both sides."""
        high, wide = (int(size) for size in self.padding)
        return high, wide

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(batched(input))
        return y[0] if input.ndim == 3 else y

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight if weight.ndim == 4 else weight.view(self.weight_shape)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _residual(self, x: Tensor) -> Tensor:
        assert self.down is not None and self.up is not None
        inner = F.conv2d(x, self.down.to(x.dtype), None, self.stride, self.padding, self.dilation)
        return F.conv2d(inner, self.up.to(x.dtype))


_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "transposed", "output_padding", "_reversed_padding_repeated_twice",
)  # fmt: skip
