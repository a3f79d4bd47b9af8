"""Plans under a budget of time: how many evaluations there are, where, and which of them leave something out."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastdiff.caching.methods.joint import Joint, Kind
from fastdiff.config import Config
from fastdiff.errors import FastdiffError
from fastdiff.pipelines.accelerate import accelerate

from .candidates import RIDGES, Candidate, held_out, student
from .fit import Products, fitted
from .fitting import Fitting
from .plan import SolverPlan
from .replay import Outputs
from .students import Calls, Trial

Saved: TypeAlias = tuple[Candidate, tuple[Kind, ...], float]  # a plan, what each evaluation is, and their time
_TIMED = 6  # evaluations of each kind that its time is the median of
_LEAST = 0.3  # dB that a whole evaluation is taken to be worth at least, where two plans do not show it


def budgeted(found: Fitting, budget: float, order: int, moves: int, site: Joint) -> SolverPlan:
    """The plan whose evaluations together take no longer than so many whole ones, nearest to the teacher on the
    pictures held out; `site` says what a partial evaluation leaves out.

    Of one evaluation more than the budget has, and of two more, some are made conditional or partial, from the end of
    the run on, where that costs less of the distance than it saves of the time, by what one evaluation more gains.
    """
    whole = math.floor(budget)
    costs = measured(found, site)
    fit = ~held_out(found.teacher.states.shape[1])
    best = found.fitted(whole, order, moves)
    before, kinds = best, tuple(["full"] * whole)
    chosen: Saved = best, kinds, float(whole)  # type: ignore[assignment]
    for evaluations in (whole + 1, whole + 2):
        full = found.fitted(evaluations, order, moves)
        worth = max(full.psnr(fit) - before.psnr(fit), _LEAST)
        candidate = _saving(found, full, costs, budget, worth, site)
        if candidate is not None and candidate[0].psnr(fit) > chosen[0].psnr(fit):
            chosen = candidate
        before = full
    best, kinds, spent = chosen
    plan = found.settled(best, whole)
    if plan.use != "fitted":
        return plan
    left = None if set(kinds) == {"full"} else _with(site, kinds, best.outputs)
    return plan.model_copy(update={"evaluations": len(kinds), "leaves_out": left, "cost": round(spent, 3)})


def _saving(
    found: Fitting, full: Candidate, costs: dict[Kind, float], budget: float, worth: float, site: Joint
) -> Saved | None:
    """A whole plan with evaluations made cheaper until it is within the budget; None where that is not worth it."""
    fit = ~held_out(found.teacher.states.shape[1])
    kinds: list[Kind] = ["full"] * len(full.points[:-1])
    best, spent = full, float(len(kinds))
    for index in range(len(kinds) - 1, 0, -1):
        if spent <= budget:
            break
        tries = []
        for kind, cost in costs.items():
            asked = _with(site, [*kinds[:index], kind, *kinds[index + 1 :]], full.outputs)
            drawn = together(found, full, asked)
            tries.append((best.psnr(fit) - drawn.psnr(fit) - worth * (1 - cost), drawn, kind, cost))
        loss, drawn, kind, cost = min(tries, key=lambda one: one[0])
        if loss < 0:
            kinds[index], best, spent = kind, drawn, spent - (1 - cost)
    return (replace(best, outputs=full.outputs), tuple(kinds), spent) if spent <= budget else None


def _with(site: Joint, kinds: Sequence[Kind], outputs: Outputs) -> Joint:
    guesses = {
        n: guess for n, kind in enumerate(kinds) if kind == "conditional" and (guess := _guess(outputs, kinds, n))
    }
    return site.model_copy(update={"kinds": tuple(kinds), "guesses": guesses})


def _guess(outputs: Outputs, kinds: Sequence[Kind], index: int) -> tuple[float, ...]:
    """Weights that make the guidance difference of a step of those of the last two full ones and of what the
    conditional output changed by, by least squares on a draw of full steps; none where that is no batch of halves."""
    known = [n for n in range(index) if kinds[n] == "full"][-2:]
    halves = [pair for n in (*known, index) if (pair := _halves(outputs, n)) is not None]
    if len(halves) < 3:
        return ()
    (_, older), (last, old), (conditional, difference) = halves
    found = Products.of([old, older, conditional - last], difference)
    held = held_out(len(difference))
    first = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    return tuple(fitted(found.at(~held), found.at(held), first, RIDGES).tolist())


def _halves(outputs: Outputs, step: int) -> tuple[Tensor, Tensor] | None:
    """The conditional output of all pictures, and the unconditional one minus it."""
    made = [output for (_, at, _), output in sorted(outputs.items(), key=lambda one: one[0]) if at == step]
    leaves = [output[0] if isinstance(output, tuple) else next(iter(output.values())) for output in made]
    if any(len(leaf) % 2 for leaf in leaves):
        return None
    pairs = [leaf.chunk(2) for leaf in leaves]
    cond = torch.cat([pair[1] for pair in pairs])
    return cond, torch.cat([pair[0] for pair in pairs]) - cond


def together(found: Fitting, full: Candidate, kinds: Joint) -> Candidate:
    """A plan's pictures drawn by the very levers that will run it, all in one call, and its weights fitted anew."""
    places = tuple(found.teacher.places[point] for point in full.points)
    bare = found.bare(places, kinds)
    trial = replace(
        found.trial, scheduler=found.own, calls=partial(_joined, found.trial), dress=partial(_dressed, plan=bare)
    )
    return student(trial, found.teacher, full.points, full.order)


