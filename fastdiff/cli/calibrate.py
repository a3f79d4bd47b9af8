"""`fastdiff calibrate`: find what a cache method wants to know of a model and a solver; write it to a plan file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import ConfigFile, Preset, Sets

if TYPE_CHECKING:
    from fastdiff.caching.plan import Plan
    from fastdiff.config import Config, Layer


ModelName = Annotated[str, typer.Option("--model", "-m", help="Embedded model, directory or hub id.")]
PromptLines = Annotated[Path | None, typer.Option(help="One prompt a line, instead of the built-in ones.")]
StepCount = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's own.")]
GuidanceScale = Annotated[float | None, typer.Option(min=0, help="Default: the pipeline's own.")]
SchedulerName = Annotated[
    str | None, typer.Option(help="ddim, dpm++, unipc, euler or flowmatch. Default: the model's own.")
]
FirstSeed = Annotated[int, typer.Option(min=0, help="Image k has seed + k.")]
PerCall = Annotated[int, typer.Option(min=1, help="Images a call.")]


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write, JSON.")],
    model: ModelName = "shapes-unet",
    preset: Preset = None,
    config: ConfigFile = None,
    sets: Sets = None,
    prompts: Annotated[int, typer.Option(min=1, help="Images to calibrate on.")] = 8,
    prompt_file: PromptLines = None,
    steps: StepCount = None,
    guidance_scale: GuidanceScale = None,
    scheduler: SchedulerName = None,
    seed: FirstSeed = 0,
    batch: PerCall = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find what a cache method wants to know of a model, and write it to a plan file.

    For dp (the default) and cachequant that is which steps to compute, --set cache.computed_steps=K or
    --set cache.interval=N; for magcache and teacache their ratios and coefficients, for a_sdm the sites by time. Use it
    with --set cache.method=dp --set cache.plan=FILE.
    """
    from . import settings

    layers = _unplanned(settings.layers(preset, config, None, None, sets or [], None))

    from fastdiff.bench import output as files
    from fastdiff.bench import prompts_for
    from fastdiff.pipelines.calibrate import calibrate as plan_for

    files.check([output], overwrite)
    pipe, resolved = loaded(model, layers, scheduler)
    call = arguments(pipe, steps, guidance_scale)
    texts = prompts_for(pipe, prompts, seed, prompt_file, held_out=False).texts
    with progress() as watch:
        found = plan_for(pipe, resolved, texts, seed=seed, batch=batch, watch=watch, **call)
    plan: Plan = found.cache.plan  # type: ignore[union-attr]
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


def loaded(model: str, layers: list[Layer], scheduler: str | None) -> tuple[Any, Config]:
    """A pipeline that is still plain, with the named scheduler, and the config to calibrate for."""
    from fastdiff.bench import solvers
    from fastdiff.config import resolve
    from fastdiff.pipelines.families import anatomies
    from fastdiff.pipelines.loading import embedded_name, load

    from .console import quiet, waiting
    from .settings import early
    from .studio import described

    if scheduler is not None:
        solvers.check_name(scheduler)
    quiet()
    early(layers, described(model), model)
    with waiting(f"loading {model}"):
        pipe: Any = load(model)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = solvers.solver(scheduler, pipe.scheduler)
    return pipe, resolve(layers, anatomies(pipe)[0].family, embedded_name(pipe)).config


def arguments(pipe: Any, steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    from fastdiff.errors import BadConfig
    from fastdiff.pipelines.loading import call_defaults

    usual = call_defaults(pipe)
    asked = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    for name, value in asked.items():
        if value is not None and name not in usual:
            raise BadConfig(f"{type(pipe).__name__} takes no {name}; leave it out")
    return usual | {name: value for name, value in asked.items() if value is not None}


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for steps done of all; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tell(output: Path, plan: Plan, as_json: bool) -> None:
    import json

    from .console import say

    if as_json:
        told = plan.model_dump(mode="json", exclude={"affine", "weights", "version"})
        steps = {"steps": len(plan.sigmas)} | ({"computed_steps": len(told["compute"])} if "compute" in told else {})
        print(json.dumps({"file": str(output)} | steps | told))
        return
    print(output)
    say(plan.summary())
