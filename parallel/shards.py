"""Weights that are not here: a block's are fetched just before it runs, while the one before it computes.

As fully sharded data parallelism (FSDP, https://arxiv.org/abs/2304.11277) does it for training, but on instances: no
class changes, buffers and packed weights are treated like parameters, and all of it can be taken back.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastdiff.anatomy import Anatomy
from fastdiff.clock import StepClock
from fastdiff.errors import PeerLost
from fastdiff.patch import PatchSet
from fastdiff.weights import tensors

from .base import ParallelMethod
from .bus import Bus
from .kept import Kept, View, aligned, share_of
from .portions import portion

_OWN = "quantized_as"  # what a layer says that fastdiff quantized
Piece: TypeAlias = tuple[int, int, list[Tensor]]  # of memory: address, bytes, and the tensors that lie there


class Keeper(ABC):
    """Who has the bytes that are not here, in `parts` equal shares."""

    parts: int = 1
    place: int = 0

    @property
    def losses(self) -> int:
        """How often what was on its way was lost."""
        return 0

    def stays(self, number: int) -> bool:
        """Whether a block's weights stay where they are."""
        return False

    @abstractmethod
    def keep(self, whole: Tensor, size: int) -> Tensor:
        """What is kept of all bytes of a block."""

    @abstractmethod
    def fetch(self, kept: Kept) -> tuple[Tensor, Any]:
        """Room for all bytes of a block, and what is on its way there; nothing is waited for."""

    @abstractmethod
    def land(self, kept: Kept) -> None:
        """All of it is there for whatever computes from now on. Raises PeerLost."""

    def settle(self) -> None:
        """Come back when nobody needs what was kept here any more."""
        return


class Peers(Keeper):
    """Each of the ranks keeps one share of every block."""

    def __init__(self, bus: Bus) -> None:
        self.bus, self.parts, self.place = bus, bus.topology.size, bus.topology.rank

    @property
    def losses(self) -> int:
        return self.bus.broken

    def keep(self, whole: Tensor, size: int) -> Tensor:
        return whole[self.place * size :][:size].clone()

    def fetch(self, kept: Kept) -> tuple[Tensor, Any]:
        room = torch.empty(self.parts * kept.size, dtype=torch.uint8, device=kept.device)
        places = list(room.split(kept.size)) if kept.size else []
        if places:
            places[self.place].copy_(kept.share)
        room_of = {peer: part for peer, part in enumerate(places) if peer != self.place}
        sends = dict.fromkeys(room_of, kept.share)
        return room, self.bus.post("weights", kept.name, sends, room_of, later=True)

    def land(self, kept: Kept) -> None:
        self.bus.wait(kept.coming, "weights")

    def settle(self) -> None:
        self.bus.settle()  # the others have their shares of this rank


