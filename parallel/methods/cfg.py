"""Classifier-free guidance on two devices: one computes the conditional, one the unconditional half (xDiT,
https://arxiv.org/abs/2411.01738, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.batches import Batches
from fastdiff.clock import Run, StepClock
from fastdiff.errors import FastdiffError, PeerLost, UnsupportedModel
from fastdiff.parallel.base import ParallelMethod
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.split import Forward
from fastdiff.patch import PatchSet
from fastdiff.recorder import Recorder


class CFG(ParallelMethod):
    """The two halves of classifier-free guidance on two ranks, exact; more ranks split each half into patches.

    Formula: e = e_u + g (e_c - e_u), where one half of the ranks computes e_c (with the prompt), the other e_u
    (without), and each sends its own; g is `guidance_scale`.
    """

    method: Literal["cfg"] = "cfg"
    cfg: Literal[2] = 2


def split_guidance(anatomy: Anatomy, bus: Bus, clock: StepClock, patches: PatchSet, recorder: Recorder) -> None:
    """Outermost patch of a denoiser. Raises UnsupportedModel where the halves cannot be told apart."""
    family = anatomy.family
    if anatomy.opaque and not anatomy.recognised:
        raise anatomy.without("style of guidance, which cfg = 2 shares out", "set parallel.cfg to 1")
    if family.guidance == "none" or (family.guidance == "batch" and not family.batches):
        raise UnsupportedModel(
            f"cfg = 2 has nothing to share out: a {family.name} denoiser has no two halves of guidance"
        )
    ways = _Calls if family.guidance == "calls" else _Batch
    way = ways(anatomy, bus, clock, recorder)
    patches.wrap_forward(anatomy.denoiser, way.shared)


class _Batch:
    """Both halves come in one batch: each rank takes its half of every input."""

    def __init__(self, anatomy: Anatomy, bus: Bus, clock: StepClock, recorder: Recorder) -> None:
        self.batches, self.bus, self.clock, self.recorder = Batches(anatomy), bus, clock, recorder
        self.place = bus.topology.place("cfg")

    def shared(self, forward: Forward) -> Forward:
        @wraps(forward)
        def half_forward(*args: Any, **kwargs: Any) -> Any:
            if self.clock.now is None or self.bus.alone:
                return forward(*args, **kwargs)
            why, count, unknown = None, self.batches.size(args, kwargs), self.batches.unknown(args, kwargs)
            if unknown is not None:
                why = f"not all inputs of this denoiser are known to have the batch first ({unknown})"
            elif count % 2:
                why = f"a batch of {count} has no two halves"
            if why is not None:
                self.recorder.note(f"{why}: both ranks of cfg compute all of it")
                return forward(*args, **kwargs)
            args, kwargs = self.batches.change(args, kwargs, self._half)
            return pytree.tree_map_only(Tensor, self._whole, forward(*args, **kwargs))

        return half_forward

    def _half(self, rows: Any) -> Any:
        half = len(rows) // 2
        return rows[self.place * half : (self.place + 1) * half]

    def _whole(self, output: Tensor) -> Tensor:
        return torch.cat(self.bus.gather("output", "the other half of guidance", output, "cfg", [output.shape] * 2))


class _Calls:
    """The halves are two calls a step: each rank computes one of them, and fills in the other's result at the second
    call, before the pipeline looks at either. How many calls a step has is learned at the first in which this denoiser
    runs (of Wan 2.2's two transformers the second begins later), which all compute.

    In a step that makes one call only (guidance for a part of the run) the result is filled in before the solver."""

    def __init__(self, anatomy: Anatomy, bus: Bus, clock: StepClock, recorder: Recorder) -> None:
        self.bus, self.clock, self.recorder = bus, clock, recorder
        self.place = bus.topology.place("cfg")
        self.calls = self._made = 0  # in a step, and in the present one
        self._first: int | None = None  # the step of this run in which this denoiser ran first
        self._empty: Any = None
        self._filled = False
        self._missed: Callable[[], Any] | None = None
        clock.on_start.append(self._start)
        clock.on_tick.append(self._tick)
        clock.on_output.append(self._solved)
        clock.before_step.append(self._alone)

    def _start(self, run: Run) -> None:
        self.calls, self._made, self._empty, self._first = 0, 0, None, None

    def _tick(self, index: int) -> None:
        if index == self._first and self.calls != 2 and not self.bus.alone:
            self.recorder.note(
                f"cfg = 2 shares nothing out: the denoiser is called {self.calls} times a step, not twice"
            )
        self._made = 0

    def _alone(self, index: int, latents: Any) -> Any:
        """The solver is about to be given one call's result: that of the first rank."""
        first, self._empty = self._empty, None
        if first is None:
            return latents
        if self.bus.sharded and self.place:
            raise UnsupportedModel(f"step {index} has one half of guidance, and parallel.shard needs both: set cfg = 1")
        self._filled = self.place == 1
        try:
            if not self.bus.alone:
                only = "the only half of guidance"
                told = pytree.tree_map_only(Tensor, lambda leaf: self._told(only, leaf)[0], first)
                self.bus.arrived()
                if self._filled:
                    _overwrite(first, told)
        except PeerLost as error:
            self.bus.lost(error)
        if self.bus.alone:
            self._fill(first)
        return latents

    def _told(self, what: str, own: Tensor) -> list[Tensor]:
        return self.bus.gather("output", what, own, "cfg", [own.shape] * 2)

    def _solved(self, index: int, output: Any) -> None:
        filled, self._filled = self._filled, False
        if filled and isinstance(output, Tensor) and bool(output.isnan().any()):
            raise FastdiffError(
                f"step {index} made one call of the denoiser where the first made {self.calls}, and its result was "
                "copied before it was there; set parallel.cfg = 1"
            )

    def shared(self, forward: Forward) -> Forward:
        @wraps(forward)
        def one_forward(*args: Any, **kwargs: Any) -> Any:
            step = self.clock.now
            if self.bus.alone and self._empty is not None:  # the other rank was lost in the second call
                first, self._empty = self._empty, None
                self._fill(first)
                return forward(*args, **kwargs)
            if step is not None and self._first is None:
                self._first = step.index
            if step is None or self.bus.alone or step.index == self._first or self.calls != 2:
                if step is not None and step.index == self._first:
                    self.calls += 1
                return forward(*args, **kwargs)
            self._made += 1
            if self._made == 1:
                if self.place == 0:
                    self._empty = forward(*args, **kwargs)
                else:
                    self.recorder.elsewhere()
                    self._missed = lambda: forward(*args, **kwargs)
                    self._empty = pytree.tree_map_only(Tensor, lambda x: torch.full_like(x, torch.nan), self._last)
                return self._empty
            return self._both(forward, args, kwargs)

        def kept(*args: Any, **kwargs: Any) -> Any:
            output = one_forward(*args, **kwargs)
            self._last = output
            return output

        return wraps(forward)(kept)

    def _both(self, forward: Forward, args: tuple, kwargs: dict) -> Any:
        first = self._empty
        if self.place == 0:
            self.recorder.elsewhere()
        own = first if self.place == 0 else forward(*args, **kwargs)
        ours, spec = pytree.tree_flatten(own)
        told = [self._told("the other half of guidance", x) if isinstance(x, Tensor) else [x, x] for x in ours]
        self._empty = None  # not before: who is left alone in here has it to fill
        if self.place == 1:
            _overwrite(first, [pair[0] for pair in told])
        return pytree.tree_unflatten([pair[1] for pair in told], spec)

    def _fill(self, first: Any) -> None:
        """Compute what a lost rank would have put into the first call's result."""
        if first is not None and self.place == 1 and self._missed is not None:
            _overwrite(first, self._missed())


def _overwrite(output: Any, values: Any) -> None:
    """Put values into the tensors of an output that the pipeline has already."""
    for leaf, value in zip(pytree.tree_leaves(output), pytree.tree_leaves(values), strict=True):
        if isinstance(leaf, Tensor):
            leaf.copy_(value)
