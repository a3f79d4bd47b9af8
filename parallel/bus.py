"""The wires between ranks: the only code that calls torch.distributed while a pipeline runs.

Every wait ends, at the latest after the time-out, and says who was waited for, where and when. Messages between two
ranks are matched by order, which is the order of the layers.

What is on a GPU travels over NCCL and is waited for by the device, in the order of its work: whether it came is known
later (see `watch`). What is on the CPU travels over gloo and is waited for by the host.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.errors import PeerLost
from fastdiff.threads import survivable

from .codec import raw
from .mesh import Topology
from .opaque import Opaque
from .shares import Speeds
from .turns import Turns
from .watch import Watch

FAR = 3600.0  # seconds, at least, after which NCCL's watchdog stops waiting: it counts from when work is queued
ASKED, NEVER = 4711, 4712  # tags of a message that nobody expects (only a peer that is gone refuses it), or sends
SMALL = 8  # messages of halos and statistics that travel as one; the first waits for the last to be there


@dataclass
class Pending:
    """Bytes on their way from a peer."""

    peer: int
    buffer: Tensor
    work: Any
    layer: str
    posted: Any  # seconds of perf_counter, or a moment of the device


Sent: TypeAlias = tuple[Any, Tensor]  # the work of sending, and its bytes


@dataclass(frozen=True)
class Span:
    """For the timeline: something that took from `start` to `end` (seconds of the host or, on a device, of that)."""

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
    once, and made anew for the next run. `device` is the run's: a rank that sends nothing receives there.
    """

    def __init__(self, topology: Topology, timeout: float, where: Callable[[], int | None] = lambda: None) -> None:
        self.topology, self.timeout, self.where = topology, timeout, where
        self.device = torch.device("cpu")
        self.traffic, self._watch = Traffic(), self._watched()
        self.speeds = Speeds()
        self.splits: list[Any] = []  # the denoisers that are split over the patch ranks
        self.sharded, self.broken, self.spared = False, 0, 0  # needs others' weights; groups closed; bytes not here
        self.alone = False  # whether the others are lost, and this rank goes on without them
        self.lost: Callable[[PeerLost], None]  # told of one where nobody else is: raises, or this rank goes on alone
        self.opaque: Opaque | None = None  # where layers that talk are compiled
        self._groups: dict[str, Any] = {}
        self._asked: list[Sent] = []
        self.turns = Turns()
        self._sending: tuple[list[Sent], list[Sent]] = ([], [])  # of exchanges that each part waits for
        self._leaving: list[list[Sent]] = [[], []]  # for the next step: those of the step before, those of this one

    def _group(self, name: str) -> Any:
        """Process groups of our own: closing them wakes whoever waits for us, and leaves the user's alone.

        Over gloo `now` and `later` are two connections: what is needed now does not queue behind what has a whole step
        to travel. A device has a single communicator, since two that ranks enter in different orders never end.
        """
        if name not in self._groups:
            backend, seconds = "gloo", self.timeout
            if name == "device":
                backend, seconds = dist.get_default_backend_for_device(self.device), max(FAR, 10 * self.timeout)
            limit = datetime.timedelta(seconds=seconds)
            with survivable():
                made = self._guarded("meeting", set(), lambda: dist.new_group(timeout=limit, backend=backend))
            self._groups[name] = made
        return self._groups[name]

    def _carrier(self, tensor: Tensor, later: bool = False) -> Any:
        """The group that a tensor goes by."""
        if not tensor.is_cpu:
            return self._group("device")
        return self._group("later" if later and self.device.type == "cpu" else "now")

    def begin(self) -> None:
        """A run begins: forget what was counted. All ranks are here, and make what groups it needs."""
        self._watch.stop()
        self.traffic, self._watch = Traffic(), self._watched()
        for name in ("now", "later" if self.device.type == "cpu" else "device"):
            self._group(name)

    def _watched(self) -> Watch:
        return Watch(self.timeout, self._gone, lambda: self._close("device", self._groups.get("device")))

    def post(
        self, kind: str, layer: str, sends: dict[int, Tensor], sizes: dict[int, Any], later: bool = False
    ) -> list[Pending]:
        """Send bytes to peers and expect so many of others, or as many as a tensor has room for, without waiting;
        `later`: what is needed now does not queue behind them."""
        sending = self._leaving[-1] if later else self._sending[self.turns.part]
        device = next(iter(sends.values())).device if sends else self.device
        empty = partial(torch.empty, dtype=torch.uint8, device=device)
        buffers = {peer: size if isinstance(size, Tensor) else empty(size) for peer, size in sizes.items()}
        group = self._carrier(next(iter((*sends.values(), *buffers.values())), torch.empty(0)), later)
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
        found: list[Pending] = []
        now = time.perf_counter() if ops[0].tensor.is_cpu else self._watch.mark(ops[0].tensor.device)
        for (op, peer, tensor), work in zip(order, works * (len(order) if len(works) == 1 else 1), strict=True):
            if op is dist.irecv:
                found.append(Pending(peer, tensor, work, layer, now))
            else:
                sending.append((work, tensor))  # the bytes must live until they are gone
        return found

    def wait(self, pending: Sequence[Pending], kind: str = "") -> dict[int, Tensor]:
        """The bytes of each peer: there at once, or, on a device, for whatever it is told to do from now on.

        Raises PeerLost; of what a device waits for, at a later call.
        """
        self.turns.hand_over()
        began = time.perf_counter()
        if pending and not pending[0].buffer.is_cpu:
            works, peers = [i.work for i in pending], {i.peer for i in pending}
            self._stand(works, pending[0].buffer, peers, pending[0].layer, pending[0].posted, kind)
            return {item.peer: item.buffer for item in pending}
        for item in pending:
            self._guarded(item.layer, {item.peer}, partial(item.work.wait, self._limit()))
        ended = time.perf_counter()
        self.traffic.waited += ended - began
        if pending:
            self._passed(kind, pending[0].layer, pending[0].posted, began, ended, self.where())
        return {item.peer: item.buffer for item in pending}

    def _passed(self, kind: str, layer: str, posted: float, began: float, ended: float, step: int | None) -> None:
        if step is not None:
            self.traffic.spans.append(Span("transfer", f"{kind} {layer}".strip(), posted, ended, step))
            self.traffic.spans.append(Span("wait", layer, began, ended, step))

    def _stand(
        self, works: Sequence[Any], tensor: Tensor, peers: set[int], layer: str, posted: Any = None, kind: str = ""
    ) -> None:  # fmt: skip
        own = {id(work): work for work in works}.values()  # NCCL has one for all messages of a post
        told = (own, tensor.device, peers, layer, self.where(), posted, kind)
        self._guarded(layer, peers, lambda: self._watch.wait(*told))

    def look(self) -> None:
        """Raises PeerLost where a device has waited for too long."""
        if (lost := self._watch.lost) is not None:
            raise self._lost(lost.peers, self._watch.waited, lost.layer, lost.step)

    def arrived(self) -> None:
        """Go on when the device is past all its waits, so that what it made is true. Raises PeerLost."""
        self._watch.settle()
        self.traffic.waited, self._watch.seconds = self.traffic.waited + self._watch.seconds, 0.0
        past, self._watch.past = self._watch.past, []
        for stand, moments in past:
            posted, began, ended = moments
            self._passed(stand.kind, stand.layer, posted, began, ended, stand.step)
        self.look()

    def _gone(self, peers: Set[int]) -> bool:
        """Whether a peer has ended or broken off: its connection on the host is closed."""
        try:
            for peer in peers:
                word = torch.zeros(1, dtype=torch.uint8)
                self._asked.append((dist.isend(word, peer, group=self._group("now"), tag=ASKED), word))
        except (RuntimeError, ValueError):
            return True
        return False

    def swap(self, kind: str, layer: str, sends: dict[int, Tensor], sizes: dict[int, int]) -> dict[int, Tensor]:
        """Send and receive now."""
        found = self.wait(self.post(kind, layer, sends, sizes), kind)
        self.drain()
        return found

    def turn(self) -> None:
        """A step ends: what was sent in the step before has had time to leave."""
        self.drain(self._leaving.pop(0))
        self._leaving.append([])

    def settle(self) -> None:
        """Wait until everything sent has left, and all that was waited for is there."""
        for _ in self._leaving:
            self.turn()
        self.arrived()

    def drain(self, sending: list[Sent] | None = None) -> None:
        """Wait until what was sent has left: of what the others wait for, unless told."""
        began, sending = time.perf_counter(), self._sending[self.turns.part] if sending is None else sending
        for work, message in sending:
            limit = (self._limit(),) if message.is_cpu else ()  # see Watch.wait
            self._guarded("sending", set(), partial(work.wait, *limit))
        sending.clear()
        self.traffic.waited += time.perf_counter() - began

    def gather(self, kind: str, layer: str, tensor: Tensor, axis: str, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """The tensors of all ranks of a group along one axis of the mesh, whose shapes are known."""
        own = tensor.contiguous()
        return self.deal(kind, layer, [own] * len(shapes), self.topology.group(axis), shapes)

    def deal(
        self, kind: str, layer: str, parts: Sequence[Tensor], ranks: Sequence[int], shapes: Sequence[Sequence[int]]
    ) -> list[Tensor]:  # fmt: skip
        """Part k goes to the k-th of some ranks, this one among them, whose part for us has the k-th shape."""
        found = self.offer(kind, layer, parts, ranks, shapes)()
        self.drain()
        return found

    def offer(
        self, kind: str, layer: str, parts: Sequence[Tensor], ranks: Sequence[int], shapes: Sequence[Sequence[int]]
    ) -> Callable[[], list[Tensor]]:
        """As `deal`, but what is returned waits; `drain` afterwards."""
        own, like = self.topology.rank, parts[0]
        messages = {rank: raw(part) for rank, part in zip(ranks, parts, strict=True) if rank != own}
        sizes = {r: torch.Size(s).numel() * like.itemsize for r, s in zip(ranks, shapes, strict=True) if r != own}
        pending = self.post(kind, layer, messages, sizes)

        def arrived() -> list[Tensor]:
            got = self.wait(pending, kind)
            return [
                part if rank == own else got[rank].view(like.dtype).reshape(tuple(shape))
                for rank, part, shape in zip(ranks, parts, shapes, strict=True)
            ]

        return arrived

    def mean(self, value: Tensor, axes: Sequence[str]) -> Tensor:
        """The mean of a scalar over the ranks of some axes, the same to the bit on all of them."""
        for axis in axes:
            ranks = self.topology.group(axis)
            if len(ranks) > 1:
                wide = torch.promote_types(value.dtype, torch.float32)  # not every device has float64
                told = self.gather("decision", "decision", value.to(wide).reshape(1), axis, [(1,)] * len(ranks))
                value = torch.cat(told).mean()
        return value

    def broadcast(self, layer: str, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, which has the shape of ours."""
        message = tensor.clone(memory_format=torch.contiguous_format)  # with strides in which bytes can be seen
        peers, group = {0} if self.topology.rank else {*range(1, self.topology.size)}, self._carrier(message)
        if message.numel():
            work = self._guarded(layer, peers, lambda: dist.broadcast(raw(message), 0, group=group, async_op=True))
            if message.is_cpu:
                self._guarded(layer, peers, partial(work.wait, self._limit()))
            else:
                self._stand([work], message, peers, layer)
        return message

    def tell(self, what: Any) -> list[Any]:
        """What each rank has to say, in order of rank."""
        told: list[Any] = [None] * self.topology.size
        self._guarded("the report", set(), lambda: dist.all_gather_object(told, what, group=self._group("now")))
        return told

    def abort(self) -> None:
        """Break off: whoever waits for this rank learns of it now."""
        self._watch.stop()
        self._watch, self.broken = self._watched(), self.broken + 1
        self._sending, self._leaving, self._asked = ([], []), [[], []], []
        while self._groups:
            self._close(*self._groups.popitem())

    def _close(self, name: str, group: Any) -> None:
        """NCCL's must not be destroyed: that waits for what a lost peer will never send. Gloo's connections live while
        anything knows one of their messages (an error's frames, values on their way); a wait too long ends them all."""
        for peer in {*range(self.topology.size)} - {self.topology.rank} if name != "device" else ():
            with suppress(Exception):  # it is broken already
                word: Any = dist.irecv(torch.empty(1, dtype=torch.uint8), peer, group=group, tag=NEVER)
                word.wait(datetime.timedelta(milliseconds=1))
        close = dist.distributed_c10d._abort_process_group if name == "device" else dist.destroy_process_group
        with suppress(Exception):
            close(group)

    def _limit(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=self.timeout)

    def _guarded(self, layer: str, peers: set[int], call: Callable[[], Any]) -> Any:
        self.look()
        began = time.perf_counter()
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            self.look()  # the group was closed because of what is told there
            raise self._lost(peers, time.perf_counter() - began, layer, self.where()) from error

    def _lost(self, peers: Set[int], waited: float, layer: str, step: int | None) -> PeerLost:
        who = " or ".join(f"rank {peer}" for peer in sorted(peers)) or "another rank"
        did = "did not answer" if waited >= 0.9 * self.timeout else "broke off or died"
        when = "between steps" if step is None else f"at step {step}"
        return PeerLost(
            f"{who} {did}: rank {self.topology.rank} waited {waited:.1f} s (parallel.timeout = {self.timeout:g}) "
            f"for {layer} {when}"
        )
