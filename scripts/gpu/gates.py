"""What has to hold on a card before anything is measured: formats, kernels, cache methods, waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fastdiff
from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.kernels.choice import KERNELS, proved
from fastdiff.quant.layer import Kernel, QLayer
from fastdiff.quant.packing import FORMATS
from fastdiff.quant.recipe import Recipe
from tests import tiny
from tests.laws.rows import ROWS, STEPS
from tests.laws.rows import Row as Method

from .bench import Bench, Row, apart, tried

RECIPES = {
    "w8a8": Recipe("int8", "int8"), "fp8": Recipe("float8", "fp8"), "w8a16": Recipe("int8"), "w4a16": Recipe("int4"),
    "w4a8": Recipe("dual4", "int8"),
}  # fmt: skip
# what makes a layer, and the shape of so many rows that it is given
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[int, ...]]]] = {
    "linear": (lambda: nn.Linear(256, 384), lambda rows: (rows, 256)),
    "3x3": (lambda: nn.Conv2d(64, 96, 3, padding=1), lambda rows: (1, 64, rows, 16)),
}
ROWS_OF_X = (1, 17, 77, 512, 4608)
WRONG = 0.02  # of a half-precision result
MOVED = 1e-3  # of float32 latents, between two devices
FAMILIES = ("flux", "sdxl", "wan")


def gates(bench: Bench) -> Iterator[Row]:
    for name in FORMATS:
        yield tried(f"format {name}", lambda name=name: _format(bench, name))  # type: ignore[misc]
    for name, recipe in RECIPES.items():
        for kernel in KERNELS:
            for kind in LAYERS:
                yield from _kernel(bench, name, recipe, kernel, kind)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for family in FAMILIES[:1] if bench.dry else FAMILIES:
        for name, row in list(ROWS.items())[: 6 if bench.dry else None]:
            if isinstance(row, Method) and family in row.families:
                yield tried(f"{name} on {family}", lambda row=row, family=family: _method(bench, row, family))  # type: ignore[misc]


def _format(bench: Bench, name: str) -> Row:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    row: Row = {}
    for rounding in ("nearest", "mse"):
        here = FORMATS[name].unpack(FORMATS[name].pack(weight, 64, rounding), 512)
        there = FORMATS[name].unpack(FORMATS[name].pack(weight.to(bench.device), 64, rounding), 512)
        row[rounding] = apart(there, here)
    return row | {"passed": max(row.values()) < MOVED}


def _kernel(bench: Bench, name: str, recipe: Recipe, kernel: Kernel, kind: str) -> Iterator[Row]:
    make, shape = LAYERS[kind]
    layer = build(make().requires_grad_(False), recipe, Present())
    assert isinstance(layer, QLayer)
    layer = layer.to(bench.device)
    if kernel.refuses(layer) is not None:
        return
    if bench.dry and (reason := proved(kernel, layer)[1]) is not None:  # a processor without the instructions, say
        yield {"name": f"kernel {kernel.name} {name} {kind}", "skipped": f"passed over on this processor: it {reason}"}
        return
    packed: Any = None

    def pack() -> Row:
        nonlocal packed
        packed = kernel.pack(layer)
        return {}

    row = tried(f"kernel {kernel.name} {name} {kind}", pack)
    if len(row) > 1:
        yield row
        return
    for dtype in (torch.float32,) if bench.dry else (torch.bfloat16, torch.float16):
        for rows in ROWS_OF_X[:2] if bench.dry else ROWS_OF_X:
            x = torch.randn(shape(rows), generator=torch.Generator().manual_seed(rows)).to(bench.device, dtype)
            told = f"kernel {kernel.name} {name} {kind} {rows} {str(dtype).removeprefix('torch.')}"
            yield tried(told, lambda x=x: _compared(kernel, layer, packed, x))  # type: ignore[misc]


def _compared(kernel: Kernel, layer: QLayer, packed: Any, x: torch.Tensor) -> Row:
    """Against the reference, and against float64 products of the dequantized weight and the unquantized input."""
    found = kernel(layer, packed, x)
    bias = None if layer.bias is None else layer.bias.double()
    exact = layer.apply_weight(x.double(), layer.matrix().double(), bias)
    error = apart(found, kernel.expected(layer, x.float()))
    return {"error_of_reference": error, "error_of_float64": apart(found, exact), "passed": error < WRONG}


def _method(bench: Bench, row: Method, family: str) -> Row:
    """The same steps computed and cached as on the CPU, and the same latents."""
    said: list[Any] = []
    latents: list[torch.Tensor] = []
    told: Row = {}
    for device in (torch.device("cpu"), bench.device):
        pipe = tiny.make(family).to(device)
        try:
            handle = fastdiff.accelerate(pipe, cache=row.aggressive)
            if device == bench.device:
                tiny.run(pipe, family, steps=STEPS)  # what is made once is made
                with bench.waits(told):
                    latents.append(tiny.run(pipe, family, steps=STEPS))
            else:
                latents.append(tiny.run(pipe, family, steps=STEPS))
            said.append(handle.report.branches)
            handle.restore()
        finally:
            pipe.to("cpu")  # text encoders and VAEs are shared by all tiny pipelines
    error = apart(latents[1], latents[0])
    return told | {"error": error, "passed": said[0] == said[1] and error < MOVED, "steps": STEPS}
