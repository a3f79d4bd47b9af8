"""Writes benchmarks/steps.json: which steps each method computes on the embedded models, for the strips in the docs.

Run it from the root: python scripts/measure_steps.py. One picture for each config in benchmarks/configs/MODEL and each
preset, with the model's own steps and guidance.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff import output
from fastdiff.bench.row import command
from fastdiff.config import presets
from fastdiff.pipelines.loading import CALL_DEFAULTS
from fastdiff.strip import cells

ROOT = Path(__file__).resolve().parents[1]
PROMPT, SEED = "a large red circle above a small blue square", 1
SHORT = {"computed": "c", "partly": "b", "predicted": "p", "cached": "r"}  # r: reused as it was


def main() -> int:
    torch.set_num_threads(1)
    found = {
        "command": command(),
        "prompt": PROMPT,
        "seed": SEED,
        "letters": {letter: kind for kind, letter in SHORT.items()},
        "models": {model: measured(model) for model in CALL_DEFAULTS},
    }
    path = ROOT / "benchmarks" / "steps.json"
    output.write(path, lambda part: part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8"))
    return 0


def measured(model: str) -> list[dict[str, Any]]:
    """A row for each config: its name, the file or preset, the method, and a letter for each step."""
    pipe = fastdiff.load(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    sources: dict[str, str | Path] = {name: name for name in presets() if name != "lossless"}
    sources |= {path.stem: path for path in sorted((ROOT / "benchmarks/configs" / model).glob("*.toml"))}
    rows = []
    for name, source in sources.items():
        with fastdiff.accelerate(pipe, source) as fast:
            generator = torch.Generator().manual_seed(SEED)
            pipe(PROMPT, generator=generator, output_type="latent", **CALL_DEFAULTS[model])
            steps = "".join(SHORT[kind] for kind in cells(fast.report))
        assert fast.config.cache is not None
        given = source if isinstance(source, str) else source.relative_to(ROOT).as_posix()
        rows.append({"name": name, "config": given, "method": fast.config.cache.method, "steps": steps})
        print(f"{model} {name:24} {steps}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    sys.exit(main())
