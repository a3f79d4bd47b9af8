"""Tables of docs/solvers.md, made from benchmarks/*.json: published grids beside ours, runs that a plan was not fitted
on, and whether tune keeps its word."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import readme  # beside this file

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
UNMEASURED = "Not measured yet."


def parts() -> dict[str, Callable[[], str]]:
    """By the name that a page asks for."""
    return {"grids": grids, "transfer": transfer, "tuned": tuned}


def grids() -> str:
    """PSNR to the converged picture of every stock solver and grid of one process, by evaluations."""
    file = BENCHMARKS / "shapes-unet-solver.json"
    if not file.is_file():
        return UNMEASURED
    found: dict[str, dict[int, float]] = {}
    for row in json.loads(file.read_text(encoding="utf-8")):
        if row["kind"] in ("fastdiff", "fewer_steps") and row["psnr_converged"] is not None:
            found.setdefault(solved(row), {})[row["computed_steps"]] = row["psnr_converged"]
    counts = sorted({count for cells in found.values() for count in cells})
    best = {count: max(cells.get(count, 0) for cells in found.values()) for count in counts}
    body = [
        (name, *(marked(cells[count], best[count]) if count in cells else "-" for count in counts))
        for name, cells in found.items()
    ]
    return readme.table(("evaluations", *map(str, counts)), body)


def solved(row: Mapping[str, Any]) -> str:
    if row["kind"] == "fastdiff":
        return "fitted"
    return row["name"].partition(" steps")[2].strip() or row["scheduler"].removesuffix("Scheduler")


def marked(value: float, best: float) -> str:
    return f"**{value:.1f}**" if value == best else f"{value:.1f}"


def transfer() -> str:
    """How a plan does in runs that it was not fitted on, beside the best stock solver there."""
    rows: list[tuple[str, ...]] = []
    for file in sorted(BENCHMARKS.glob("solver-transfer-*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        rows += [
            (found["model"], row["what"], f"{row['fitted']:.1f}", f"{row['stock']:.1f}", row["stock_name"])
            for row in found["rows"]
        ]
    head = ("model", "run", "fitted: PSNR dB to converged", "stock solver, as many evaluations", "which")
    if not rows:
        return UNMEASURED
    lora = any("LoRA" in what for _, what, *_ in rows)
    told = "\n\nThe LoRA was fine-tuned on scenes whose objects all have that colour." if lora else ""
    return readme.table(head, rows) + told


def tuned() -> str:
    """What searches promised, and what came of it on captions that they never saw."""
    file = BENCHMARKS / "tune.json"
    if not file.is_file():
        return UNMEASURED
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        (one["model"], str(one["seed"]), f"{one['target']:g}", *outcome(one))
        for one in sorted(found["tries"], key=lambda one: (one["model"], one["seed"], one["target"]))
    ]
    head = (
        "model", "search", "target, dB", "chosen", "speedup", "best of one lever", "PSNR dB as measured",
        "unseen captions", "kept it",
    )  # fmt: skip
    kept = sum(one.get("unseen", 0) >= one["target"] for one in found["tries"])
    told = (
        f"{kept} of {len(found['tries'])} searches reach their target on {found['judges']} captions and noises that "
        f"they never saw. Each was fitted on {found['fit']} pictures and measured on {found['prompts']}; the last "
        "column is the share of unseen pictures that keep the target, each by itself. The best of one lever is the "
        "fastest row of the same search that reaches the target with a solver, 8 bits or a graph alone, or with fewer "
        "steps of the stock solver."
    )
    return f"{told}\n\n{readme.table(head, rows)}"


def outcome(one: Mapping[str, Any]) -> tuple[str, ...]:
    if one["chosen"] is None:
        return ("nothing", "-", "-", "-", "-", "-")
    single = f"{one['single_speedup']:.2f}, {one['single']}" if "single" in one else "none"
    return (
        one["chosen"], f"{one['speedup']:.2f}", single, f"{one['measured']:.1f}", f"{one['unseen']:.1f}",
        f"{one['kept']:.0%}",
    )  # fmt: skip
