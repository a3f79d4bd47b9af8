"""The commands and their arguments. Nothing heavy is imported before a command runs, so that --help answers at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bring import Brought
from .gathered import gathered
from .options import ConfigFile, Dtype, Json, Model, Preset, Sets

if TYPE_CHECKING:
    from fastdiff.studio.drawing import Order
    from fastdiff.studio.wanted import Asked

Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)]
PromptFile = Annotated[
    Path | None, typer.Option(help="One prompt a line, or .jsonl with a `prompt` in each line; - is stdin.")
]
Seeds = Annotated[list[int] | None, typer.Option("--seed", metavar="S", help="May be repeated; random if left out.")]
Steps = Annotated[int | None, typer.Option("--steps", "--num-inference-steps", help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option("--guidance-scale", help="Strength of the prompt.")]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="What not to draw.")]
Count = Annotated[int, typer.Option("-n", help="Images of each prompt, with consecutive seeds.")]
Output = Annotated[
    str | None,
    typer.Option("-o", "--output", help="A .png, .webp, .jpg, .mp4, .gif or .wav file, or a directory. [default: out]"),
]
Devices = Annotated[int | None, typer.Option(help="Devices that share one image.")]
PreviewEvery = Annotated[int | None, typer.Option(metavar="K", help="Save a small preview every K steps.")]
Preview = Annotated[bool, typer.Option("--preview", help="Show every step in the terminal, if it has 24-bit colours.")]
FromImage = Annotated[
    Path | None,
    typer.Option("--from-image", "--from-file", help="Make this file again; other options change what they name."),
]
Timeline = Annotated[
    Path | None, typer.Option(help="Write compute and transfers of each rank here (.json for Chrome's tracing, .png).")
]
Engine = Annotated[
    str | None, typer.Option(help="ray spreads a job over a Ray cluster (extra: ray). Default: this process.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="With --engine ray; default: one for each GPU, or CPU.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files instead of numbering.")]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="Write no settings into the file.")]
Compare = Annotated[
    bool, typer.Option("--compare", help="Draw without acceleration too, and put both side by side with their seconds.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from fastdiff import __version__

        typer.echo(__version__)
        raise typer.Exit


def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Faster image generation with diffusers: feature caching, patch parallelism, quantization."""


@dataclass(frozen=True)
class Sampled:
    """Each field is an option, and one of what a picture is asked to be."""

    steps: Steps = None
    guidance_scale: Guidance = None
    width: Annotated[int | None, typer.Option()] = None
    height: Annotated[int | None, typer.Option()] = None
    negative_prompt: Negative = None


@dataclass(frozen=True)
class Watched:
    """Each field is an option, and a way to look on."""

    preview_every: PreviewEvery = None
    preview: Preview = False
    timeline: Timeline = None


@gathered(Sampled, Brought, Watched)
def generate(
    sampled: Sampled,
    brought: Brought,
    watched: Watched,
    prompts: Prompts = None,
    model: Model = None,
    preset: Preset = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seeds: Seeds = None,
    prompt_file: PromptFile = None,
    count: Count = 1,
    output: Output = None,
    devices: Devices = None,
    from_image: FromImage = None,
    overwrite: Overwrite = False,
    no_metadata: NoMetadata = False,
    dtype: Dtype = None,
    engine: Engine = None,
    workers: Workers = None,
    compare: Compare = False,
    as_json: Json = False,
) -> int | None:
    """Make pictures, videos or sounds from prompts and pictures; prints their paths.

    With --prompt-file and a directory this is a job: broken off and started again, it draws what is missing.
    """
    from fastdiff.studio import wanted

    made = wanted.replayed(from_image, model, brought.given) if from_image else None
    flags = wanted.given(**asdict(sampled), **brought.flags)
    lasting = prompt_file is not None and output is not None and wanted.is_folder(output)
    shown = watched.preview_every or watched.preview or None
    wanted.check_engine(engine, workers, devices, lasting=lasting, single=(shown, watched.timeline))
    asked = wanted.listed(prompts or [], prompt_file, wanted.base(made, flags), seeds or [], count, lasting=lasting)
    drawable = wanted.drawable(asked, strict=not lasting)
    targets = wanted.targets(output or "out.png", drawable)
    suffix = None if output is None or wanted.is_folder(output) else targets[0].suffix
    outfit = brought.outfit(made, wanted.inputs(drawable))
    name = model or (made.model if made else "shapes-unet")

    from fastdiff.studio import settings  # from here on torch is needed

    layers = settings.layers(preset, config, made, from_image, sets or [], devices)
    from fastdiff.studio import comparing, drawing
    from fastdiff.studio.previews import Shown
    from fastdiff.studio.timeline import check_timeline

    if watched.preview:
        Shown.console()
    if compare:
        comparing.refuse(layers, devices, lasting, shown, watched.timeline)
    if watched.timeline is not None:
        check_timeline(watched.timeline, layers, overwrite=overwrite)

    order = drawing.Order(
        name, layers, dtype or (made.dtype if made else None), drawable, targets, made, overwrite=overwrite,
        metadata=not no_metadata, as_json=as_json, outfit=outfit, suffix=suffix, compare=compare, **asdict(watched),
    )  # fmt: skip
    return _carry_out(order, asked if lasting else None, (workers or 0) if engine == "ray" else None, devices)


def _carry_out(order: Order, asked: list[Asked] | None, workers: int | None, devices: int | None) -> int | None:
    """Draw the pictures of an order, or `asked` as a job; in this process, on a cluster, or in one for each device."""
    from fastdiff.studio import drawing, ranks, settings

    work: tuple[Any, ...] = drawing.draw, order
    if asked is not None:
        from fastdiff.jobs import batch, log

        work = batch.run, log.Batch(order, order.targets[0].parent, asked, workers)
    if devices is None or devices == 1 or ranks.launched():
        return work[0](work[1])
    settings.early(order.layers, drawing.described(order.model), order.model)  # a mistake starts nothing
    return ranks.launch(devices, settings.timeout(order.layers), *work)


def methods(as_json: Json = False) -> None:
    """List the methods of each kind."""
    from . import about

    about.methods(as_json)


def inspect(
    subject: Annotated[str, typer.Argument(metavar="MODEL|PNG|CONFIG", help="Also a preset's name.")],
    model: Model = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Show what a model can use, how a PNG was made, or what a config resolves to and why."""
    from . import inspection

    inspection.inspect(subject, model, sets or [], as_json)


def env(as_json: Json = False) -> None:
    """Show versions and devices, for bug reports."""
    from . import about

    about.env(as_json)
