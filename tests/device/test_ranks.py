"""What ranks do with devices, told without one: each takes a card of its own, and receives where its peers send."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from fastdiff.parallel import bus as buses
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.mesh import Topology, own_device


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
    bus.device = torch.device("meta")
    bus.post("halo", "conv_in", {}, {0: 16})
    assert [(op.tensor.device.type, op.group) for op in posted] == [("meta", own)]
