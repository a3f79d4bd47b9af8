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
from fastdiff.quant.kernels.choice import choose
from fastdiff.quant.kernels.cpu import OneDNN
from fastdiff.quant.kernels.cuda import IntConv, IntMM, ScaledMM, levels_of, scaled
from fastdiff.quant.kernels.fused import FusedIntMM
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

_COMPILE_FUSED = """
import triton
from triton.backends.compiler import GPUTarget
from fastdiff.quant.kernels.triton_program import finish, levels, patches

rows = {"x": "*bf16", "inverse": "*fp32", "scales": "*fp32", "K": "i32", "most": "fp32"}
ends = {"product": "*i32", "scales": "*fp32", "sums": "*i32", "bias": "*fp32", "y": "*bf16", "N": "i32"}
pixels = {"q": "*i8", "out": "*i8"} | dict.fromkeys(("H", "W", "C", "OH", "OW", "K"), "i32")
window = dict.fromkeys(("SH", "SW", "PH", "PW", "DH", "DW"), 1) | {"KH": 3, "KW": 3}
for capability in (80, 89, 90):
    for there in (0, 1):
        numbers = dict.fromkeys(("scale", "zero"), "*fp32" if there else "fp32")
        own = {"KIND": there, "BLOCK": 1024}
        cases = [
            (levels, rows | numbers | {"q": "*i8"}, own | {"ROWS": False, "SMOOTH": True}),
            (finish, ends | numbers, own | {"ROWS": False, "BIAS": True}),
            (patches, pixels | {"zero": numbers["zero"]}, own | window),
        ]
        if not there:
            by_row = numbers | {"scale": "*fp32"}
            cases += [(levels, rows | numbers | {"q": "*i8"}, own | {"ROWS": True, "SMOOTH": False})]
            cases += [(finish, ends | by_row, own | {"ROWS": True, "BIAS": False})]
            if capability > 80:
                cases += [(levels, rows | numbers | {"q": "*fp8e4nv"}, own | {"ROWS": True, "SMOOTH": False})]
        for program, kinds, fixed in cases:
            source = triton.compiler.ASTSource(program, kinds | dict.fromkeys(fixed, "constexpr"), fixed)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            print(capability, program.__name__, len(made.asm["cubin"]), made.metadata.shared)
"""

