"""Fit a solver to a model: a teacher, the best levels on its trajectories, and weights step by step on the student's
own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeAlias

import numpy as np
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
from .grid import best
from .levels import Levels, blend
from .lockstep import twin
from .plan import SolverPlan
from .replay import Outputs
from .schedulers import host, ode, solver
from .students import Teacher, Trial, taught

Watch: TypeAlias = Callable[[int, int], None]
_RIDGES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_BIASES = (-0.2, -0.1, 0.0)  # powers of 1 + (noise / signal)^2 that a step's cost is counted with
_GAIN = 0.02  # dB that a move of a level is worth at least
_HELD = 4  # every so many a picture is left out of the fit, to choose by


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


def calibrate_solver(
    pipe: Any, config: Config, prompts: Sequence[str], *, watch: Watch | None = None, **how: Any
) -> Config:
    """The config with a plan in its solver: the best of a fitted one and stock solvers on pictures left out of the fit.

    `how` is what `fitting` takes; `watch` is told how many steps of how many are done. An accelerated pipeline is
    restored first.

    Raises BadConfig for a scheduler that no weights can stand for, and for too few prompts.
    """
    method: Any = config.solver
    if not isinstance(method, Fitted):
        raise BadConfig("a solver is calibrated with --set solver.method=fitted and solver.evaluations=N")
    with fitting(
        pipe, config, prompts, watch=watch, evaluations=method.evaluations, moves=method.moves, **how
    ) as found:
        plan = found.plan(method.evaluations, method.order, method.moves)
    if watch is not None:
        watch(1, 1)
    return config.model_copy(update={"solver": method.model_copy(update={"plan": plan})})


@contextmanager
def fitting(
    pipe: Any, config: Config, prompts: Sequence[str], *, seed: int = 0, batch: int = 4, teacher_steps: int = 100,
    watch: Watch | None = None, evaluations: int = 1, moves: int = 2, **call: Any,
) -> Iterator[Fitting]:  # fmt: skip
    """The teacher's trajectories, from which plans of any number of evaluations can be made.

    Image k is drawn from seed + k, in calls of `batch` with the arguments `call`, with the config's quantization on;
    the teacher takes `teacher_steps`, and plans of `evaluations` are to be made from it, with `moves` passes of moves.
    """
    if evaluations >= teacher_steps:
        raise BadConfig(f"{evaluations} evaluations need a teacher of more steps than {teacher_steps}")
    if call.get("strength", 1) < 1:
        raise BadConfig("a solver is fitted on whole runs; leave out strength")
    if len(prompts) < 2 * _HELD:
        raise BadConfig(
            f"{len(prompts)} prompts: a solver is fitted on {2 * _HELD} or more, of which one in {_HELD} is held out"
        )
    restore(pipe)
    own, found = pipe.scheduler, anatomies(pipe)
    draws = len(_BIASES) + (moves * 2 * (evaluations - 1) if evaluations > 1 else 0)
    work = (teacher_steps + draws * evaluations) * -(-len(prompts) // batch)
    calls = partial(_calls, prompts, seed, batch, call)
    stock = host(own)
    if not stock.config.get("use_dynamic_shifting"):
        stock.set_timesteps(teacher_steps)  # which says where it ends
    trial = Trial(twin(pipe, own), stock, calls, [one.denoiser for one in found], _ticks(watch, work))
    quantized = nullcontext() if config.quant is None else accelerate(pipe, Config(quant=config.quant))
    with quantized, taught(trial, blend(Levels.of(stock), teacher_steps), len(prompts)) as teacher:
        yield Fitting(trial, teacher, found[0], own, call.get("guidance_scale"))


@dataclass(frozen=True)
class Fitting:
    """A teacher, and what is needed to draw by its side."""

    trial: Trial
    teacher: Teacher
    main: Anatomy
    own: Any
    guidance_scale: float | None

    def plan(self, evaluations: int, order: int, moves: int = 2) -> SolverPlan:
        """The best plan of so many evaluations on the pictures held out, its levels moved in so many passes."""
        held, rivals = held_out(self.teacher.states.shape[1]), [*self._stock(evaluations)]
        fitted = max(self._fitted(evaluations, order), key=lambda one: one.psnr(~held))
        for stride in [3, *[1] * (moves - 1)] if moves > 1 else [1] * moves:
            fitted = moved(self.trial, self.teacher, fitted, stride)
        chosen = max([fitted, *rivals], key=lambda one: one.psnr(held))
        rival = max(rivals, key=lambda one: one.psnr(held), default=None)
        return SolverPlan(
            denoiser=fingerprint(self.main), quantization=quantization(self.main), scheduler=type(self.own).__name__,
            ode=ode(self.own),
            guidance_scale=self.guidance_scale, shape=self.teacher.shape, use=chosen.use, evaluations=evaluations,
            order=chosen.order, places=chosen.places, weights=chosen.weights, psnr=round(chosen.psnr(held), 2),
            stock=rival.use if rival else "", stock_psnr=round(rival.psnr(held), 2) if rival else None,
        )  # fmt: skip

    def _fitted(self, evaluations: int, order: int) -> Iterator[Candidate]:
        """Each drawn with all pictures: an error early in the run counts for more or less than one at its end."""
        mixed = self.teacher.levels.signal_and_noise(self.teacher.places)
        noise = np.array([n / max(s, 1e-3) for s, n in mixed])
        grids = {tuple(best(self.teacher.costs * (1 + noise**2) ** bias, evaluations)) for bias in _BIASES}
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
            yield Candidate(name, _distance(last, self.teacher))


def held_out(count: int) -> Tensor:
    """Which of so many pictures nothing is fitted on."""
    return torch.arange(count) % _HELD == _HELD - 1


def _distance(last: Tensor, teacher: Teacher) -> Tensor:
    return (last.flatten(1).float().cpu() - teacher.states[-1]).square().mean(1)


def _ticks(watch: Watch | None, work: int) -> Callable[[], None]:
    done = count(1)
    return lambda: watch(min(next(done), work), work) if watch is not None else None


def _calls(prompts: Sequence[str], seed: int, batch: int, call: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for start in range(0, len(prompts), batch):
        texts = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(texts))]
        found.append({**call, "prompt": texts, "generator": generators})
    return found


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
        weights = fitted(found.at(~held), found.at(held), usual, _RIDGES)
        kept.append(tuple(weights.tolist()) if weights.any() else ())
        return [onward(steps, kept[-1], order) for steps in seen]

    last, outputs = trial.students(places, order, settle, before.outputs if before else None, until)
    return Candidate("fitted", _distance(last, teacher), tuple(points), tuple(places), tuple(kept), order, outputs)


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
