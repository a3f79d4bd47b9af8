"""Layers and kernels: against dequantized float32, over shapes, strides, groups, odd sizes, NaN; copies and moves."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastdiff.errors import BackendUnavailable, UnknownName, UnsupportedModel
from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.kernels import choice as kernels
from fastdiff.quant.kernels.cpu import OneDNN
from fastdiff.quant.layers import QConv2d, QLinear
from fastdiff.quant.packing import FORMATS
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.reference import reference

LAYERS = {
    "linear": (lambda: nn.Linear(96, 80), (2, 33, 96)),
    "odd": (lambda: nn.Linear(33, 7, bias=False), (5, 33)),
    "one row": (lambda: nn.Linear(16, 8), (1, 16)),
    "conv": (lambda: nn.Conv2d(24, 40, 3, 2, 1), (2, 24, 9, 11)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, 1, 1, groups=16), (2, 16, 8, 8)),
    "pixel": (lambda: nn.Conv2d(16, 20, 1), (2, 16, 8, 8)),
    "dilated": (lambda: nn.Conv2d(16, 20, 3, 1, 2, 2, groups=4, bias=False), (2, 16, 8, 8)),
    "wide": (lambda: nn.Conv2d(6, 10, (1, 5), padding=(0, 2)), (1, 6, 7, 9)),
}
EIGHT = [("int8", "int8"), ("dual4", "int8")]
ALL = [*EIGHT, *((name, "none") for name in FORMATS), ("float8", "fp8")]
CPU_KERNELS = ("onednn", "onednn_7bit")
has_onednn = pytest.mark.skipif(not hasattr(torch.ops.onednn, "qlinear_pointwise"), reason="torch without oneDNN")


def made(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make().eval().requires_grad_(False), nn.functional.silu(torch.randn(shape))


def ranged(x, buckets=3):
    return {"low": torch.full((buckets + 1,), float(x.min())), "high": torch.full((buckets + 1,), float(x.max()))}


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("form", "activations"), ALL)
@torch.no_grad()
def test_every_layer_and_format_is_near_the_float_one(name, form, activations):
    layer, x = made(name)
    quantized = build(layer, Recipe(form, activations, 32), Present())
    limit = {"int8": 0.02, "half": 0.001, "float8": 0.06, "normal3": 0.3, "normal2": 0.5}.get(form, 0.16)
    found = quantized(x)
    assert found.shape == layer(x).shape
    assert off(found, layer(x)) < limit
    assert off(quantized.weight.clone(), layer.weight) < limit


@has_onednn
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("form", "activations"), EIGHT)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kernel", CPU_KERNELS)
@torch.no_grad()
def test_kernels_equal_the_reference(name, form, activations, static, kernel):
    layer, x = made(name)
    recipe = Recipe(form, activations, 32, kernel=kernel)
    quantized = build(layer, recipe, Present(), **(ranged(x) if static else {}))
    try:
        quantized.choose_kernel()
    except BackendUnavailable as error:  # 8 bits saturate where there is no VNNI, and the self-test says so
        assert kernel == "onednn" and "wrong by" in str(error)
        return
    assert off(quantized(x), reference(quantized, x, 127 if kernel == "onednn_7bit" else 255)) < 1e-5


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_nan_in_is_nan_out(name, static):
    layer, x = made(name)
    quantized = build(layer, Recipe("int8", "int8"), Present(), **(ranged(x) if static else {}))
    x[0, ..., 0] = float("nan")
    assert quantized(x).isnan().any()


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("rank", [0, 4])
@torch.no_grad()
def test_smooth_and_low_rank_stand_for_the_same_layer(name, rank):
    layer, x = made(name)
    smooth = torch.rand(x.shape[1] if x.ndim == 4 else x.shape[-1]) + 0.5
    quantized = build(layer, Recipe("int8", "int8", low_rank=rank), Present(), smooth=smooth)
    found, halves = quantized(x), quantized.kernel_name == "onednn_7bit"  # of the levels, on machines without VNNI
    assert off(found, layer(x)) < 0.02 * (1 + halves)
    assert off(quantized.weight.clone(), layer.weight) < 0.02


@torch.no_grad()
def test_low_rank_takes_the_worst_off_4_bits():
    layer, x = made("linear")
    layer.weight += 3 * torch.outer(torch.randn(80), torch.randn(96))  # what rank 1 holds

    def error(rank):
        return off(build(layer, Recipe("int4", low_rank=rank), Present())(x), layer(x))

    assert error(2) < error(0) / 2


@has_onednn
@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize(("form", "activations"), EIGHT)
@torch.no_grad()
def test_packed_layers_give_their_plain_tensors_back(name, form, activations):
    layer, x = made(name)
    quantized = build(layer, Recipe(form, activations, 32, low_rank=2), Present(), **ranged(x))
    before = {key: t.clone() for key, t in quantized.state_dict().items()}
    found = quantized(x)
    assert quantized.kernel_name in CPU_KERNELS
    assert quantized.q.numel() == 0, "the integers must not be held twice"
    after = quantized.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(copy.deepcopy(quantized)(x), found)
    file = io.BytesIO()
    torch.save(quantized, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), found)
    assert torch.equal(quantized(x), found)


@torch.no_grad()
def test_a_change_of_type_leaves_the_integers_and_scales():
    layer, x = made("linear")
    quantized = build(layer, Recipe("int8", "int8"), Present())
    found, before = quantized(x), {key: t.clone() for key, t in quantized.state_dict().items()}
    quantized.to(torch.bfloat16)
    assert all(torch.equal(t, before[key]) for key, t in quantized.state_dict().items())
    assert torch.equal(quantized(x), found)
    assert quantized(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_padding_is_read_at_each_call():
    """Patch parallelism puts rows of the neighbours in its place."""
    layer, x = made("conv")
    quantized = build(layer, Recipe("int8", "int8"), Present(), **ranged(x))
    whole = quantized(x)
    object.__setattr__(quantized, "padding", (0, 1))
    assert torch.equal(quantized(nn.functional.pad(x, (0, 0, 1, 1))), whole)


@torch.no_grad()
def test_static_ranges_go_by_the_bucket():
    layer, x = made("linear")
    present = Present()
    edges = {"low": torch.tensor([-0.3, -0.3, -0.3]), "high": torch.tensor([0.1, 5.0, 5.0])}
    quantized = build(layer, Recipe("int8", "int8"), present, **edges)
    present.bucket = 0
    clipped = quantized(x)
    present.bucket = 1
    wide = quantized(x)
    present.bucket = None
    assert torch.equal(quantized(x), wide)  # outside of a run: the range of all timesteps
    assert off(clipped, layer(x)) > 0.1 > off(wide, layer(x))


@torch.no_grad()
def test_a_shared_input_is_quantized_once(monkeypatch):
    from fastdiff.quant import layer as layers

    calls, rows_of = [], layers.rows_of
    monkeypatch.setattr(layers, "rows_of", lambda *a: calls.append(1) or rows_of(*a))
    present, x = Present(), torch.randn(4, 32)
    projections = [build(nn.Linear(32, 16), Recipe("int8", "int8"), present) for _ in range(3)]
    for projection in projections:
        projection.choose_kernel()
    calls.clear()
    first = [projection(x) for projection in projections]
    assert len(calls) == 1
    x += 1  # the same tensor with other numbers
    assert not any(torch.equal(projection(x), old) for projection, old in zip(projections, first, strict=True))
    assert len(calls) == 2


class Wrong(OneDNN):
    def __call__(self, layer, packed, x):
        return super().__call__(layer, packed, x) * 1.1


@has_onednn
@torch.no_grad()
def test_a_kernel_that_is_wrong_is_passed_over_and_the_reason_told(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", (Wrong("onednn_7bit", 127), kernels.Reference()))
    monkeypatch.setattr(kernels, "AUTOMATIC", ("onednn_7bit", "reference"))
    layer, x = made("linear")
    quantized = build(layer, Recipe("int8", "int8"), Present())
    assert "wrong by 10" in quantized.choose_kernel()
    assert quantized.kernel_name == "reference"
    assert off(quantized(x), layer(x)) < 0.02


class Broken(OneDNN):
    def pack(self, layer):
        raise KeyError  # as Triton's CompilationError no RuntimeError, and without a word


@torch.no_grad()
def test_a_kernel_that_fails_in_any_way_is_passed_over(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", (Broken("onednn_7bit", 127), kernels.Reference()))
    monkeypatch.setattr(kernels, "AUTOMATIC", ("onednn_7bit", "reference"))
    quantized = build(made("linear")[0], Recipe("int8", "int8"), Present())
    assert quantized.choose_kernel() == "onednn_7bit: fails: KeyError" and quantized.kernel_name == "reference"


_SATURATES = """
import torch
from torch import nn
from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.reference import reference
torch.manual_seed(0)
for layer, shape in ((nn.Linear(96, 80), (33, 96)), (nn.Conv2d(24, 40, 1), (1, 24, 8, 8))):
    x, names = 0.9 + torch.rand(shape) / 10, set()
    for bucket in (0, 1, None):  # of ranges in which the input is at the top, and in the middle
        present = Present(bucket)
        edges = {"low": torch.tensor([-0.1, -90.0, -90.0]), "high": torch.tensor([1.0, 90.0, 90.0])}
        quantized = build(layer.eval().requires_grad_(False), Recipe("int8", "int8"), present, **edges)
        quantized.choose_kernel()
        names.add(quantized.kernel_name)
        assert present.bucket == bucket
        present.bucket = 0
        top = 127 if quantized.kernel_name == "onednn_7bit" else 255
        assert torch.dist(quantized(x), reference(quantized, x, top)) < 1e-4, (bucket, names)
    assert len(names) == 1
