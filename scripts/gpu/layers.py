"""Layers of FLUX and SDXL at their own sizes, in bf16 and in every scheme, eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastdiff.quant.activations import Present
from fastdiff.quant.build import build

from .bench import Bench, Row, tried
from .gates import RECIPES

SIZES = {  # rows, outputs, inputs
    "flux single out": (4608, 3072, 15360), "flux ff in": (4608, 12288, 3072), "flux q": (4608, 3072, 3072),
    "sdxl ff in": (2048, 10240, 1280), "sdxl ff out": (2048, 1280, 5120), "flux modulation": (1, 18432, 3072),
}  # fmt: skip
TINY = {"tiny": (32, 64, 128)}
RIVALS = {"torchao int8": "Int8DynamicActivationInt8WeightConfig", "torchao fp8": "Float8DynamicActivationFloat8WeightConfig"}  # fmt: skip  # noqa: E501


def layers(bench: Bench) -> Iterator[Row]:
    for name, (rows, outputs, inputs) in (TINY if bench.dry else SIZES).items():
        with torch.device(bench.device):
            linear = nn.Linear(inputs, outputs, dtype=bench.dtype).requires_grad_(False)
            nn.init.normal_(linear.weight, std=0.02)
            x = torch.randn(rows, inputs, dtype=bench.dtype)
        calls: dict[str, Callable[[], Tensor]] = {"bf16": lambda linear=linear, x=x: linear(x)}  # type: ignore[misc]
        for told, made in _candidates(bench, linear).items():
            row = tried(f"{name} {told}", lambda made=made, x=x: _runs(made, x))  # type: ignore[misc]
            if len(row) > 1:
                yield row
            else:
                calls[told] = lambda made=made, x=x: made(x)  # type: ignore[misc]
        found = bench.interleaved(calls)
        for told, row in found.items():
            faster = round(found["bf16"]["ms"] / row["ms"], 3)
            yield {"name": f"{name} {told}", "size": [rows, outputs, inputs], **row, "times_bf16": faster}
        torch._dynamo.reset()


def _runs(made: Callable[[Tensor], Tensor], x: Tensor) -> Row:
    made(x)
    return {}


def _candidates(bench: Bench, linear: nn.Linear) -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, recipe in RECIPES.items():
        layer = build(copy.deepcopy(linear), recipe, Present())
        found[name] = layer
        if name != "w4a8":
            found[f"{name} compiled"] = torch.compile(layer, backend="eager" if bench.dry else "inductor")
    for name, config in RIVALS.items():
        try:
            from torchao import quantization

            rival = nn.Sequential(copy.deepcopy(linear))
            quantization.quantize_(rival, getattr(quantization, config)())
        except Exception:  # not installed, or not for this card: the row is missing, and `versions` says why
            continue
        found[f"{name} compiled"] = torch.compile(rival)
    return found
