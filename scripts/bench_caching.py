"""Calibrates the plans that the files of benchmarks/configs name, and measures all of them beside the rivals.

`python scripts/bench_caching.py shapes-unet [--steps N] [--scheduler NAME] [options of fastdiff bench]`; about an hour
a model on one quiet core. Needs the extras bench and peers.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CALIBRATED = ("dp", "cachequant", "magcache")


def main(model: str, *options: str) -> int:
    folder = ROOT / "benchmarks" / "configs" / model
    given = dict(zip(options[::2], options[1::2], strict=False))
    names = [model, *(given[key] for key in ("--steps", "--scheduler") if key in given)]
    for config in sorted(folder.glob("*.toml")):
        cache = tomllib.loads(config.read_text())["cache"]
        plan = (folder / cache["plan"]).resolve() if "plan" in cache else None
        if plan is not None and not plan.exists():  # made for the model's own steps and solver; other runs re-map it
            call = ["calibrate", "-m", model, "--config", str(config.relative_to(ROOT)), "--prompts", "16"]
            run(*call, "--batch", "8", "-o", str(plan.relative_to(ROOT)))
    out = ROOT.joinpath("benchmarks", "-".join(names)).relative_to(ROOT)
    files = ["--json", f"{out}.json", "--plot", f"{out}.png", "--sheet", f"{out}-sheet.png"]
    configs = [word for config in sorted(folder.glob("*.toml")) for word in ("--config", str(config.relative_to(ROOT)))]
    presets = ["--preset", "balanced", "--preset", "fast"]
    return run("bench", "-m", model, *presets, *configs, *files, "--verdict", f"{out}-verdict.json", *options)


def run(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "fastdiff", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
