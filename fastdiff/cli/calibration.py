"""What `calibrate` and `quantize` have in common: a plain pipeline, what is drawn with it, and a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .bring import Corrupt, Images, Strength
from .gathered import gathered
from .options import ConfigFile, FirstSeed, ModelName, Preset, PromptLines, Sets, StepCount

if TYPE_CHECKING:
    from fastdiff.config import Config, Layer
    from fastdiff.quant.base import QuantMethod
    from fastdiff.quant.install import QuantReport

GuidanceScale = Annotated[float | None, typer.Option(min=0, help="Default: the pipeline's own.")]
SchedulerName = Annotated[
    str | None, typer.Option(help="ddim, dpm++, unipc, euler or flowmatch. Default: the model's own.")
]
PerCall = Annotated[int, typer.Option(min=1, help="Images a call.")]


@dataclass(frozen=True)
class Calibration:
    """A model, its settings, and how it is called to be calibrated. Each field is an option."""

    model: ModelName = "shapes-unet"
    preset: Preset = None
    config: ConfigFile = None
    sets: Sets = None
    prompt_file: PromptLines = None
    steps: StepCount = None
    guidance_scale: GuidanceScale = None
    scheduler: SchedulerName = None
    seed: FirstSeed = 0
    batch: PerCall = 4
    image: Images = None
    strength: Strength = None
    corrupt: Corrupt = False

    @property
    def layers(self) -> list[Layer]:
        from fastdiff.studio import settings

        return settings.layers(self.preset, self.config, None, None, self.sets or [], None)

    def loaded(self, layers: list[Layer]) -> tuple[Any, Config]:
        """A pipeline that is still plain, with the named scheduler, and the config that `layers` make for it."""
        from fastdiff.config import resolve
        from fastdiff.pipelines.families import anatomies
        from fastdiff.pipelines.loading import embedded_name
        from fastdiff.pipelines.solving import schedulers as solvers
        from fastdiff.studio.drawing import described, opened
        from fastdiff.studio.settings import early

        if self.scheduler is not None:
            solvers.check_name(self.scheduler)
        early(layers, described(self.model), self.model)
        pipe = opened(self.model, inputs=("image",) if self.image else ())
        pipe.set_progress_bar_config(disable=True)
        if self.scheduler is not None:
            pipe.scheduler = solvers.solver(self.scheduler, pipe.scheduler)
        return pipe, resolve(layers, anatomies(pipe)[0].family, embedded_name(pipe)).config

    def loaded_quantized(self, layers: list[Layer]) -> tuple[Any, QuantReport]:
        """A pipeline whose denoiser was quantized layer by layer while it was read; nothing is drawn for it."""
        from fastdiff.config import resolve
        from fastdiff.errors import BadConfig
        from fastdiff.pipelines.loading import load_quantized
        from fastdiff.pipelines.planning import with_plans
        from fastdiff.studio.console import quiet, waiting
        from fastdiff.studio.drawing import described
        from fastdiff.studio.settings import early

        if self.image or self.strength is not None or self.corrupt:
            raise BadConfig("--image, --strength and --corrupt are of what is drawn, and --prompts 0 draws nothing")
        resolved = early(layers, described(self.model), self.model) or resolve(layers, None, self.model)
        with_plans(cast("QuantMethod", resolved.config.quant), None, None)  # what has to be planned is refused
        quiet()
        with waiting(f"reading {self.model}, a layer at a time"):
            return load_quantized(self.model, resolved.config)

    def call(self, pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
        """How the pipeline is called for these prompts, with the calibration's seed and batch. Raises BadConfig."""
        from fastdiff.errors import BadConfig
        from fastdiff.pipelines.loading import call_defaults
        from fastdiff.studio import pictures

        usual = call_defaults(pipe)
        asked = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}
        given = {name: value for name, value in asked.items() if value is not None}
        if foreign := sorted(given.keys() - usual.keys()):
            raise BadConfig(f"{type(pipe).__name__} takes no {foreign[0]}; leave it out")
        if self.image or self.strength is not None:
            given |= pictures.for_each(pipe, texts, self.image, self.strength)
        given |= {"corrupt": True} if self.corrupt else {}
        return usual | given | {"seed": self.seed, "batch": self.batch}

    def texts(self, pipe: Any, count: int) -> Sequence[str]:
        from fastdiff.bench import prompts_for

        return prompts_for(pipe, count, self.seed, self.prompt_file, held_out=False).texts if count else []


calibrating = gathered(Calibration)


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for steps done of all; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
