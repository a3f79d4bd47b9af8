"""`fastdiff bench`: speed and quality of presets and configs, side by side with simply taking fewer steps."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import FirstSeed, ModelName, PromptLines

if TYPE_CHECKING:
    from fastdiff.bench import Row

_PLOT_TYPES, _SHEET_TYPES = (".png", ".svg", ".pdf"), (".png", ".jpg", ".webp")
_OTHER_SOLVERS = ("dpm++", "unipc")  # what a user would try before any cache
Solvers = Annotated[
    list[str] | None,
    typer.Option(
        "--solver",
        help="Fewer steps of this scheduler too; repeatable: unipc, deis, dpm++@karras, unipc@ays, unipc@shift2 ...",
    ),
]
_SHEET_ROWS = 8  # prompts shown in the contact sheet

Presets = Annotated[
    list[str] | None, typer.Option(help="Preset to measure; repeatable. Default: all, unless --config is given.")
]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="Default: 3 for the embedded models, else the pipeline's own.")
]
Peers = Annotated[
    bool, typer.Option("--peers", help="Measure rival packages and faster schedulers too (extra: peers).")
]
PeerNames = Annotated[
    list[str] | None, typer.Option("--peer", help="Only rivals whose name holds this, as --peers; repeatable.")
]
Scheduler = Annotated[
    str | None, typer.Option(help="ddim, dpm++, unipc, euler or flowmatch for all rows. Default: the model's own.")
]
Verdict = Annotated[Path | None, typer.Option(help="Write which rivals are beaten, and by what, here (.json).")]
NoConverged = Annotated[
    bool, typer.Option("--no-converged", help="Leave out the 500-step reference, the slowest part.")
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="section.key=value on top of every config; repeatable.")]


def bench(
    model: ModelName = "shapes-unet",
    preset: Presets = None,
    config: Annotated[list[Path] | None, typer.Option(help="Config file, or folder of them; repeatable.")] = None,
    set_: Sets = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Inference steps. Default: the pipeline's own.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Images that the quality is measured on.")] = 32,
    prompt_file: PromptLines = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls a row.")] = 5,
    seed: FirstSeed = 0,
    guidance_scale: Guidance = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a call while measuring quality.")] = 8,
    peers: Peers = False,
    peer: PeerNames = None,
    solver: Solvers = None,
    scheduler: Scheduler = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here; - prints them instead of the table.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw quality over speed-up here (.png, .svg, .pdf).")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Put the first images side by side here (.png, .jpg).")] = None,
    verdict: Verdict = None,
    no_converged: NoConverged = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace result files that exist.")] = False,
) -> None:
    """Measure presets and configs against the stock pipeline and against fewer steps."""
    to_stdout = json is not None and str(json) == "-"
    json_file = None if to_stdout else json
    _check_outputs(json_file, plot, sheet, verdict, overwrite)
    from fastdiff.bench import metrics
    from fastdiff.pipelines.solving import schedulers as solvers

    metrics.require_extra()
    peers = peers or bool(peer)
    others = [*(_OTHER_SOLVERS if peers else ()), *(solver or ())]
    for name in [*others, *filter(None, [scheduler])]:
        solvers.check_name(name)
    import torch

    import fastdiff
    from fastdiff.bench import Settings, contenders, prompts_for, rivals, run, sources
    from fastdiff.studio.console import quiet

    quiet()
    layers = sources(preset or [], config or [], set_ or [])
    torch.set_num_threads(threads or torch.get_num_threads())
    pipe: Any = fastdiff.load(model)
    if scheduler is not None:
        pipe.scheduler = solvers.solver(scheduler, pipe.scheduler)
    settings = Settings.of(
        pipe, steps, guidance_scale, rounds=rounds, seed=seed, batch=batch, solvers=tuple(dict.fromkeys(others)),
        **({"converged_steps": None} if no_converged else {}),
    )  # fmt: skip
    planned = contenders(pipe, layers, settings.steps) + (rivals(pipe, settings, peer or ()) if peers else [])
    texts = prompts_for(pipe, prompts, seed, prompt_file)
    with _observer(texts.texts) as observer:
        rows = run(pipe, planned, texts, settings, observer=observer, command=shlex.join(["fastdiff", *sys.argv[1:]]))
    _write(rows, observer.tiles(), json_file, plot, sheet, to_stdout)
    _judge(rows, verdict, shown=peers and not to_stdout)
    if (own := [row for row in rows if row.kind == "fastdiff"]) and all(row.error is not None for row in own):
        raise typer.Exit(1)


def _check_outputs(
    json: Path | None, plot: Path | None, sheet: Path | None, verdict: Path | None, overwrite: bool
) -> None:
    from fastdiff import output
    from fastdiff.errors import BadConfig

    for file, kinds in ((plot, _PLOT_TYPES), (sheet, _SHEET_TYPES)):
        if file is not None and file.suffix.lower() not in kinds:
            raise BadConfig(f"{str(file)!r} must end in {' or '.join(kinds)}")
    output.check([json, plot, sheet, verdict], overwrite)


def _write(
    rows: Sequence[Row],
    tiles: list[list[Any]],
    json: Path | None,
    plot: Path | None,
    sheet: Path | None,
    to_stdout: bool,
) -> None:
    from fastdiff import output
    from fastdiff.bench import render
    from fastdiff.bench.row import as_json

    text = as_json(rows)
    if json is not None:
        output.write(json, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    if plot is not None:
        figure = render.pareto(rows)
        output.write(plot, lambda part: figure.savefig(part, dpi=150))
    if sheet is not None:
        by_prompt = [tile for row in zip(*tiles, strict=True) for tile in row]
        output.write(sheet, render.contact_sheet(by_prompt, columns=len(tiles)).save)
    print(text if to_stdout else render.markdown(rows))


def _judge(rows: Sequence[Row], file: Path | None, shown: bool) -> None:
    import json

    from fastdiff import output
    from fastdiff.bench import verdict

    found = verdict.verdict(rows)
    if file is not None:
        text = json.dumps(found, indent=2, allow_nan=False)
        output.write(file, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    if shown:
        print(f"\n{verdict.markdown(found)}")


def _observer(texts: Sequence[str]) -> Any:
    """A progress bar on stderr that keeps the first images of each row."""
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from fastdiff.bench import Observer
    from fastdiff.bench.measure import to_bytes
    from fastdiff.bench.render import Tile

    class Screen(Observer):
        def __init__(self) -> None:
            # without a thread that refreshes: it would take CPU time from what is measured
            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False,
            )  # fmt: skip
            self.task = self.progress.add_task("warm-up", total=None)
            self.columns: list[list[Tile]] = []

        def __enter__(self) -> Screen:
            self.progress.start()
            return self

        def __exit__(self, *_: object) -> None:
            self.progress.stop()

        def planned(self, work: int) -> None:
            self.progress.update(self.task, total=work)

        def done(self, name: str, work: int) -> None:
            self.progress.update(self.task, description=name, advance=work, refresh=True)

        def drawn(self, name: str, images: NDArray, decibels: NDArray) -> None:
            shown = zip(to_bytes(images[:_SHEET_ROWS]), decibels, texts, strict=False)
            self.columns.append([Tile(i, f"{name}: {t if not self.columns else f'{d:.1f} dB'}") for i, d, t in shown])

        def tiles(self) -> list[list[Tile]]:
            return self.columns

    return Screen()
