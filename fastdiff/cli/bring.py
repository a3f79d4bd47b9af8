"""Options for what a user brings along: files, LoRA, a scheduler, pictures to draw from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff.errors import BadConfig

if TYPE_CHECKING:
    from fastdiff.images import Replay

Base = Annotated[
    str | None, typer.Option(metavar="MODEL", help="What a single-file model lacks: configuration, and other parts.")
]
Lora = Annotated[
    list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="LoRA on top of the model, .safetensors; repeatable.")
]
Scheduler = Annotated[
    str | None, typer.Option(help="ddim, dpm++, unipc, euler, deis, flowmatch, or a class of diffusers.")
]
Offload = Annotated[str, typer.Option(help="none, model, group or layers: what waits on the CPU until it runs.")]
Tiling = Annotated[bool, typer.Option("--vae-tiling", help="Decode large pictures in tiles, with less memory.")]
Images = Annotated[list[str] | None, typer.Option("--image", help="A picture to draw from; repeatable.")]
Mask = Annotated[str | None, typer.Option(help="White where the picture is to be drawn anew.")]
Strength = Annotated[float | None, typer.Option(help="How much of --image is drawn over, 0 to 1.")]
Corrupt = Annotated[
    bool, typer.Option("--corrupt", help="Mix noise into the pictures to draw from, to bear worse ones (Q-GESCO).")
]
Control = Annotated[
    str | None,
    typer.Option(metavar="[MODEL:]PICTURE", help="Edges, depths or a pose to follow, and a ControlNet to add."),
]
Frames = Annotated[int | None, typer.Option(help="Frames of a video.")]
Fps = Annotated[float | None, typer.Option(help="Frames a second. Default: the pipeline's own.")]


@dataclass(frozen=True)
class Brought:
    """Each field is an option."""

    base: Base = None
    lora: Lora = None
    scheduler: Scheduler = None
    offload: Offload = "none"
    vae_tiling: Tiling = False
    image: Images = None
    mask: Mask = None
    strength: Strength = None
    control: Control = None
    frames: Frames = None
    fps: Fps = None

    @property
    def flags(self) -> dict[str, Any]:
        """What each picture is drawn from, as far as it was said."""
        found = {"image": self.image or None, "mask": self.mask, "control": self._control[1]}
        return found | {"strength": self.strength, "frames": self.frames, "fps": self.fps}

    @property
    def given(self) -> set[str]:
        return {name for name, value in (self.flags | {"lora": self.lora or None}).items() if value is not None}

    @property
    def _control(self) -> tuple[str | None, str | None]:
        if self.control is None or Path(self.control).expanduser().is_file():
            return None, self.control
        model, colon, picture = self.control.rpartition(":")
        if colon and not (model and picture):
            raise BadConfig(f"--control {self.control}: give PICTURE, or MODEL:PICTURE")
        return model or None, picture

    def outfit(self, made: Replay | None, inputs: set[str]) -> dict[str, Any]:
        """The arguments of `load` that were said, or with which a replay was made."""
        before = made.outfit if made else {}
        model = self._control[0]
        if before.get("controlnet") and model is None:
            raise BadConfig(f"made with the ControlNet {before['controlnet']!r}; say --control MODEL:PICTURE")
        found = {
            "base": self.base,
            "lora": tuple(self.lora or ()),
            "scheduler": self.scheduler or before.get("scheduler"),
            "controlnet": model,
            "offload": self.offload if self.offload != "none" else None,
            "vae_tiling": self.vae_tiling or before.get("vae_tiling"),
            "inputs": tuple(sorted(inputs)),
        }
        return {name: value for name, value in found.items() if value}
