"""4-bit weights on NVIDIA GPUs: a Triton product that unpacks them on the way. Written with care and never run.

Each program makes a tile [BM, BN] of y = x w^T and goes along the inputs a group at a time, so that a tile of weights
has one scale for each output. W4A16 dequantizes the tile to the type of x and sums in float32; W4A8 does not come
here: its weights are unpacked to 8 bits once, for `int_mm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activations import rows_of
from .kernels_cuda import _Product, as_output, as_product, lacks_cuda
from .layers import QLayer
from .packing import group_of, power_of_two


def _program() -> Any:
    """The compiled program; made here because Triton is an optional package."""
    import triton
    import triton.language as tl

    @triton.jit
    def product(x, q, scale, y, M, N, K, groups, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr):
        m = tl.program_id(0) * BM + tl.arange(0, BM)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        k = tl.arange(0, G)
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for group in range(groups):
            at = group * G + k
            a = tl.load(x + m[:, None] * K + at[None, :], mask=(m[:, None] < M) & (at[None, :] < K), other=0.0)
            packed = tl.load(q + n[None, :] * (groups * G // 2) + at[:, None] // 2, mask=n[None, :] < N, other=0)
            four = (packed >> ((at[:, None] % 2) * 4).to(tl.uint8)) & 15
            s = tl.load(scale + n * groups + group, mask=n < N, other=0.0).to(tl.float32)
            b = ((four.to(tl.float32) - 8.0) * s[None, :]).to(a.dtype)
            total += tl.dot(a, b)
        tl.store(y + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))

    return product


class TritonW4(_Product):
    """W4A16 of linear layers, and convolutions of one pixel."""

    name = "triton"

    def refuses(self, layer: QLayer) -> str | None:
        if layer.recipe.format != "int4" or layer.recipe.activations != "none":
            return "computes grouped 4-bit weights with float activations only"
        size = group_of(layer.matrix_shape[1], layer.recipe.group)[0]
        if size < 16 or size > 128 or size != power_of_two(size):
            return f"needs groups of 16, 32, 64 or 128, not {size}"
        return lacks_cuda(layer, (8, 0)) or (None if as_product(layer) else "has no convolutions but those of a pixel")

    def pack(self, layer: QLayer) -> Any:
        return _program()

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        rows, tensors = rows_of(layer.smoothed(x)).contiguous(), layer.tensors()
        (outputs, inputs), groups = layer.matrix_shape, tensors["scale"].shape[1]
        y = torch.empty(len(rows), outputs, dtype=torch.float32, device=x.device)
        size = group_of(inputs, layer.recipe.group)[0]
        grid = (-(-len(rows) // 64), -(-outputs // 64))
        packed[grid](rows, tensors["q"], tensors["scale"], y, len(rows), outputs, inputs, groups, 64, 64, size)
        if layer.bias is not None:
            y += layer.bias
        return as_output(y.to(x.dtype), x)
