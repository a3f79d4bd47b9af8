"""Makes anew every number that README and docs quote: all of benchmarks/*.json, then the pages that are made of them.

    python scripts/bench_all.py --list              # the commands in their order, and which are done
    python scripts/bench_all.py                     # days on a core that nobody else uses; goes on where it was stopped
    python scripts/bench_all.py --only "quant-*"    # these files, and the pages

Every file names the commands that made it, for all of it or for each row; WHOLE has the others. One runs at a time,
with one thread. A *-verdict.json comes with its benchmark. Plans are measured, not results: missing ones are made. What
a file held goes to build/bench_all before its first command, so that scripts that keep rows measure all of them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
STATE = ROOT / "build/bench_all"
MODELS = ("shapes-unet", "shapes-dit")
CLIPPED = (
    "--only float --only 'w8a8 static' --only 'w8a8 static, percentile 99.99' --only 'w8a8 static, percentile 99.999' "
    "--only 'w8a8 static, smooth percentile' --only 'w4a8 static' --only 'w4a8 static, smooth percentile' --steps 25 "
    "--file benchmarks/quant-clipping.json"
)
# Files whose last command made some of their rows, wrote elsewhere, or is not recorded.
WHOLE = {
    "parallel-codecs": ["python scripts/trial_codecs.py"],
    "parallel-codecs-4": ["python scripts/trial_codecs.py --ranks 4 -o benchmarks/parallel-codecs-4.json"],
    "parallel-turns": [
        "benchmarks/overlap.sh scripts/measure_turns.py",
        "benchmarks/overlap.sh scripts/measure_turns.py --model shapes-unet --size 320 --images 1 --method patch "
        "--share 1.0 --share 0.05",
    ],
    "quant-clipping": [
        f"python scripts/measure_quant.py quality --model shapes-unet --captions 16 --fit 8 {CLIPPED}",
        f"python scripts/measure_quant.py quality --model shapes-dit --captions 4 --fit 4 {CLIPPED}",
    ],
    "quant-clock": ["python scripts/measure_quant_clock.py"],
    "quant-corrupt": [f"python scripts/measure_corrupt.py --model {model}" for model in MODELS],
    "quant-distil": ["python scripts/distil_pruned.py --model shapes-unet --steps 400 --captions 32"],
    "quant-quality": [f"python scripts/measure_quant.py quality --model {model}" for model in MODELS],
    "shapes-dit-calibrators": [
        "fastdiff bench -m shapes-dit --config benchmarks/configs/shapes-dit --config benchmarks/configs/solver "
        "--peer DBCache --threads 1 --prompts 32 --rounds 5 --json benchmarks/shapes-dit-calibrators.json --overwrite"
    ],
    "solver-transfer-unet": ["python scripts/measure_transfer.py shapes-unet -o benchmarks/solver-transfer-unet.json"],
    "tune": ["python scripts/measure_tune.py -o benchmarks/tune.json"],
}
KEPT = {"published-speedups": "what papers measured", "soak-parallel-found": "a run that found faults, now mended"}
PAGES = ("python scripts/step_figures.py", "python scripts/readme.py")
Row = dict[str, str]  # a command, its file, and its state: to do, begun, done


def plans() -> Iterator[str]:
    """What makes missing plans: those of solvers, and those that the configs in a folder name."""
    yield from (f"python scripts/fit_solvers.py {model}" for model in MODELS)
    for folder in sorted((BENCHMARKS / "configs").iterdir()):
        if any("plan =" in file.read_text(encoding="utf-8") for file in folder.glob("*.toml")):
            kind, model, *run = folder.name.split("-")
            options = [word for pair in zip(("--steps", "--scheduler"), run, strict=False) for word in pair]
            yield shlex.join(["python", "scripts/bench_caching.py", f"{kind}-{model}", *options, "--plans"])


def commands(file: str) -> list[str]:
    """All that make a file of benchmarks/, in the order of its rows; none for what comes with another, or is kept."""
    if file in WHOLE or file in KEPT or file.endswith("-verdict"):
        return WHOLE.get(file, [])
    found = json.loads((BENCHMARKS / f"{file}.json").read_text(encoding="utf-8"))
    return list(dict.fromkeys(row["command"] for row in (found if isinstance(found, list) else [found])))


def work() -> Iterator[Row]:
    """All commands in their order: plans, the accuracy of the models, all others, pages."""
    yield from ({"file": "plans", "command": command, "state": "to do"} for command in plans())
    names = {path.stem for path in BENCHMARKS.glob("*.json")} | set(WHOLE)
    for name in sorted(names, key=lambda name: (not name.startswith("evaluation"), name)):
        yield from ({"file": name, "command": command, "state": "to do"} for command in commands(name))
    yield from ({"file": "pages", "command": command, "state": "to do"} for command in PAGES)


def written(row: Row) -> list[Path]:
    """What a command writes into benchmarks/: its file first, and pictures and verdicts that it names."""
    named = [BENCHMARKS / f"{row['file']}.json", *(ROOT / word for word in shlex.split(row["command"]))]
    found = [path for path in named if path.parent == BENCHMARKS and path.suffix in (".json", ".png", ".jpg")]
    return list(dict.fromkeys(found)) if row["file"] not in ("plans", "pages") else []


def run(command: str) -> int:
    first, *words = shlex.split(command)
    program = {"python": [sys.executable], "fastdiff": [sys.executable, "-m", "fastdiff"]}.get(first, ["sh", first])
    # benchmarks/overlap.sh starts the `python` that it finds.
    path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    return subprocess.run([*program, *words], cwd=ROOT, env=environment).returncode


def made(row: Row, rows: list[Row]) -> bool:
    """Runs a command. One that wrote nothing failed: some skip what a machine cannot do."""
    files = written(row)
    if all(other["state"] == "to do" for other in rows if other["file"] == row["file"]):
        for path in filter(Path.exists, files):
            path.replace(STATE / path.name)
    note(row, "begun", rows)
    print(f"{row['file']}: {row['command']}", flush=True)
    good = run(row["command"]) == 0 and all(path.exists() for path in files[:1])
    note(row, "done" if good else "begun", rows)
    return good


def note(row: Row, state: str, rows: list[Row]) -> None:
    row["state"] = state
    (STATE / "state.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main(
    only: Annotated[str, typer.Option(help="names of files in benchmarks/, as a pattern")] = "*",
    listed: Annotated[bool, typer.Option("--list", help="print the commands and run none")] = False,
) -> None:
    STATE.mkdir(parents=True, exist_ok=True)
    state = STATE / "state.json"
    lock = (STATE / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_UN if listed else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit("another bench_all runs here; measurements beside each other say nothing") from None
    rows = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else list(work())
    asked = [row for row in rows if row["file"] == "pages" or fnmatch(row["file"], only.removesuffix(".json"))]
    print(f"{sum(row['state'] == 'done' for row in asked)} of {len(asked)} commands are done.", flush=True)
    if listed:
        print(*(f"{row['state']:5} {row['file']}: {row['command']}" for row in asked), sep="\n")
        print(*(f"kept  {file}: {why}" for file, why in KEPT.items()), sep="\n")
        return
    left = [row for row in asked if row["state"] != "done" or row["file"] == "pages"]
    if failed := [row["command"] for row in left if not made(row, rows)]:
        raise SystemExit("\n".join([f"Start again to try these again; {STATE} has the old files:", *failed]))
    print(f"Made; remove {STATE} to begin anew. tests/packaging/test_quoted.py says which pages quote other numbers.")


if __name__ == "__main__":
    typer.run(main)
