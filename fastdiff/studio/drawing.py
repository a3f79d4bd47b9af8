"""A loaded, accelerated pipeline that draws one picture after another."""

from __future__ import annotations

import copy
import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

import fastdiff
from fastdiff import media
from fastdiff.anatomy import Family
from fastdiff.config import Layer, Source, resolve
from fastdiff.errors import BadConfig, FastdiffError, PeerLost, UnknownName
from fastdiff.images import Replay, Sampling
from fastdiff.pipelines.accelerate import accelerate
from fastdiff.pipelines.expected import expect, foresee
from fastdiff.pipelines.families import FAMILIES, anatomies
from fastdiff.pipelines.loading import call_defaults, embedded, embedded_name, load
from fastdiff.pipelines.quantized_parts import is_quantized

from . import comparing, named, pictures
from .console import quiet, say, waiting, warn
from .previews import Previews, Shown
from .settings import early
from .timeline import write_timeline
from .wanted import make_folder

DTYPES = ("float32", "bfloat16", "float16")


def versions() -> dict[str, str]:
    return {"fastdiff": fastdiff.__version__, "torch": torch.__version__, "diffusers": version("diffusers")}


def described(model: str) -> Family | None:
    """The family of a model on this machine, read from its index alone; None if that does not tell."""
    index = embedded().get(model, Path(model).expanduser()) / "model_index.json"
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
        classes = [entry[1] for entry in components.values() if isinstance(entry, list) and len(entry) == 2]
    except (OSError, ValueError, AttributeError):
        return None  # loading will say what is wrong
    return next((FAMILIES[name] for name in classes if name in FAMILIES), None)


def opened(model: str, dtype: torch.dtype | None = None, quant: Source = None, **outfit: Any) -> Any:
    """A plain pipeline, or one that is quantized while it is read, without the chatter of loading."""
    quiet()
    with waiting(f"loading {model}"):
        return load(model, dtype=dtype, quant=quant, **outfit)


def foretold(model: str, devices: int, dtype: torch.dtype | None, memory: float | None) -> Any:
    """A plain pipeline, after it is said what each of so many devices with `memory` bytes would hold of it."""
    for text in foresee(model, devices, dtype, memory):
        say(text)
    return opened(model, dtype)


@dataclass(frozen=True)
class Order:
    """All that `generate` was asked for; goes to each process of a parallel run."""

    model: str
    layers: Sequence[Layer]
    dtype: str | None
    jobs: Sequence[Sampling]
    targets: Sequence[Path]
    made: Replay | None = None
    overwrite: bool = False
    metadata: bool = True
    preview_every: int | None = None
    preview: bool = False  # in the terminal
    as_json: bool = False
    timeline: Path | None = None
    outfit: Mapping[str, Any] = field(default_factory=dict)  # arguments of `load`
    suffix: str | None = None  # of the files, where -o says one
    compare: bool = False


def draw(order: Order) -> None:
    """Load, check everything, and draw one picture after the other."""
    studio = Studio(order.model, order.layers, order.dtype, once=True, outfit=order.outfit)
    jobs, targets = studio.told((order.jobs, order.targets))  # each rank may have chosen other seeds
    studio.check(jobs, 1 if order.preview else order.preview_every, order.suffix)
    console = Shown.console() if order.preview and studio.leads else None
    if order.made:
        studio.compare(order.made)
        studio.compare_pictures(order.made, jobs)
    if studio.leads:
        make_folder(targets[0].parent)
    for job, target in zip(jobs, targets, strict=True):
        target = target if order.suffix else target.with_suffix(studio.suffix)
        if order.compare:
            comparing.paint(studio, order, job, target)
            continue
        studio.paint(
            job, target, overwrite=order.overwrite, metadata=order.metadata, preview_every=order.preview_every,
            as_json=order.as_json, console=console,
        )  # fmt: skip
    if order.timeline is not None:
        write_timeline(studio.fast, order.timeline, overwrite=order.overwrite)


@dataclass(frozen=True)
class Drawn:
    """A picture, video or sound, what it was made with, and the seconds that took."""

    image: Any  # media.Made
    made: Replay
    seconds: float
    summary: str  # the report in one line
    idle: str | None  # a cache method that cached nothing

    @property
    def row(self) -> dict[str, Any]:
        """What `--json` says of it, but for where it went."""
        made = self.made
        return {"prompt": made.prompt, "seed": made.seed, "seconds": round(self.seconds, 3), "report": made.report}


