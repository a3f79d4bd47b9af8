"""The wires between ranks: the only code that calls torch.distributed while a pipeline runs.

Every wait ends, at the latest after the time-out, and says who was waited for, where and when. Messages between two
ranks are matched by order, which is the order of the layers.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.errors import PeerLost

from .mesh import Topology

SMALL = 8  # messages of halos and statistics that travel as one; the first waits for the last to be there


@dataclass
class Pending:
    """Bytes on their way from a peer."""

    peer: int
    buffer: Tensor
    work: Any
    layer: str
    posted: float


Sent: TypeAlias = tuple[Any, Tensor]  # the work of sending, and its bytes


@dataclass(frozen=True)
class Span:
    """For the timeline: something that took from `start` to `end` (seconds of perf_counter)."""

    kind: str
    layer: str
    start: float
    end: float
    step: int


@dataclass
class Traffic:
    """What one rank sent and waited for in a run."""

    sent: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0
    oldest: int = 0  # age, in steps, of the oldest value that was used
    spans: list[Span] = field(default_factory=list)


class Bus:
    """Sends to and receives from the other ranks; counts bytes by kind and seconds waited.

    `where` tells the present step, for errors. After a failure the groups are closed, so that the others learn of it at
    once, and made anew for the next run.
    """

    def __init__(
        self,
        topology: Topology,
        timeout: float,
        where: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.topology, self.timeout, self.where = topology, timeout, where
        self.device = torch.device("cpu")  # where a rank that sends nothing receives: a peer's backend goes by its own
        self.traffic = Traffic()
        self.alone = False  # whether the others are lost, and this rank goes on without them
        self._groups: list[Any] = []
        self._sending: list[Sent] = []  # of exchanges that are waited for
        self._leaving: list[list[Sent]] = [[], []]  # for the next step: those of the step before, those of this one

    @property
    def groups(self) -> list[Any]:
        """Process groups of our own: closing them wakes whoever waits for us, and leaves the user's alone.

        Two, which are two connections: what is needed now does not queue behind what has a whole step to travel.
        """
        if not self._groups:
            wait, backend = datetime.timedelta(seconds=self.timeout), str(dist.get_backend())
            if backend == "nccl":  # decisions and the random state are tensors on the CPU, which NCCL refuses
                backend = "cpu:gloo,cuda:nccl"
            for _ in range(2):
                group = self._guarded("meeting", set(), lambda: dist.new_group(timeout=wait, backend=backend))
                self._groups.append(group)
        return self._groups

    def begin(self) -> None:
        """A run begins: forget what was counted."""
        self.traffic = Traffic()
        _ = self.groups

    def post(
        self, kind: str, layer: str, sends: dict[int, Tensor], sizes: dict[int, int], later: bool = False
    ) -> list[Pending]:
        """Send bytes to peers and expect so many of others, without waiting; `later`: they are for the next step."""
        group, sending = self.groups[later], self._leaving[-1] if later else self._sending
        device = next(iter(sends.values())).device if sends else self.device
        buffers = {peer: torch.empty(size, dtype=torch.uint8, device=device) for peer, size in sizes.items()}
        ops, order = [], []
        for peer in sorted({*sends, *sizes}):
            both: list[tuple[Any, Tensor]] = []
            if peer in sends:
                both.append((dist.isend, sends[peer]))
                self.traffic.sent[kind] += sends[peer].numel()
                self.traffic.messages[kind] += 1
            if peer in sizes:
                both.append((dist.irecv, buffers[peer]))
            for op, tensor in both:
                ops.append(dist.P2POp(op, tensor, peer, group))
                order.append((op, peer, tensor))
        if not ops:
            return []
        works = self._guarded(layer, {*sends, *sizes}, lambda: dist.batch_isend_irecv(ops))
        now, found = time.perf_counter(), []
        for (op, peer, tensor), work in zip(order, works * (len(order) if len(works) == 1 else 1), strict=True):
            if op is dist.irecv:
                found.append(Pending(peer, tensor, work, layer, now))
            else:
                sending.append((work, tensor))  # the bytes must live until they are gone
        return found

    def wait(self, pending: Sequence[Pending], kind: str = "") -> dict[int, Tensor]:
        """The bytes of each peer. Raises PeerLost."""
        began = time.perf_counter()
        for item in pending:
            self._guarded(item.layer, {item.peer}, partial(item.work.wait, self._limit()))
        ended = time.perf_counter()
        self.traffic.waited += ended - began
        step = self.where()
        if pending and step is not None:
            spans = self.traffic.spans
            spans.append(Span("transfer", f"{kind} {pending[0].layer}".strip(), pending[0].posted, ended, step))
            spans.append(Span("wait", pending[0].layer, began, ended, step))
        return {item.peer: item.buffer for item in pending}

    def swap(self, kind: str, layer: str, sends: dict[int, Tensor], sizes: dict[int, int]) -> dict[int, Tensor]:
        """Send and receive now."""
        found = self.wait(self.post(kind, layer, sends, sizes), kind)
        self._left(self._sending)
        return found

    def turn(self) -> None:
        """A step ends: what was sent in the step before has had time to leave."""
        self._left(self._leaving.pop(0))
        self._leaving.append([])

    def settle(self) -> None:
        """Wait until everything sent has left."""
        for _ in self._leaving:
            self.turn()

    def _left(self, sending: list[Sent]) -> None:
        began = time.perf_counter()
        for work, _ in sending:
            self._guarded("sending", set(), partial(work.wait, self._limit()))
        sending.clear()
        self.traffic.waited += time.perf_counter() - began

    def gather(self, kind: str, layer: str, tensor: Tensor, axis: str, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """The tensors of all ranks of a group along one axis of the mesh, whose shapes are known."""
        ranks = self.topology.group(axis)
        own = self.topology.rank
        message = tensor.contiguous().reshape(-1).view(torch.uint8)
        sizes = {r: torch.Size(s).numel() * tensor.itemsize for r, s in zip(ranks, shapes, strict=True) if r != own}
        got = self.swap(kind, layer, dict.fromkeys(sizes, message), sizes)
        return [
            tensor if rank == own else got[rank].view(tensor.dtype).reshape(tuple(shape))
            for rank, shape in zip(ranks, shapes, strict=True)
        ]

    def mean(self, value: Tensor, axes: Sequence[str]) -> Tensor:
        """The mean of a scalar over the ranks of some axes, the same to the bit on all of them."""
        for axis in axes:
            ranks = self.topology.group(axis)
            if len(ranks) > 1:
                told = self.gather("decision", "decision", value.double().reshape(1), axis, [(1,)] * len(ranks))
                value = torch.cat(told).mean()
        return value

    def broadcast(self, layer: str, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, which has the shape of ours."""
        message = tensor.contiguous().clone()
        if message.numel():
            self._guarded(
                layer, {0}, lambda: dist.broadcast(message, 0, group=self.groups[0], async_op=True).wait(self._limit())
            )
        return message

    def tell(self, what: Any) -> list[Any]:
        """What each rank has to say, in order of rank."""
        told: list[Any] = [None] * self.topology.size
        self._guarded("the report", set(), lambda: dist.all_gather_object(told, what, group=self.groups[0]))
        return told

    def abort(self) -> None:
        """Break off: whoever waits for this rank learns of it now."""
        self._sending, self._leaving = [], [[], []]
        groups, self._groups = self._groups, []
        for group in groups:
            with suppress(Exception):  # it is broken already
                dist.destroy_process_group(group)

    def _limit(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=self.timeout)

    def _guarded(self, layer: str, peers: set[int], call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            waited, step = time.perf_counter() - began, self.where()
            who = " or ".join(f"rank {peer}" for peer in sorted(peers)) or "another rank"
            did = "did not answer" if waited >= 0.9 * self.timeout else "broke off or died"
            when = "between steps" if step is None else f"at step {step}"
            raise PeerLost(
                f"{who} {did}: rank {self.topology.rank} waited {waited:.1f} s (parallel.timeout = {self.timeout:g}) "
                f"for {layer} {when}"
            ) from error