class Shelf:
    """The blocks of one denoiser. One is here while it computes, and the one after it is fetched meanwhile.

    Which one that is, the last time tells. A block that a cache skips is not fetched; if it was expected, it is on its
    way already, and stays until it runs. `fetched` counts blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module], root: nn.Module, keeper: Keeper, device: torch.device) -> None:
        self.blocks, self.root, self.keeper, self.device, self.home = list(blocks), root, keeper, device, device
        self.kept: list[Kept] = []
        self.fetched = 0
        self._forget()

    def _forget(self) -> None:
        """What is known of the order; and what was on its way, which has to be the same on all ranks."""
        self._losses = self.keeper.losses
        self._next: dict[int, int] = {}
        self._last: int | None = None
        self._ahead: int | None = None
        for kept in self.kept:
            kept.here = kept.coming = None

    def install(self, patches: PatchSet) -> None:
        """Take the weights away; each block fetches its own. To restore is to fetch all, which all ranks have to do."""
        patches.call(self.take, self.give_back)
        for number, block in enumerate(self.blocks):
            patches.wrap_forward(block, partial(self._around, number))

    def take(self) -> None:
        if (loaded := portion(self.root)) is not None:
            self.kept = loaded.lend(self.keeper.place, self.keeper.parts)
            return
        for number, pieces in enumerate(_ranges(self.blocks, self.root)):
            self.home = pieces[0][2][0].device if pieces else self.device
            self.kept.append(_laid_out(number, pieces, self.keeper, self.device))

    def give_back(self) -> None:
        if (loaded := portion(self.root)) is not None:
            loaded.take_back()
            self.kept = []
            return
        try:
            for number, kept in enumerate(self.kept):
                self._land(kept)
                for view in kept.views if not self.keeper.stays(number) else ():
                    own = torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device=self.home)
                    assert kept.here is not None
                    view.tensor.data = own.copy_(view.of(kept.here))
                kept.here = kept.coming = None
            self.keeper.settle()
        except PeerLost as error:
            lost = f"weights were lost with the rank that kept them: load the pipeline again ({error})"
            warnings.warn(lost, stacklevel=2)
        self.kept = []

    def _land(self, kept: Kept) -> None:
        if self._losses != self.keeper.losses:
            self._forget()
        if kept.here is None:
            self._fetch(kept)
        self.keeper.land(kept)

    def _fetch(self, kept: Kept) -> None:
        kept.here, kept.coming = self.keeper.fetch(kept)
        self.fetched += 1

    def _around(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def with_weights(*args: Any, **kwargs: Any) -> Any:
            kept = self.kept[number]
            self._land(kept)
            kept.fill()
            if self._last is not None:
                self._next[self._last] = number
            self._last = number
            self._ahead = None if self._ahead == number else self._ahead
            after = self._next.get(number, (number + 1) % len(self.kept))
            if self._ahead is None and after != number and self.kept[after].here is None:
                self._fetch(self.kept[after])
                self._ahead = after
            try:
                return forward(*args, **kwargs)
            finally:
                kept.empty()

        return with_weights


def shelve(
    method: ParallelMethod, anatomy: Anatomy, cached: Sequence[nn.Module], bus: Bus, clock: StepClock, patches: PatchSet
) -> list[Shelf]:
    """Leave this rank its part of a denoiser's blocks, if the method says so. cached: what a cache may leave out.

    Raises UnsupportedModel.
    """
    if method.leave is not None and bus.topology.patch > 1:
        return [method.leave(anatomy, cached, bus, patches)]
    if not method.shard:
        return []
    device = next(anatomy.denoiser.parameters()).device
    shelf = Shelf(units(anatomy), anatomy.denoiser, Peers(bus), device)
    shelf.install(patches)
    bus.sharded = True
    if bus.topology.patch == 1:  # nothing else ends a step
        clock.on_tick.append(lambda _: bus.turn())
    return [shelf]


def units(anatomy: Anatomy) -> list[nn.Module]:
    """What is fetched at a time: transformer blocks, or the stages of a UNet. Raises UnsupportedModel."""
    net: Any = anatomy.denoiser
    if anatomy.family.kind == "unet":
        return [*net.down_blocks, *([net.mid_block] if net.mid_block is not None else []), *net.up_blocks]
    if not anatomy.blocks:
        raise anatomy.without("blocks whose weights could be kept elsewhere", "take a method without parallel.shard")
    return anatomy.blocks


def share_out(number: int, block: nn.Module, root: nn.Module, keeper: Keeper, device: torch.device) -> Kept:
    """What is kept of a block, while others may not be here yet."""
    return _laid_out(number, _ranges([block], root)[0], keeper, device)


def _laid_out(number: int, pieces: list[Piece], keeper: Keeper, device: torch.device) -> Kept:
    size, begin = share_of(sum(aligned(count) for _, count, _ in pieces), keeper.parts), 0
    kept = Kept(number, device, size, torch.empty(0))
    for address, count, found in pieces:
        for tensor in found:
            at = begin + tensor.data_ptr() - address
            kept.views.append(View(tensor, at, tensor.dtype, tuple(tensor.shape), tensor.stride()))
        begin += aligned(count)
    if not keeper.stays(number):
        kept.share = keeper.keep(kept.packed(keeper.parts), size)
        kept.empty()
    return kept


def _ranges(blocks: Sequence[nn.Module], root: nn.Module) -> list[list[Piece]]:
    """For each block, the pieces of memory that it alone looks at: address, bytes, and the tensors that lie there, in
    the order of the modules, which is the same on all ranks, as addresses are not."""
    number = {id(module): k for k, block in enumerate(blocks) for module in block.modules()}
    found: list[tuple[int, int, int, Tensor, int]] = []
    for module in root.modules():
        for tensor in {id(t): t for t in _held(module)}.values():
            if address := _address(tensor):
                reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                end, owner = address + reach * tensor.itemsize, number.get(id(module), -1)
                found.append((address, end, len(found), tensor, owner))
    found.sort(key=lambda one: one[:3])
    pieces: list[dict[int, tuple[int, int, list[Tensor]]]] = [{} for _ in blocks]
    while found:
        (begin, end, *_), count = found[0], 1
        while count < len(found) and found[count][0] < end:
            end, count = max(end, found[count][1]), count + 1
        together, found = found[:count], found[count:]
        owners = {owner for *_, owner in together}
        if len(owners) == 1 and (owner := owners.pop()) >= 0:
            first = min(turn for _, _, turn, _, _ in together)
            pieces[owner][first] = (begin, end - begin, [tensor for *_, tensor, _ in together])
    return [[own[first] for first in sorted(own)] for own in pieces]


def _held(module: Any) -> Iterator[Tensor]:
    """A module's parameters and buffers, and what the kernels of a quantized layer have packed."""
    yield from tensors(module)
    if hasattr(module, _OWN):
        module.ready()
        yield from _inside([value for value in vars(module).values() if isinstance(value, list | tuple)])


def _inside(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _inside(value)


def _address(tensor: Tensor) -> int:
    """Where a tensor's numbers are; 0 where they are not bytes in a row, as in layouts of a library's own."""
    try:
        return tensor.data_ptr() if tensor.layout is torch.strided and tensor.numel() else 0
    except RuntimeError:
        return 0
