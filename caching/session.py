"""Runs a cache method on a live denoiser: decides at the entry of a region, remembers at its exit."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run, Step, StepClock
from fastdiff.patch import PatchSet
from fastdiff.recorder import Recorder

from .base import CacheMethod
from .predictors import combine
from .region import Memory, Region, named, placeholder, signature, unread


class Session:
    """State of one method on one denoiser, fresh for every run, apart for every branch and region."""

    def __init__(self, method: CacheMethod, anatomy: Anatomy, clock: StepClock, recorder: Recorder) -> None:
        self.method, self.clock, self.recorder = method, clock, recorder
        self.regions = method.regions(anatomy)
        self._memories: dict[tuple[int, int], Memory] = {}
        self._mask: list[bool] | None = None
        clock.on_start.append(self._start)
        clock.on_end.append(self._end)

    def attach(self, patches: PatchSet) -> None:
        for number, region in enumerate(self.regions):
            if region.probe is not None:
                self._wrap_probe(number, region, patches)
            for position, unit in enumerate(region.units):
                self._wrap_unit(number, region, position, unit, patches)

    def _start(self, run: Run) -> None:
        self._memories = {}
        self._mask = self.method.guarded_mask(run)
        for note in self.method.notes(run):
            self.recorder.note(note)

    def _end(self, run: Run) -> None:
        self._memories = {}
        report = self.recorder.report
        if report.steps == run.total and not report.cached:
            self.recorder.note(f"{self.method.method} skipped nothing in {run.total} steps with these settings")

    def _memory(self, number: int, step: Step) -> Memory:
        return self._memories.setdefault((number, step.branch), Memory())

    def _wrap_probe(self, number: int, region: Region, patches: PatchSet) -> None:
        assert region.probe is not None
        module, read = region.probe.module, region.probe.read
        by_name = named(module)

        def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def probed(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                if self.clock.now is not None:
                    self._memory(number, self.clock.now).probe = read(by_name(args, kwargs), output)
                return output

            return probed

        patches.wrap_forward(module, wrapper)

    def _wrap_unit(self, number: int, region: Region, position: int, unit: nn.Module, patches: PatchSet) -> None:
        by_name = named(unit)

        def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def unit_forward(*args: Any, **kwargs: Any) -> Any:
                step = self.clock.now
                if step is None:
                    return forward(*args, **kwargs)
                memory = self._memory(number, step)
                if position == 0:
                    self._enter(region, step, memory, args, kwargs)
                    if region.store == "residual":
                        given = by_name(args, kwargs)
                        memory.entry = [given[stream] for stream in region.takes]
                last = position == len(region.units) - 1
                if memory.skipping:
                    return self._predict(region, step, memory) if last else unread(memory.placeholders[position])
                output = forward(*args, **kwargs)
                if not memory.keep:
                    return output
                if last:
                    self._remember(region, step, memory, output)
                elif position not in memory.placeholders:
                    memory.placeholders[position] = placeholder(output)
                return output

            return unit_forward

        patches.wrap_forward(unit, wrapper)

    def _enter(self, region: Region, step: Step, memory: Memory, args: tuple, kwargs: dict) -> None:
        shape = signature(args, kwargs)
        if shape != memory.shape:
            memory.forget()
            memory.placeholders.clear()
            memory.shape = shape
        compute = not memory.values or self._wants_compute(step, memory)
        memory.skipping = not compute
        memory.cached_in_row = 0 if compute else memory.cached_in_row + 1
        memory.keep = self._mask is None or not all(self._mask[step.index + 1 :])
        if compute:
            memory.last_probe = memory.probe
        else:
            self.recorder.skipped()

    def _wants_compute(self, step: Step, memory: Memory) -> bool:
        if self._mask is not None:
            return self._mask[step.index]
        assert memory.probe is not None
        if self.method.guarded(False, step.index, step.run.total, memory.cached_in_row):
            return True
        return memory.last_probe is None or self.method.should_compute(memory.probe, memory.last_probe)

    def _remember(self, region: Region, step: Step, memory: Memory, output: Any) -> None:
        leaves, memory.spec = pytree.tree_flatten(output)
        if region.store == "residual":
            entry = dict(zip(region.takes, memory.entry, strict=True))
            pairs = zip(leaves, region.returns, strict=True)
            leaves = [leaf - entry[stream] if isinstance(leaf, Tensor) else leaf for leaf, stream in pairs]
        else:
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        memory.entry = []
        memory.indices.append(step.index)
        memory.values.append(leaves)
        del memory.indices[: -self.method.order], memory.values[: -self.method.order]

    def _predict(self, region: Region, step: Step, memory: Memory) -> Any:
        factors = self.method.weights(step.run, step.index, memory.indices)
        leaves = [
            combine(factors, column) if isinstance(column[-1], Tensor) else column[-1]
            for column in zip(*memory.values, strict=True)
        ]
        if region.store == "residual":
            entry = dict(zip(region.takes, memory.entry, strict=True))
            pairs = zip(leaves, region.returns, strict=True)
            leaves = [entry[stream] + leaf if isinstance(leaf, Tensor) else leaf for leaf, stream in pairs]
            memory.entry = []
        return pytree.tree_unflatten(leaves, memory.spec)
