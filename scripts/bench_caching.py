"""Calibrates the plans that the files of benchmarks/configs name, and measures all of them, with what is added.

`python scripts/bench_caching.py shapes-unet --peers`: all further options are those of `fastdiff bench`. About an hour
a model with the rivals on one quiet core. Needs the extras bench and peers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from fastdiff.config import read_file

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--steps")
    parser.add_argument("--scheduler")
    known, options = parser.parse_known_args()
    configs = sorted((ROOT / "benchmarks" / "configs" / known.model).glob("*.toml"))
    for config in configs:
        named = read_file(config)["cache"].get("plan")
        plan = (config.parent / named).resolve() if named else None
        if plan is not None and not plan.exists():  # made for the model's own steps and solver; other runs re-map it
            call = ["calibrate", "-m", known.model, "--config", short(config), "--prompts", "16", "--batch", "8"]
            run(*call, "-o", short(plan))
    out = "benchmarks/" + "-".join(filter(None, [known.model, known.steps, known.scheduler]))
    files = ["--json", f"{out}.json", "--plot", f"{out}.png", "--sheet", f"{out}-sheet.png"]
    chosen = [word for config in configs for word in ("--config", short(config))]
    for name in ("steps", "scheduler"):
        if getattr(known, name):
            options += [f"--{name}", getattr(known, name)]
    presets = ["--preset", "balanced", "--preset", "fast"]
    return run("bench", "-m", known.model, *presets, *chosen, *files, "--verdict", f"{out}-verdict.json", *options)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "fastdiff", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
