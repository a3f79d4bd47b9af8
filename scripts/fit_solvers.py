"""Fit the solvers that come with the embedded models.

python scripts/fit_solvers.py shapes-unet    about two hours on a core; plans that are there are not made again
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fastdiff
from fastdiff.bench import prompts_for
from fastdiff.config import Config
from fastdiff.pipelines.loading import call_defaults
from fastdiff.pipelines.solving.calibrate import fitting
from fastdiff.pipelines.solving.plan import SHIPPED

EVALUATIONS = (5, 6, 8, 10, 13, 16, 20)
SEED = 20_000  # far from those of the benchmarks


def main(
    model: Annotated[str, typer.Argument(help="shapes-unet or shapes-dit")],
    pictures: Annotated[int, typer.Option(help="captions of the training vocabulary")] = 48,
    order: Annotated[int, typer.Option(help="model outputs that a step is made of")] = 4,
    teacher_steps: Annotated[int, typer.Option()] = 120,
    guidance_scale: Annotated[float | None, typer.Option(help="default: the model's own")] = None,
    moves: Annotated[int, typer.Option(help="passes of moving the levels")] = 2,
    polish: Annotated[int, typer.Option(help="times that all weights are moved at once")] = 1,
    only: Annotated[list[int] | None, typer.Option(help="these numbers of evaluations alone")] = None,
    folder: Annotated[Path, typer.Option(help="where the plans go")] = SHIPPED,
) -> None:
    wanted = [n for n in only or EVALUATIONS if not (folder / f"{model}-{n}.json").exists()]
    if not wanted:
        return
    pipe = fastdiff.load(model)
    usual = call_defaults(pipe)
    call = {**usual, "guidance_scale": guidance_scale or usual["guidance_scale"]}
    texts = prompts_for(pipe, pictures, SEED, None, held_out=False).texts
    folder.mkdir(parents=True, exist_ok=True)
    with fitting(pipe, Config(), texts, seed=SEED, batch=16, teacher_steps=teacher_steps, **call) as found:
        for evaluations in wanted:
            plan = found.plan(evaluations, order, moves, polish)
            print(plan.summary(), flush=True)
            (folder / f"{model}-{evaluations}.json").write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
