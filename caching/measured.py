"""What leaving out a group of steps does to the finished latents, measured by a run for each: LeMiCa's error graph.

LeMiCa: Lexicographic Minimax Path Caching, https://arxiv.org/abs/2511.00090.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run, StepClock
from fastdiff.errors import BadConfig
from fastdiff.recorder import Recorder

from .plan import Schedule
from .planned import Scheduled
from .protocols import Calibrator, Install
from .session import Session

Edges = dict[tuple[int, int], float]


class Finals:
    """The finished latents of each complete run of a pass in which the denoiser was called."""

    def __init__(self, clock: StepClock, counts: Callable[[Run], bool]) -> None:
        self._clock, self._counts = clock, counts
        self.found: list[Tensor] = []
        clock.on_end.append(self._end)

    def _end(self, run: Run) -> None:
        if self._clock.index >= run.total and self._counts(run):
            solved = self._clock.solved
            latents: Tensor = solved[0] if isinstance(solved, tuple) else solved.prev_sample
            self.found.append(latents.detach().clone())


def group_errors(
    method: Scheduled, calibrator: Calibrator, plain: Sequence[Tensor], longest: int
) -> Generator[Install, None, Edges]:
    """For each computed step and the next: mean |x - x'| of the finished latents of a run that leaves out what lies
    between the two and nothing else; `plain` are those of the runs that leave out nothing. A pass for each, so about
    `longest` times as many as a run has steps; at most `longest` steps are left out, and none that guards compute.
    Raises BadConfig where several denoisers share the run.
    """
    run, edges = calibrator.run, Edges()
    if len(calibrator.parts(run)) > 1:
        raise BadConfig(
            'objective = "lemica" is for one denoiser, and here several share a run; set objective = "minimax"'
        )
    total, origin, forced = run.total, calibrator.origin(run), method.forced(run, range(run.total))
    pairs = [
        (step, end)
        for step in range(total)
        for end in range(step + 2, min(step + longest + 1, total) + 1)
        if not any(step < must < end for must in forced)
    ]
    for step, end in pairs:
        kept = tuple(k for k in range(total) if not step < k < end)
        plan = Schedule(**origin, compute=kept)
        own = method.model_copy(update={"plan": plan, "guard": "none"})
        finals: list[Finals] = []
        yield partial(_install, own, calibrator, finals)
        apart = [(x - y).abs().mean() for x, y in zip(finals[0].found, plain, strict=True)]
        edges[step, end] = float(torch.stack(apart).mean())
    return edges


def _install(
    method: Scheduled, calibrator: Calibrator, finals: list[Finals], anatomy: Anatomy, clock: StepClock,
    recorder: Recorder,
) -> Session:  # fmt: skip
    finals.append(Finals(clock, calibrator.heard))
    return Session(method, anatomy, clock, recorder)