"""


@has_onednn
@pytest.mark.parametrize("isa", ["AVX2", "DEFAULT"])
def test_where_8_bits_saturate_the_same_kernel_is_chosen_whatever_the_ranges_and_the_bucket(isa):
    """As oneDNN computes on machines without VNNI; which it is, is fixed when it is loaded."""
    environment = {**os.environ, "DNNL_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _SATURATES], env=environment, check=True, timeout=900)


@pytest.mark.parametrize(
    ("kernel", "form", "activations", "said"),
    [
        ("scaled_mm", "float8", "fp8", "needs an NVIDIA GPU"),
        ("int_mm", "int8", "int8", "needs an NVIDIA GPU"),
        ("triton", "int4", "none", "needs an NVIDIA GPU"),
        ("onednn", "int4", "none", "8-bit activations only"),
    ],
)
def test_a_kernel_without_its_hardware_says_so(kernel, form, activations, said):
    if torch.cuda.is_available():
        pytest.skip("this machine has the hardware")
    quantized = build(nn.Linear(64, 32), Recipe(form, activations, kernel=kernel), Present())
    with pytest.raises(BackendUnavailable, match=said):
        quantized.choose_kernel()


def test_unknown_kernel():
    with pytest.raises(UnknownName, match="onednn"):
        build(nn.Linear(8, 8), Recipe("int8", "int8", kernel="onedn"), Present()).choose_kernel()


def test_nan_weights_are_refused():
    layer = nn.Linear(8, 8)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(UnsupportedModel, match="NaN"):
        build(layer, Recipe("int8"), Present())


def test_the_float_copy_of_a_weight_cannot_be_changed():
    """A LoRA that is fused into it would be lost without a word."""
    quantized = build(nn.Linear(8, 8), Recipe("int8"), Present())
    with pytest.raises(RuntimeError, match="cannot be changed"):
        quantized.weight.add_(1)
    assert isinstance(quantized, QLinear) and isinstance(quantized, nn.Linear)
    assert issubclass(QConv2d, nn.Conv2d)
