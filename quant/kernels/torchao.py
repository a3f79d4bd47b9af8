"""torchao (https://github.com/pytorch/ao) as a kernel of linear layers; an optional package, used only when asked for.

Its int8 layers are slower than float32 on a CPU; on a GPU they are fast only under torch.compile.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdiff.quant.layer import QLayer
from fastdiff.quant.layers import QConv2d

from .cuda import Product


class TorchAO(Product):
    """torchao's own quantization of the weight that the layer's integers stand for."""

    name = "torchao"

    def refuses(self, layer: QLayer) -> str | None:
        if isinstance(layer, QConv2d):
            return "has no convolutions"
        if self._config(layer) is None:
            return f"has nothing for {layer.recipe.format} weights with activations {layer.recipe.activations}"
        return None

    def _config(self, layer: QLayer) -> str | None:
        names = {
            ("int8", "none"): "Int8WeightOnlyConfig",
            ("int8", "int8"): "Int8DynamicActivationInt8WeightConfig",
            ("float8", "fp8"): "Float8DynamicActivationFloat8WeightConfig",
        }
        return names.get((layer.recipe.format, layer.recipe.activations)) if layer.low is None else None

    def pack(self, layer: QLayer) -> nn.Module:
        from torchao import quantization

        outputs, inputs = layer.matrix_shape
        plain = nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(layer.matrix(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias, requires_grad=False)
        quantization.quantize_(plain, getattr(quantization, str(self._config(layer)))())
        return plain

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        y: Tensor = packed(layer.smoothed(x))
        return y
