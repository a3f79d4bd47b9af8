"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="shapes-unet, shapes-dit, a directory or a hub id.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="Embedded model, directory or hub id.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting.")]
Preset = Annotated[str | None, typer.Option("--preset", help="Named settings: lossless, balanced or fast.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings from a .toml or .json file.")]
PromptLines = Annotated[Path | None, typer.Option(help="One prompt a line, instead of the built-in ones.")]
StepCount = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's own.")]
FirstSeed = Annotated[int, typer.Option(min=0, help="Image k has seed + k.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
