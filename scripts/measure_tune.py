"""Whether `fastdiff tune` keeps its word: each try looks for settings of a target, which are then drawn for captions
and noises that the search never saw.

python scripts/measure_tune.py -o benchmarks/tune.json    about an hour; goes on after the tries that the file holds
python scripts/measure_tune.py -o benchmarks/tune.json --model shapes-unet --seed 3
The second makes some of them, while another process makes others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

import fastdiff
from fastdiff.bench import Settings, prompts_for
from fastdiff.bench.measure import draw
from fastdiff.bench.metrics import psnr
from fastdiff.bench.row import environment
from fastdiff.bench.tune import Goal, Tried, Tuning
from fastdiff.pipelines.solving.schedulers import solver

# model, seed of the search, decibels to the converged picture; searches of one seed share what they fitted
TRIES = (
    ("shapes-unet", 1, 33.0), ("shapes-unet", 1, 37.0), ("shapes-dit", 1, 30.0), ("shapes-dit", 1, 34.0),
    ("shapes-unet", 2, 35.0), ("shapes-unet", 2, 38.0), ("shapes-dit", 2, 32.0), ("shapes-dit", 2, 36.0),
    ("shapes-unet", 3, 32.0), ("shapes-unet", 3, 36.0),
)  # fmt: skip
FINE = 150  # steps of DPM++ 2M that stand for the converged picture; the search itself takes fewer
UNSEEN = 700_000  # from the seed of a search to that of its judges
BATCH = 8


def main(
    output: Annotated[Path, typer.Option("-o", "--output")],
    model: Annotated[str | None, typer.Option(help="tries of this one alone")] = None,
    only: Annotated[int | None, typer.Option("--seed", help="tries of this seed alone")] = None,
    states: Annotated[Path, typer.Option(help="folder for what the searches fitted")] = Path("build/tune"),
    budget_minutes: Annotated[float, typer.Option(help="for the fits of one search")] = 5,
    prompts: Annotated[int, typer.Option(help="captions that a search measures on")] = 12,
    fit: Annotated[int, typer.Option(help="captions that a search fits on")] = 16,
    judges: Annotated[int, typer.Option(help="captions that no search saw")] = 24,
) -> None:
    torch.set_num_threads(1)
    states.mkdir(parents=True, exist_ok=True)
    for name, seed, target in TRIES:
        known = [(one["model"], one["seed"], one["target"]) for one in tries(output)]
        if model not in (None, name) or only not in (None, seed) or (name, seed, target) in known:
            continue
        pipe = fastdiff.load(name)
        pipe.set_progress_bar_config(disable=True)
        search = searching(pipe, states / f"{name}-{seed}.json", target, seed, budget_minutes, prompts, fit)
        measured, chosen = search.search()
        told: dict[str, Any] = {"model": name, "seed": seed, "target": target, "chosen": None}
        if chosen:
            told |= judged(pipe, search, chosen, judges, seed) | single(search, measured)
        every = [*tries(output), told]
        print(told, flush=True)
        found = {
            "reached": sum(one.get("unseen", 0) >= one["target"] for one in every), "of": len(every), "tries": every,
            "prompts": prompts, "fit": fit, "judges": judges, "budget_minutes": budget_minutes,
            "converged": f"DPM++ 2M, {FINE} steps", "command": f"python scripts/measure_tune.py -o {output}",
            "environment": environment(pipe),
        }  # fmt: skip
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def tries(output: Path) -> list[dict[str, Any]]:
    """What the file holds by now."""
    return json.loads(output.read_text(encoding="utf-8"))["tries"] if output.exists() else []


def searching(
    pipe: Any, state: Path, target: float, seed: int, budget_minutes: float, prompts: int, fit: int
) -> Tuning:
    """As the command makes it, with fewer captions; no try sees those of another seed."""
    first = 1_000 * seed
    settings = Settings.of(pipe, None, None, rounds=2, seed=first, batch=BATCH)
    texts = prompts_for(pipe, fit, first + 50_000, held_out=False).texts
    goal = Goal("psnr", target, "converged")
    return Tuning(pipe, goal, settings, prompts_for(pipe, prompts, first), texts, state, budget_minutes)


def judged(pipe: Any, search: Tuning, chosen: Tried, count: int, seed: int) -> dict[str, Any]:
    """The choice, drawn for captions of its own beside the converged pictures."""
    first = UNSEEN + 1_000 * seed
    seen = {*search.prompts.texts, *search.texts}
    texts = [text for text in prompts_for(pipe, 2 * count, first).texts if text not in seen][:count]

    def drawn(steps: int) -> NDArray:
        parts = [range(k, min(k + BATCH, len(texts))) for k in range(0, len(texts), BATCH)]
        guidance = search.settings.guidance_scale
        return np.concatenate(
            [draw(pipe, [texts[i] for i in part], [first + i for i in part], steps, guidance) for part in parts]
        )

    own, pipe.scheduler = pipe.scheduler, solver("dpm++", pipe.scheduler)
    goal = drawn(FINE)
    pipe.scheduler = own
    with fastdiff.accelerate(pipe, search.configs[chosen.name]):
        decibels = psnr(drawn(search.settings.steps), goal)
    return {
        "chosen": chosen.name, "speedup": round(chosen.speedup, 2), "measured": round(chosen.mean, 2),
        "unseen": round(float(decibels.mean()), 2), "unseen_std": round(float(decibels.std()), 2),
        "kept": round(float((decibels >= search.goal.value).mean()), 3), "captions": len(texts),
    }  # fmt: skip


def single(search: Tuning, measured: Sequence[Tried]) -> dict[str, Any]:
    """The fastest of what one lever alone, or fewer steps of the stock solver, reached the target with."""
    levers = {name: len(config.model_dump(exclude_defaults=True)) for name, config in search.configs.items()}
    alone = [one for one in measured if levers.get(one.name, 1) == 1 and search.goal.met(one)]
    best = search.goal.best(alone)
    return {"single": best.name, "single_speedup": round(best.speedup, 2)} if best else {}


if __name__ == "__main__":
    typer.run(main)
