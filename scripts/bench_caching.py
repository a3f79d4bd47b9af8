"""Calibrates the plans that the files of benchmarks/configs name, and measures all of them, with what is added.

`python scripts/bench_caching.py shapes-unet --peers`: all further options are those of `fastdiff bench`. Other steps or
another solver have plans of their own where benchmarks/configs has a folder for them (shapes-unet-20-dpm++), else those
of the model are re-mapped. About an hour a model with the rivals on one quiet core. Needs the extras bench and peers.
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
    parser.add_argument("--plans", action="store_true", help="calibrate what is missing, and measure nothing")
    known, options = parser.parse_known_args()
    asked = [
        word for name in ("steps", "scheduler") if getattr(known, name) for word in (f"--{name}", getattr(known, name))
    ]
    label = "-".join(filter(None, [known.model, known.steps, known.scheduler]))
    own = (ROOT / "benchmarks" / "configs" / label).is_dir()
    configs = sorted((ROOT / "benchmarks" / "configs" / (label if own else known.model)).glob("*.toml"))
    for config in configs:
        named = read_file(config)["cache"].get("plan")
        plan = (config.parent / named).resolve() if named else None
        if plan is not None and not plan.exists():
            call = ["calibrate", "-m", known.model, "--config", short(config), "--prompts", "16", "--batch", "8"]
            if run(*call, *(asked if own else []), "-o", short(plan)) and known.plans:
                return 1
    if known.plans:
        return 0
    out = f"benchmarks/{label}"
    files = ["--json", f"{out}.json", "--plot", f"{out}.png", "--sheet", f"{out}-sheet.jpg"]
    chosen = ["--config", short(configs[0].parent)]
    presets = ["--preset", "balanced", "--preset", "fast"]
    return run(
        "bench", "-m", known.model, *presets, *chosen, *files, "--verdict", f"{out}-verdict.json", *asked, *options
    )


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "fastdiff", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
