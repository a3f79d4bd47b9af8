"""Unequal ranks: seconds of a step with even shares, and with shares by measured speed.

Rank 1 of two is made half as fast: behind each block it sleeps as long as the block computed. Weights are random.

    python scripts/measure_shares.py [--json benchmarks/parallel-shares.json]
"""

from __future__ import annotations

import json as jsonlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastdiff
from fastdiff import output
from fastdiff.bench.row import command, environment
from fastdiff.parallel.shards import units
from fastdiff.pipelines.families import anatomies
from fastdiff.studio.ranks import launch
from scripts.measure_sharding import TIMEOUT, draw, pipeline

ROUNDS, SIZE = 5, {"height": 256, "width": 256}
METHODS = ("patch", "ring", "ulysses")


def slow(pipe: Any) -> None:
    """Every block takes its own time once more; what it waits for the other rank is none of it."""
    for block in units(anatomies(pipe)[0]):
        began: list[float] = []
        block.register_forward_pre_hook(lambda *_, began=began: began.append(time.thread_time()))
        block.register_forward_hook(lambda *_, began=began: time.sleep(time.thread_time() - began.pop()))


def together(folder: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe, rows = pipeline(), []
    if dist.get_rank() == 1:
        slow(pipe)
    for method in METHODS:
        seconds: dict[str, list[float]] = {"even": [], "measured": []}
        for name, found in seconds.items():
            asked = {"method": method, "timeout": TIMEOUT, "shares": name if name == "measured" else None}
            with fastdiff.accelerate(pipe, parallel=asked) as fast:
                assert fast.crew is not None
                draw(pipe, **SIZE)  # the first run tells how fast the ranks are
                draw(pipe, **SIZE)
                for _ in range(ROUNDS):
                    found.append(draw(pipe, **SIZE))
                used = fast.crew.bus.speeds.used
            rows.append({
                "method": method, "shares": name, "rows": used, "seconds_a_step": round(statistics.median(found), 4),
            })  # fmt: skip
    (folder / f"{dist.get_rank()}.json").write_text(jsonlib.dumps(rows), encoding="utf-8")


def main(json: Annotated[Path, typer.Option(help="file to write")] = Path("benchmarks/parallel-shares.json")) -> None:
    found: dict[str, Any] = {"command": command(), "remark": __doc__ and __doc__.splitlines()[2]}
    found |= {"environment": environment(pipeline())}
    with tempfile.TemporaryDirectory() as folder:
        code = launch(2, TIMEOUT, together, Path(folder))
        if code:
            raise SystemExit(code)
        found["rows"] = jsonlib.loads((Path(folder) / "0.json").read_text(encoding="utf-8"))
    for method in METHODS:
        even, measured = (row["seconds_a_step"] for row in found["rows"] if row["method"] == method)
        found[f"faster_{method}"] = round(even / measured, 2)
    text = jsonlib.dumps(found, indent=1) + "\n"
    output.write(json, lambda part: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
