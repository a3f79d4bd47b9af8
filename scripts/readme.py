"""Write the generated parts of README.md (methods, picture, measured rows), and docs/results.md, which has all rows.

    python scripts/readme.py            # rewrite them
    python scripts/readme.py --check    # change nothing; exit 1 if one is out of date

Methods come from the registry, numbers from benchmarks/*.json (written by `fastdiff bench --json`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.bench.metrics import PSNR_CAP
from fastdiff.registry import ROOMS, registry

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results.md"
MODELS = ("shapes-unet", "shapes-dit")
PICTURE = "docs/images/shapes-unet-balanced.png"
COLUMNS = {
    "name": "run",
    "kind": "kind",
    "steps": "steps",
    "computed_steps": "computed",
    "speedup": "speedup",
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "psnr_converged": "PSNR dB to converged",
    "prompt_accuracy": "prompt accuracy",
}
_DIGITS = {"speedup": 2, "psnr": 1, "ssim": 3, "psnr_converged": 1, "prompt_accuracy": 3}
HEAD = """# Results

Every row of the committed benchmarks, made from `benchmarks/*.json` by `make readme`. Speedup is the baseline's median
latency of a whole call over the row's, rounds interleaved in one process; PSNR and SSIM are against the plain picture
of the same seed, PSNR to converged against the same seed solved in 500 steps; computed counts the steps in which the
denoiser ran in full. Rows of kind `fewer_steps` take fewer steps of the named solver, rows of kind `peer` are other
libraries on the same pipeline. A rival is called beaten if a row of ours has at least its PSNR at 1.25 times its
speedup, or at least its speedup and 3 dB more.

Quality was measured in batches of 8, time on single images: methods that decide by a threshold decide for a batch as a
whole, so that their computed steps may differ between the two.

Rows named `fast` are the preset of that name before it had a solver: `ab_cache` with `interval = 3`."""
_URL = re.compile(r"https?://[^\s)>,]+")


class OutOfShape(Exception):
    """README.md or a benchmark file is not as this script needs it; the message says what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description="write the generated parts of README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is out of date")
    check = parser.parse_args().check
    try:
        wanted = {README: rendered(README.read_text(encoding="utf-8")), RESULTS: results_page()}
    except OutOfShape as error:
        print(error, file=sys.stderr)
        return 1
    for path, after in wanted.items():
        if path.is_file() and path.read_text(encoding="utf-8") == after:
            continue
        if check:
            print(f"{path.name} is out of date; run `make readme`", file=sys.stderr)
            return 1
        path.write_text(after, encoding="utf-8")
        print(f"{path.name} rewritten")
    return 0


def rendered(readme: str) -> str:
    """The README with its generated parts made anew."""
    results = {model: rows_of(model) for model in MODELS}
    parts = {
        "methods": methods_table(), "picture": picture(results["shapes-unet"]), "solver": solvers(),
        "presets": presets(results),
    }  # fmt: skip
    for name, text in parts.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if readme.count(start) != 1 or readme.count(end) != 1:
            raise OutOfShape(f"README.md needs the markers {start} and {end}, once each")
        head, rest = readme.split(start)
        readme = f"{head}{start}\n{text}\n{end}{rest.split(end)[1]}"
    return readme


def methods_table() -> str:
    """One row a method that ships with fastdiff; a room without methods says so."""
    rows = []
    for kind in ROOMS:
        own = sorted((n, cls) for n, cls in registry(kind).items() if cls.__module__.startswith("fastdiff."))
        rows += [(f"`{name}`", kind, summary(cls), source(cls)) for name, cls in own] or [
            ("none yet", kind, "This room is still empty.", "")
        ]
    return table(("method", "kind", "what it does", "source"), rows)


def summary(cls: type) -> str:
    """First line of the class docstring."""
    return (cls.__doc__ or "").strip().splitlines()[0].replace("|", "\\|")


def source(cls: type) -> str:
    """The first link in the docstring of the method's module."""
    found = _URL.search(importlib.import_module(cls.__module__).__doc__ or "")
    if not found:
        return "this project"
    url = found[0].rstrip(".;,")
    if "arxiv.org/abs/" in url:
        return f"[arXiv {url.rsplit('/', 1)[-1]}]({url})"
    return f"[{url.rstrip('/').rsplit('/', 1)[-1]}]({url})"


def rows_of(model: str) -> list[Mapping[str, Any]]:
    """Rows of the committed benchmark; none, with a word on stderr, where it has not been made."""
    path = ROOT / "benchmarks" / f"{model}.json"
    if not path.is_file():
        print(f"benchmarks/{path.name} does not exist; `make bench` makes it", file=sys.stderr)
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise OutOfShape(f"benchmarks/{path.name} is not JSON: {error}; `make bench` makes it anew") from None
    for row in rows if isinstance(rows, list) else [{}]:
        if missing := [key for key in COLUMNS if key not in row]:
            raise OutOfShape(f"benchmarks/{path.name} has a row without {', '.join(missing)}")
    return rows


