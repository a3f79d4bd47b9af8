"""Devices without float64 (MPS, some XPUs): what is fitted in it is fitted on the CPU, whatever the device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import affine
from fastdiff.caching.roles import conditional
from fastdiff.caching.trace import Gram
from fastdiff.pipelines.texts import _state
from fastdiff.quant.calls import relative


class Widened(TorchDispatchMode):
    """Counts float64 tensors that are made of others without asking `wide`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = [leaf.dtype for leaf in args if isinstance(leaf, torch.Tensor)]
        if isinstance(output, torch.Tensor) and output.dtype == torch.float64 and torch.float32 in given:
            self.found.append(str(func))
        return output


def test_every_widening_asks_what_the_device_has(monkeypatch):
    """With a `wide` that leaves float32 as it is, no float64 is made of what a device gave."""
    for module in ("fastdiff.affine", "fastdiff.caching.roles", "fastdiff.caching.trace", "fastdiff.quant.calls"):
        monkeypatch.setattr(f"{module}.wide", lambda numbers: numbers.float())
    x, y, z = torch.randn(3, 2, 4, 6, 6)
    with Widened() as mode:
        fit = affine.AffineFit(0.1)
        fit.add(x, y)
        affine.corrected(x, *fit.solve())
        relative(x, y)
        conditional(x, y, 3 * y - 2 * x)
        Gram().sketch(torch.cat([x, y, z], 1))
        Gram().sketch(torch.randn(2, 20_000))
        _state(torch.nn.Linear(4, 4), sample=True)
    assert not mode.found


def test_what_a_fit_on_the_cpu_found_is_brought_to_where_the_value_lies():
    value = torch.empty(2, 4, 3, 3, device="meta")
    assert affine.corrected(value, torch.ones(4).double(), torch.zeros(4).double()).is_meta
    assert affine.wide(value).dtype == torch.float64 and affine.wide(value).is_meta
