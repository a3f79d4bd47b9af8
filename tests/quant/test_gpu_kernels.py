"""GPU kernels where there is no GPU: Triton's programs are compiled for GPUs and run by its interpreter; `int_mm` and
`scaled_mm`, whose operators CPUs have too, are compared with the reference. The rest is left to the self-test."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.kernels.cuda import IntMM, ScaledMM
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.reference import reference

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="4-bit GPU kernels NOT CHECKED: pip install 'fastdiff[triton]'"
)

_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from fastdiff.quant.kernels.triton_program import product

sizes = dict.fromkeys(("M", "N", "K", "groups"), "i32")
floats = {"x": "*bf16", "q": "*u8", "fine": "*fp16", "y": "*fp32"}
integers = {"x": "*i8", "q": "*u8", "fine": "*u8", "y": "*i32"}
for capability in (80, 89, 90):
    for whole, tensors, smallest in ((False, floats, 16), (True, integers, 32)):
        for group in (16, 32, 64, 128):
            if group >= smallest:
                tiles = {"WHOLE": whole, "BM": 64, "BN": 64, "G": group}
                kinds = tensors | sizes | dict.fromkeys(tiles, "constexpr")
                source = triton.compiler.ASTSource(product, kinds, tiles)
                made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                tensor_cores = ("wgmma" if capability == 90 else "mma.sync") in made.asm["ptx"]
                print(whole, capability, group, len(made.asm["cubin"]), made.metadata.shared, tensor_cores)
"""

_RUN = """
import torch
from torch import nn
from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.kernels.triton import TritonW4
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.reference import reference

torch.manual_seed(0)
kernel, worst = TritonW4(), 0.0
for layer, shape in (
    (nn.Linear(128, 96), (3, 20, 128)), (nn.Linear(200, 70, bias=False), (64, 200)),
    (nn.Linear(64, 130), (1, 64)), (nn.Conv2d(96, 40, 1), (1, 96, 5, 7)),
):
    x = torch.randn(shape)
    for form, eight in (("int4", "none"), ("dual4", "int8")):
        for group in (32, 64):
            for edges in ({}, {"low": torch.tensor([-2.0, -3.0]), "high": torch.tensor([4.0, 3.5])}):
                recipe = Recipe(form, eight, group=group)
                quantized = build(layer, recipe, Present(0), **(edges if eight == "int8" else {}))
                quantized._ranges = [(-2.0, 4.0), (-3.0, 3.5)] if edges and eight == "int8" else []
                found, wanted = kernel(quantized, kernel.pack(quantized), x), reference(quantized, x)
                assert found.shape == wanted.shape and wanted.norm() > 1
                worst = max(worst, float((found - wanted).norm() / wanted.norm()))
print(worst)
"""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=600,
        capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


@needs_triton
def test_triton_programs_compile_for_gpus_and_use_their_tensor_cores(tmp_path):
    lines = [line.split() for line in run(_COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()]
    assert len(lines) == 3 * (4 + 3)
    for line in lines:
        *_, size, shared, tensor_cores = line
        assert int(size) > 1000 and int(shared) < 48 << 10, line
        assert tensor_cores == "True", line


@needs_triton
def test_triton_programs_compute_what_the_reference_does():
    assert float(run(_RUN, TRITON_INTERPRET="1")) < 1e-5


@pytest.fixture
def exact_int_mm(monkeypatch):
    """PyTorch's own product on CPUs, but where that is wrong: oneDNN told to do without VNNI adds pairs in 16 bits."""
    own, most = torch._int_mm, torch.full((64, 64), 127, dtype=torch.int8)
    if not torch.equal(own(most, most), most.int() @ most.int()):
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("form", "rows"), [("int8", 40), ("int8", 3), ("dual4", 40)])
def test_int_mm_computes_what_the_reference_does(form, rows, static, exact_int_mm):
    torch.manual_seed(0)
    layer, kernel = nn.Linear(64, 48).requires_grad_(False), IntMM()
    edges = {"low": torch.tensor([-3.0]), "high": torch.tensor([2.5])} if static else {}
    quantized = build(layer, Recipe(form, "int8"), Present(), **edges)
    quantized._ranges = [(-3.0, 2.5)] if static else []
    x = torch.randn(rows, 64)
    torch.testing.assert_close(kernel(quantized, kernel.pack(quantized), x), reference(quantized, x))


@pytest.mark.parametrize("rows", [40, 3])
def test_scaled_mm_computes_what_the_reference_does(rows):
    torch.manual_seed(0)
    layer, kernel, x = nn.Linear(64, 48).requires_grad_(False), ScaledMM(), torch.randn(rows, 64)
    quantized = build(layer, Recipe("float8", "fp8"), Present())
    found, wanted = kernel(quantized, kernel.pack(quantized), x), reference(quantized, x)
    assert float((found - wanted).norm() / wanted.norm()) < 4e-3  # bfloat16 results
