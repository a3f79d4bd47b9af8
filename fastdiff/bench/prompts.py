"""What a benchmark or a calibration draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.bench.scenes import Scene, scenes
from fastdiff.errors import BadConfig
from fastdiff.pipelines.loading import embedded_name

_PROMPTS = (
    "a red fox in the snow, photograph",
    "a lighthouse on a cliff at sunset",
    "portrait of an old fisherman, soft light",
    "two cats asleep on a striped sofa",
)


@dataclass(frozen=True)
class Prompts:
    """What to draw; with `scenes`, the images can be marked."""

    texts: tuple[str, ...]
    scenes: tuple[Scene, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)


def prompts_for(pipe: Any, count: int, seed: int, file: Path | None = None, *, held_out: bool = True) -> Prompts:
    """Captions for an embedded model, else the file's lines or built-in prompts, repeated up to `count`.

    held_out: captions the embedded model has not been trained on; others are for calibration.
    """
    if file is None and embedded_name(pipe):
        found = scenes(seed, count, held_out=held_out)
        return Prompts(tuple(scene.caption for scene in found), tuple(found))
    lines = _lines(file) if file is not None else _PROMPTS
    return Prompts(tuple(lines[k % len(lines)] for k in range(count)))


def _lines(file: Path) -> Sequence[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"prompts file {str(file)!r} cannot be read: {error}") from None
    if not lines:
        raise BadConfig(f"prompts file {str(file)!r} holds no prompt; write one a line")
    return lines
