"""Fit a solver to a model: a teacher, the best levels on its trajectories, and weights step by step on the student's
own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.caching.plan import quantization
from fastdiff.config import Config
from fastdiff.errors import BadConfig
from fastdiff.listening import unheard
from fastdiff.pipelines.accelerate import accelerate, restore
from fastdiff.pipelines.families import anatomies

from . import theory
from .combine import At, counts, onward, parts
from .fit import Products, fitted
from .fitted import Fitted
from .grid import best, costs
from .levels import Levels, power
from .lockstep import twin
from .plan import SolverPlan
from .schedulers import host, solver
from .students import Teacher, Trial, taught

_FINER = 1.2  # the teacher's levels lie a little closer at the noise
_RIDGES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_HELD = 4  # every so many a picture is left out of the fit, to choose by


@dataclass(frozen=True)
class Candidate:
    """What may become the plan: a solver and, if it is fitted, its levels and weights, with the mean square distance
    of each picture's last latents to the teacher's."""

    use: Any
    error: Tensor
    places: tuple[float, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    order: int = 3

    def psnr(self, pictures: Tensor) -> float:
        """Mean over some pictures, dB, peak 1."""
        return -10 * float(self.error[pictures].clamp_min(1e-30).log10().mean())


def calibrate_solver(
    pipe: Any, config: Config, prompts: Sequence[str], *, seed: int = 0, batch: int = 4, teacher_steps: int = 100,
    watch: Callable[[int, int], None] | None = None, **call: Any,
) -> Config:  # fmt: skip
    """The config with a plan in its solver: the best of a fitted one and stock solvers on pictures left out of the fit.

    Image k is drawn from seed + k, in calls of `batch` with the arguments `call`, with the config's quantization on;
    the teacher takes `teacher_steps`; `watch` is told how many steps of how many are done. An accelerated pipeline is
    restored first.

    Raises BadConfig for a scheduler that no weights can stand for, and for too few prompts.
    """
    method: Any = config.solver
    if not isinstance(method, Fitted):
        raise BadConfig("a solver is calibrated with --set solver.method=fitted and solver.evaluations=N")
    if len(prompts) < 2 * _HELD:
        raise BadConfig(
            f"{len(prompts)} prompts: a solver is fitted on {2 * _HELD} or more, of which a part is held out"
        )
    restore(pipe)
    [main, *_] = anatomies(pipe)
    plain, own = twin(pipe, pipe.scheduler), pipe.scheduler
    work = (teacher_steps + method.evaluations) * -(-len(prompts) // batch)
    trial = Trial(plain, host(own), lambda: _calls(prompts, seed, batch, call), _ticks(watch, work))
    fine = power(teacher_steps, _FINER)
    with accelerate(pipe, Config(quant=config.quant)), taught(trial, fine, len(prompts)) as teacher:
        found = [*_fitted(trial, teacher, method), *_stock(trial, teacher, own, method.evaluations)]
        plan = _plan(found, teacher, main, own, method.evaluations, call.get("guidance_scale"))
    return config.model_copy(update={"solver": method.model_copy(update={"plan": plan})})


def held_out(count: int) -> Tensor:
    """Which of so many pictures nothing is fitted on."""
    return torch.arange(count) % _HELD == _HELD - 1


def _fitted(trial: Trial, teacher: Teacher, method: Fitted) -> Iterator[Candidate]:
    points = best(costs(teacher.gram), method.evaluations)
    yield student(trial, teacher, points, method.order)


def _stock(trial: Trial, teacher: Teacher, own: Any, evaluations: int) -> Iterator[Candidate]:
    """The rivals; one that this pipeline cannot have is none."""
    for name in ("own", "dpm++", "unipc"):
        try:
            scheduler = unheard(own) if name == "own" else solver(name, own)
            last = trial.stock(scheduler, evaluations)
        except (BadConfig, ValueError):
            continue
        yield Candidate(name, _distance(last, teacher))


def _distance(last: Tensor, teacher: Teacher) -> Tensor:
    return (last.flatten(1).float().cpu() - teacher.states[-1]).square().mean(1)


def _plan(
    found: Sequence[Candidate], teacher: Teacher, main: Anatomy, own: Any, evaluations: int, guidance: Any
) -> SolverPlan:
    held = held_out(teacher.states.shape[1])
    chosen = max(found, key=lambda one: one.psnr(held))
    rival = max((one for one in found if one.use != "fitted"), key=lambda one: one.psnr(held), default=None)
    return SolverPlan(
        denoiser=fingerprint(main), quantization=quantization(main), scheduler=type(own).__name__, shape=teacher.shape,
        guidance_scale=None if guidance is None else float(guidance), use=chosen.use, order=chosen.order,
        evaluations=evaluations, places=chosen.places, weights=chosen.weights, psnr=round(chosen.psnr(held), 2),
        stock=rival.use if rival else "", stock_psnr=round(rival.psnr(held), 2) if rival else None,
    )  # fmt: skip


def _ticks(watch: Callable[[int, int], None] | None, work: int) -> Callable[[], None]:
    done = count(1)
    return lambda: watch(min(next(done), work), work) if watch is not None else None


def _calls(prompts: Sequence[str], seed: int, batch: int, call: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for start in range(0, len(prompts), batch):
        texts = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(texts))]
        found.append({**call, "prompt": texts, "generator": generators})
    return found


def student(trial: Trial, teacher: Teacher, points: Sequence[int], order: int) -> Candidate:
    """Draw all pictures on some of the teacher's points, each step's weights fitted to its states."""
    places = [teacher.places[point] for point in points]
    held = held_out(teacher.states.shape[1])
    kept: list[tuple[float, ...]] = []

    def settle(index: int, seen: list[list[At]]) -> list[Tensor]:
        goals = teacher.goal(points[index + 1], [steps[-1].x for steps in seen])
        found = Products.cat(
            [Products.of(parts(steps, order), goal - steps[-1].plain) for steps, goal in zip(seen, goals, strict=True)]
        )
        usual = prior(teacher.levels, places, index, order)
        weights = fitted(found.at(~held), found.at(held), usual, _RIDGES)
        kept.append(tuple(weights.tolist()) if weights.any() else ())
        return [onward(steps, kept[-1], order) for steps in seen]

    last = trial.students(places, order, settle)
    return Candidate("fitted", _distance(last, teacher), tuple(places), tuple(kept), order)


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
