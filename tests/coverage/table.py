"""What the committed table of combinations says, and the covering array of those that work by it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from fastdiff.config import OFF
from tests.coverage.combining import PIPELINES, WORKS, Combination, Trials, factors, pairs, singles
from tests.coverage.pairwise import Pair, covering

FILE = Path(__file__).parents[2] / "benchmarks/compatibility.json"
WRONG = "wrong: "
# Rows of the covering array that the normal tests run, on one rank and on two; the others are slow. They begin with the
# rows that have most new pairs; a graph takes as long as ten rows without.
QUICK, QUICK_SHARED = 14, 5


@cache
def outcomes() -> dict[str, str]:
    """By label of a combination: works, or why it is refused."""
    return json.loads(FILE.read_text(encoding="utf-8"))["outcomes"] if FILE.is_file() else {}


@cache
def rows() -> tuple[Combination, ...]:
    """The covering array, those without a graph and with most levers first."""

    def works(name: str) -> Callable[[Pair], bool]:
        return lambda values: outcomes().get(Combination(name, **dict(values)).label) == WORKS

    made = [Combination(**row) for row in covering(factors(), {name: works(name) for name in PIPELINES}, OFF)]
    return tuple(sorted(made, key=lambda row: (row.compile != OFF, -len(row.levers))))


def shared(asked: Combination) -> bool:
    return asked.parallel != OFF


def judged(trials: Trials, asked: Iterable[Combination], breaks: bool = True) -> dict[str, str]:
    """What becomes of each, by its label; a broken law or a traceback is `wrong`, and says which."""
    said = {}
    for one in asked:
        try:
            said[one.label] = trials.tried(one, breaks)
        except Exception:
            said[one.label] = WRONG + traceback.format_exc()
    return said


def part(trials: Trials, name: str, on_ranks: bool) -> dict[str, str]:
    """A pipeline's part of the table that runs on one rank, or on two: each value, and each two that work alone. What
    works alone elsewhere is known of the committed table."""
    said = judged(trials, [one for one in singles(name) if shared(one) is on_ranks])
    both = [one for one in pairs(name, outcomes() | said) if shared(one) is on_ranks]
    return said | judged(trials, both, breaks=False)  # in rows, all of them meet with it
