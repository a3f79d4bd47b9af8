"""What ranks do with devices, told without one: each takes a card of its own, and receives where its peers send."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastdiff.parallel import bus as buses
from fastdiff.parallel import watch
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.exchange import Exchange
from fastdiff.parallel.mesh import Topology, own_device
from fastdiff.parallel.partial import _fused
from fastdiff.parallel.travel import Parcels


def test_under_torchrun_each_process_takes_a_card_of_its_own(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: False)
    own_device()
    assert taken == []
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    own_device()
    assert taken == [3]


def test_a_rank_that_sends_nothing_receives_on_the_device_of_the_run(monkeypatch):
    """A convolution of stride 2 shows nothing to the rank below: send and receive are of one backend."""
    bus, own = Bus(Topology(cfg=1, step=1, patch=2, rank=1), 1.0), object()
    bus._groups = {"device": own}
    posted: list[Any] = []
    monkeypatch.setattr(
        buses.dist, "P2POp", lambda op, tensor, peer, group: SimpleNamespace(tensor=tensor, group=group)
    )
    monkeypatch.setattr(buses.dist, "batch_isend_irecv", lambda ops: posted.extend(ops) or [None] * len(ops))
    monkeypatch.setattr(watch, "moment", lambda device: object())
    bus.device = torch.device("meta")
    bus.post("halo", "conv_in", {}, {0: 16})
    assert [(op.tensor.device.type, op.group) for op in posted] == [("meta", own)]


def test_of_a_rank_without_tokens_comes_nothing_and_on_the_device_of_the_run():
    """Its part is merged with ours, which a GPU would refuse of one on the CPU."""
    bus = Bus(Topology(cfg=1, step=1, patch=2, rank=0), 1.0)
    bus.device = torch.device("meta")
    parcels = Parcels(bus, Exchange(bus, "attn", "kv"))
    parcels.expect_part("result", 1, (1, 2, 0, 8), torch.bfloat16)
    parcels.arrive()
    assert [part.is_meta for part in parcels.take_part("result")] == [True, True]


@pytest.mark.parametrize(
    ("dtype", "channels", "capability", "kernel"),
    [
        (torch.bfloat16, 64, (8, 0), "flash"), (torch.float16, 64, (9, 0), "flash"),
        (torch.float16, 64, (7, 5), "efficient"),  # flash attention refuses Turing
        (torch.bfloat16, 64, (7, 5), ""), (torch.float32, 64, (7, 5), "efficient"),
        (torch.bfloat16, 60, (9, 0), ""), (torch.bfloat16, 512, (9, 0), ""), (torch.float64, 64, (9, 0), ""),
    ],
)  # fmt: skip
def test_parts_of_attention_go_to_a_kernel_that_the_card_has(dtype, channels, capability, kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _fused(dtype, channels, torch.device("cuda")) == kernel
