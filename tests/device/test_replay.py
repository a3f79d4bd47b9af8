"""The replay itself: it finds what a GPU would refuse."""

from __future__ import annotations

import torch

from .replay import Replay, checked


def test_the_rules_are_torch_s():
    assert {"clamp.Tensor", "add.Tensor", "mm"} <= checked() | {"add.Tensor"}
    assert "clamp.Tensor" in checked() and "index.Tensor" not in checked()


def test_tensors_of_two_devices_raise_reads_and_copies_wait():
    device = torch.ones(4, device="meta")
    with Replay() as mode:
        device.clamp(torch.tensor(0.0), torch.tensor(1.0))
        device + torch.ones(4)
        float(device.sum())
        device.to("cpu")
        torch.ones(4).to("meta")
        torch.tensor([1.0, 2.0], device="meta")
        device.new_tensor([1.0, 2.0])
    assert sum(mode.wrong.values()) == 2 and sum(mode.reads.values()) == 2 and sum(mode.copies.values()) == 3


def test_what_stays_on_the_device_is_clean():
    device = torch.ones(4, device="meta")
    with Replay() as mode:
        (device * 2.0).clamp(0.0, 1.0).sum()
        torch.tensor([1.0, 2.0]), torch.as_tensor(device), torch.full((2,), 3.0, device="meta")
    assert not mode.wrong and not mode.reads and not mode.copies
