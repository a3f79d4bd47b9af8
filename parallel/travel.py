"""What travels round a ring of ranks: blocks that are passed on, and parcels of several things for several ranks.

All of it leaves before the computing under which it travels, and is waited for after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .bus import Bus, Pending
from .codec import Wire, raw
from .exchange import Exchange
from .partial import Part
from .split import Split


def passed_on(
    split: Split, exchange: Exchange, own: Tensor, ranks: Sequence[int], counts: Sequence[int]
) -> Iterator[Tensor]:
    """Blocks of all ranks, our own first and then in the order in which they come round; while one is used, the next
    is on its way. Each is coded once, by its own rank, and passed on as it is.

    own: (batch, heads, tokens, channels); counts: tokens of each of the ranks.
    """
    bus, step, size = split.bus, split.step, len(ranks)
    place = ranks.index(bus.topology.rank)
    after, before = ranks[(place + 1) % size], ranks[place - 1]
    slot, alike = exchange.slot(step), (split.shape, own.dtype)
    if slot.alike != alike:
        slot.out, slot.into, slot.alike = {}, {}, alike
    block, message = own, torch.empty(0) if size == 1 else slot.out.setdefault(-1, Wire(exchange.codec)).pack(own)
    for distance in range(1, size):
        owner = place - distance
        shape = (*own.shape[:-2], counts[owner], own.shape[-1])
        wire = slot.into.setdefault(ranks[owner], Wire(exchange.codec))
        size_there = wire.size(shape, own.dtype) if counts[owner] else 0
        sends = {after: message} if message.numel() else {}
        pending = bus.post(exchange.kind, exchange.layer, sends, {before: size_there} if size_there else {})
        yield block
        message = bus.wait(pending, exchange.kind).get(before, message[:0])
        block = wire.unpack(message, shape, own.dtype) if size_there else own.new_empty(shape)
    yield block
    bus.drain()


class Parcels:
    """Things for several ranks, those for one rank in one message; all that leaves at a time is one exchange."""

    def __init__(self, bus: Bus, exchange: Exchange) -> None:
        self.bus, self.exchange = bus, exchange
        self._sends: dict[int, list[Tensor]] = {}
        self._expects: dict[int, list[tuple[str, tuple[int, ...], torch.dtype]]] = {}
        self._pending: list[Pending] = []
        self._here: dict[str, Tensor] = {}

    def send(self, peer: int, thing: Tensor) -> None:
        self._sends.setdefault(peer, []).append(raw(thing))

    def expect(self, name: str, peer: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """In the order in which the peer sends."""
        self._expects.setdefault(peer, []).append((name, shape, dtype))

    def send_part(self, peer: int, part: Part, dtype: torch.dtype) -> None:
        """The output in the layer's own type, its weight as it is."""
        self.send(peer, part.out.to(dtype))
        self.send(peer, part.lse)

    def expect_part(self, name: str, peer: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.expect(name, peer, shape, dtype)
        self.expect(f"{name} lse", peer, shape[:-1], torch.promote_types(dtype, torch.float32))

    def leave(self) -> None:
        sends = {peer: torch.cat(things) for peer, things in self._sends.items() if any(map(len, things))}
        sizes = {peer: sum(map(_size, those)) for peer, those in self._expects.items()}
        kind, layer = self.exchange.kind, self.exchange.layer
        self._sends = {}
        self._pending = self.bus.post(kind, layer, sends, {peer: size for peer, size in sizes.items() if size})

    def arrive(self) -> None:
        got = self.bus.wait(self._pending, self.exchange.kind)
        nothing = torch.empty(0, dtype=torch.uint8, device=self.bus.device)
        for peer, those in self._expects.items():
            begin = 0
            for name, shape, dtype in those:
                size = _size((name, shape, dtype))
                piece = got[peer][begin : begin + size].clone() if size else nothing
                self._here[name] = piece.view(dtype).reshape(shape)  # a copy: wide numbers must not begin anywhere
                begin += size
        self._expects = {}

    def take(self, name: str) -> Tensor:
        return self._here.pop(name)

    def take_part(self, name: str) -> Part:
        out, lse = self.take(name), self.take(f"{name} lse")
        return Part(out.to(lse.dtype), lse)


def _size(thing: tuple[str, tuple[int, ...], torch.dtype]) -> int:
    _, shape, dtype = thing
    return torch.Size(shape).numel() * dtype.itemsize
