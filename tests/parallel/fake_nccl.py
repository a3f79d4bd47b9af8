"""torch.distributed over NCCL without a GPU: a thread is a rank with a card of its own (tests/device/cards.py).

What it holds ranks to, each with a message of its own where it is broken:

- NCCL takes what is on the rank's GPU, gloo what is on the CPU; each rank has another GPU.
- `wait()` is an order for the GPU; one with a time-out blocks the host, and is refused. Nothing is there before it.
- A GPU works off what it was given in the order in which the host gave it, communicators and all: two orders on two
  ranks never end (`Deadlock`). What is sent must not change until it has left.
- A rank that hangs, dies or breaks off leaves the GPUs of its peers standing. Nothing raises: the host goes on, until
  it reads a value (`Stuck`). Only an abort sets the GPU free; to destroy the group would wait for ever.
- The first operation of a communicator is one of all its ranks.

Time is not the machine's: it passes only for who waits for a rank that will never come.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tests.device.cards import DEVICE, Card, OnCard, Stuck, WrongDevice

Box: TypeAlias = tuple[int, int, int, int]  # a group's number, who sends, who gets it, a tag
PATIENCE = 900.0  # seconds after which a test is given up, however busy the machine
SOON = 0.1  # seconds: a shorter wait ends at once, a longer one when its sender is lost, however busy the machine
TICK = 2.0  # seconds that pass for whoever looks at the clock while a GPU stands


class Refused(AssertionError):
    """What NCCL would not bear."""


class Deadlock(AssertionError):
    """All ranks wait, and no two for the same."""


class Over(BaseException):
    """Unwinds the thread of a rank that hangs on purpose, when the others are done."""


@dataclass(eq=False)
class Group:
    world: World
    rank: int
    number: int
    backend: str
    seconds: float
    begun: bool = False


@dataclass(eq=False)
class Part:
    """One direction of a launch with one peer."""

    sends: bool
    peer: int
    tensor: Tensor
    bytes: Tensor | None = None  # as they were when they were to be sent, or as they came
    done: bool = False


@dataclass(eq=False)
class Launch:
    """What a communicator was given at once; also torch's handle of it."""

    world: World
    rank: int
    group: Group
    parts: list[Part]
    ended: bool = False

    def wait(self, timeout: Any = None) -> None:
        if timeout is not None:
            raise Refused("wait(timeout) over NCCL blocks the host; wait() is an order for the GPU")
        self.world.stand(self)


@dataclass(eq=False)
class Letter:
    """gloo's handle: the host waits."""

    world: World
    rank: int
    group: Group
    part: Part
    tag: int
    number: int  # of those that this rank expects of that one

    def wait(self, timeout: Any = None) -> None:
        if not self.part.sends:
            seconds = self.group.seconds if timeout is None else timeout.total_seconds()
            key = (self.group.number, self.part.peer, self.rank, self.tag)
            self.part.tensor.copy_(self.world.letter(self.group, key, self.number, seconds))


