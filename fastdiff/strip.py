"""What a run did, one cell a step, as HTML that needs no style sheet and no script: for notebooks and the demo."""

from __future__ import annotations

from html import escape

from .report import CACHED, COMPUTED, RunReport

# kind of step: what to call it, and how its cell is filled; told apart without colour by hatching, height and border
KINDS = {
    "computed": ("computed", "background:#1d4ed8"),
    "partly": ("one branch computed", "background:linear-gradient(#bfdbfe 50%,#1d4ed8 50%)"),
    "predicted": ("predicted", "background:repeating-linear-gradient(45deg,#f59e0b 0 3px,#fef3c7 3px 6px)"),
    "cached": ("reused", "background:#fef3c7"),
}
_CELL = "display:inline-block;box-sizing:border-box;width:12px;height:22px;border:1px solid #6b7280;border-radius:2px;"


def cells(report: RunReport) -> list[str]:
    """The kind of each step, a key of KINDS. A step in which another rank did the work counts as computed."""
    return [_kind(report, index) for index in range(report.steps)]


def _kind(report: RunReport, index: int) -> str:
    states = {row[index] for row in report.branches.values() if len(row) > index}
    if CACHED not in states:
        return "computed"
    if COMPUTED in states:
        return "partly"
    return "predicted" if index in report.predicted else "cached"


def html(report: RunReport, title: str = "") -> str:
    """Title, strip, legend and the report's line; a screen reader hears the counts instead of the cells."""
    kinds = cells(report)
    counts = {kind: kinds.count(kind) for kind in KINDS if kind in kinds}
    heading = f"<div><b>{escape(title)}</b></div>" if title else ""
    drawn = "".join(
        f'<span style="{_CELL}{KINDS[kind][1]}" title="{escape(_tooltip(report, index, kind))}"></span>'
        for index, kind in enumerate(kinds)
    )
    said = ", ".join(f"{count} {KINDS[kind][0]}" for kind, count in counts.items())
    legend = "".join(
        f'<span style="white-space:nowrap"><span aria-hidden="true" style="{_CELL}vertical-align:middle;'
        f'{KINDS[kind][1]}"></span> {count} {KINDS[kind][0]}</span>'
        for kind, count in counts.items()
    )
    strip = (
        f'<div role="img" aria-label="{len(kinds)} steps: {said}" '
        f'style="display:flex;flex-wrap:wrap;gap:2px;margin:6px 0">{drawn}</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:4px 16px;font-size:90%">{legend}</div>'
    )
    return f"<div>{heading}{strip if kinds else ''}<div>{escape(str(report))}</div></div>"


def _tooltip(report: RunReport, index: int, kind: str) -> str:
    names = report.branch_names()
    parts = [f"{names[b]} {row[index]}" for b, row in sorted(report.branches.items()) if len(row) > index]
    detail = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    return f"step {index}: {KINDS[kind][0]}{detail}, {report.step_seconds[index] * 1000:.0f} ms"