def shown(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of README: plain, presets, our plans, and those rivals that no other rival beats in both respects."""
    rivals = [row for row in rows if row["kind"] in ("peer", "fewer_steps") and row["psnr"] is not None]
    best = [
        row for row in rivals
        if not any(other["psnr"] > row["psnr"] and other["speedup"] > row["speedup"] for other in rivals)
    ]  # fmt: skip
    own = [row for row in rows if row["name"] in ("baseline", "lossless", "balanced")]
    plans = [row for row in rows if str(row["name"]).startswith("dp") and row["speedup"] is not None]
    return own + sorted(plans, key=lambda row: row["speedup"]) + sorted(best, key=lambda row: row["speedup"])


def results_page() -> str:
    """Every row of every committed benchmark, with what made it."""
    parts = [HEAD]
    for path in sorted((ROOT / "benchmarks").glob("shapes-*.json")):
        if path.stem.endswith("-verdict"):
            continue
        rows = rows_of(path.stem)
        first = rows[0]
        facts = (
            f"{first['prompts']} held-out captions, {first['rounds']} timed rounds, {first['scheduler']}, "
            f"{first['environment']['device']}, {first['environment']['threads']} thread; "
            f"torch {first['environment']['versions'].get('torch', '?')}"
        )
        body = table(tuple(COLUMNS.values()), [tuple(cell(key, row[key]) for key in COLUMNS) for row in rows])
        failed = [f"- {row['name']}: {row['error']}" for row in rows if row.get("error")]
        plot = f"![Quality over speed](../benchmarks/{path.stem}.png)\n\n" if path.with_suffix(".png").is_file() else ""
        parts.append(f"## {path.stem}\n\n{facts}. Made by `{folded(first['command'])}`.\n\n{plot}{body}")
        parts += [verdict_of(path)] + (["Failed:\n\n" + "\n".join(failed)] if failed else [])
    return "\n\n".join(part for part in parts if part) + "\n"


def folded(command: str) -> str:
    """A command that names each file of a folder of configs, as the shorter one that names the folder."""
    return re.sub(r"(--config (\S+)/[^/\s]+\.toml)( --config \2/[^/\s]+\.toml)+", r"--config \2", command)


def verdict_of(path: Path) -> str:
    """For how many rivals some row of ours has at least their quality at 1.25 times their speed, or 3 dB more at it."""
    file = path.with_name(f"{path.stem}-verdict.json")
    if not file.is_file():
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    lost = [row for row in found if not row["beaten_by"]]
    told = f"{len(found) - len(lost)} of {len(found)} rival rows are beaten by that rule."
    if not lost:
        return told
    names = ", ".join(f"{row['rival']} ({row['speedup']:.2f}x, {row['psnr']:.1f} dB)" for row in lost)
    return f"{told} Not beaten: {names}."


def presets(results: Mapping[str, list[Mapping[str, Any]]]) -> str:
    parts = []
    for model, rows in results.items():
        body = (
            table(tuple(COLUMNS.values()), [tuple(cell(key, row[key]) for key in COLUMNS) for row in shown(rows)])
            if rows
            else "Not measured yet."
        )
        parts.append(f"`{model}`:\n\n{body}")
    return "\n\n".join(parts)


def cell(key: str, value: Any) -> str:
    """A number as the table shows it; equal pictures have no finite PSNR."""
    if value is None:
        return "-"
    if key == "psnr" and value >= PSNR_CAP:
        return "identical"
    if isinstance(value, (int, float)) and key in _DIGITS:
        return f"{value:.{_DIGITS[key]}f}"
    return str(value).replace("|", "\\|")


def solvers() -> str:
    """For each number of evaluations, the fitted solver beside the stock one that comes nearest to the converged
    picture with as many."""
    parts = []
    for model in MODELS:
        rows = rows_of(f"{model}-solver")
        plain = next((row for row in rows if row["kind"] == "baseline"), None)
        if plain is None:
            continue
        head = (
            "evaluations", "fitted: PSNR dB to converged", "speedup", "prompt accuracy", "best stock solver", "PSNR dB",
            "speedup",
        )  # fmt: skip
        own = [row for row in rows if row["kind"] == "fastdiff" and not row["error"]]
        body = [beside(row, rows) for row in sorted(own, key=lambda row: row["computed_steps"])]
        accuracy = f"prompt accuracy {plain['prompt_accuracy']:.3f}"
        told = (
            f"`{model}`, {plain['prompts']} captions that nothing was fitted on; plain diffusers, {plain['steps']} "
            f"steps of {plain['scheduler']}: {plain['psnr_converged']:.1f} dB, {accuracy}."
        )
        parts.append(f"{told}\n\n{table(head, body)}")
    return "\n\n".join(parts) or "Not measured yet."


def beside(row: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """A row of the fitted solver and its best rival of as many evaluations."""
    same = [
        other for other in rows
        if other["kind"] == "fewer_steps" and other["steps"] == row["computed_steps"] and other["psnr_converged"]
    ]  # fmt: skip
    best = max(same, key=lambda other: other["psnr_converged"])
    name = best["name"].partition(" steps")[2].strip() or best["scheduler"]
    return (
        str(row["computed_steps"]), *(cell(key, row[key]) for key in ("psnr_converged", "speedup", "prompt_accuracy")),
        name, cell("psnr_converged", best["psnr_converged"]), cell("speedup", best["speedup"]),
    )  # fmt: skip


def picture(rows: list[Mapping[str, Any]]) -> str:
    """The grid, with the ratio that was measured."""
    row = next((r for r in rows if "balanced" in str(r["name"]).split()), None)
    told = f", {row['speedup']:.2f} times as fast in the benchmark below" if row else ""
    return f"![Plain diffusers above, preset balanced below, same prompts and seeds]({PICTURE})\n\n" + (
        f"Top: plain diffusers. Bottom: preset `balanced`{told}. Same prompts, same seeds."
    )


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
