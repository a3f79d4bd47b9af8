"""A teacher, and the plans that are fitted to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.caching.methods.joint import Joint
from fastdiff.caching.plan import quantization
from fastdiff.errors import BadConfig
from fastdiff.listening import unheard

from .candidates import Candidate, distance, held_out, moved, student
from .grid import best
from .plan import SolverPlan
from .polish import polished
from .schedulers import ode, solver
from .students import Teacher, Trial

BIASES = (-0.2, -0.1, 0.0)  # powers of 1 + (noise / signal)^2 that a step's cost is counted with


@dataclass(frozen=True)
class Fitting:
    """A teacher, and what is needed to draw by its side."""

    trial: Trial
    teacher: Teacher
    main: Anatomy
    own: Any
    guidance_scale: float | None

    def plan(self, evaluations: int, order: int, moves: int = 2, polish: int = 1) -> SolverPlan:
        """The best plan of so many evaluations on the pictures held out, its levels moved in so many passes, and then
        all of its weights."""
        found = self.fitted(evaluations, order, moves)
        for _ in range(polish):
            found = polished(self.trial, self.teacher, found)
        return self.settled(found, evaluations)

    def fitted(self, evaluations: int, order: int, moves: int) -> Candidate:
        """The best that is fitted, whatever the stock solvers do."""
        fit = ~held_out(self.teacher.states.shape[1])
        found = max(self._fitted(evaluations, order), key=lambda one: one.psnr(fit))
        for stride in [3, *[1] * (moves - 1)] if moves > 1 else [1] * moves:
            found = moved(self.trial, self.teacher, found, stride)
        return found

    def bare(self, places: Sequence[float], leaves_out: Joint) -> SolverPlan:
        """The levels of a plan and what is left out at them, with the scheduler's own weights."""
        count = len(places) - 1
        return SolverPlan(
            denoiser=fingerprint(self.main), scheduler=type(self.own).__name__, evaluations=count, order=1,
            places=tuple(places), weights=((),) * count, leaves_out=leaves_out,
        )  # fmt: skip

    def settled(self, fitted: Candidate, evaluations: int) -> SolverPlan:
        """A plan of it or, if that is nearer to the teacher on the pictures held out, of a stock solver with so many
        evaluations."""
        held, rivals = held_out(self.teacher.states.shape[1]), [*self._stock(evaluations)]
        chosen = max([fitted, *rivals], key=lambda one: one.psnr(held))
        rival = max(rivals, key=lambda one: one.psnr(held), default=None)
        return SolverPlan(
            denoiser=fingerprint(self.main), quantization=quantization(self.main), scheduler=type(self.own).__name__,
            ode=ode(self.own), guidance_scale=self.guidance_scale, shape=self.teacher.shape, use=chosen.use,
            evaluations=len(chosen.weights) or evaluations, order=chosen.order, places=chosen.places,
            weights=chosen.weights, psnr=round(chosen.psnr(held), 2),
            stock=rival.use if rival else "", stock_psnr=round(rival.psnr(held), 2) if rival else None,
        )  # fmt: skip

    def _fitted(self, evaluations: int, order: int) -> Iterator[Candidate]:
        """Each drawn with all pictures: an error early in the run counts for more or less than one at its end."""
        mixed = self.teacher.levels.signal_and_noise(self.teacher.places)
        noise = np.array([n / max(s, 1e-3) for s, n in mixed])
        grids = {tuple(best(self.teacher.costs * (1 + noise**2) ** bias, evaluations)) for bias in BIASES}
        for points in sorted(grids):
            yield student(self.trial, self.teacher, points, order)

    def _stock(self, evaluations: int) -> Iterator[Candidate]:
        """The rivals; one that this pipeline cannot have is none."""
        for name in ("own", "dpm++", "unipc"):
            try:
                scheduler = unheard(self.own) if name == "own" else solver(name, self.own)
                if getattr(scheduler, "order", 1) > 1 or "PNDM" in type(scheduler).__name__:
                    continue  # it calls the model more often
                last = self.trial.stock(scheduler, evaluations)
            except (BadConfig, ValueError):
                continue
            yield Candidate(name, distance(last, self.teacher))
