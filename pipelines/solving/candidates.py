"""What may become a plan: pictures drawn on some of the teacher's points, each step's weights fitted on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import theory
from .combine import At, counts, onward, parts
from .fit import Products, fitted
from .levels import Levels
from .replay import Outputs
from .students import Teacher, Trial

RIDGES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HELD = 4  # every so many a picture is left out of the fit, to choose by
_GAIN = 0.02  # dB that a move of a level is worth at least


@dataclass(frozen=True)
class Candidate:
    """What may become the plan: a solver and, if it is fitted, its levels and weights, with the mean square distance
    of each picture's last latents to the teacher's."""

    use: Any
    error: Tensor
    points: tuple[int, ...] = ()
    places: tuple[float, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    order: int = 1
    outputs: Outputs = field(default_factory=dict, repr=False, compare=False)  # what the model gave while it was drawn

    def psnr(self, pictures: Tensor) -> float:
        """Mean over some pictures, dB, peak 1."""
        return -10 * float(self.error[pictures].clamp_min(1e-30).log10().mean())


def held_out(count: int) -> Tensor:
    """Which of so many pictures nothing is fitted on."""
    return torch.arange(count) % HELD == HELD - 1


def distance(last: Tensor, teacher: Teacher) -> Tensor:
    return (last.flatten(1).float().cpu() - teacher.states[-1]).square().mean(1)


def student(
    trial: Trial, teacher: Teacher, points: Sequence[int], order: int, before: Candidate | None = None, until: int = 0
) -> Candidate:
    """Draw all pictures on some of the teacher's points, each step's weights fitted to its states. The model's outputs
    of the steps before `until` are those of `before`, which has the same points up to there."""
    places = [teacher.places[point] for point in points]
    held = held_out(teacher.states.shape[1])
    kept: list[tuple[float, ...]] = []

    def settle(index: int, seen: list[list[At]]) -> list[Tensor]:
        goals = teacher.goal(points[index + 1], [steps[-1].x for steps in seen])
        found = Products.cat(
            [Products.of(parts(steps, order), goal - steps[-1].plain) for steps, goal in zip(seen, goals, strict=True)]
        )
        usual = prior(teacher.levels, places, index, order)
        weights = fitted(found.at(~held), found.at(held), usual, RIDGES)
        kept.append(tuple(weights.tolist()) if weights.any() else ())
        return [onward(steps, kept[-1], order) for steps in seen]

    last, outputs = trial.students(places, order, settle, before.outputs if before else None, until)
    return Candidate("fitted", distance(last, teacher), tuple(points), tuple(places), tuple(kept), order, outputs)


def moved(trial: Trial, teacher: Teacher, best: Candidate, stride: int) -> Candidate:
    """Shift one level after the other by so many of the teacher's points, as long as that takes the pictures that are
    fitted on nearer to the teacher's end; what the dynamic program cannot see is what an early error does to later
    outputs. (BudCache moves a cache's steps so.)"""
    fit = ~held_out(teacher.states.shape[1])
    for place in range(1, len(best.points) - 1):
        for way in (stride, -stride):
            while True:
                points = [*best.points]
                points[place] += way
                if not points[place - 1] < points[place] < points[place + 1]:
                    break
                found = student(trial, teacher, points, best.order, best, place)
                if found.psnr(fit) <= best.psnr(fit) + _GAIN:
                    break
                best = found
    return best


def prior(levels: Levels, places: Sequence[float], index: int, order: int) -> Tensor:
    """What theory adds to the host's step: nothing to DPM++(2M), its second order to Euler's."""
    outputs, latents = counts(index, order)
    weights = torch.zeros(outputs + latents, dtype=torch.float64)
    if levels.flow:
        sigmas = levels.sigmas(places).tolist()
        used = min(2, latents)
        wanted = theory.flow_step(sigmas[index::-1][:used], sigmas[index + 1])
        weights[:used], weights[outputs : outputs + used] = wanted[:used], wanted[used:]
        weights[0] -= sigmas[index + 1] - sigmas[index]
        weights[outputs] -= 1
    return weights
