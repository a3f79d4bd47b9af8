"""A transformer whose blocks lie on different ranks, through which patches of the picture flow one behind the other.

Source: PipeFusion, https://arxiv.org/abs/2405.14430. Unlike there a step begins when the one before it has ended, since
the solver is the pipeline's own: of p patches on n ranks, n - 1 turns of p + n - 1 are waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy, Stack, named
from fastdiff.clock import StepClock
from fastdiff.errors import UnsupportedModel
from fastdiff.patch import PatchSet
from fastdiff.weights import nbytes

from .attention import Layout, split_attention
from .base import ParallelMethod
from .bus import Bus, Pending
from .codec import raw
from .exchange import Exchange
from .kept import Kept
from .shards import Keeper, Shelf, units
from .shares import shares
from .split import Forward, Split
from .tokens import PLACES, Tokens


def attend(
    split: Split, exchange: Exchange, layout: Layout, own: slice,
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """A patch sees all keys and values: of patches that passed before it in this step, its own, and those that the
    others had in the step before."""
    (begin, end), total, slot = split.parts[split.place], split.parts[-1][1], exchange.slot(split.step)
    both, width = torch.cat([key, value], -1), key.shape[-1]
    words = torch.cat([both[..., : own.start, :], both[..., own.stop :, :]], -2)
    if len(split.parts) == 1:
        slot.values = {0: both[..., own, :].clone()}
    else:
        slot.values[0][..., begin:end, :] = both[..., own, :]
    if words.shape[-2]:
        slot.values[1] = words
    if end - begin == total:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    known = torch.cat([slot.values[k] for k in sorted(slot.values)], -2)
    return torch.nn.functional.scaled_dot_product_attention(query, known[..., :width], known[..., width:], **options)


_NEVER_ALONE = {"hunyuanvideo"}  # who cut off the text by its length from the end: an empty one leaves nothing


def cuts(blocks: Sequence[nn.Module], parts: int) -> list[range]:
    """Blocks of each stage: in order, with about as many bytes of weights. Raises UnsupportedModel for too few."""
    if len(blocks) < parts:
        raise UnsupportedModel(f"{len(blocks)} blocks cannot be {parts} stages; take fewer devices, or cfg = 2")
    sizes = [nbytes(block) for block in blocks]
    ends, done, whole = [0], 0, sum(sizes)
    for number, size in enumerate(sizes):
        stage, left = len(ends), len(blocks) - number
        enough = number > ends[-1] and done + size / 2 > whole * stage / parts
        if stage < parts and (enough or left <= parts - stage):
            ends.append(number)
        done += size
    return [range(begin, end) for begin, end in zip(ends, [*ends[1:], len(blocks)], strict=True)]


class Patches(Tokens):
    """The patch that is under way: contiguous tokens. The text goes with the first of a step, and is empty behind."""

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        total, text = self.split.parts[-1][1], self.text_tokens
        if self.split.place and text and any(part in name for part in PLACES):
            dim = next((k for k, size in enumerate(tensor.shape) if size == total + text), None)
            if dim is not None:  # of the picture alone
                tensor = tensor.narrow(dim, text if self.text_first else 0, total)
        return super().cut(name, tensor)


class Stages:
    """One rank's part: its blocks, what comes to the first of them and leaves the last."""

    def __init__(self, method: Any, anatomy: Anatomy, bus: Bus, clock: StepClock) -> None:
        if anatomy.family.tokens is None or not anatomy.blocks:
            raise anatomy.without("tokens in a known order, which flow in patches", "take cfg or parastep")
        if anatomy.family.long_skips:
            raise UnsupportedModel(f"{anatomy.family.name} gives blocks what much earlier ones made: no stages")
        self.method, self.bus, self.anatomy, self.blocks = method, bus, anatomy, anatomy.blocks
        self.split = Split(method, bus, clock)
        if anatomy.family.name in _NEVER_ALONE and method.patches_of(len(self.split.ranks)) > 1:
            raise UnsupportedModel(f"blocks of {anatomy.family.name} take no patch without text; set patches = 1")
        self.layout, self.place = Patches(self.split, anatomy), self.split.place
        self.own, self.whole = cuts(self.blocks, len(self.split.ranks))[self.place], torch.empty(0)
        self.count, self._coming = 1, list[Pending]()
        self._known: set[int] = set()  # branches whose keys and values are here
        self.split.at_reset(self._known.clear)
        self.spared = sum(nbytes(block) for number, block in enumerate(self.blocks) if number not in self.own)

    def passes(self, forward: Forward) -> Forward:
        by_name = named(self.anatomy.denoiser)

        @wraps(forward)
        def staged(*args: Any, **kwargs: Any) -> Any:
            split = self.split
            if split.clock is None or split.clock.now is None:
                return forward(*args, **kwargs)
            split.rules(self.rules)
            split.latents, split.parts = by_name(args, kwargs), []
            split.enter()
            try:
                step = split.step
                whole = split.fresh or step is None or step.branch not in self._known
                self.count = 1 if whole else self.method.patches_of(len(split.ranks))
                for place in range(self.count):
                    split.place = place
                    output = forward(*args, **kwargs)
                self._known.add(step.branch if step else 0)
            finally:
                split.leave()
                self.whole = torch.empty(0)
            output = pytree.tree_map_only(Tensor, self._told, output)
            split.flush()
            return output

        return staged

    def rules(self) -> None:
        for number in self.own:
            split_attention(self.split, self.blocks[number], self.layout, self.patches, prefix=f"block {number} ")

    def install(self, patches: PatchSet) -> Callable[[PatchSet], None]:
        self.patches = patches
        self.rules()
        patches.wrap_forward(self.anatomy.denoiser, self.passes)

        def outside(patches: PatchSet) -> None:
            for number, block in enumerate(self.blocks):
                patches.wrap_forward(block, partial(self._block, number, block))

        return outside

    def _block(self, number: int, block: nn.Module, forward: Forward) -> Forward:
        stack, by_name = self.anatomy.stack_of(block), named(block)
        first, last = number == 0, number == len(self.blocks) - 1

        @wraps(forward)
        def block_forward(*args: Any, **kwargs: Any) -> Any:
            if not self.split.active:
                return forward(*args, **kwargs)
            given = by_name(args, kwargs)
            if first:
                self._cut(given, stack)
            if number == self.own.start and self.place:
                given |= self._received(given, stack)
            if number in self.own:
                for key in given.keys() - set(stack.takes):
                    given[key] = pytree.tree_map_only(Tensor, partial(self.layout.cut, key), given[key])
                output = forward(**given)
                streams = dict(zip(stack.returns, output, strict=False)) if isinstance(output, tuple) else {
                    stack.takes[0]: output
                }  # fmt: skip
                if number == self.own.stop - 1 and not last:
                    self._send(streams, stack)
            else:
                streams = {name: given[name] for name in stack.returns}
            if last:
                streams[stack.takes[0]] = self._placed(streams[stack.takes[0]]) if number in self.own else self.whole
            single = len(stack.returns) == 1
            return streams[stack.takes[0]] if single else tuple(streams.get(name) for name in stack.returns)

        return block_forward

    def _cut(self, given: dict[str, Any], stack: Stack) -> None:
        """The patch, and for those behind the first a text without words."""
        image, split, layout = given[stack.takes[0]], self.split, self.layout
        text = given.get(stack.takes[1]) if layout.kind != "apart" and len(stack.takes) > 1 else None
        if split.place == 0:
            total, count = image.shape[1], self.count
            if total < count:
                raise UnsupportedModel(f"{total} tokens cannot be {count} patches; set parallel.patches lower")
            split.parts, split.shape = shares(total, count), tuple(image.shape)
            layout.text_tokens = 0 if text is None else text.shape[1]
            self.whole = torch.empty_like(image)
        begin, end = split.parts[split.place]
        given[stack.takes[0]] = image[:, begin:end].contiguous()
        if text is not None and split.place:
            given[stack.takes[1]] = text[:, :0]

    def _streams(self, stack: Stack) -> list[str]:
        joint = self.layout.kind != "apart" and len(stack.takes) > 1
        return list(stack.takes[:2]) if joint and self.split.place == 0 else [stack.takes[0]]

    def _send(self, streams: dict[str, Tensor], stack: Stack) -> None:
        message = torch.cat([raw(streams[name]) for name in self._streams(stack)])
        self.bus.post("stage", f"stage {self.place}", {self.split.ranks[self.place + 1]: message}, {})

    def _received(self, given: dict[str, Tensor], stack: Stack) -> dict[str, Tensor]:
        """What the stage before gives of this patch; the next one is expected while this one is computed."""
        peer, names, parts = self.split.ranks[self.place - 1], self._streams(stack), self.split.parts
        if self.split.place == 0:
            self._coming = self._expected(peer, sum(given[name].nbytes for name in names))
        message = self.bus.wait(self._coming, "stage")[peer]
        if self.split.place + 1 < len(parts):
            (begin, end), image = parts[self.split.place + 1], given[stack.takes[0]]
            self._coming = self._expected(peer, image[:, :1].nbytes * (end - begin))
        sizes = [given[name].nbytes for name in names]
        got = zip(names, message.split(sizes), strict=True)
        return {name: part.clone().view(given[name].dtype).reshape(given[name].shape) for name, part in got}

    def _expected(self, peer: int, size: int) -> list[Pending]:
        return self.bus.post("stage", f"stage {self.place}", {}, {peer: size})

    def _placed(self, patch: Tensor) -> Tensor:
        """The picture as far as it is there: what comes behind the blocks runs on all of it."""
        begin, end = self.split.parts[self.split.place]
        self.whole[:, begin:end] = patch
        return self.whole

    def _told(self, output: Tensor) -> Tensor:
        """The last stage's output, on all ranks."""
        ranks, own = self.split.ranks, output.contiguous()
        peers = [rank for rank in ranks if rank != self.bus.topology.rank]
        if self.place == len(ranks) - 1:
            self.bus.swap("output", "the output", dict.fromkeys(peers, raw(own)), {})
            return output
        got = self.bus.swap("output", "the output", {}, {ranks[-1]: own.nbytes})[ranks[-1]]
        return got.view(own.dtype).reshape(own.shape)


