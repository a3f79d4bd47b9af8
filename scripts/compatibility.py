"""Runs every two levers together on tiny pipelines, and writes what became of them: benchmarks/compatibility.json, and
docs/compatibility.md, which is made of it.

    python scripts/compatibility.py                     # run everything, for half an hour; write both
    python scripts/compatibility.py --parts wan-2       # one pipeline on two ranks; the rest stays as it was
    python scripts/compatibility.py --new               # what the file does not have, of a method that came, say
    python scripts/compatibility.py --check             # run nothing; exit 1 if the page is not made of the file

What runs, and the laws that it has to hold, are in tests/coverage/combining.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from scripts.readme import table  # noqa: E402
from tests.coverage.combining import PIPELINES, Combination, Trials, factors, home, not_applicable  # noqa: E402
from tests.coverage.table import FILE, WRONG, agreed, outcomes, part  # noqa: E402
from tests.parallel.ranks import start  # noqa: E402

PAGE = ROOT / "docs/compatibility.md"
PARTS = [f"{name}-{ranks}" for ranks in (1, 2) for name in PIPELINES]
TITLES = {
    "cache": "Cache", "parallel": "Parallel", "quant": "Quantization", "solver": "Solver", "attention": "Attention",
    "compile": "Compile",
}  # fmt: skip
# Levers of the rows, and of the columns
TABLES = [
    ("cache", ("quant", "solver")), ("cache", ("parallel",)), ("cache", ("attention", "compile")),
    ("parallel", ("quant", "solver")), ("parallel", ("attention", "compile")),
    ("quant", ("solver", "attention", "compile")), ("solver", ("attention", "compile")), ("attention", ("compile",)),
]  # fmt: skip
HEAD = """# What works with what

Made by `python scripts/compatibility.py`, which runs it; do not edit. Tiny pipelines of random weights: a DiT (PixArt),
a UNet (Stable Diffusion) and a video transformer (Wan); parallel methods on two real processes. Each value runs alone
on all of them, and each two values together on the first on which both work alone. A cell says **works**, or the number
of the reason with which the two are refused; **-** where no pipeline has both.

What works holds these: the report says what was left out, sent or quantized, or aloud that nothing was; attention,
graphs and exact parallel methods change the picture no more than rounding does; `restore()` gives the plain picture to
the bit and leaves nothing behind; on one process also: each other lever changes the picture, a cache that skips nothing
changes no bit of what the other lever gives, and a second call is the first one to the bit. A refusal is one sentence,
and leaves the pipeline as it was. Of more levers at a time a covering array is tested, in which every two that work
together meet, also on two processes, and also with a call after an exception: a part of it by `make test`, all by
`make test-slow`. There the pipelines take turns. Random weights say nothing about quality.

Graphs are made by torch's own compiler front with the backend `eager`; a scope is a value of `compile.scope`.
Of attention, the two backends that run everywhere are here; any other is tried by a real call first, and refused with
the reason where it cannot run. `sparge` and `radial` are sparse attention, here with blocks of 4 and 2 tokens and from
the first token on, so that they leave some of so few out; they have to, and the report to say so."""


def main() -> int:
    parser = argparse.ArgumentParser(description="run every two levers together and write the page of it")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="pipeline and ranks")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 if the page is out of date")
    parser.add_argument("--new", action="store_true", help="run only what the file does not have")
    asked = parser.parse_args()
    if asked.new:
        for name in PIPELINES:  # one by one: where two values are tried together depends on what works alone
            keep(on_one(name, new=True))
        keep(on_ranks("new"))
    elif not asked.check:
        for name, _, ranks in (one.partition("-") for one in asked.parts):
            said = on_ranks(name) if ranks == "2" else on_one(name)
            keep(said, lambda label, own=name, shared=ranks == "2": part_of(label) == (own, shared))
    wanted = page(outcomes())
    if asked.check:
        return int(PAGE.read_text(encoding="utf-8") != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    wrong = {label: said for label, said in outcomes().items() if said.startswith(WRONG)}
    print(*(f"{label}: {said}" for label, said in wrong.items()), sep="\n", file=sys.stderr)
    return int(bool(wrong))


def on_one(name: str, new: bool = False) -> dict[str, str]:
    said = {}
    for label, outcome in part(Trials(), name, on_ranks=False, new=new):
        said[label] = outcome
        print(f"{label}: {outcome}", file=sys.stderr, flush=True)
    return said


def on_ranks(name: str) -> dict[str, str]:
    """What both ranks say; where they differ, that is wrong."""
    (said,) = start("tests.parallel.combined", [([name], 2)], timeout=7200)
    one, other = said[name]
    if not isinstance(one, dict) or not isinstance(other, dict):
        raise SystemExit(f"{one}\n{other}")
    return agreed(one, other)


def part_of(label: str) -> tuple[str, bool]:
    """The pipeline, and whether ranks share it."""
    return label.split()[0], " parallel=" in label


def keep(said: Mapping[str, str], gone: Callable[[str], bool] = lambda label: False) -> None:
    """Put outcomes into the file, in the place of those that are `gone`."""
    outcomes.cache_clear()  # another part may have been written meanwhile
    rest = {label: told for label, told in outcomes().items() if not gone(label)}
    versions = {package: version(package) for package in ("torch", "diffusers")}
    told = {"command": "python scripts/compatibility.py", "versions": versions, "outcomes": rest | said}
    FILE.write_text(json.dumps(told, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    outcomes.cache_clear()


def page(said: Mapping[str, str]) -> str:
    """The whole page, from outcomes by label."""
    reasons: dict[str, int] = {}
    parts = [HEAD, "## Each lever alone", *alone(said, reasons)]
    for kind, others in TABLES:
        columns = [(other, value) for other in others for value in factors()[other]]
        rows = [
            (f"`{value}`", *(cell(said, {kind: value, other: own}, reasons) for other, own in columns))
            for value in factors()[kind]
            if not_applicable(kind, value) is None
        ]
        title = f"{TITLES[kind]} with {' and '.join(TITLES[other].lower() for other in others)}"
        parts += [f"## {title}", table((TITLES[kind].lower(), *(f"`{own}`" for _, own in columns)), rows)]
    numbered = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return "\n\n".join([*parts, "## Reasons", numbered]) + "\n"


def alone(said: Mapping[str, str], reasons: dict[str, int]) -> Iterator[str]:
    """A row for each value, a column for each pipeline; what is for no pipeline here."""
    rows = []
    for kind, values in factors().items():
        for value in values:
            if why := not_applicable(kind, value):
                yield f"`{value}` is not applicable: {why}."
                continue
            told = [words(said.get(Combination(name, **{kind: value}).label, "not run"), reasons) for name in PIPELINES]
            rows.append((TITLES[kind].lower(), f"`{value}`", *told))
    yield table(("lever", "value", *PIPELINES.values()), rows)


def cell(said: Mapping[str, str], both: dict[str, str], reasons: dict[str, int]) -> str:
    """What became of two values, at home."""
    where = home(both, said)
    return "-" if where is None else words(said.get(Combination(where, **both).label, "not run"), reasons)


def words(outcome: str, reasons: dict[str, int]) -> str:
    if outcome.startswith(WRONG):
        return "**wrong**"
    if not outcome.startswith("refused: "):
        return outcome
    number = reasons.setdefault(outcome.removeprefix("refused: "), len(reasons) + 1)
    return f"refused {number}"


if __name__ == "__main__":
    raise SystemExit(main())
