"""All that only a card can say, in under eight minutes: writes benchmarks/gpu-<card>.json after each row.

python scripts/bench_gpu.py                    all sections
python scripts/bench_gpu.py --sections 0,1     the gates alone: run these first, and mend what fails
python scripts/bench_gpu.py --dry-run          the same code on a CPU, with tiny sizes

It runs from a bare checkout. What the machine lacks can travel as wheels: `make gpu-kit` puts them into build/gpu-kit,
of which what is not here, or older, is unpacked for the run; nothing is installed, and no network is needed.
"""

# ruff: noqa: E402, I001
from __future__ import annotations

import faulthandler
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
UNPACKED = tempfile.TemporaryDirectory()  # kept until the end: modules are loaded from it
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent), UNPACKED.name]

from gpu.kit import unpack

unpack(ROOT / "build/gpu-kit", Path(UNPACKED.name))

import torch
import typer

from fastdiff import output
from fastdiff.bench.row import command
from gpu import card, compiled, gates, layers, models
from gpu.bench import Bench, Row

MOST = 460  # seconds of a whole run: what a lent card is lent for, less its start
SUMMARY = 12_000  # characters


@dataclass(frozen=True)
class Section:
    title: str
    seconds: float  # at which what is left of it stays unmeasured
    rows: Callable[[Bench], Iterator[Row]]


SECTIONS = (
    Section("the card", 30, card.card),
    Section("gates", 75, gates.gates),
    Section("compile gate", 60, compiled.compiled),
    Section("waits for NCCL", 10, card.waits),
    Section("layers", 75, layers.layers),
    Section("SDXL", 95, models.unets),
    Section("FLUX", 135, models.transformers),
)


def main(
    sections: Annotated[str, typer.Option(help="numbers, with commas between them")] = "0,1,2,3,4,5,6",
    dry_run: Annotated[bool, typer.Option(help="on a CPU, with tiny sizes: says whether it runs")] = False,
    file: Annotated[Path | None, typer.Option("--output", "-o", help="else benchmarks/gpu-<card>.json")] = None,
) -> None:
    if unknown := [word for word in sections.split(",") if word not in map(str, range(len(SECTIONS)))]:
        raise typer.BadParameter(f"{unknown[0]!r} is no section; they are 0 to {len(SECTIONS) - 1}")
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("there is no card that torch can use; --dry-run rehearses on the CPU")
    if not dry_run:
        faulthandler.dump_traceback_later(MOST + 20, exit=True)  # a kernel that hangs cannot be stopped otherwise
    began, device = time.monotonic(), torch.device("cpu" if dry_run else "cuda:0")
    name = "dry" if dry_run else torch.cuda.get_device_name(device)
    file = file or ROOT / f"benchmarks/gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    told: dict[str, Any] = {"command": command(), "card": name, "sections": {}}
    for number in sorted(map(int, sections.split(","))):
        measure(SECTIONS[number], began + MOST, Bench(device, dry_run, 1 if dry_run else 3), told, file)
    faulthandler.cancel_dump_traceback_later()
    print(summary(told))
    gate = [row for s in told["sections"].values() for row in s["rows"] if row.get("passed") is False]
    raise typer.Exit(bool(gate))


def measure(section: Section, end: float, bench: Bench, told: dict[str, Any], file: Path) -> None:
    """Row after row until the deadline; what was not reached is missing, and the section says so."""
    began = time.monotonic()
    deadline = min(end, began + section.seconds)
    found: dict[str, Any] = {"state": "not measured", "rows": []}
    told["sections"][section.title] = found
    state = "complete"
    if time.monotonic() < deadline:
        try:
            for row in section.rows(bench):
                found["rows"].append(row)
                found["state"] = f"broke off after {row['name']}"
                write(told, file)
                if time.monotonic() > deadline:
                    state = f"stopped at its deadline, after {row['name']}"
                    break
        except Exception as error:
            state = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        found["state"], found["seconds"] = state, round(time.monotonic() - began, 1)
    write(told, file)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def write(told: dict[str, Any], file: Path) -> None:
    output.write(file, lambda part: part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8"))


def summary(told: dict[str, Any]) -> str:
    """What failed first, then a line a row, cut to what a narrow channel takes."""
    lines = [f"{told['card']}: {told['command']}"]
    for title, section in told["sections"].items():
        rows = section["rows"]
        bad = [row for row in rows if "failed" in row or row.get("passed") is False]
        lines.append(f"\n{title}: {section['state']}, {len(rows)} rows, {len(bad)} failed")
        lines += [f"  FAILED {_line(row)}" for row in bad]
        lines += [f"  {_line(row)}" for row in rows if row not in bad and "passed" not in row]
    text = "\n".join(lines)
    return text if len(text) <= SUMMARY else text[: SUMMARY - 4] + "\n..."


def _line(row: Row) -> str:
    return " ".join(str(v) if k == "name" else f"{k}={v}" for k, v in row.items() if k not in ("config", "notes"))


if __name__ == "__main__":
    typer.run(main)
