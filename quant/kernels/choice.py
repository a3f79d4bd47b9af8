"""Which code computes a quantized layer: the fastest that this device has and that proves itself on the layer.

When a kernel has packed a layer's weight, its result on a small input is compared with the reference, dequantized
float32: integer instructions that saturate, or a library that is wrong for one shape, are found here. What fails is
passed over, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import BackendUnavailable, UnknownName
from fastdiff.quant.layer import Kernel, QLayer
from fastdiff.quant.layers import QConv2d

from .cpu import OneDNN
from .cuda import IntConv, IntMM, Product, ScaledMM
from .fused import FusedIntConv, FusedIntMM, FusedScaledMM
from .torchao import TorchAO
from .triton import TritonW4

TOLERANCE = 2e-2  # of a half-precision result; float32 ones must agree within a hundredth of it


class Reference(Product):
    """Dequantizes the weight at each call: works everywhere, saves memory, never time."""

    name = "reference"

    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor:
        return self.expected(layer, x)


KERNELS: Sequence[Kernel] = (
    FusedScaledMM(), ScaledMM(), TritonW4(), FusedIntMM(), IntMM(), OneDNN("onednn", 255), OneDNN("onednn_7bit", 127),
    TorchAO(), Reference(), FusedIntConv(), IntConv(),  # the last are for the clock to choose, never the first choice
)  # fmt: skip
AUTOMATIC = tuple(kernel.name for kernel in KERNELS if kernel.name != "torchao")


def kernel_named(name: str) -> Kernel:
    known = {kernel.name: kernel for kernel in KERNELS}
    if name not in known:
        raise UnknownName("kernel", name, ["auto", *known])
    return known[name]


def choose(layer: QLayer) -> tuple[list[tuple[Kernel, Any]], str]:
    """The kernels that proved themselves, each with its packed weight, and what was passed over and why.

    The first is the one of choice; others only where the clock is to decide, and the first needs no layout of its own,
    beside which the plain integers would have to be held.

    Raises BackendUnavailable where the recipe asks for one kernel and that does not work here.
    """
    asked = layer.recipe.kernel
    wanted = [kernel_named(name) for name in (AUTOMATIC if asked == "auto" else (asked,))]
    said: list[str] = []
    found: list[tuple[Kernel, Any]] = []
    for kernel in wanted:
        if any(isinstance(better, type(kernel)) for better, _ in found):
            continue  # a faster form of it has proved itself
        reason = kernel.refuses(layer)
        if reason is None:
            packed, reason = proved(kernel, layer)
            if reason is None:
                found.append((kernel, packed))
                if kernel.replaces_q or layer.recipe.speed == "smallest":
                    break
            else:
                said.append(f"{kernel.name}: {reason}")
        elif asked != "auto":
            said.append(f"{kernel.name} {reason}")
    if found:
        return found, "; ".join(said)
    raise BackendUnavailable(f"{'; '.join(said)}; set quant.kernel to auto, or to reference, which works everywhere")


def proved(kernel: Kernel, layer: QLayer) -> tuple[Any, str | None]:
    """The packed weight and None, or the reason why the kernel cannot be trusted with this layer."""
    if isinstance(kernel, Reference):
        return None, None
    bucket, layer.present.bucket = layer.present.bucket, None  # the verdict is the same whenever it is asked for
    try:
        packed = kernel.pack(layer)
        for x in _samples(layer):
            found, wanted = kernel(layer, packed, x).float(), kernel.expected(layer, x).float()
            rounded = x.dtype != torch.float32 or isinstance(kernel, TorchAO)  # which rounds weights once more
            order = 2 if rounded else torch.inf
            error = float(torch.dist(found, wanted, order) / wanted.flatten().norm(order).clamp_min(1e-12))
            if not error <= (TOLERANCE if rounded else TOLERANCE / 100):
                return None, f"is wrong by {error:.1%}"
        if kernel.replaces_q:
            given = {name: t for name, t in layer.tensors().items() if name != "q"}
            if not torch.equal(kernel.unpack(layer, packed, given), layer.q):
                return None, "does not give the weight back"
    except Exception as error:  # whatever a library raises: Triton's errors have no base of their own
        return None, f"fails: {(str(error) or type(error).__name__).splitlines()[0][:120]}"
    finally:
        layer.present.forget()
        layer.present.bucket = bucket
    return packed, None


def _samples(layer: QLayer) -> Iterator[Tensor]:
    """Small inputs: normal ones, and ones at the top of their range, where sums saturate if they ever do."""
    device = layer.tensors()["q"].device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(layer, QConv2d):
        sides = [(size - 1) * dilation + 4 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
        shape: tuple[int, ...] = (1, layer.in_channels, *sides)
    else:
        shape = (17, layer.matrix_shape[1])
    yield torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    yield (layer.highest / layer.smoothed(torch.ones(shape, device=device))).to(dtype)