class Studio:
    """Loads the model and installs the config, then paints. With `once` the config never changes, so that layers which
    are to be as small as can be are quantized while they are read."""

    def __init__(
        self, model: str, layers: Sequence[Layer], dtype: str | None, once: bool = False,
        outfit: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if dtype is not None and dtype not in DTYPES:
            raise UnknownName("dtype", dtype, DTYPES)
        resolved = early(layers, described(model), model)
        quant: Any = resolved.config.quant if once and resolved is not None else None
        small = quant is not None and quant.speed == "smallest" and not is_quantized(Path(model))
        asked = resolved.config if resolved is not None and small else None
        self.outfit, loaded = dict(outfit or {}), getattr(torch, dtype) if dtype else None
        parallel: Any = resolved.config.parallel if once and resolved is not None else None
        if parallel is not None:
            for text in expect(model, parallel, loaded, quant is not None, self.outfit.get("offload", "none")):
                say(text)
            parallel = None if quant is not None else parallel
        self.pipe = opened(model, loaded, asked, parallel=parallel, **self.outfit)
        layers = [*layers, ("quantized while it was read", {"quant": None})] if small else layers
        self.model = f"./{Path(model).resolve().name}" if Path(model).exists() and model not in embedded() else model
        self.use(layers)
        self.known = inspect.signature(self.pipe.__call__).parameters
        self.kind = pictures.kind(self.known)
        self.suffix = media.usual(self.kind)
        self.leads = self.fast.rank == 0  # one rank speaks for all, and writes the files
        self.pipe.set_progress_bar_config(disable=not (sys.stderr.isatty() and self.leads), leave=False)

    def use(self, layers: Sequence[Layer]) -> None:
        """Accelerate with these settings from now on; where they cannot be had, the old ones stay."""
        resolved = resolve(layers, anatomies(self.pipe)[0].family, embedded_name(self.pipe))
        self.fast = accelerate(self.pipe, resolved.config)

    def over(self, pipe: Any) -> Studio:
        """The same with another pipeline of this model, which is not accelerated yet."""
        made = copy.copy(self)
        made.pipe, made.known = pipe, inspect.signature(pipe.__call__).parameters
        pipe.set_progress_bar_config(disable=True)
        return made

    def only(self, *kinds: str) -> None:
        """Raises FastdiffError for a model that makes something else than a front door can show."""
        if self.kind not in kinds:
            raise FastdiffError(f"{type(self.pipe).__name__} makes a {self.kind}; generate writes it, this cannot")

    def told(self, what: Any) -> Any:
        """What rank 0 says."""
        return what if self.fast.crew is None else self.fast.crew.bus.tell(what)[0]

    def check(self, jobs: Sequence[Sampling], preview_every: int | None, suffix: str | None = None) -> None:
        """Refuse what this model cannot draw, before the first picture is begun."""
        kind = type(self.pipe).__name__
        if not {"prompt", "image"} & {*self.known}:
            raise FastdiffError(f"{kind} draws neither from prompts nor from pictures; generate does one of the two")
        if preview_every is not None and preview_every < 1:
            raise BadConfig(f"--preview-every {preview_every}: give 1 or more steps")
        if preview_every is not None and "callback_on_step_end" not in self.known:
            raise BadConfig(f"{kind} cannot show its steps; leave --preview-every out")
        multiple = pictures.multiple(self.pipe)
        for job in jobs:
            if suffix is not None:
                media.check(suffix, self.kind, kind, still=job.frames == 1)
            for side, pixels in (("width", job.width), ("height", job.height)):
                if pixels is not None and pixels % multiple:
                    near = max(multiple, round(pixels / multiple) * multiple)
                    raise BadConfig(f"{side} {pixels}: this model draws multiples of {multiple}, for example {near}")
            for name, value in (("negative_prompt", job.negative_prompt), ("guidance_scale", job.guidance_scale)):
                if value is not None and name not in self.known:
                    raise BadConfig(f"{kind} takes no {name}; leave it out")
            pictures.check(self.pipe, job, self.kind)
            if self.fast.config.solver is None:
                pictures.check_strength(self.pipe, job)

    def compare(self, made: Replay) -> None:
        """Say why a replay may not be identical."""
        now = {"scheduler": type(self.pipe.scheduler).__name__} | versions()
        for name, before in ({"scheduler": made.scheduler} | made.versions).items():
            if now.get(name, before) != before:
                warn(f"made with {name} {before}, this is {now[name]}: the picture may differ")

    def compare_pictures(self, made: Replay, jobs: Sequence[Sampling]) -> None:
        """Say which pictures are not those that a replay was drawn from."""
        now = {name for job in jobs for name in named.fingerprints(job).values()}
        for name, before in made.drawn_from.items():
            if before not in now:
                warn(f"no picture here is the {name} that it was drawn from: the result may differ")

    def paint(
        self, job: Sampling, target: Path, *, overwrite: bool, metadata: bool, preview_every: int | None, as_json: bool,
        console: Any = None,
    ) -> None:  # fmt: skip
        """Draw, save and report one image, which `console` shows while it is made."""
        if self.leads and self.too_long(job.prompt):
            warn(f"the model reads only the beginning of the prompt {job.prompt[:40]!r}...: it is too long")
        if console is not None:
            self.pipe.set_progress_bar_config(disable=True)
            with Shown(self.pipe.vae, console) as shown:
                drawn = self.draw(job, shown)
        else:
            previews = preview_every is not None and self.leads
            drawn = self.draw(job, Previews(self.pipe.vae, preview_every or 1, target) if previews else None)
        if self.leads:
            path = media.save(drawn.image, target, drawn.made if metadata else None, overwrite=overwrite)
            announce(drawn, path, as_json)

    def draw(self, job: Sampling, on_step_end: Callable[..., Any] | None = None) -> Drawn:
        """One picture; `on_step_end` is called as diffusers does."""
        settings = call_defaults(self.pipe) | _named(job, self.known) | pictures.guided(self.pipe, job)
        settings |= pictures.arguments(self.pipe, job)
        if on_step_end is not None:
            settings["callback_on_step_end"] = on_step_end
        began = time.perf_counter()
        output = self._call(settings)
        seconds = time.perf_counter() - began
        image = media.taken(output, self.pipe, pictures.fps(self.pipe, job))
        report, cache = self.fast.report, self.fast.config.cache
        idle = cache.method if cache is not None and not report.cached else None
        return Drawn(image, self._record(job, image, settings), seconds, str(report), idle)

    def _call(self, settings: Mapping[str, Any]) -> Any:
        kind = type(self.pipe).__name__
        try:
            return self.pipe(**settings)
        except ValueError as error:  # how diffusers refuses arguments
            raise BadConfig(f"{kind} refuses: {str(error).strip().splitlines()[0]}") from error
        except (MemoryError, RuntimeError) as error:
            if "memory" not in f"{type(error).__name__} {error}".lower():
                raise
            raise FastdiffError("out of memory; draw a smaller picture, or use --dtype bfloat16") from error

    def too_long(self, prompt: str) -> bool:
        """Is the prompt cut by every text encoder? diffusers says so only in the logs."""
        names = ("tokenizer", "tokenizer_2", "tokenizer_3")
        found = [t for name in names if (t := getattr(self.pipe, name, None)) is not None]
        return bool(found) and all(len(t(prompt).input_ids) > t.model_max_length for t in found)

    def _record(self, job: Sampling, image: media.Made, settings: Mapping[str, Any]) -> Replay:
        guidance = settings.get("guidance_scale") if job.guidance_scale is None else job.guidance_scale
        return Replay(
            **named.inputs(job),
            outfit=named.outfit(self.outfit),
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            seed=job.seed or 0,
            steps=settings.get("num_inference_steps") or max(self.fast.report.steps, 1),
            guidance_scale=guidance if isinstance(guidance, int | float) else None,
            width=image.size[0],
            height=image.size[1],
            model=self.model,
            scheduler=type(self.pipe.scheduler).__name__,
            dtype=str(self.pipe.dtype).removeprefix("torch."),
            config=self.fast.config.model_dump(mode="json"),
            report=self.fast.report.to_dict(),
            versions=versions(),
        )


def attempt(studio: Studio, job: Sampling, on_step_end: Callable[..., Any] | None = None) -> Drawn | str:
    """A picture, or the reason why there is none; what breaks the whole run is raised."""
    try:
        studio.check([job], None)
        return studio.draw(job, on_step_end)
    except PeerLost:
        raise
    except FastdiffError as error:
        return str(error)
    except Exception as error:  # whatever a pipeline raises for one prompt must not cost the others
        return f"{type(error).__name__}: {error}"


def announce(drawn: Drawn, path: Path, as_json: bool, out: TextIO | None = None) -> None:
    """A picture's path or JSON on stdout, or `out`; its report on stderr."""
    print(json.dumps({"file": str(path)} | drawn.row) if as_json else path, flush=True, file=out)
    say(f"{path}  seed {drawn.made.seed}  {drawn.summary}")
    if drawn.idle:
        steps = drawn.made.report["steps"]
        warn(f"NOTHING WAS CACHED: {drawn.idle} computed all {steps} steps with these settings")


def _named(job: Sampling, known: Mapping[str, Any]) -> dict[str, Any]:
    """A job as arguments of a diffusers pipeline; what it leaves open stays with the pipeline."""
    values = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale,
        "width": job.width,
        "height": job.height,
        "num_frames": job.frames,
        "generator": torch.Generator("cpu").manual_seed(job.seed or 0),
    }
    return {name: value for name, value in values.items() if value is not None and name in known}
