"""Draws benchmarks/steps.json: which steps a method computes, a cell a step, as SVG. Run after measure_steps.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from fastdiff.strip import KINDS

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
FILLS = {"computed": "#1d4ed8", "partly": "#93c5fd", "predicted": "#f59e0b", "cached": "#fef3c7"}
LETTERS = {"c": "computed", "b": "partly", "p": "predicted", "r": "cached"}


def main() -> int:
    """Writes the figures that pages in docs/ show."""
    for name, model, rows in figures():
        (IMAGES / f"{name}.svg").write_text(strips(model, rows), encoding="utf-8")
    return 0


def figures(method: str | None = None) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Name, model and rows of each figure: for each model one config of each method, or all configs of one method."""
    path = ROOT / "benchmarks" / "steps.json"
    models = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else {}
    for model, rows in models.items():
        if method is None:
            firsts = {row["method"]: row for row in reversed(rows)}
            yield f"steps-{model}", model, [firsts[name] for name in sorted(firsts)]
        elif chosen := [row for row in rows if row["method"] == method]:
            yield f"steps-{method}-{model}", model, chosen


def strips(model: str, rows: list[dict[str, Any]]) -> str:
    """A strip a config, a cell a step; computed cells are taller, and each has its words as a tooltip."""
    left, cell, line = 210, 11, 24
    width = left + max(cell * max(len(row["steps"]) for row in rows), 4 * 160) + 8
    parts = []
    for number, row in enumerate(rows):
        y = 34 + number * line
        name, method = row["name"], row["method"]
        shown = name if name.startswith(method) else f"{method} ({name})"
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(shown)}</text>')
        for index, letter in enumerate(row["steps"]):
            kind = LETTERS[letter]
            place = f'y="{y}" height="18"' if kind == "computed" else f'y="{y + 5}" height="13"'
            parts.append(
                f'<rect x="{left + index * cell}" {place} width="{cell - 2}" fill="{FILLS[kind]}" stroke="#6b7280">'
                f"<title>step {index}: {KINDS[kind][0]}</title></rect>"
            )
    for number, kind in enumerate(FILLS):
        x = left + number * 160
        parts.append(f'<rect x="{x}" y="8" width="{cell - 2}" height="13" fill="{FILLS[kind]}" stroke="#6b7280"/>')
        parts.append(f'<text x="{x + 14}" y="19">{KINDS[kind][0]}</text>')
    height = 42 + len(rows) * line
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="13"><title>{model}: which steps each method computes</title>\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