_RUN_FUSED = """
import torch
from torch import nn
from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.kernels.fused import FusedIntConv, FusedIntMM, FusedScaledMM
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.reference import reference

torch.manual_seed(0)
torch._int_mm = lambda a, b: a.int() @ b.int()
worst = 0.0
for layer, shape in (
    (nn.Linear(128, 96), (3, 20, 128)), (nn.Linear(1400, 64, bias=False), (3, 1400)),
    (nn.Conv2d(96, 40, 1), (1, 96, 5, 7)), (nn.Conv2d(24, 16, 3, 2, 1), (2, 24, 9, 8)),
    (nn.Conv2d(8, 16, (3, 5), padding=(2, 1), dilation=(2, 1), bias=False), (1, 8, 12, 11)),
):
    kernel = FusedIntMM() if getattr(layer, "kernel_size", (1, 1)) == (1, 1) else FusedIntConv()
    for form in ("int8", "dual4"):
        for edges in ({}, {"low": torch.tensor([-2.0, -3.0]), "high": torch.tensor([4.0, 3.5])}):
            smooth = torch.rand(shape[1 if len(shape) == 4 else -1]) + 0.5
            quantized = build(layer.requires_grad_(False), Recipe(form, "int8"), Present(0), smooth=smooth, **edges)
            quantized._ranges, quantized._inverse = [(-2.0, 4.0), (-3.0, 3.5)] if edges else [], 1 / smooth
            x = torch.randn(shape).half()
            wanted = reference(quantized, x.float())
            found = kernel(quantized, kernel.pack(quantized), x)
            assert found.shape == wanted.shape and found.dtype == torch.float16 and wanted.norm() > 1
            worst = max(worst, float((found - wanted).norm() / wanted.norm()))
            x.flatten()[0] = torch.nan
            quantized.present.forget()
            assert edges or bool(kernel(quantized, kernel.pack(quantized), x).isnan().any()), "of a row with NaN"
print(worst)

layer, x = build(nn.Linear(1100, 64).requires_grad_(False), Recipe("float8", "fp8"), Present()), torch.randn(40, 1100)
eight, scale = FusedScaledMM().rows(layer, x)
assert torch.equal(scale, x.abs().amax(-1, keepdim=True) / 448)
exact = (x / scale).to(torch.float8_e4m3fn).float()
# the interpreter does not carry: what rounds up to a power of two it halves; numbers below the normal ones are zero
carried = (exact.abs() > (x / scale).abs()) & (exact.abs().log2() % 1 == 0)
assert carried.float().mean() < 0.05
print(float((eight.float() - exact).abs()[~carried].max()))
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


@needs_triton
def test_what_surrounds_the_products_compiles_for_gpus(tmp_path):
    lines = [line.split() for line in run(_COMPILE_FUSED, TRITON_CACHE_DIR=str(tmp_path)).splitlines()]
    assert len(lines) == 3 * 8 + 2
    assert all(int(size) > 1000 and int(shared) < 48 << 10 for _, _, size, shared in lines)


@needs_triton
def test_what_surrounds_the_products_computes_what_the_reference_does():
    integers, floats = map(float, run(_RUN_FUSED, TRITON_INTERPRET="1").split())
    assert integers < 1e-3  # float16 results
    assert floats <= 2**-6  # the least normal number


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


CONVOLUTIONS = {
    "padded": nn.Conv2d(24, 16, 3, padding=1),
    "every other pixel": nn.Conv2d(24, 16, 3, 2, 1, bias=False),
    "wide": nn.Conv2d(24, 16, (3, 5), padding=(2, 1), dilation=(2, 1)),
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_as_a_product_computes_what_the_reference_does(name, static, exact_int_mm):
    """Beyond the edges are zeros, whatever level stands for zero."""
    torch.manual_seed(0)
    layer, kernel, x = CONVOLUTIONS[name].requires_grad_(False), IntConv(), torch.randn(2, 24, 9, 8) + 0.5
    edges = {"low": torch.tensor([-1.0]), "high": torch.tensor([3.5])} if static else {}
    quantized = build(layer, Recipe("int8", "int8"), Present(), **edges)
    quantized._ranges = [(-1.0, 3.5)] if static else []
    assert kernel.refuses(quantized) == "needs an NVIDIA GPU"
    torch.testing.assert_close(quantized._quantized(kernel, kernel.pack(quantized), x), reference(quantized, x))


def test_a_convolution_is_no_product_where_the_copy_would_be_too_large(monkeypatch):
    monkeypatch.setattr("fastdiff.quant.kernels.cuda._MOST", 1000)
    layer, x = CONVOLUTIONS["padded"].requires_grad_(False), torch.randn(1, 24, 8, 8)
    quantized = build(layer, Recipe("int8", "int8"), Present())
    monkeypatch.setattr(torch, "_int_mm", None)
    assert torch.equal(IntConv()(quantized, IntConv().pack(quantized), x), reference(quantized, x))


def test_only_the_clock_can_prefer_a_convolution_as_a_product(monkeypatch, exact_int_mm):
    """What is not timed has the reference: on what card copies pay, nobody knows beforehand."""
    monkeypatch.setattr("fastdiff.quant.kernels.cuda.lacks_cuda", lambda layer, capability: None)
    monkeypatch.setattr(OneDNN, "refuses", lambda self, layer: "is not here")
    quantized = build(CONVOLUTIONS["padded"].requires_grad_(False), Recipe("int8", "int8", speed="fastest"), Present())
    assert [kernel.name for kernel, _ in choose(quantized)[0]] == ["reference", "int_conv"]
    small = build(CONVOLUTIONS["padded"], Recipe("int8", "int8", speed="smallest"), Present())
    assert [kernel.name for kernel, _ in choose(small)[0]] == ["reference"]


def test_a_faster_form_of_a_kernel_that_proves_itself_is_the_only_one(monkeypatch, exact_int_mm):
    monkeypatch.setattr("fastdiff.quant.kernels.cuda.lacks_cuda", lambda layer, capability: None)
    monkeypatch.setattr("fastdiff.quant.kernels.fused._lacks_triton", lambda: None)
    monkeypatch.setattr(FusedIntMM, "levels", staticmethod(levels_of))
    layer = build(nn.Linear(64, 48).requires_grad_(False), Recipe("int8", "int8", speed="fastest"), Present())
    assert {"triton_int_mm", "int_mm"} & {kernel.name for kernel, _ in choose(layer)[0]} == {"int_mm"}, "no Triton here"
    monkeypatch.setattr(FusedIntMM, "scaled", staticmethod(scaled))
    assert {"triton_int_mm", "int_mm"} & {kernel.name for kernel, _ in choose(layer)[0]} == {"triton_int_mm"}


@pytest.mark.parametrize("rows", [40, 3])
def test_scaled_mm_computes_what_the_reference_does(rows):
    torch.manual_seed(0)
    layer, kernel, x = nn.Linear(64, 48).requires_grad_(False), ScaledMM(), torch.randn(rows, 64)
    quantized = build(layer, Recipe("float8", "fp8"), Present())
    found, wanted = kernel(quantized, kernel.pack(quantized), x), reference(quantized, x)
    assert float((found - wanted).norm() / wanted.norm()) < 4e-3  # bfloat16 results
