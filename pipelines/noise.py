"""How much of what a cache forecasts is noise of quantization, for the report of a run with both.

Extrapolating amplifies the noise of 8-bit activations (NVIDIA's cosmos-framework #247 turns caching off for it); what
weights alone err by changes as smoothly over the steps as the output does, and cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.affine import wide
from fastdiff.caching.session import Session
from fastdiff.clock import Run, Step
from fastdiff.patch import PatchSet
from fastdiff.quant.calls import copied, first, swapped
from fastdiff.quant.layer import QLayer

LIMIT = 0.3  # share from which on the report warns


class Noise:
    """Watches a cached denoiser with quantized layers; attach it after the session, to what is called in its place.

    A forecast sum_j w_j y_j of computed outputs, each with noise of energy v |y_j|^2 of its own, has sum_j w_j^2 times
    that of one: its `amplification`, 1 for reuse. In what it changes the last output y_a by, noise has the energy
    v |y_a|^2 sum_j (w_j - [j = a])^2; the root of that over the true change, which is taken to go on as between the
    last two computed outputs, is a forecast's share of noise, and `share` the median of a run.
    v = |d_a - d_b|^2 / (|y_a|^2 + |y_b|^2), the d being what two computed outputs differ by from those of the float
    layers: where weights add up to 1, what both err alike by cancels. It is measured once, by two calls of the float
    layers behind the middle of a run; where they are not at hand, there is no share.
    """

    def __init__(self, session: Session, patches: PatchSet) -> None:
        self.session, self.denoiser = session, session.anatomy.denoiser
        self.energy: float | None = None  # v
        self._begin()
        patches.wrap_forward(self.denoiser, self._watched)
        session.clock.on_start.append(self._begin)
        session.clock.on_end.append(self._end)

    def _begin(self, _: Run | None = None) -> None:
        self._last: dict[int, tuple[int, Tensor]] = {}  # computed outputs by branch, and their steps
        self._pace: dict[int, Tensor] = {}  # energy by which outputs change in a step
        self._errors: list[tuple[Tensor, Tensor]] = []  # of computed outputs, beside them
        self._gains: list[float] = []
        self._parts: list[Tensor] = []  # noise in each change by the change, if v were 1

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        clock, recorder = self.session.clock, self.session.recorder

        @wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            step = clock.now
            given = copied((args, kwargs)) if step is not None and self._wanted(step) else None
            output = forward(*args, **kwargs)
            if step is not None and recorder.skipping:
                self._forecast(step, recorder.forecasts)
            elif step is not None:
                self._computed(step, first(output).detach().clone())
                if given is not None and (floats := floats_of(self.denoiser)):
                    clock.now = None  # to the cache this is no call of the run
                    with swapped(self.denoiser, floats):
                        exact = first(forward(*given[0], **given[1])).detach()
                    clock.now = step
                    self._measure(exact, self._last[step.branch][1])
            return output

        return watched

    def _wanted(self, step: Step) -> bool:
        late = step.branch == 0 and step.index >= step.run.total // 2
        return late and self.energy is None and any(gain != 1.0 for gain in self._gains)

    def _computed(self, step: Step, output: Tensor) -> None:
        at, last = self._last.get(step.branch, (step.index, output))
        self._pace.pop(step.branch, None)
        if at < step.index and last.shape == output.shape:
            self._pace[step.branch] = energy(output - last) / (step.index - at) ** 2
        self._last[step.branch] = step.index, output

    def _measure(self, exact: Tensor, output: Tensor) -> None:
        self._errors.append((output - exact, output))
        if len(self._errors) == 2:
            (one, y), (other, z) = self._errors
            self.energy = float(energy(one - other) / (energy(y) + energy(z)))

    def _forecast(self, step: Step, made: Sequence[Sequence[float]]) -> None:
        if made and step.branch in self._pace:
            self._gains.append(fmean(sum(w * w for w in factors) for factors in made))
            moved = fmean(sum(w * w for w in factors[:-1]) + (factors[-1] - 1) ** 2 for factors in made)
            at, last = self._last[step.branch]
            change = self._pace[step.branch] * (step.index - at) ** 2
            self._parts.append(moved * energy(last) / change.clamp_min(1e-300))

    def _end(self, _: Run) -> None:
        if not self._gains:
            return
        recorder, part = self.session.recorder, float(torch.stack(self._parts).median())
        recorder.report.noise["amplification"] = fmean(self._gains)
        if self.energy is not None or not part:
            share = recorder.report.noise["share"] = (part * (self.energy or 0.0)) ** 0.5
            if share > LIMIT:
                recorder.note(
                    f"noise of quantization is {share:.0%} of what the cache's forecasts are to change the output by: "
                    "a lower cache.order, cache.damping or reuse amplify it less"
                )


def watch_noise(session: Session, patches: PatchSet, cached: bool) -> None:
    """Attach it to a denoiser that has quantized layers, if its outputs are `cached` and nothing else is in between."""
    quantized = any(isinstance(part, QLayer) for part in session.anatomy.denoiser.modules())
    if cached and quantized and not session.method.language:
        Noise(session, patches)


def energy(value: Tensor) -> Tensor:
    return wide(value).square().sum()


def floats_of(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Float layers that come back with restore(), by the places of quantized ones; none where some are elsewhere."""
    found = {path: part for path, part in denoiser.named_modules(remove_duplicate=False) if isinstance(part, QLayer)}
    here = all(one.floats and next(one.floats[0].parameters()).device == one.q.device for one in found.values())
    return {path: one.floats[0] for path, one in found.items()} if here else {}
