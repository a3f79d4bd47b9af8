"""What a parallel run did when: as Chrome's trace events, or as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff import output
from fastdiff.errors import BadConfig

if TYPE_CHECKING:
    from fastdiff.config import Layer
    from fastdiff.pipelines.accelerate import Accelerated

KINDS = ("compute", "transfer", "wait")


def check_timeline(path: Path, layers: Sequence[Layer], *, overwrite: bool) -> None:
    """Raises BadConfig, before anything is drawn, for a timeline that cannot be written."""
    if path.suffix not in (".json", ".png"):
        raise BadConfig(f"--timeline {path}: end the name in .json or .png")
    if not any(values.get("parallel") for _, values in layers):
        raise BadConfig("--timeline shows what ranks do; it needs a parallel method")
    output.check([path], overwrite)


def write_timeline(fast: Accelerated, path: Path, *, overwrite: bool = False) -> None:
    """Rows of all ranks in the last run, written by rank 0."""
    assert fast.crew is not None
    told = fast.crew.bus.tell(events(fast))
    if fast.rank:
        return
    rows = [event for one in told for event in one]
    output.check([path], overwrite)
    if path.suffix == ".png":
        figure = picture(rows)
        output.write(path, lambda part: figure.savefig(part, dpi=150, format="png"))
    else:
        text = json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})
        output.write(path, lambda part: part.write_text(text, encoding="utf-8"))


def events(fast: Accelerated) -> list[dict[str, Any]]:
    """This rank's spans, in microseconds from its first; a step is what is left between its waits."""
    spans, rank = fast.report.spans, fast.rank
    start = min((span.start for span in spans), default=0.0)
    rows = []
    for span in spans:
        rows.append(_event(span.kind, span.layer, span.start - start, span.end - span.start, rank, span.step))
    waits = sorted((s.start - start, s.end - start, s.step) for s in spans if s.kind == "wait")
    for (_, ended, _), (began, _, step) in pairwise(waits):
        rows.append(_event("compute", f"step {step}", ended, began - ended, rank, step))
    return rows


def _event(kind: str, name: str, start: float, seconds: float, rank: int, step: int) -> dict[str, Any]:
    place = {"pid": rank, "tid": KINDS.index(kind), "args": {"step": step}}
    return {"name": name, "cat": kind, "ph": "X", "ts": start * 1e6, "dur": max(0.0, seconds) * 1e6, **place}


def picture(rows: list[dict[str, Any]]) -> Any:
    """One line for each rank and kind."""
    from fastdiff.bench import metrics

    metrics.require_extra()
    from matplotlib.figure import Figure

    ranks = sorted({row["pid"] for row in rows})
    figure = Figure(figsize=(12, 0.8 + 0.9 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(KINDS, ("#4c78a8", "#f2b134", "#c44e52"), strict=True))
    for number, kind in enumerate(KINDS):
        for rank in ranks:
            spans = [(r["ts"] / 1e3, r["dur"] / 1e3) for r in rows if r["pid"] == rank and r["cat"] == kind]
            axes.broken_barh(  # without edges, which would be wider than most waits
                spans, (rank - 0.4 + 0.27 * number, 0.25), color=colours[kind], linewidth=0,
                label=kind if not rank else None,
            )  # fmt: skip
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    axes.set_xlabel("milliseconds")
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=len(KINDS))
    return figure
