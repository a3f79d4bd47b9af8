"""Draw the picture of the README: plain diffusers above, a preset below, same prompts and seeds.

python scripts/picture.py                       # docs/images/shapes-unet-balanced.png
python scripts/picture.py --model shapes-dit --preset fast --output dit.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

import fastdiff
from fastdiff.pipelines.loading import call_defaults

PROMPTS = (
    "a large red circle above a small blue square",
    "a small green cross to the left of a large yellow triangle on a gray background",
    "a large striped purple ring on a pink background",
    "a small cyan square below a large red triangle on a black background",
    "a small yellow ring to the right of a small striped blue circle on a white background",
    "a large green square on a black background",
)
GAP, SCALE = 4, 2


def main(
    model: Annotated[str, typer.Option()] = "shapes-unet",
    preset: Annotated[str, typer.Option()] = "balanced",
    output: Annotated[Path, typer.Option()] = Path("docs/images/shapes-unet-balanced.png"),
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    pipe = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed + k) for k in range(len(PROMPTS))]
        return pipe(list(PROMPTS), generator=generators, **call_defaults(pipe)).images

    rows = [draw()]
    with fastdiff.accelerate(pipe, preset) as fast:
        rows.append(draw())
    print(fast.report)
    side = rows[0][0].width * SCALE
    sheet = Image.new("RGB", (len(PROMPTS) * (side + GAP) + GAP, 2 * (side + GAP) + GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            big = image.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(big, (GAP + x * (side + GAP), GAP + y * (side + GAP)))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)


if __name__ == "__main__":
    typer.run(main)
