"""Waits of exact methods whose halves of a batch take turns, and of heads in groups: two ranks, a link of limited rate.

Run by `benchmarks/overlap.sh scripts/measure_turns.py`, which puts each rank into a network namespace of its own and
skips where that is not allowed. For each method the link is limited so that all that a step sends takes `share` of
what a step of it computes; then it is measured as it is and with turns, in interleaved rounds, whose medians are
written.

    benchmarks/overlap.sh scripts/measure_turns.py [--rounds 3] [--model shapes-unet --size 320 --images 1]
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from overlap import STEPS, TIMEOUT, limit, run

import fastdiff
from fastdiff import output
from fastdiff.bench.row import environment

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parallel-turns.json"
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "patch": {"whole": {}, "halves": {"halves": True}},
    "ring": {"whole": {}, "halves": {"halves": True}},
    "ulysses": {
        "whole": {}, "groups": {"groups": 2}, "halves": {"halves": True}, "both": {"halves": True, "groups": 2},
    },
}  # fmt: skip
# `patch` on a UNet as it was before halos travelled with statistics: a displaced method all of whose steps wait
APART = {"apart": {"method": "distrifusion", "warmup_steps": STEPS}}
REMARK = (
    "seconds are those of two ranks on one machine with other jobs: medians of rounds. waited is what a rank stood "
    "still for others in a step, mean of the ranks. This shows what is hidden, not what a cluster would gain"
)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    model: Annotated[str, typer.Option(help="An embedded model.")] = "shapes-dit",
    method: Annotated[list[str] | None, typer.Option(help="All that the model takes by default.")] = None,
    size: Annotated[int, typer.Option(min=64, help="Pixels of the picture's sides.")] = 64,
    images: Annotated[int, typer.Option(min=1, help="Pictures in a call.")] = 4,
    share: Annotated[list[float] | None, typer.Option(help="Seconds of sending over computing.")] = None,
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the rows go; those of others stay.")] = OUTPUT,
) -> None:
    """One of the two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    pipe: Any = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    for name in method or (("patch",) if model == "shapes-unet" else WAYS):
        limit(1e9)
        run(pipe, size, {"method": name}, images)  # what is first takes longer
        free = run(pipe, size, {"method": name}, images)
        full = torch.tensor(free["bytes"] / free["computed_seconds"], dtype=torch.float64)
        dist.broadcast(full, 0)
        for one in share or [0.5, 1.0]:
            limit(float(full) / one)
            began = os.getloadavg()[0]
            ways = WAYS[name] | (APART if (model, name) == ("shapes-unet", "patch") else {})
            told = measured(pipe, size, name, images, rounds, ways)
            loads = [round(began, 1), round(os.getloadavg()[0], 1)]
            place = {"model": model, "size": size, "images": images, "method": name, "share": one, "rounds": rounds}
            row = place | {"bytes_per_second": round(float(full) / one), "load_before_and_after": loads} | told
            if dist.get_rank() == 0:
                keep(pipe, file, row)
    dist.barrier()
    dist.destroy_process_group()


def measured(
    pipe: Any, size: int, method: str, images: int, rounds: int, ways: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Medians of waited, computed and whole seconds of a step, by way; nobody is always first."""
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(told)
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            dist.barrier()
            told[name].append(run(pipe, size, {"method": method} | ways[name], images))
    kinds = ("waited_seconds", "computed_seconds", "step_seconds")
    found: dict[str, Any] = {
        name: {kind: round(statistics.median(one[kind] for one in runs), 5) for kind in kinds}
        | {"bytes": round(runs[0]["bytes"]), "waited_by_kind_first_round": runs[0]["waited_by_kind"]}
        for name, runs in told.items()
    }
    for name in found:
        for other in {"whole", "apart"} & found.keys() - {name}:
            pairs = zip(told[name], told[other], strict=True)
            ratio = statistics.median(a["waited_seconds"] / b["waited_seconds"] for a, b in pairs)
            found[name][f"waited_over_{other}"] = round(ratio, 3)
    return {"ways": found}


def keep(pipe: Any, file: Path, row: dict[str, Any]) -> None:
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    key = ("model", "size", "method", "share")
    rows = [one for one in there["rows"] if [one[k] for k in key] != [row[k] for k in key]] + [row]
    command = (
        "benchmarks/overlap.sh scripts/measure_turns.py; --model, --size, --images, --rounds and --share: see rows"
    )
    told = {"command": command, "remark": REMARK, "ranks": 2, "environment": environment(pipe), "rows": rows}
    output.write(file, lambda part: part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8"))
    print(row["model"], row["method"], row["share"], json.dumps(row["ways"]), flush=True)


if __name__ == "__main__":
    typer.run(main)
