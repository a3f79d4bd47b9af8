"""Runs a cache method on a live denoiser: decides when a region is entered, remembers what leaves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy, named
from fastdiff.clock import Run, Step, StepClock
from fastdiff.patch import PatchSet
from fastdiff.recorder import Recorder

from .base import CacheMethod, Gated, needed, placed
from .holding import Holding, bytes_of
from .predictors import combine
from .readers import Readers
from .reading import Peaks, Reading, unbounded
from .region import Memory, Region, placeholder, signature, unread, wants_gradients
from .verify import Verify


class Session:
    """State of one method on one denoiser, fresh for every run, apart for every branch and region.

    Static regions are decided before the denoiser is entered, gated ones at their first module. With `ahead`, the
    predictions of a step are made before the denoiser is entered too, so that a compiled graph of it holds for all
    computed, and another for all cached steps.
    """

    def __init__(
        self, method: CacheMethod, anatomy: Anatomy, clock: StepClock, recorder: Recorder, *, ahead: bool = False,
        regions: Sequence[Region] = (),
    ) -> None:  # fmt: skip
        self.method, self.anatomy, self.clock, self.recorder = method, anatomy, clock, recorder
        self.regions, self.ahead = list(regions) or method.places(anatomy), ahead
        self.masks: list[list[bool] | None] = []
        self._needed: list[list[bool] | None] = []
        self.agree: Callable[[Tensor], Tensor] | None = None  # makes a reading the same on all ranks
        self.own: Callable[[Run], list[int]] | None = None  # the steps of a run that this rank computes, if not all
        self._branches: dict[int, list[Memory]] = {}
        self._shapes: dict[int, Any] = {}
        self._current: list[Memory] | None = None
        self._verify: Verify | None = None  # of the present run, where the guard asks for it and steps are skipped
        self.holding = Holding(method, anatomy, self.regions, recorder)
        self._readers = Readers(unit for region in self.regions for unit in region.units)
        self._whole = self._read = False  # whether the present call, or all of the run, is computed in any case
        clock.on_expect.append(self._readers.expect)
        clock.on_start.append(self._start)
        clock.on_end.append(self._end)

    def attach(self, patches: PatchSet) -> None:
        """What goes inside the denoiser; `attach_denoiser` comes after what may lie between."""
        for number, region in enumerate(self.regions):
            probe = region.probe if isinstance(self.method, Gated) else None
            if probe is not None and probe.module is not None:
                self._wrap_probe(number, probe.read, probe.module, patches)
            for position, unit in enumerate(region.units):
                if unit is not self.anatomy.denoiser:
                    self._wrap_unit(number, region, position, unit, patches)

    def attach_denoiser(self, patches: PatchSet) -> None:
        self.patches = patches
        denoiser = self.anatomy.denoiser
        for number, region in enumerate(self.regions):
            if region.units == (denoiser,):
                self._wrap_unit(number, region, 0, denoiser, patches)
        patches.wrap_forward(denoiser, self._stepped)
        if self.regions and all(region.hides_control for region in self.regions):
            for companion in self.anatomy.companions:
                patches.wrap_forward(companion, self._at_key_steps)

    def _start(self, run: Run) -> None:
        self._branches, self._shapes, self._verify = {}, {}, None
        reason = self._readers.found()
        self._read = reason is not None
        if reason is not None:
            self.recorder.note(reason)
        own = self.own(run) if self.own is not None else list(range(run.total))
        masks = [self.method.guarded_mask(run.only(own), region) for region in self.regions]
        if self._read:
            masks = [mask and [True] * len(mask) for mask in masks]
        self.masks = [placed(mask, own, run.total) for mask in masks]
        self._needed = [placed(mask and needed(mask, self.method.order), own, run.total) for mask in masks]
        if self.method.guard == "verify" and not all(all(mask) for mask in self.masks if mask):
            self._verify = Verify(self.method.bounds(run), self._combined, self.agree)
            self._needed = [use if use is None or not any(use) else None for use in self._needed]  # all are checked
        self.holding.start(max((sum(mask) if mask else run.total for mask in self.masks), default=run.total))
        self._weigh = self.method.weigher(run)
        self._correct = [self.method.corrector(run, number) for number in range(len(self.regions))]
        for note in self.method.notes(run, self.anatomy):
            self.recorder.note(note)

    def _end(self, run: Run) -> None:
        self._branches, self._current = {}, None
        if self._verify is not None:
            self._verify.tell(self.recorder.report.verified)
        report = self.recorder.report
        if report.steps == run.total and not report.cached and not report.partly:
            self.recorder.note(f"{self.method.method} skipped nothing in {run.total} steps with these settings")

    def _stepped(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        inner = self.method.around(forward, self)

        @wraps(forward)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            step = self.clock.now
            if step is None:
                return forward(*args, **kwargs)
            differentiable = wants_gradients(args, kwargs)
            if differentiable:
                self.recorder.note("calls that gradients go through were computed")
            self._whole = self._read or differentiable
            self._enter(step, args, kwargs)
            try:
                output = (forward if self._whole else inner)(*args, **kwargs)
                if self._unserved():
                    self.recorder.note(f"step {step.index} was computed: not all of what is cached was called in it")
                    return forward(*args, **kwargs)
                self.commit(step.index)
            finally:
                self._current = None
            return output

        return stepped

    def _unserved(self) -> bool:
        """Whether a region was left out, and the end of it, which gives what is remembered, never called (a guider
        that skips layers). Then the call is made again, in full; nothing of it is remembered."""
        assert self._current is not None
        missed = any(memory.skipping and memory.torn for memory in self._all())
        if missed:
            self._current = None
            self.recorder.again()
        return missed

    def _all(self) -> list[Memory]:
        return [own for first in self._current or () for own in (first, *first.again)]

    def _enter(self, step: Step, args: tuple, kwargs: dict) -> None:
        shape = signature(args, kwargs)
        if self._shapes.get(step.branch) != shape:
            self.holding.enter(bytes_of(pytree.tree_leaves((args, kwargs))[:1]))
            self._shapes[step.branch] = shape
            self._branches[step.branch] = [Memory(placeholders=[None] * len(region.units)) for region in self.regions]
        self._current = self._branches[step.branch]
        for number, mask in enumerate(self.masks):
            first = self._current[number]
            for memory in (first, *first.again):
                memory.ready, memory.visits, memory.passed, memory.broken, memory.skipping = None, 0, 0, False, False
                if mask is not None:
                    self._decide(number, step, memory, self._planned(number, step.index))
                    if self.ahead and memory.skipping:
                        self.recorder.skipped(predicted=self._extrapolates(number, memory))
                        memory.ready = self._combined(number, memory, step.index)

    def _decide(self, number: int, step: Step, memory: Memory, wanted: bool) -> None:
        compute = wanted or self._whole or not memory.values
        if not compute:
            memory.factors = self.weigh(step.index, memory.indices)
            compute = not self._bounded(memory, step)
        memory.skipping = not compute
        memory.cached_in_row = 0 if compute else memory.cached_in_row + 1
        memory.cached += memory.skipping
        use = self._needed[number]
        if self.ahead and use is not None:  # every computed step alike: they share a graph
            memory.keep = compute and any(use)
        else:
            memory.keep = compute and (use is None or use[step.index] or (not memory.values and any(use)))

    def _planned(self, number: int, index: int) -> bool:
        """Whether a region is computed at a step: by its mask, or since forecasts fail; a dynamic one may be."""
        mask = self.masks[number]
        return mask is None or mask[index] or (self._verify is not None and self._verify.fails(index))

    def _bounded(self, memory: Memory, step: Step) -> bool:
        """Whether the prediction is finite for certain: amplified values may leave what the dtype holds."""
        gain = sum(map(abs, memory.factors))
        if gain <= 1 or not memory.peaks:
            return True
        dtypes = [leaf.dtype for leaf in memory.values[-1] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        limit = min(torch.finfo(dtype).max for dtype in dtypes)
        fits = all(gain * top() <= limit for top in memory.peaks[-len(memory.factors) :])
        if self.agree is not None:
            fits = bool(self.agree(torch.tensor(float(fits))) == 1)
        if fits:
            return True
        self.recorder.note(f"step {step.index} was computed: its prediction would not have been finite")
        return False

    def _gate(self, number: int, region: Region, memory: Memory, inputs: dict[str, Any]) -> None:
        """The decision of a dynamic method, at the entry of its region."""
        step, method = self.clock.now, self.method
        assert step is not None and isinstance(method, Gated) and region.probe is not None
        if region.probe.module is None:
            memory.probe = region.probe.read(inputs, None).detach()
        compute = method.guarded(False, step.index, step.run.total, memory.cached_in_row, memory.cached)
        compute = compute or self._whole or not memory.probes
        if not compute:
            change = method.change(step, memory)
            change = change if self.agree is None else self.agree(change)
            reading = Reading(change)
            known = memory.change if method.lagged and memory.change is not None else reading
            memory.change = reading
            compute = not float(known) < method.threshold  # also where it is not a number
            memory.drift = change
        self._decide(number, step, memory, compute)
        if not memory.skipping:
            memory.drift, memory.change = 0.0, None
        memory.previous = memory.probe

    def _wrap_probe(self, number: int, read: Callable[..., Tensor], module: nn.Module, patches: PatchSet) -> None:
        by_name = named(module)

        def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def probed(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                if self._current is not None:
                    self._current[number].probe = read(by_name(args, kwargs), output).detach()
                return output

            return probed

        patches.wrap_forward(module, wrapper)

    def _wrap_unit(self, number: int, region: Region, position: int, unit: nn.Module, patches: PatchSet) -> None:
        by_name = named(unit)
        first, last, gated = position == 0, position == len(region.units) - 1, isinstance(self.method, Gated)

        def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def unit_forward(*args: Any, **kwargs: Any) -> Any:
                if self._current is None:
                    return forward(*args, **kwargs)
                memory = self._visit(number, first)
                if not memory.passes(position):
                    return forward(*args, **kwargs)
                if first and gated:
                    self._gate(number, region, memory, by_name(args, kwargs))
                if first and region.store == "residual":
                    given = by_name(args, kwargs)
                    memory.entry = [given[stream] for stream in region.takes]
                if memory.skipping:
                    return self._serve(number, region, memory) if last else unread(memory.placeholders[position])
                output = forward(*args, **kwargs)
                if memory.keep and last:
                    return self._take(number, region, memory, output)
                if memory.keep and (self.ahead or memory.placeholders[position] is None):
                    memory.placeholders[position] = placeholder(output)
                return output

            return unit_forward

        patches.wrap_forward(unit, wrapper)

    def _visit(self, number: int, first: bool) -> Memory:
        """The memory of a region in the present call; one that runs several times in a call has one for each time."""
        assert self._current is not None
        memory = self._current[number]
        memory.visits += first
        if memory.visits <= 1:
            return memory
        if len(memory.again) < memory.visits - 1:
            memory.again.append(Memory(keep=memory.keep, placeholders=[None] * len(memory.placeholders)))
        return memory.again[memory.visits - 2]

    def _take(self, number: int, region: Region, memory: Memory, output: Any) -> Any:
        """Keep what leaves a region until the step is committed."""
        leaves, memory.spec = pytree.tree_flatten(output)
        if region.store == "residual":
            entry = dict(zip(region.takes, memory.entry, strict=True))
            pairs = zip(leaves, region.returns, strict=True)
            memory.taken = [
                (leaf - entry[stream]).detach() if isinstance(leaf, Tensor) else leaf for leaf, stream in pairs
            ]
        else:
            memory.taken = _own(leaves)
        if not self.ahead and not memory.values and self.clock.now is not None:
            self.holding.take(self.clock.now.branch, number, memory.taken)
        return output

    def commit(self, index: int) -> None:
        """Put what was taken in this step into the histories."""
        grown, peaks = False, Peaks()
        if self._verify is not None:
            self._verify.check(index, self._current or ())
        if self.ahead and self.clock.now is not None:  # what a graph took is seen when it is over
            self.holding.take_all(self.clock.now.branch, self._current or ())
        for memory in self._all():
            memory.entry = []
            if memory.torn:  # a layer was left out by somebody else: this is not what the region gives
                memory.taken = None
            if memory.taken is None:
                continue
            if self.ahead:  # a CUDA graph writes over what it gave
                memory.taken = _own(memory.taken)
            memory.indices.append(index)
            memory.values.append(memory.taken)
            if self.method.predictor != "reuse" and not unbounded(memory.taken):
                memory.peaks.append(peaks.add(memory.taken))
            if memory.probe is not None:
                memory.probes.append(memory.probe)
            for history in (memory.indices, memory.values, memory.peaks, memory.probes):
                del history[: -self.method.history]
            memory.taken, grown = None, True
        peaks.leave()
        if grown:
            self.holding.count(
                own for rows in self._branches.values() for first in rows for own in (first, *first.again)
            )

    def overlook(self) -> None:
        """Nothing of the present call is remembered: it is one of fewer rows."""
        for memory in self._all():
            memory.keep = False

    def forget(self) -> None:
        """What is remembered holds no longer: compute anew."""
        self._branches, self._shapes = {}, {}
        self.holding.forget()

    def skipping(self, number: int) -> bool:
        """Whether a region is left out in the present call; known of a static one before the denoiser is entered."""
        return self._current is not None and self._current[number].skipping

    def weigh(self, index: int, anchors: Sequence[int]) -> Sequence[float]:
        """The present run's factors for step `index` of the newest of the values computed at `anchors`."""
        return self._weigh(index, anchors)

    def predicted(self, number: int, index: int) -> list[Any]:
        """The leaves of what a region would give at a step, made of what the present branch remembers of it."""
        assert self._current is not None
        return self._combined(number, self._current[number], index)

    def _combined(self, number: int, memory: Memory, index: int) -> list[Any]:
        factors = self.weigh(index, memory.indices)
        leaves = [
            combine(factors, column) if isinstance(column[-1], Tensor) else column[-1]
            for column in zip(*memory.values, strict=True)
        ]
        correct = self._correct[number]
        if correct is None:
            return leaves
        return [correct(index, k, leaf) if isinstance(leaf, Tensor) else leaf for k, leaf in enumerate(leaves)]

    def _extrapolates(self, number: int, memory: Memory) -> bool:
        return sum(factor != 0 for factor in memory.factors) > 1 or self._correct[number] is not None

    def _serve(self, number: int, region: Region, memory: Memory) -> Any:
        leaves = memory.ready
        if leaves is None:
            self.recorder.skipped(predicted=self._extrapolates(number, memory))
            assert self.clock.now is not None
            leaves = self._combined(number, memory, self.clock.now.index)
        memory.ready = None
        if region.store == "residual":
            entry = dict(zip(region.takes, memory.entry, strict=True))
            pairs = zip(leaves, region.returns, strict=True)
            leaves = [entry[stream] + leaf if isinstance(leaf, Tensor) else leaf for leaf, stream in pairs]
        else:  # the caller may write into what it is given
            leaves = _own(leaves)
        return pytree.tree_unflatten(leaves, memory.spec)

    def _at_key_steps(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A ControlNet's forward, which is left out where no region would look at what it says."""
        kept: list[Any] = []  # number of the run, shapes and scales it was called with, what it said

        @wraps(forward)
        def at_key_steps(*args: Any, **kwargs: Any) -> Any:
            if not self.clock.ours():
                return forward(*args, **kwargs)
            index = self.clock.upcoming
            scales = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, int | float)]
            asked = [self.clock.number, signature(args, kwargs), scales]
            if index is not None and self.hidden(index) and kept[:3] == asked:
                return pytree.tree_map(_copied, kept[3])  # some models empty the very list that they are given
            output = forward(*args, **kwargs)
            kept[:] = [*asked, pytree.tree_map(_copied, output)]
            return output

        return at_key_steps

    def hidden(self, index: int) -> bool:
        """Whether every region is skipped at a step, which is known before it for static methods only."""
        return bool(self.masks) and not self._read and not any(self._planned(k, index) for k in range(len(self.masks)))


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _own(leaves: list[Any]) -> list[Any]:
    """Values that nobody else can write into, and that keep no graph alive."""
    return [_copied(leaf) for leaf in leaves]
