"""`generate --compare`: the same picture without and with acceleration, in one process, side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastdiff import media
from fastdiff.config import Layer
from fastdiff.errors import BadConfig
from fastdiff.images import Sampling
from fastdiff.media import Clip, Sound

from .console import say

_BAR = 18  # pixels for the words above a picture
_WARM_UP = 2  # steps: the first call of a pipeline does what later ones need not


def refuse(layers: list[Layer], devices: int | None, lasting: bool, preview: int | None, timeline: Path | None) -> None:
    """Raises BadConfig where there are not two runs on one device to compare."""
    if not layers:
        raise BadConfig(
            "--compare draws without and with settings, and none are given: add --preset balanced, or --set"
        )
    if (devices or 1) > 1 or lasting or preview is not None or timeline is not None:
        raise BadConfig(
            "--compare draws each picture twice on one device; leave --devices, --preview-every, --timeline and "
            "prompt files into a directory out"
        )


def paint(studio: Any, order: Any, job: Sampling, target: Path) -> None:
    """Draw plain and accelerated, both after a warm-up; save the accelerated one, and both beside each other.

    studio, order: of `drawing`."""
    short = job.model_copy(update={"steps": min(job.steps or _WARM_UP, _WARM_UP)})
    studio.use([])
    studio.draw(short)
    plain = studio.draw(job)
    studio.use(order.layers)
    studio.draw(short)
    fast = studio.draw(job)
    path = media.save(fast.image, target, fast.made if order.metadata else None, overwrite=order.overwrite)
    decibels, speedup = psnr(plain.image, fast.image), plain.seconds / fast.seconds
    alike = "identical" if math.isinf(decibels) else f"{decibels:.1f} dB"
    labels = f"plain {plain.seconds:.3g} s", f"fastdiff {fast.seconds:.3g} s, {speedup:.2f}x, {alike}"
    sheet = None
    if not isinstance(fast.image, Sound):
        both = beside(plain.image, fast.image, labels)
        place = path.with_name(f"{path.stem}_compared{path.suffix}")
        sheet = media.save(both, place, overwrite=order.overwrite)
    if order.as_json:
        told: dict[str, Any] = {"plain_seconds": round(plain.seconds, 3), "speedup": round(speedup, 3)}
        told["compared"], told["psnr"] = sheet and str(sheet), None if math.isinf(decibels) else round(decibels, 2)
        print(json.dumps({"file": str(path)} | fast.row | told), flush=True)
    else:
        print("\n".join(str(file) for file in (path, sheet) if file is not None), flush=True)
    say(f"{path}  seed {fast.made.seed}  {fast.summary}")
    aim = "" if studio.fast.config.solver is None else "; a solver aims at the converged picture, not at this plain one"
    say(f"{labels[0]}, {labels[1]} (one run of each after a warm-up; bench measures{aim})")


def psnr(plain: Any, fast: Any) -> float:
    """Decibels between two results; infinite where they are identical."""
    a, b = values(plain), values(fast)
    error = float(((a - b) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def values(made: Any) -> Any:
    """Frames x height x width x 3 in [0, 1] (a picture is one frame), or half of a sound's samples, -0.5 to 0.5."""
    if isinstance(made, Sound):
        return made.samples.astype(np.float64) / 2
    frames = made.frames if isinstance(made, Clip) else [made]
    return np.stack([np.asarray(frame.convert("RGB"), np.float64) for frame in frames]) / 255


def beside(plain: Any, fast: Any, labels: tuple[str, str]) -> Any:
    """Two pictures, or videos, in one, with words above them."""
    if isinstance(plain, Clip):
        frames = [beside(a, b, labels) for a, b in zip(plain.frames, fast.frames, strict=True)]
        return Clip(frames, plain.fps)
    scale = max(1, math.ceil(256 / plain.width))  # small ones enlarged without smoothing
    width, height = plain.width * scale, plain.height * scale
    sheet = Image.new("RGB", (2 * width, height + _BAR), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (picture, label) in enumerate(zip((plain, fast), labels, strict=True)):
        large = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(large, (column * width, _BAR))
        pen.text((column * width + 3, 2), label, fill="black", font=ImageFont.load_default(12))
    return sheet
