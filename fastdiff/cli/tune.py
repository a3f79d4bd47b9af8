"""`fastdiff tune`: settings for a goal, found on the user's own model and machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import FirstSeed, Json, ModelName, PromptLines, StepCount

if TYPE_CHECKING:
    from fastdiff.bench.tune import Goal, Tried, Tuning
    from fastdiff.config import Config

TargetPsnr = Annotated[float | None, typer.Option(min=1, help="Decibels to keep; the fastest settings that do.")]
TargetSpeedup = Annotated[float | None, typer.Option(min=1, help="Times as fast; the best pictures at that speed.")]
Seconds = Annotated[float | None, typer.Option(min=0.001, help="Seconds a picture; the best pictures in that time.")]


def tune(
    output: Annotated[Path, typer.Option("--output", "-o", help="The config to write, .toml.")],
    model: ModelName = "shapes-unet",
    target_psnr: TargetPsnr = None,
    target_speedup: TargetSpeedup = None,
    seconds: Seconds = None,
    to: Annotated[str, typer.Option(help="converged or plain: which pictures are to be kept.")] = "converged",
    budget_minutes: Annotated[float, typer.Option(min=0, help="Time for fitting; measuring comes on top.")] = 20,
    prompts: Annotated[int, typer.Option(min=4, help="Images to measure on.")] = 16,
    fit: Annotated[int, typer.Option(min=8, help="Images to fit on.")] = 24,
    prompt_file: PromptLines = None,
    steps: StepCount = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="Default: the pipeline's own.")] = None,
    seed: FirstSeed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each finalist.")] = 5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace result files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Find the fastest settings that keep a quality, or the best of a speed: solvers fitted to this model, plans of
    cached steps, 8 bits.

    What was fitted and drawn is kept beside the output in a .tune.json; the same command goes on from there.
    """
    goal = _goal(target_psnr, target_speedup, seconds, to, output)
    state = output.with_suffix(".tune.json")
    from fastdiff import output as files
    from fastdiff.bench import Settings, metrics, prompts_for
    from fastdiff.bench.tune import Tuning
    from fastdiff.studio.console import say
    from fastdiff.studio.drawing import opened

    files.check(
        [output, *(output.with_name(f"{output.stem}-{lever}.json") for lever in ("solver", "cache"))], overwrite
    )
    metrics.require_extra()
    pipe = opened(model)
    pipe.set_progress_bar_config(disable=True)
    settings = Settings.of(pipe, steps, guidance_scale, rounds=rounds, seed=seed, batch=batch)
    texts = prompts_for(pipe, fit, seed + 50_000, prompt_file, held_out=False).texts
    search = Tuning(
        pipe, goal, settings, prompts_for(pipe, prompts, seed, prompt_file), texts, state, budget_minutes, say
    )
    chosen, lines = _told(search)
    text = "\n".join([*lines, "", *_toml(search.configs[chosen.name], output)]) + "\n"
    files.write(output, lambda part: part.write_text(text, encoding="utf-8"))
    print(json.dumps({"file": str(output), "chosen": chosen.name, "seconds": chosen.seconds,
                      "speedup": chosen.speedup, "psnr": chosen.mean}) if as_json else output)  # fmt: skip


def _told(search: Tuning) -> tuple[Tried, list[str]]:
    """The choice, and what was measured, as comments. Raises FastdiffError where nothing meets the goal."""
    from fastdiff.errors import FastdiffError
    from fastdiff.studio.console import say

    goal = search.goal
    measured, chosen = search.search()
    lines = [_line(one) for one in sorted(measured, key=lambda one: one.speedup)]
    ours = [one for one in measured if one.name in search.configs]
    for one in measured:
        if one not in ours and one.name != "baseline" and goal.best([one, *([chosen] if chosen else [])]) is one:
            lines.append(f"{one.name} of the stock scheduler alone do better; no config says that, a call does")
    for line in lines:
        say(line)
    if chosen is None:
        nearest = goal.nearest(ours, len(search.prompts))[0]
        raise FastdiffError(f"nothing that was fitted reaches {_words(goal)}; nearest is {_line(nearest)}")
    kept = f"; {chosen.kept(goal.value):.0%} of the pictures keep {goal.value:g} dB" if goal.kind == "psnr" else ""
    head = f"Found by fastdiff tune for {_words(goal)}, on {len(search.prompts)} pictures that nothing was fitted on:"
    return chosen, [f"# {line}" for line in (head, *lines, f"chosen: {chosen.name}{kept}")]


def _goal(target_psnr: Any, target_speedup: Any, seconds: Any, to: str, output: Path) -> Goal:
    from fastdiff.bench.tune import Goal
    from fastdiff.errors import BadConfig, UnknownName

    if to not in ("converged", "plain"):
        raise UnknownName("--to", to, ("converged", "plain"))
    if output.suffix != ".toml":
        raise BadConfig(f"{str(output)!r} must end in .toml")
    given = {"psnr": target_psnr, "speedup": target_speedup, "seconds": seconds}
    asked = {kind: value for kind, value in given.items() if value is not None}
    if len(asked) != 1:
        raise BadConfig("give one goal: --target-psnr, --target-speedup or --seconds")
    [(kind, value)] = asked.items()
    return Goal(kind, value, to)  # type: ignore[arg-type]


def _words(goal: Goal) -> str:
    what = {"psnr": f"{goal.value:g} dB", "speedup": f"{goal.value:g} times the speed", "seconds": f"{goal.value:g} s"}
    return f"{what[goal.kind]} (PSNR to the {goal.to} picture)"


def _line(one: Tried) -> str:
    return f"{one.name}: {one.speedup:.2f} times as fast, {one.seconds:.3f} s, {one.mean:.1f} dB"


def _toml(config: Config, output: Path) -> list[str]:
    """The levers of a config; a plan goes into a file of its own beside it."""
    from fastdiff import output as files

    lines = []
    whole = config.model_dump(mode="json")
    for lever, table in config.model_dump(mode="json", exclude_defaults=True).items():
        lines.append(f"[{lever}]")
        for key in (key for key in whole[lever] if key == "method" or key in table):
            value = whole[lever][key]
            if isinstance(value, dict):
                beside, text = output.with_name(f"{output.stem}-{lever}.json"), json.dumps(value, indent=2)
                files.write(beside, lambda part, text=text: part.write_text(text + "\n", encoding="utf-8"))  # type: ignore[misc]
                value = beside.name
            lines.append(f"{key} = {json.dumps(value)}")
        lines.append("")
    return lines