def _joined(trial: Trial) -> Calls:
    """All calls as one, since what a denoiser remembers is of one run at a time."""
    calls = trial.calls()
    prompts = [text for call in calls for text in call["prompt"]]
    generators = [generator for call in calls for generator in call["generator"]]
    return [{**calls[0], "prompt": prompts, "generator": generators}]


def _dressed(pipe: Any, plan: SolverPlan) -> Any:
    return accelerate(pipe, Config(solver={"method": "fitted", "plan": plan}))


def measured(found: Fitting, site: Joint) -> dict[Kind, float]:
    """What an evaluation of each kind takes of the time of a full one, of one picture, here and now; without those that
    this pipeline cannot have, or that save nothing."""
    costs: dict[Kind, float] = {}
    kinds: tuple[Kind, ...] = ("partial", "conditional")
    for kind in kinds:
        try:
            full, other = _seconds(found, site, kind)
        except FastdiffError:
            continue
        if other < 0.95 * full:
            costs[kind] = other / full
    return costs


def _seconds(found: Fitting, site: Joint, kind: Kind) -> tuple[float, float]:
    kinds: list[Kind] = ["full", "full", *(["full", kind] * _TIMED)]
    places = tuple(torch.linspace(0, 1, len(kinds) + 1, dtype=torch.float64).tolist())
    bare = found.bare(places, site.model_copy(update={"kinds": tuple(kinds)}))
    call = found.trial.calls()[0]
    one = {**call, "prompt": call["prompt"][:1], "generator": call["generator"][:1]}
    trial = replace(found.trial, scheduler=found.own, calls=lambda: [one], dress=partial(_dressed, plan=bare))
    seconds = [*_ticks(trial, places)]
    return statistics.median(seconds[2::2]), statistics.median(seconds[3::2])


def _ticks(trial: Trial, places: Sequence[float]) -> Iterator[float]:
    """Seconds of each step of a draw; a value that is read at its end waits for the device."""
    began = time.perf_counter()
    found: list[float] = []

    def settle(_: int, seen: list[list[Any]]) -> list[Tensor]:
        nonlocal began
        state = seen[0][-1].plain
        float(state.flatten()[0])
        found.append(time.perf_counter() - began)
        began = time.perf_counter()
        return [state]

    trial.students(places, 1, settle)
    yield from found
