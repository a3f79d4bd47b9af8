"""One rank of a mesh on its own: what it would compute, send and hold, with silent peers.

The rules that split a model are those of a real run, so that every byte is counted where it would be sent. On the meta
device nothing is computed, and models of any size can be rehearsed.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run, Step, StepClock
from fastdiff.patch import PatchSet
from fastdiff.recorder import Recorder
from fastdiff.timing import Moments

from .base import ParallelMethod
from .bus import Bus, Pending, Traffic
from .elapsed import Event
from .mesh import Topology
from .methods.cfg import split_guidance
from .partial import attend_part
from .tokens import split_tokens
from .unet import split_unet

_STEPS = 10_000  # more than any rehearsal plays
Call = tuple[tuple, dict[str, Any]]  # the arguments of one call of the denoiser


@dataclass(frozen=True)
class Part:
    """What one step is to one rank: bytes sent by kind, exchanges (each waits for a message's latency), seconds (0 on
    the meta device), floating-point operations, and what it sends and waits for, in order."""

    sent: Counter[str] = field(default_factory=Counter)
    exchanges: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    flops: int = 0
    events: tuple[Event, ...] = ()

    def bytes_of(self, output: bool) -> int:
        """Bytes of the output, which is always waited for, or of everything else."""
        return sum(size for kind, size in self.sent.items() if (kind == "output") is output)


@dataclass(frozen=True)
class Rehearsed:
    """Steps that wait for all values, steps that use old ones, the most bytes held in either beside the weights, and
    whether another rank has a larger share of the picture, and bytes of weights that are not on this one."""

    fresh: Part
    stale: Part
    held: int
    behind: bool = False
    spared: int = 0


class Echo(Bus):
    """Peers that take everything and answer zeros at once."""

    def __init__(self, topology: Topology, device: torch.device) -> None:
        super().__init__(topology, timeout=1.0)
        self.device = device
        self.exchanges: Counter[str] = Counter()
        self.behind = False
        self.done: Callable[[], int] = int  # operations so far
        self.begin()

    def begin(self) -> None:
        self.traffic, self.exchanges = Traffic(), Counter()
        self.events, self._told = list[Event](), self.done()

    def _tell(self, number: int, size: int | None) -> None:
        before, self._told = self._told, self.done()
        self.events.append((self._told - before, number, size))

    def post(
        self, kind: str, layer: str, sends: dict[int, Tensor], sizes: dict[int, Any], later: bool = False
    ) -> list[Pending]:
        self.traffic.sent[kind] += sum(message.numel() for message in sends.values())
        self.traffic.messages[kind] += len(sends)
        self.exchanges[kind] += bool(sends or sizes)
        own = max((message.numel() for message in sends.values()), default=0)
        self.behind |= kind == "output" and any(size > own for size in sizes.values())
        zeros = {peer: torch.zeros(size, dtype=torch.uint8, device=self.device) for peer, size in sizes.items()}
        number = len(self.events)
        self._tell(number, sum(message.numel() for message in sends.values()))
        return [Pending(peer, buffer, None, layer, number) for peer, buffer in zeros.items()]

    def wait(self, pending: Sequence[Pending], kind: str = "") -> dict[int, Tensor]:
        for number in {item.posted: None for item in pending}:
            self._tell(number, None)
        return {item.peer: item.buffer for item in pending}

    def turn(self) -> None:
        pass


def rehearse(
    anatomy: Anatomy, calls: Sequence[Call], method: ParallelMethod | None, topology: Topology, rounds: int = 4
) -> Rehearsed:
    """Play some steps of one rank; the model is as before afterwards. None is one device.

    calls: the arguments of each call of the denoiser in a step. Raises UnsupportedModel where the method cannot split
    the model, or not for so many ranks.
    """
    device = next(anatomy.denoiser.parameters()).device
    clock = StepClock(None)
    clock.run = Run(1, tuple(map(float, range(_STEPS, 0, -1))), tuple(map(float, range(_STEPS, 0, -1))), False)
    bus = Echo(topology, device)
    warmup = method.warmup_steps if method is not None else 0
    with PatchSet() as patches:
        if method is not None:
            _install(anatomy, method, bus, clock, patches)
        for callback in clock.on_start:
            callback(clock.run)
        play = _Player(anatomy.denoiser, calls, clock, bus)
        always = method is None or method.fresh(warmup + 1)
        # of a step that waits for everything, and of one that need not
        indices = (min(1, warmup),) if always else (min(1, warmup), warmup + 1)
        with torch.no_grad():
            if len(calls) > 1 or (method is not None and method.codec != "raw"):
                play.step(0)  # in which one learns how many calls a step has, and what residuals start from
            with Tally(anatomy.denoiser, calls) as tally:
                parts = [play.counted(index, tally) for index in indices]
            if device.type != "meta":
                rows = [[indices[0]] * rounds, list(range(warmup + 2, warmup + 2 + rounds))]
                for number in (1, 0)[-len(indices) :]:  # old values are those of the step before
                    parts[number] = replace(parts[number], seconds=play.seconds(rows[number]))
            patches.restore()
    return Rehearsed(parts[0], parts[-1], tally.peak, bus.behind, bus.spared)


def _install(anatomy: Anatomy, method: ParallelMethod, bus: Bus, clock: StepClock, patches: PatchSet) -> None:
    """In the order of a real run; the step axis changes nothing in a step."""
    if bus.topology.patch > 1 and anatomy.family.kind == "unet":
        split_unet(method, anatomy, bus, clock, patches)
    elif bus.topology.patch > 1:
        split_tokens(method, anatomy, bus, clock, patches)(patches)
    if bus.topology.cfg > 1:
        split_guidance(anatomy, bus, clock, patches, Recorder(clock))


class _Player:
    def __init__(self, denoiser: nn.Module, calls: Sequence[Call], clock: StepClock, bus: Echo) -> None:
        self.denoiser, self.calls, self.clock, self.bus = denoiser, calls, clock, bus

    def step(self, index: int) -> None:
        assert self.clock.run is not None
        self.clock.index = index
        for branch, (args, kwargs) in enumerate(self.calls):
            self.clock.now = Step(self.clock.run, index, branch)
            self.denoiser(*args, **kwargs)
        self.clock.now = None
        for callback in self.clock.on_tick:
            callback(index)

    def counted(self, index: int, tally: Tally) -> Part:
        """A step's bytes and operations."""
        self.bus.done = lambda: tally.flops
        self.bus.begin()
        before = tally.flops
        self.step(index)
        return Part(self.bus.traffic.sent, self.bus.exchanges, 0.0, tally.flops - before, tuple(self.bus.events))

    def seconds(self, indices: Sequence[int]) -> float:
        """The least of some steps: what else the machine does only adds."""
        self.bus.begin()
        moments = Moments(self.bus.device)
        for index in indices:
            self.step(index)
            moments.mark()
        return min(moments.seconds())


