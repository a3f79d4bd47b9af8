"""Writes benchmarks/busy.json: what threads that spin, and threads that sleep, cost on an idle and on a busy machine.

python scripts/measure_busy.py

Each row is a command of its own, in turns. `unset` is OpenMP's own default, a spin of some milliseconds; with
`PASSIVE` threads sleep at once; `briefly` is what the command line sets, a spin of microseconds. Idle is as idle as the
machine is: each row says the load average before it, without ours.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff import output
from fastdiff.bench.row import command
from fastdiff.machine import cpu_name, package_version
from fastdiff.threads import processor_quota, processors

ROOT = Path(__file__).parents[1]
OPENMP = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
UNSET = "import sys; from fastdiff.cli import run; sys.exit(run(sys.argv[1:]))"  # all of the program but what it sets
POLICIES: dict[str, tuple[list[str], dict[str, str]]] = {
    "unset": (["-c", UNSET], {}),
    "PASSIVE": (["-c", UNSET], {"OMP_WAIT_POLICY": "PASSIVE"}),
    "briefly": (["-m", "fastdiff"], {}),
}
PROMPT = "a large red circle above a small blue square"
TASKS: dict[str, tuple[list[str], float]] = {  # with the seconds after which it is ended
    "generate": (["generate", PROMPT, "--steps", "20", "--seed", "1", "--json", "-o", "out.png"], 60.0),
    "quantize": (["quantize", "--json", "-o", "quantized"], 120.0),
}
BUSY = 2  # other processes that compute


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    tasks: Annotated[list[str] | None, typer.Option("--task", help=f"{' or '.join(TASKS)}; may be repeated")] = None,
    file: Annotated[Path, typer.Option("--output", "-o")] = ROOT / "benchmarks/busy.json",
) -> None:
    rows = []
    for number, task in itertools.product(range(rounds), tasks or TASKS):
        for busy in (0, BUSY):
            policies = list(POLICIES) if number % 2 else list(reversed(POLICIES))
            rows += [measured(task, policy, busy) | {"round": number} for policy in policies]
    told = {
        "command": command(),
        "machine": {"cpu": cpu_name(), "processors": processors(), "quota": processor_quota()},
        "packages": {name: package_version(name) for name in ("fastdiff", "torch", "diffusers")},
        "remark": "seconds of a whole command, loading included; `drawing` is the seconds of the picture alone. A null "
        "is a command that did not end in `at_most` seconds. `load` is the machine's load average of a minute before "
        "a row: what other jobs and the row before took",
        "at_most": {task: seconds for task, (_, seconds) in TASKS.items()},
        "medians": medians(rows),
        "rows": rows,
    }
    output.write(file, lambda part: part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8"))


def measured(task: str, policy: str, busy: int) -> dict[str, Any]:
    words, most = TASKS[task]
    load = os.getloadavg()[0]
    program, told = POLICIES[policy]
    environment = {**os.environ}
    for name in OPENMP:
        environment.pop(name, None)
    seconds: float | None
    with tempfile.TemporaryDirectory() as folder, others(busy):
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, *program, *words], cwd=folder, env=environment | told, timeout=most,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True,
            )  # fmt: skip
            seconds, drawing = round(time.perf_counter() - began, 2), json.loads(done.stdout).get("seconds")
        except subprocess.TimeoutExpired:
            seconds = drawing = None
    row = {"task": task, "busy": busy, "policy": policy, "seconds": seconds, "drawing": drawing, "load": round(load, 2)}
    print(row, file=sys.stderr)
    return row


@contextmanager
def others(count: int) -> Iterator[None]:
    """Processes that compute, as a neighbour's would."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind of row: how many ended, and median, least and most of those."""
    found = []
    for task, busy, policy in dict.fromkeys((row["task"], row["busy"], row["policy"]) for row in rows):
        same = [row for row in rows if (row["task"], row["busy"], row["policy"]) == (task, busy, policy)]
        told: dict[str, Any] = {"task": task, "busy": busy, "policy": policy, "rounds": len(same)}
        told["ended"] = sum(row["seconds"] is not None for row in same)
        for name in ("seconds", "drawing"):
            values = [row[name] for row in same if row[name] is not None]
            told[name] = [round(f(values), 3) for f in (statistics.median, min, max)] if values else None
        found.append(told)
    return found


if __name__ == "__main__":
    typer.run(main)
