"""Every format and kind of layer on the device: packing, unpacking, the reference, and the kernels for CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.kernels.cuda import IntConv, IntMM, ScaledMM
from fastdiff.quant.packing import FORMATS
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.reference import reference

from .replay import Replay


@pytest.mark.parametrize("rounding", ["nearest", "mse"])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_packed_where_they_lie(name, rounding):
    with Replay() as mode:
        packed = FORMATS[name].pack(torch.empty(64, 128, device="meta"), 64, rounding)
    assert not mode.wrong and not mode.reads
    with Replay() as mode:
        FORMATS[name].unpack(packed, 128)
        FORMATS[name].unpack(packed, 128)
    assert not mode.wrong and not mode.reads and sum(mode.copies.values()) <= 1, "tables are brought there once"


LAYERS = {
    "linear": (lambda: nn.Linear(128, 64, device="meta"), (2, 40, 128)),
    "1x1": (lambda: nn.Conv2d(64, 64, 1, device="meta"), (2, 64, 8, 8)),
    "3x3": (lambda: nn.Conv2d(64, 64, 3, padding=1, device="meta"), (2, 64, 8, 8)),
}
RECIPES: dict[str, tuple[Recipe, Any]] = {
    "w8a8": (Recipe("int8", "int8"), IntMM()), "fp8": (Recipe("float8", "fp8"), ScaledMM()),
    "w8a16": (Recipe("int8"), None), "w4a16": (Recipe("int4"), None), "normal": (Recipe("normal4"), None),
    "w4a8": (Recipe("dual4", "int8"), IntMM()), "w4a16 low rank": (Recipe("int4", low_rank=4), None),
}  # fmt: skip
RECIPES |= {name: (Recipe(name), None) for name in FORMATS if name not in {r.format for r, _ in RECIPES.values()}}


@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
def test_static_ranges_are_numbers_that_nothing_waits_for(kind):
    """In every bucket, and smoothed: what a calibration gives, brought there when the layer is packed."""
    make, shape = LAYERS[kind]
    channels, edges, present = shape[1 if len(shape) > 3 else -1], torch.tensor([1.0, 2.0, 3.0]), Present()
    there = {"smooth": torch.ones(channels, device="meta")}
    with Replay():
        layer = build(make().requires_grad_(False), RECIPES["w8a8"][0], present, low=-edges, high=edges, **there)
    layer._ranges = [(-float(edge), float(edge)) for edge in edges]
    layer._inverse = 1 / there["smooth"]
    x, kernel = torch.empty(shape, device="meta", dtype=torch.bfloat16), IntConv() if kind == "3x3" else IntMM()
    packed = kernel.pack(layer)
    with Replay() as mode:
        for bucket in (0, 1, None):
            present.bucket = bucket
            kernel(layer, packed, x)
            reference(layer, x)
    assert not mode.wrong and not mode.copies and not mode.reads


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_quantized_layer_waits_for_nothing(name, kind):
    (recipe, kernel), (make, shape) = RECIPES[name], LAYERS[kind]
    with Replay() as built:
        layer = build(make().requires_grad_(False), recipe, Present())
    assert not built.wrong
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    with Replay() as mode:
        reference(layer, x)
        if kernel is not None and not (kind == "3x3" and isinstance(kernel, ScaledMM)):
            own = IntConv() if kind == "3x3" else kernel
            assert own(layer, own.pack(layer), x).shape == ((*shape[:-1], 64) if kind == "linear" else shape)
    assert not mode.wrong and not mode.copies
    assert not mode.reads