class Tally(TorchFunctionMode):
    """Operations of matrix products, and the most bytes alive at a time of tensors that were made inside.

    On the meta device the costly ones are only sketched: attention as a fused kernel does it, where torch would build
    the whole matrix of scores.
    """

    def __init__(self, denoiser: nn.Module, calls: Sequence[Call]) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.meta = next(denoiser.parameters()).is_meta
        known = [*denoiser.parameters(), *denoiser.buffers(), *pytree.tree_leaves(list(calls))]
        self._known = {leaf.untyped_storage()._cdata for leaf in known if isinstance(leaf, Tensor)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sketch = _SKETCHES.get(func)
        flops, shape = sketch(*args, **(kwargs or {})) if sketch is not None else (0, None)
        self.flops += flops
        if self.meta and shape is not None:
            output = args[0].new_empty(shape) if args else torch.empty(shape, device="meta")
        else:
            output = func(*args, **(kwargs or {}))
        for leaf in output if isinstance(output, tuple | list) else (output,):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._known:
                self._hold(leaf.untyped_storage())
        return output

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[int, tuple[int, ...]]:
    return 2 * input.numel() * len(weight), (*input.shape[:-1], len(weight))


def _conv(input: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, *_: Any) -> tuple[int, tuple[int, ...]]:
    """Without dilation and groups, which no stock denoiser has."""
    sides = zip(input.shape[2:], weight.shape[2:], stride, padding, strict=True)
    out = (len(input), len(weight), *((n + 2 * pad - size) // step + 1 for n, size, step, pad in sides))
    return 2 * math.prod(out) * weight[0].numel(), out


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[int, tuple[int, ...]]:
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1]), (*query.shape[:-1], value.shape[-1])


def _same(input: Tensor, *_: Any, **__: Any) -> tuple[int, tuple[int, ...]]:
    return 0, tuple(input.shape)


# operations and shape of what a function gives
_SKETCHES: Mapping[Any, Callable[..., tuple[int, tuple[int, ...] | None]]] = {
    F.linear: _linear, F.conv2d: _conv, F.scaled_dot_product_attention: _attention, F.layer_norm: _same,
    F.group_norm: _same, F.silu: _same, F.gelu: _same, 
    attend_part: lambda *given, **_: (_attention(*given)[0], None),
}  # fmt: skip
