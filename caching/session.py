"""Runs a cache method on a live denoiser: decides when a region is entered, remembers what leaves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy, named
from fastdiff.batches import Batches
from fastdiff.clock import Run, Step, StepClock
from fastdiff.patch import PatchSet
from fastdiff.recorder import Recorder

from .base import CacheMethod, Gated, needed, placed
from .companions import at_key_steps
from .gate import read_probe, wishes
from .holding import Holding, bytes_of
from .pictures import assembled, each, parts_of, run_some, settle
from .readers import Readers
from .reading import Together, peak, unbounded
from .region import Memory, Region, entries_of, owned, placeholder, signature, unread, wants_gradients
from .verify import Verify


class Session:
    """State of one method on one denoiser, fresh for every run, apart for every branch and region.

    Static regions are decided before the denoiser is entered, gated ones at their first module. With `ahead`, the
    predictions of a step are made before the denoiser is entered too, so that a compiled graph of it holds for all
    computed, and another for all cached steps.
    """

    def __init__(
        self, method: CacheMethod, anatomy: Anatomy, clock: StepClock, recorder: Recorder, *, ahead: bool = False,
        regions: Sequence[Region] = (), whole: str | None = None,
    ) -> None:  # fmt: skip
        self.method, self.anatomy, self.clock, self.recorder = method, anatomy, clock, recorder
        self.regions, self.ahead = list(regions) or method.places(anatomy), ahead
        self._batches = Batches(anatomy)
        self._rows = self._solved = 0  # of the present call, and of what the solver was given last
        self.undivided = whole  # why modules are to be given whole batches, if they are
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
        clock.on_output.append(self._told)

    def attach(self, patches: PatchSet) -> None:
        """What goes inside the denoiser; `attach_denoiser` comes after what may lie between."""
        for number, region in enumerate(self.regions):
            probe = region.probe if isinstance(self.method, Gated) else None
            if probe is not None and probe.module not in (None, self.anatomy.denoiser):
                read_probe(probe.module, probe.read, lambda: self._current, number, patches)
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
                patches.wrap_forward(companion, partial(at_key_steps, clock=self.clock, hidden=self.hidden))

    def _start(self, run: Run) -> None:
        self._branches, self._shapes, self._verify, self._solved = {}, {}, None, 0
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
        if self.method.guard != "none" and not all(all(mask) for mask in self.masks if mask):
            self._verify = self._checks(run)
            self._needed = [use if use is None or not any(use) else None for use in self._needed]  # all are checked
        self.holding.start(max((sum(mask) if mask else run.total for mask in self.masks), default=run.total))
        self._weigh = self.method.weigher(run)
        self._correct = [self.method.corrector(run, number) for number in range(len(self.regions))]
        for note in self.method.notes(run, self.anatomy):
            self.recorder.note(note)

    def _checks(self, run: Run) -> Verify:
        return Verify(self.method.bounds(run), self._combined, self.agree)

    def _told(self, index: int, output: Any) -> None:
        self._solved = len(output) if isinstance(output, Tensor) and output.ndim else 0

    def _end(self, run: Run) -> None:
        self._branches, self._current = {}, None
        if self._verify is not None:
            self._verify.tell(self.recorder.report.verified)
        report = self.recorder.report
        some = any(min(counts) < run.total for counts in report.pictures.values())
        if report.steps == run.total and not (report.cached or report.partly or some):
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
        missed = any((memory.skipping or memory.partial) and memory.torn for memory in self._all())
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
        self._current, self._rows = self._branches[step.branch], self._batches.size(args, kwargs)
        for number, mask in enumerate(self.masks):
            first, probe = self._current[number], self.regions[number].probe
            if isinstance(self.method, Gated) and probe is not None and probe.module is self.anatomy.denoiser:
                first.probe = probe.read(self._batches.named(args, kwargs), None).detach()
            for memory in (first, *first.again):
                memory.ready, memory.visits, memory.passed, memory.broken, memory.skipping = None, 0, 0, False, False
                memory.chosen = ()
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
        elif self._current is not None:  # a region that runs several times in a call has one probe
            memory.probe = self._current[number].probe
        parts = parts_of(memory, self._rows, self._solved)
        for part, wish in zip(parts, wishes(method, step, parts, self._whole, self.agree), strict=True):
            self._decide(number, step, part, wish)
            if not part.skipping:
                part.drift, part.change = 0.0, None
            part.previous, part.at = part.probe, step.index
        if memory.parts:
            settle(memory, step.branch, self.recorder)

    def _wrap_unit(self, number: int, region: Region, position: int, unit: nn.Module, patches: PatchSet) -> None:
        by_name, batches = named(unit), Batches(self.anatomy, unit)
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
                if memory.partial:
                    output = run_some(memory, batches, self.recorder, self.undivided, forward, args, kwargs)
                else:
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
        """Keep what leaves a region until the step is committed; what is handed on, with what was left out."""
        leaves, memory.spec = pytree.tree_flatten(output)
        taken, entries = leaves, entries_of(region, memory)
        if entries:
            pairs = zip(leaves, entries, strict=True)
            taken = [(leaf - entry).detach() if isinstance(leaf, Tensor) else leaf for leaf, entry in pairs]
        for picture in memory.chosen:
            memory.parts[picture].taken = memory.pictures.one(taken, picture)
        if not memory.parts:
            memory.taken = taken if entries else owned(taken)
            if not self.ahead and not memory.values and self.clock.now is not None:
                self.holding.take(self.clock.now.branch, number, memory.taken)
        return self._joined(number, region, memory, leaves) if memory.partial else output

    def _joined(self, number: int, region: Region, memory: Memory, leaves: list[Any]) -> Any:
        """What a region gives for all pictures: `leaves` hold what was computed for the chosen ones."""
        own = assembled(memory, leaves, entries_of(region, memory), partial(self._served, number))
        return pytree.tree_unflatten(own, memory.spec)

    def commit(self, index: int) -> None:
        """Put what was taken in this step into the histories."""
        grown, peaks = False, Together()
        if self._verify is not None:
            self._verify.check(index, self._current or ())
        if self.ahead and self.clock.now is not None:  # what a graph took is seen when it is over
            self.holding.take_all(self.clock.now.branch, self._current or ())
        for memory in self._all():
            memory.entry = []
            for own in memory.parts or (memory,):
                if memory.torn:  # a layer was left out by somebody else: this is not what the region gives
                    own.taken = None
                if own.taken is not None:
                    self._remember(own, index, own.taken, peaks)
                    grown = True
        peaks.leave()
        if grown:
            self.holding.count(own for rows in self._branches.values() for first in rows for own in each(first))

    def _remember(self, memory: Memory, index: int, taken: list[Any], peaks: Together) -> None:
        taken = owned(taken) if self.ahead else taken  # a CUDA graph writes over what it gave
        memory.indices.append(index)
        memory.values.append(taken)
        if self.method.predictor != "reuse" and not unbounded(taken):
            memory.peaks.append(peaks.add(peak(taken)))
        if memory.probe is not None:
            memory.probes.append(memory.probe)
        for history in (memory.indices, memory.values, memory.peaks, memory.probes):
            del history[: -self.method.history]
        memory.taken = None

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
        leaves = self.method.forecast(self.weigh(index, memory.indices), memory, self.agree)
        correct = self._correct[number]
        if correct is None:
            return leaves
        return [correct(index, k, leaf) if isinstance(leaf, Tensor) else leaf for k, leaf in enumerate(leaves)]

    def _extrapolates(self, number: int, memory: Memory) -> bool:
        return sum(factor != 0 for factor in memory.factors) > 1 or self._correct[number] is not None

    def _serve(self, number: int, region: Region, memory: Memory) -> Any:
        if memory.ready is None:
            parts = memory.parts or [memory]
            made = [own.factors for own in parts if own.skipping]
            self.recorder.skipped(predicted=any(self._extrapolates(number, own) for own in parts), forecasts=made)
        return self._joined(number, region, memory, [])

    def _served(self, number: int, memory: Memory, entries: Sequence[Any]) -> list[Any]:
        """The leaves of what a region that is left out gives; entries: what entered it, where that is added."""
        assert self.clock.now is not None
        leaves, memory.ready = memory.ready or self._combined(number, memory, self.clock.now.index), None
        if not entries:  # the caller may write into what it is given
            return owned(leaves)
        pairs = zip(entries, leaves, strict=True)
        return [entry + leaf if isinstance(leaf, Tensor) else leaf for entry, leaf in pairs]

    def hidden(self, index: int) -> bool:
        """Whether every region is skipped at a step, which is known before it for static methods only."""
        return bool(self.masks) and not self._read and not any(self._planned(k, index) for k in range(len(self.masks)))
