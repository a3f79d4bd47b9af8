"""`fastdiff calibrate`: find what a cache method wants to know of a model and a solver; write it to a plan file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import waiting
from .calibration import Calibration, calibrating, progress
from .options import Json

if TYPE_CHECKING:
    from fastdiff.caching.plan import Plan
    from fastdiff.config import Layer
    from fastdiff.pipelines.solving.plan import SolverPlan
    from fastdiff.plans import Each


@calibrating
def calibrate(
    asked: Calibration,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write, JSON.")],
    prompts: Annotated[int | None, typer.Option(min=1, help="Images. Default: 8, of a solver 32, of ranks 4.")] = None,
    teacher_steps: Annotated[int, typer.Option(min=10, help="Steps of the solution that a solver is fitted to.")] = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
) -> int:
    """Find what a cache method, a solver or a displaced method wants to know of a model, and write it to a plan file.

    For dp (the default) and cachequant that is which steps to compute, --set cache.computed_steps=K or
    --set cache.interval=N; for magcache and teacache their ratios and coefficients, for a_sdm the sites by time. Use it
    with --set cache.method=dp --set cache.plan=FILE.

    --set solver.evaluations=N, without a cache, fits a solver: where to evaluate the model, and with which weights to
    go on. Use it with --set solver.method=fitted --set solver.plan=FILE.
    --set parallel.sync_kb=KB, with a displaced method and its devices, chooses layers that wait, for parallel.plan.
    """
    from fastdiff import output as files

    files.check([output], overwrite)
    if waiting.asks(asked.layers):
        return waiting.calibrate_waiting(asked, output, prompts or 4, as_json)
    layers = _unplanned(asked.layers)

    from fastdiff.pipelines.calibrate import calibrate as plan_for
    from fastdiff.pipelines.solving.calibrate import calibrate_solver

    pipe, resolved = asked.loaded(layers)
    solved = resolved.cache is None
    texts = asked.texts(pipe, prompts or (32 if solved else 8))
    call = asked.call(pipe, texts) | ({"teacher_steps": teacher_steps} if solved else {})
    with progress() as watch:
        found: Any = (calibrate_solver if solved else plan_for)(pipe, resolved, texts, watch=watch, **call)
    plan: Any = (found.solver if solved else found.cache).plan
    files.write(output, lambda part: part.write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8"))
    _tell(output, plan, as_json)
    return 0


def _unplanned(layers: list[Layer]) -> list[Layer]:
    """On top of the method dp or, where a solver is set but no cache, of fitted; a config may name the plan that is
    still to be made."""
    from fastdiff.config import OFF

    asked = {lever: any(v.get(lever) not in (None, OFF) for _, v in layers) for lever in ("solver", "cache")}
    solver = asked["solver"] and not asked["cache"]
    lever, method = ("solver", "fitted") if solver else ("cache", "dp")
    unplanned = ((origin, waiting.unplanned(values, lever)) for origin, values in layers)
    return [("calibrate", {lever: {"method": method}}), *unplanned]


def _tell(output: Path, plan: Plan | Each[Plan] | SolverPlan, as_json: bool) -> None:
    """One plan's values, or those of each denoiser under its name."""
    import json

    from fastdiff.plans import Each
    from fastdiff.studio.console import say

    if as_json:
        told = {n: _told(own) for n, own in plan.root.items()} if isinstance(plan, Each) else _told(plan)
        print(json.dumps({"file": str(output)} | told))
        return
    print(output)
    say(plan.summary())


def _told(plan: Plan | SolverPlan) -> dict[str, Any]:
    from fastdiff.pipelines.solving.plan import SolverPlan

    if isinstance(plan, SolverPlan):
        return plan.model_dump(mode="json", exclude={"version"})
    told = plan.model_dump(mode="json", exclude={"affine", "weights", "version"})
    own = set(plan.called or range(len(plan.sigmas)))
    steps = {"steps": len(own)} | ({"computed_steps": len(own & set(told["compute"]))} if "compute" in told else {})
    return steps | told
