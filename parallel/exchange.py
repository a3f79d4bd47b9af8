"""What one layer shows the other ranks: now, or for the step after this one.

A displaced value is sent when it is made and used one step later, so that it has a whole step to travel. What is small
(halos, statistics) travels in bundles.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastdiff.clock import Step

from .bus import SMALL, Bus, Pending
from .codec import CHANGES, Codec, Wire

Messages: TypeAlias = Mapping[int, Tensor]  # by peer
Shapes: TypeAlias = Mapping[int, tuple[int, ...]]


@dataclass
class Flight:
    """Bytes on their way from some peers, for one slot or for a bundle of them."""

    pending: list[Pending] | None = None
    landed: dict[int, Tensor] | None = None
    sizes: dict[int, int] = field(default_factory=dict)
    sends: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass
class Slot:
    """What one branch knows of the peers at one layer."""

    values: dict[int, Tensor] = field(default_factory=dict)
    made: int = 0  # step in which the values were made
    flight: Flight | None = None
    offsets: dict[int, int] = field(default_factory=dict)
    sent: int = 0  # step in which what is under way was made
    out: dict[int, Wire] = field(default_factory=dict)
    into: dict[int, Wire] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    alike: Any = None
    size: int = 0  # bytes that were sent last
    own: Tensor | None = None  # of the step that old values are of, where a rule compares with it

    def copy(self) -> Slot:
        ends = ({peer: copy(wire) for peer, wire in wires.items()} for wires in (self.out, self.into))
        return replace(self, out=next(ends), into=next(ends))


class Bundle:
    """Small messages of one kind that leave together, in the order in which the layers run."""

    def __init__(self, bus: Bus, kind: str) -> None:
        self.bus, self.kind = bus, kind
        self._flight, self._layer, self._count = Flight(), "", 0

    def add(self, layer: str, sends: Mapping[int, Tensor], sizes: Mapping[int, int]) -> tuple[Flight, dict[int, int]]:
        """The flight they will be in, and where in the bytes of each peer they are."""
        flight = self._flight
        self._layer, self._count = self._layer or layer, self._count + 1
        offsets = {peer: flight.sizes.get(peer, 0) for peer in sizes}
        for peer, size in sizes.items():
            flight.sizes[peer] = flight.sizes.get(peer, 0) + size
        for peer, message in sends.items():
            flight.sends.setdefault(peer, []).append(message)
        if self._count == SMALL:
            self.flush()
        return flight, offsets

    def flush(self) -> None:
        flight, layer = self._flight, self._layer
        self._flight, self._layer, self._count = Flight(), "", 0
        messages = {peer: torch.cat(parts) for peer, parts in flight.sends.items()}
        flight.sends = {}
        flight.pending = self.bus.post(self.kind, layer, messages, flight.sizes, later=True)


class Exchange:
    """One layer's slot for each branch. `kind` is what the bytes are counted as."""

    def __init__(self, bus: Bus, layer: str, kind: str, codec: Codec = "raw", bundle: Bundle | None = None) -> None:
        self.bus, self.layer, self.kind, self.codec, self.bundle = bus, layer, kind, codec, bundle
        self._slots: dict[tuple[int, int], Slot] = {}  # by branch, and part of the batch
        self.waits: bool | None = None  # in every step, or in none; None goes by the step

    def reset(self) -> None:
        """Forget a run; what is still under way has to arrive first, so that no later message is taken for it."""
        for slot in self._slots.values():
            self._land(slot)
        self._slots = {}

    def forget(self) -> None:
        """After a failure: nothing will arrive any more."""
        self._slots = {}

    def held(self) -> dict[tuple[int, int], Slot]:
        """What is known now, to be known again; nothing may be under way."""
        return {place: slot.copy() for place, slot in self._slots.items()}

    def hold(self, held: dict[tuple[int, int], Slot]) -> None:
        """Know what was known."""
        self.reset()
        self._slots = {place: slot.copy() for place, slot in held.items()}

    def slot(self, step: Step | None) -> Slot:
        return self._slots.setdefault((step.branch if step else 0, self.bus.turns.part), Slot())

    def swap(
        self, sends: Messages, shapes: Shapes, dtype: torch.dtype, step: Step | None, fresh: bool, max_age: int,
        alike: Any, last: int | None = None,
    ) -> dict[int, Tensor]:  # fmt: skip
        """The peers' tensors: of this very step if `fresh` or nothing else is known, else of the step before.

        sends: what each peer is to get. shapes: what each peer will give. max_age: steps after which a value that no
        step has renewed (its layer was cached) is too old. alike: where it changes, what is known is of no use; the
        same on all ranks, which one rank's shapes are not: half of a single row is that row. last: the step, if not
        the run's last, after which nobody uses what is sent on.
        """
        slot = self.slot(step)
        if step is None or fresh or slot.alike != alike:
            return self._now(slot, sends, shapes, dtype, step, alike)
        self._land(slot, dtype)
        age = step.index - slot.made
        if age > max_age:
            return self._now(slot, sends, shapes, dtype, step, alike)
        self.bus.traffic.oldest = max(self.bus.traffic.oldest, age)
        values = slot.values
        if step.index < (step.run.total - 1 if last is None else last):
            self._later(slot, sends, shapes, dtype, step)
        return values

    def _now(
        self, slot: Slot, sends: Messages, shapes: Shapes, dtype: torch.dtype, step: Step | None, alike: Any
    ) -> dict[int, Tensor]:  # fmt: skip
        self._land(slot, dtype)
        if slot.alike != alike:
            slot.out, slot.into, slot.shapes, slot.alike = {}, {}, dict(shapes), alike
        messages, sizes = self._packed(slot, sends, shapes, dtype)
        got = self.bus.swap(self.kind, self.layer, messages, sizes)
        slot.values = {peer: slot.into[peer].unpack(got[peer], shape, dtype) for peer, shape in shapes.items()}
        slot.made, slot.own = step.index if step else 0, None
        return slot.values

    def _later(self, slot: Slot, sends: Messages, shapes: Shapes, dtype: torch.dtype, step: Step) -> None:
        messages, sizes = self._packed(slot, sends, shapes, dtype, later=True)
        slot.sent = step.index
        if self.bundle is not None:
            slot.flight, slot.offsets = self.bundle.add(self.layer, messages, sizes)
        else:
            slot.flight, slot.offsets = Flight(sizes=sizes), dict.fromkeys(sizes, 0)
            slot.flight.pending = self.bus.post(self.kind, self.layer, messages, sizes, later=True)

    def _packed(
        self, slot: Slot, sends: Messages, shapes: Shapes, dtype: torch.dtype, later: bool = False
    ) -> tuple[dict[int, Tensor], dict[int, int]]:  # fmt: skip
        messages: dict[int, Tensor] = {}
        packed: dict[int, Tensor] = {}  # what several peers get alike is coded once
        for peer, value in sends.items():
            wire = slot.out.setdefault(peer, Wire(self.codec))
            if id(value) in packed and self.codec not in CHANGES:
                messages[peer] = packed[id(value)]
            else:
                message = wire.pack(value)
                # what leaves while the layers go on must not change under way
                messages[peer] = packed[id(value)] = message.clone() if later and self.codec == "raw" else message
        slot.size = sum(message.numel() for message in messages.values())
        wires = {peer: slot.into.setdefault(peer, Wire(self.codec)) for peer in shapes}
        return messages, {peer: wires[peer].size(shape, dtype) for peer, shape in shapes.items()}

    def _land(self, slot: Slot, dtype: torch.dtype | None = None) -> None:
        """Take in what was under way."""
        flight, slot.flight = slot.flight, None
        if flight is None:
            return
        if flight.landed is None:
            if flight.pending is None and self.bundle is not None:
                self.bundle.flush()
            flight.landed = self.bus.wait(flight.pending or [], self.kind)
        if dtype is None:
            return
        values: dict[int, Tensor] = {}  # not those of before: who got them may still read them
        for peer, shape in slot.shapes.items():
            wire, begin = slot.into[peer], slot.offsets[peer]
            message = flight.landed[peer][begin : begin + wire.size(shape, dtype)].clone()
            values[peer] = wire.unpack(message, shape, dtype)
        slot.values = values
        slot.made = slot.sent
