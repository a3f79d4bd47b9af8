"""`fastdiff calibrate`: find what a cache method wants to know of a model and a solver; write it to a plan file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .calibration import Calibration, calibrating, progress
from .options import Json

if TYPE_CHECKING:
    from fastdiff.caching.plan import Plan
    from fastdiff.config import Layer
    from fastdiff.plans import Each


@calibrating
def calibrate(
    asked: Calibration,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write, JSON.")],
    prompts: Annotated[int, typer.Option(min=1, help="Images to calibrate on.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Find what a cache method wants to know of a model, and write it to a plan file.

    For dp (the default) and cachequant that is which steps to compute, --set cache.computed_steps=K or
    --set cache.interval=N; for magcache and teacache their ratios and coefficients, for a_sdm the sites by time. Use it
    with --set cache.method=dp --set cache.plan=FILE.
    """
    layers = _unplanned(asked.layers)

    from fastdiff import output as files
    from fastdiff.pipelines.calibrate import calibrate as plan_for

    files.check([output], overwrite)
    pipe, resolved = asked.loaded(layers)
    call = asked.call(pipe)
    texts = asked.texts(pipe, prompts)
    with progress() as watch:
        found = plan_for(pipe, resolved, texts, watch=watch, **call)
    plan: Plan | Each[Plan] = found.cache.plan  # type: ignore[union-attr]
    files.write(output, lambda part: part.write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8"))
    _tell(output, plan, as_json)


def _unplanned(layers: list[Layer]) -> list[Layer]:
    """On top of the method dp; a config may name the plan that is still to be made."""
    kept: list[Layer] = [("calibrate", {"cache": {"method": "dp"}})]
    for origin, values in layers:
        cache = values.get("cache")
        if isinstance(cache, dict):
            values = {**values, "cache": {key: value for key, value in cache.items() if key != "plan"}}
        kept.append((origin, values))
    return kept


def _tell(output: Path, plan: Plan | Each[Plan], as_json: bool) -> None:
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


def _told(plan: Plan) -> dict[str, Any]:
    told = plan.model_dump(mode="json", exclude={"affine", "weights", "version"})
    own = set(plan.called or range(len(plan.sigmas)))
    steps = {"steps": len(own)} | ({"computed_steps": len(own & set(told["compute"]))} if "compute" in told else {})
    return steps | told
