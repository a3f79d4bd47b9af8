"""Fit a solver to a model: a teacher, the best levels on its trajectories, and weights step by step on the student's
own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any, TypeAlias

from fastdiff.anatomy import Anatomy
from fastdiff.caching.methods.joint import Joint, Kind
from fastdiff.config import Config
from fastdiff.errors import BadConfig
from fastdiff.pipelines.accelerate import accelerate, restore
from fastdiff.pipelines.conditions import calls_of
from fastdiff.pipelines.families import anatomies

from .candidates import HELD
from .fitted import Fitted
from .fitting import BIASES, Fitting
from .joint import budgeted
from .levels import Levels, blend
from .lockstep import twin
from .polish import draws
from .schedulers import host
from .students import Trial, taught

Watch: TypeAlias = Callable[[int, int], None]


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
    budget = method.budget
    passes = {"moves": method.moves, "polish": method.polish if budget is None else 0}
    if budget is not None and config.quant is not None:
        raise BadConfig(
            "a plan with a budget is fitted on plain weights; leave out quant here (the plan may be used with it), or "
            "leave out solver.budget"
        )
    most = method.evaluations if budget is None else math.ceil(budget) + 2
    with fitting(pipe, config, prompts, watch=watch, evaluations=most, order=method.order, **passes, **how) as found:
        if budget is None:
            plan = found.plan(most, method.order, **passes)
        else:
            plan = budgeted(found, budget, method.order, method.moves, _inside(found.main, method.depth))
    if watch is not None:
        watch(1, 1)
    return config.model_copy(update={"solver": method.model_copy(update={"plan": plan})})


@contextmanager
def fitting(
    pipe: Any, config: Config, prompts: Sequence[str], *, seed: int = 0, batch: int = 4, teacher_steps: int = 100,
    watch: Watch | None = None, evaluations: int = 1, order: int = 1, moves: int = 2, polish: int = 0, **call: Any,
) -> Iterator[Fitting]:  # fmt: skip
    """The teacher's trajectories, from which plans of any number of evaluations can be made.

    Image k is drawn from seed + k, in calls of `batch` with the arguments `call`, with the config's quantization on;
    the teacher takes `teacher_steps`, and plans of `evaluations` are to be made from it, with `moves` passes of moving
    levels and `polish` of moving weights.
    """
    if evaluations >= teacher_steps:
        raise BadConfig(f"{evaluations} evaluations need a teacher of more steps than {teacher_steps}")
    if call.get("strength", 1) < 1:
        raise BadConfig("a solver is fitted on whole runs; leave out strength")
    if len(prompts) < 2 * HELD:
        raise BadConfig(
            f"{len(prompts)} prompts: a solver is fitted on {2 * HELD} or more, of which one in {HELD} is held out"
        )
    restore(pipe)
    own, found = pipe.scheduler, anatomies(pipe)
    drawn = len(BIASES) + moves * 2 * (evaluations - 1) + polish * draws(evaluations, order)
    work = (teacher_steps + drawn * evaluations) * -(-len(prompts) // batch)
    calls = partial(calls_of, prompts, seed, batch, call)
    stock = host(own)
    if not stock.config.get("use_dynamic_shifting"):
        stock.set_timesteps(teacher_steps)  # which says where it ends
    trial = Trial(twin(pipe, own), stock, calls, [one.denoiser for one in found], _ticks(watch, work))
    quantized = nullcontext() if config.quant is None else accelerate(pipe, Config(quant=config.quant))
    with quantized, taught(trial, blend(Levels.of(stock), teacher_steps), len(prompts)) as teacher:
        yield Fitting(trial, teacher, found[0], own, call.get("guidance_scale"))


def _ticks(watch: Watch | None, work: int) -> Callable[[], None]:
    done = count(1)
    return lambda: watch(min(next(done), work), work) if watch is not None else None


def _inside(anatomy: Anatomy, depth: float) -> Joint:
    """What a partial evaluation leaves out: what is deeper than this share of the skip connections or blocks."""
    kinds: tuple[Kind, ...] = ("full",)
    if anatomy.family.kind == "unet" and not anatomy.opaque:
        denoiser: Any = anatomy.denoiser
        skips = sum(len(block.resnets) for block in denoiser.up_blocks)
        return Joint(kinds=kinds, branch=min(round(depth * (skips - 1)), max(skips - 2, 0)))
    return Joint(kinds=kinds, live_blocks=min(round(depth * len(anatomy.blocks)), max(len(anatomy.blocks) - 1, 0)))