@dataclass(eq=False)
class World:
    """The ranks, what their GPUs still have to do, and what lies in gloo's letter boxes."""

    size: int
    cards: list[Card] = field(default_factory=list)
    patience: float = PATIENCE  # seconds that a host waits for a GPU that stands

    def __post_init__(self) -> None:
        self.cards = self.cards or [Card(rank) for rank in range(self.size)]
        self.lock, self.here = threading.Condition(threading.Lock()), threading.local()
        self.now = 0.0
        self.baton = threading.Lock()  # one rank at a time: two would take Python's lock from each other at every call
        self.queues: list[deque[Launch]] = [deque() for _ in range(self.size)]
        self.gone: dict[int, str] = {}
        self.ends: list[Callable[[], None]] = []  # what a test has to stop
        self.left: set[tuple[int, int]] = set()  # (rank, number of a group) that was closed
        self.standing: dict[int, str] = {}  # GPUs that never go on, and why
        self.blocked: dict[int, Launch] = {}
        self.made = [0] * self.size
        self.boxes: dict[Box, list[Tensor]] = {}
        self.expected = Counter[Box]()
        self.over = threading.Event()
        self.launched: list[list[tuple[int, int]]] = [[] for _ in range(self.size)]  # (group, messages)
        for rank, card in enumerate(self.cards):
            card.stands = lambda rank=rank: self._read(rank)  # type: ignore[misc]

    @property
    def rank(self) -> int:
        return self.here.rank

    def pause(self, seconds: float) -> None:
        """Let other ranks go on; `lock` is held, and the baton."""
        self.baton.release()
        self.lock.wait(seconds)
        self.lock.release()
        self.baton.acquire()
        self.lock.acquire()

    def clock(self) -> float:
        with self.lock:
            self.now += TICK if self.standing else 1e-6
            return self.now

    def sleep(self, seconds: float) -> None:
        self.baton.release()
        time.sleep(seconds)
        self.baton.acquire()

    # ranks

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work` returned on each rank, or raised."""
        said: list[Any] = [None] * self.size
        ranks = range(self.size)
        threads = [threading.Thread(target=self._rank, args=(rank, work, said), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        end = time.monotonic() + PATIENCE
        while any(t.is_alive() for k, t in enumerate(threads) if self.gone.get(k) not in ("hangs", "has died")):
            next(t for k, t in enumerate(threads) if self.gone.get(k) not in ("hangs", "has died")).join(0.2)
            if time.monotonic() > end:
                self.over.set()
                raise AssertionError(f"no end in sight: {self.gone} {self.standing} {self.blocked}")
        self.over.set()
        for thread in threads:
            thread.join(PATIENCE)
        return said

    def _rank(self, rank: int, work: Callable[[int], Any], said: list[Any]) -> None:
        self.here.rank = rank
        torch.set_grad_enabled(False)
        with self.baton:
            try:
                with self.cards[rank]:
                    said[rank] = work(rank)
            except BaseException as error:
                said[rank] = error
            with self.lock:
                self.gone.setdefault(rank, "has ended")
                self.lock.notify_all()

    def goes(self, how: str) -> None:
        """This rank `hangs` or `has died`, now."""
        with self.lock:
            self.gone[self.rank] = how
            self.lock.notify_all()
            while not self.over.is_set():
                self.pause(0.2)
        raise Over

    def _lost(self, rank: int, group: Group) -> str | None:
        """Why a rank will do nothing more in a group."""
        if rank in self.gone:
            return self.gone[rank]
        return "has broken off" if (rank, group.number) in self.left else None

    # GPUs

    def moment(self, device: torch.device) -> Any:
        """A mark on the present rank's GPU, see fastdiff.parallel.watch."""
        rank, behind, at = self.rank, self.standing.get(self.rank), self.now
        return SimpleNamespace(
            at=at, query=lambda: behind is None or self.standing.get(rank) is None,
            elapsed_time=lambda other: 1e3 * (other.at - at),
        )  # fmt: skip

    def _read(self, rank: int) -> str | None:
        """The host waits for its GPU; why it gave up, if it did: until then somebody may set the GPU free."""
        with self.lock:
            end = time.monotonic() + self.patience
            while rank in self.standing and time.monotonic() < end:
                self.pause(0.05)
            return self.standing.get(rank)

    def launch(self, group: Group, parts: list[Part]) -> Launch:
        rank, card = self.rank, self.cards[self.rank]
        for part in parts:
            if not isinstance(part.tensor, OnCard) or part.tensor.card is not card:
                raise WrongDevice(f"NCCL on rank {rank} was given a tensor that is not on its GPU")
        if not group.begun and len({part.peer for part in parts}) < self.size - 1:
            raise Refused("the first operation of a communicator must be one of all its ranks")
        if any(other is card for k, other in enumerate(self.cards) if k != rank):
            raise RuntimeError("Duplicate GPU detected")
        with self.lock:
            if (rank, group.number) in self.left:
                raise RuntimeError("NCCL communicator was aborted")
            group.begun = True
            made = Launch(self, rank, group, parts)
            for part in parts:
                part.tensor = part.tensor.inner  # type: ignore[attr-defined]
                if part.sends:
                    part.bytes = part.tensor.clone()
                else:
                    part.tensor.fill_(255)  # not a number in any format
                    card.arriving[part.tensor.untyped_storage()._cdata] = f"rank {part.peer}"
            self.queues[rank].append(made)
            self.launched[rank].append((group.number, len(parts)))
            self._progress()
            return made

    def stand(self, launch: Launch) -> None:
        """The GPU, which is this thread, waits. Where it would do so for ever, it stands and the host goes on."""
        with self.lock:
            self.blocked[launch.rank] = launch
            try:
                while launch in self.queues[launch.rank] and launch.rank not in self.standing:  # nor aborted
                    self._judge(launch)
                    if launch.rank not in self.standing:
                        self.pause(0.2)
            finally:
                del self.blocked[launch.rank]
            for part in launch.parts:
                if part.sends and launch.ended:
                    self._unchanged(launch.rank, part)
                elif not part.sends:  # where the GPU stands, what the host goes on with is never computed
                    self.cards[launch.rank].arriving.pop(part.tensor.untyped_storage()._cdata, None)
                    if part.bytes is not None:
                        part.tensor.copy_(part.bytes)
                        part.bytes = None

    def _judge(self, launch: Launch) -> None:
        head = self.queues[launch.rank][0]
        for part in (part for part in head.parts if not part.done):
            why = self._lost(part.peer, head.group) or (part.peer in self.standing and "stands itself")
            if why:
                self.standing[launch.rank] = f"waits for rank {part.peer}, which {why}"
                self.lock.notify_all()
                return
        waiting = [one for one in self.blocked.values() if not one.ended]
        if len(waiting) == self.size and not any(self._matches(rank) for rank in range(self.size)):
            heads = "; ".join(
                f"rank {k} is in communicator {queue[0].group.number} with "
                f"{', '.join(f'rank {part.peer}' for part in queue[0].parts if not part.done)}"
                for k, queue in enumerate(self.queues) if queue
            )  # fmt: skip
            raise Deadlock(f"the GPUs wait for each other in two orders: {heads}")

    def _matches(self, rank: int) -> list[tuple[Part, Part]]:
        head = self.queues[rank][0] if self.queues[rank] else None
        found = []
        for part in head.parts if head is not None and self.gone.get(rank) not in ("hangs", "has died") else ():
            other = self.queues[part.peer][0] if self.queues[part.peer] else None
            if part.done or other is None or other.group.number != head.group.number:  # type: ignore[union-attr]
                continue
            if self.gone.get(part.peer) in ("hangs", "has died"):
                continue
            pair = next((p for p in other.parts if p.peer == rank and p.sends is not part.sends and not p.done), None)
            if pair is not None:
                found.append((part, pair) if part.sends else (pair, part))
        return found

    def _progress(self) -> None:
        moved, any_moved = True, False
        while moved:
            moved = False
            for rank in range(self.size):
                for sent, got in self._matches(rank):
                    if sent.done or got.done:
                        continue
                    if sent.tensor.numel() != got.tensor.numel():
                        raise Refused(f"{sent.tensor.numel()} bytes come where {got.tensor.numel()} are expected")
                    self._unchanged(rank, sent)
                    got.bytes = sent.tensor.clone()
                    sent.done = got.done = moved = True
                queue = self.queues[rank]
                while queue and all(part.done for part in queue[0].parts):
                    queue.popleft().ended = moved = True
            any_moved |= moved
        if any_moved:
            self.lock.notify_all()

    def _unchanged(self, rank: int, part: Part) -> None:
        if part.bytes is not None and not torch.equal(part.tensor, part.bytes):
            raise Refused(f"what rank {rank} sends was changed before it had left")

    # gloo

    def letter(self, group: Group, key: Box, number: int, seconds: float) -> Tensor:
        with self.lock:
            sender = key[1]
            while len(self.boxes.get(key, ())) <= number:
                why = self._lost(sender, group)
                if why == "hangs":
                    self.now += seconds
                    raise RuntimeError(f"Timed out waiting {seconds} s")
                if why is not None:
                    raise RuntimeError(f"Connection closed by peer: rank {sender} {why}")
                self.pause(min(seconds, 0.2))
                if seconds < SOON:  # a wait that ended without a letter ends all connections of its group
                    self.left.add((self.rank, group.number))
                    self.lock.notify_all()
                    raise RuntimeError(f"Timed out waiting {seconds} s")
            return self.boxes[key][number]

    def post(self, group: Group, peer: int, tensor: Tensor, tag: int) -> None:
        if isinstance(tensor, OnCard):
            raise WrongDevice("gloo was given a tensor on a GPU")
        with self.lock:
            why = self._lost(peer, group)
            if why not in (None, "hangs"):
                raise RuntimeError(f"Connection closed by peer: rank {peer} {why}")
            self.boxes.setdefault((group.number, group.rank, peer, tag), []).append(tensor.clone())
            self.lock.notify_all()


class FakeDist:
    """The part of torch.distributed that ranks use."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.distributed_c10d = SimpleNamespace(_abort_process_group=self._abort_process_group)
        self.is_available = self.is_initialized = lambda: True
        self.get_world_size, self.get_rank = lambda: world.size, lambda: world.rank
        self.isend, self.irecv = _Isend(self), _Irecv(self)

    def get_default_backend_for_device(self, device: torch.device) -> str:
        return "gloo" if torch.device(device).type == "cpu" else "nccl"

    def new_group(self, timeout: Any, backend: str) -> Group:
        number = self.world.made[self.world.rank]
        self.world.made[self.world.rank] += 1
        return Group(self.world, self.world.rank, number, backend, timeout.total_seconds())

    def destroy_process_group(self, group: Group) -> None:
        if group.rank in group.world.standing and group.backend == "nccl":
            raise Stuck("to destroy a group of NCCL waits for what a lost rank would have sent; abort it")
        self._abort_process_group(group)

    def _abort_process_group(self, group: Group) -> None:
        world, rank = group.world, group.rank
        with world.lock:
            world.left.add((rank, group.number))
            if group.backend == "nccl":
                world.queues[rank] = deque(one for one in world.queues[rank] if one.group is not group)
                world.cards[rank].arriving.clear()
                world.standing.pop(rank, None)
            world._progress()
            world.lock.notify_all()

    def P2POp(self, op: Any, tensor: Tensor, peer: int, group: Group) -> Any:
        return SimpleNamespace(op=op, tensor=tensor, peer=peer, group=group)

    def batch_isend_irecv(self, ops: Sequence[Any]) -> list[Any]:
        group = ops[0].group
        if group.backend == "nccl":
            return [self.world.launch(group, [Part(op.op is self.isend, op.peer, op.tensor) for op in ops])]
        return [op.op(op.tensor, op.peer, group=group) for op in ops]

    def broadcast(self, tensor: Tensor, src: int, group: Group, async_op: bool) -> Any:
        world = self.world
        peers = [rank for rank in range(world.size) if rank != src] if world.rank == src else [src]
        parts = [Part(world.rank == src, peer, tensor) for peer in peers]
        if group.backend != "nccl":
            return next(iter([self._letter(group, part, -1) for part in parts]))
        group.begun = True
        return world.launch(group, parts)

    def _letter(self, group: Group, part: Part, tag: int) -> Letter:
        if isinstance(part.tensor, OnCard):
            raise WrongDevice("gloo was given a tensor on a GPU")
        if part.sends:
            self.world.post(group, part.peer, part.tensor, tag)
        return Letter(self.world, group.rank, group, part, tag, self._number(group, part.peer, tag, not part.sends))

    def _number(self, group: Group, sender: int, tag: int, counts: bool = True) -> int:
        """Which letter of a sender comes next: they are told apart by the order in which they are expected."""
        key = (group.number, sender, group.rank, tag)
        self.world.expected[key] += counts
        return self.world.expected[key] - 1

    def all_gather_object(self, told: list[Any], what: Any, group: Group) -> None:
        world, rank = self.world, self.world.rank
        letter = torch.frombuffer(bytearray(pickle.dumps(what)), dtype=torch.uint8)
        for peer in range(world.size):
            if peer != rank:
                world.post(group, peer, letter, -2)
        for peer in range(world.size):
            key = (group.number, peer, rank, -2)
            got = letter if peer == rank else world.letter(group, key, self._number(group, peer, -2), group.seconds)
            told[peer] = pickle.loads(got.numpy().tobytes())


@dataclass(eq=False)
class _Isend:
    dist: FakeDist

    def __call__(self, tensor: Tensor, peer: int, group: Group, tag: int = 0) -> Letter:
        return self.dist._letter(group, Part(True, peer, tensor), tag)


@dataclass(eq=False)
class _Irecv:
    dist: FakeDist

    def __call__(self, tensor: Tensor, peer: int, group: Group, tag: int = 0) -> Letter:
        return self.dist._letter(group, Part(False, peer, tensor), tag)


def install(world: World, monkeypatch: Any) -> FakeDist:
    """Put the fake in the place of torch.distributed, and its GPUs in that of CUDA's."""
    from fastdiff.parallel import bus, crew, mesh, watch

    made = FakeDist(world)
    for module in (bus, crew, mesh):
        monkeypatch.setattr(module, "dist", made)
    monkeypatch.setattr(watch, "moment", world.moment)
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=world.clock, sleep=world.sleep))
    monkeypatch.setattr(bus, "time", SimpleNamespace(perf_counter=lambda: world.now))
    monkeypatch.setattr(watch, "PACE", 0.05)
    monkeypatch.setattr(crew, "card", lambda device: str(id(world.cards[world.rank])))

    def get(device: Any) -> Tensor:
        return world.cards[world.rank].generator.get_state()

    def put(state: Tensor, device: Any) -> None:
        world.cards[world.rank].generator.set_state(state)

    own, known = SimpleNamespace(get_rng_state=get, set_rng_state=put), torch.get_device_module
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: own if device == DEVICE else known(device))
    return made
