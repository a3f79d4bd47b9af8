"""Does fastdiff beat each rival? The rule is fixed beforehand, so that nobody picks the flattering comparison.

A rival's point is beaten by a point of ours that has at least its PSNR at 1.25 times its denoising speed-up, or at
least its speed-up at 3 dB more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import PSNR_CAP
from .row import Row

FASTER, CLOSER = "faster", "closer"
FASTER_BY, CLOSER_BY = 1.25, 3.0
_ROUNDING = 1e-6  # rows are rounded to five decimals; an exact tie must not fail by the last bit of a float


@dataclass(frozen=True)
class _Match:
    """How far one point of ours is from beating a rival by one rule; it does from `score` 1 on."""

    ours: str
    rule: str
    margin: float
    score: float


def verdict(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each rival and each fewer-steps row that has numbers, which fastdiff row beats it, by which rule.

    `margin` is the ratio of speed-ups (rule "faster") or the difference in dB ("closer"). Where nothing beats the
    rival, `beaten_by` is None and `rule`, `margin` and `nearest` tell of the row that comes nearest; all are None where
    no row of ours has the rival's PSNR or its speed-up.
    """
    ours = [row for row in rows if row.kind == "fastdiff" and _measured(row)]
    rivals = [row for row in rows if row.kind in ("peer", "fewer_steps") and _measured(row)]
    return [_judge(rival, ours) for rival in rivals]


def _measured(row: Row) -> bool:
    return row.error is None and row.psnr is not None and row.speedup_denoising is not None


def _judge(rival: Row, ours: Sequence[Row]) -> dict[str, Any]:
    matches = [match for row in ours for match in _matches(row, rival)]
    best = max(matches, key=lambda match: match.score, default=None)
    beaten = best is not None and best.score >= 1 - _ROUNDING
    return {
        "rival": rival.name,
        "kind": rival.kind,
        "speedup": rival.speedup_denoising,
        "psnr": rival.psnr,
        "beaten_by": best.ours if best and beaten else None,
        "rule": best.rule if best else None,
        "margin": round(best.margin, 4) if best else None,
        "nearest": best.ours if best else None,
    }


def _matches(row: Row, rival: Row) -> list[_Match]:
    assert row.psnr is not None and rival.psnr is not None
    assert row.speedup_denoising is not None and rival.speedup_denoising is not None
    decibels, ratio = row.psnr - rival.psnr, row.speedup_denoising / rival.speedup_denoising
    found = []
    if decibels >= -_ROUNDING:
        found.append(_Match(row.name, FASTER, ratio, ratio / FASTER_BY))
    if ratio >= 1 - _ROUNDING:
        found.append(_Match(row.name, CLOSER, decibels, decibels / CLOSER_BY))
    return found


def markdown(verdicts: Sequence[dict[str, Any]]) -> str:
    """The verdict as a Markdown table, with the count above it."""
    if not verdicts:
        return "No rival was measured."
    beaten = sum(entry["beaten_by"] is not None for entry in verdicts)
    lines = [
        f"{beaten} of {len(verdicts)} rivals beaten (at least their PSNR at {FASTER_BY}x their denoising speed-up, "
        f"or at least their speed-up at {CLOSER_BY:g} dB more).",
        "",
        "| rival | denoising | PSNR | beaten by | margin |",
        "|---|---:|---:|---|---|",
    ]
    for entry in verdicts:
        psnr = "identical" if entry["psnr"] >= PSNR_CAP else f"{entry['psnr']:.1f}"
        winner = entry["beaten_by"] or (f"**no**, nearest {entry['nearest']}" if entry["nearest"] else "**no**")
        lines.append(f"| {entry['rival']} | {entry['speedup']:.2f} | {psnr} | {winner} | {_margin(entry)} |")
    return "\n".join(lines)


def _margin(entry: dict[str, Any]) -> str:
    if entry["margin"] is None:
        return "nothing of ours has its PSNR or its speed-up"
    if entry["rule"] == FASTER:
        return f"{entry['margin']:.2f}x at its PSNR or better"
    return f"{entry['margin']:+.1f} dB at its speed-up or better"