class Owner(Keeper):
    """Each block is on the rank of its stage alone; the others get it back when all is restored."""

    def __init__(self, bus: Bus, stages: Sequence[range]) -> None:
        self.bus, self.ranks, self.stages = bus, bus.topology.group("patch"), stages
        self.own = stages[bus.topology.place("patch")]

    @property
    def losses(self) -> int:
        return self.bus.broken

    def stays(self, number: int) -> bool:
        return number in self.own

    def keep(self, whole: Tensor, size: int) -> Tensor:
        return whole[:0].clone()

    def fetch(self, kept: Kept) -> tuple[Tensor, Any]:
        owner = self.ranks[next(k for k, stage in enumerate(self.stages) if kept.number in stage)]
        if owner == self.bus.topology.rank:
            whole = kept.packed()
            peers = [rank for rank in self.ranks if rank != owner]
            return whole, self.bus.post("weights", kept.name, dict.fromkeys(peers, whole), {})
        room = torch.empty(kept.size, dtype=torch.uint8, device=kept.device)
        return room, self.bus.post("weights", kept.name, {}, {owner: room})

    def land(self, kept: Kept) -> None:
        self.bus.wait(kept.coming, "weights")

    def settle(self) -> None:
        self.bus.drain()
        self.bus.settle()


def split_stages(
    method: ParallelMethod, anatomy: Anatomy, bus: Bus, clock: StepClock, patches: PatchSet
) -> Callable[[PatchSet], None]:
    """As `split_tokens`. Raises UnsupportedModel, with the reason, before anything is patched."""
    stages = Stages(method, anatomy, bus, clock)
    bus.spared = stages.spared  # for who plans
    return stages.install(patches)


def leave(anatomy: Anatomy, cached: Sequence[nn.Module], bus: Bus, patches: PatchSet) -> Shelf:
    """Take the weights of other stages' blocks away from this rank. Raises UnsupportedModel."""
    if any(module is not anatomy.denoiser for module in cached):
        raise UnsupportedModel("pipefusion runs a block for each patch: take a cache of whole steps, such as easycache")
    stages = cuts(anatomy.blocks, bus.topology.patch)
    device = next(anatomy.denoiser.parameters()).device
    shelf = Shelf(units(anatomy), anatomy.denoiser, Owner(bus, stages), device)
    patches.call(shelf.take, shelf.give_back)
    return shelf
