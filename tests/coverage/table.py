"""What the committed table of combinations says, and the covering array of those that work by it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from fastdiff.config import OFF
from tests.coverage.combining import PIPELINES, WORKS, Combination, Trials, factors, home, pairs, singles
from tests.coverage.pairwise import Pair, Row, covering

FILE = Path(__file__).parents[2] / "benchmarks/compatibility.json"
WRONG = "wrong: "
# Rows of the covering array that the normal tests run, on one rank and on two, of those with most levers; others are
# slow. A graph takes as long as ten rows without.
QUICK, QUICK_SHARED = range(0, 30, 5), range(1)


@cache
def outcomes() -> dict[str, str]:
    """By label of a combination: works, or why it is refused."""
    return json.loads(FILE.read_text(encoding="utf-8"))["outcomes"] if FILE.is_file() else {}


@cache
def rows() -> tuple[Combination, ...]:
    """The covering array: first what one rank can run without graphs, then what is left for graphs, and for two ranks.
    Of each, those with most levers come first."""

    def works(name: str) -> Callable[[Pair], bool]:
        return cache(lambda values: expected(name, dict(values)) == WORKS)

    known = {name: works(name) for name in PIPELINES}
    made: list[Row] = []
    for later in (("compile", "parallel"), ("parallel",), ()):
        levers = {kind: values for kind, values in factors().items() if kind not in later}
        made += [dict.fromkeys(later, OFF) | row for row in covering(levers, known, OFF, made)]
    found = [Combination(**row) for row in made]
    return tuple(sorted(found, key=lambda row: (row.compile != OFF, -len(row.levers))))


def expected(name: str, levers: dict[str, str]) -> str | None:
    """What is known of one value, or of two, on a pipeline: of two what became of them at home, if each works here."""
    told = outcomes()
    alone = [told.get(Combination(name, **{kind: value}).label) for kind, value in levers.items()]
    where = home(levers, told)
    if len(levers) == 1 or where is None or any(one != WORKS for one in alone):
        return next((one for one in alone if one != WORKS), WORKS)
    return told.get(Combination(where, **levers).label)


def shared(asked: Combination) -> bool:
    return asked.parallel != OFF


def judged(trials: Trials, asked: Iterable[Combination], **which: bool) -> Iterator[tuple[str, str]]:
    """What becomes of each, with its label; a broken law or a traceback is `wrong`, and says which."""
    for one in asked:
        try:
            yield one.label, trials.tried(one, **which)
        except Exception:
            yield one.label, WRONG + traceback.format_exc()


def agreed(one: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """What two ranks say; of a rank that refuses and one that waited for it in vain, the first."""
    said = {}
    for label in one:
        both = sorted({one[label], other.get(label, "nothing")}, key=lambda text: "broke off" in text)
        lost = len(both) == 2 and both[0].startswith("refused: ") and "broke off" in both[1]
        said[label] = both[0] if len(both) == 1 or lost else WRONG + " / ".join(both)
    return said


def part(trials: Trials, name: str, on_ranks: bool, new: bool = False) -> Iterator[tuple[str, str]]:
    """A pipeline's part of the table that runs on one rank, or on two: each value, and each two that work alone. What
    works alone elsewhere is known of the committed table. new: without what that has."""
    known, left_out = dict(outcomes()), frozenset(outcomes() if new else ())

    def asked(found: Iterable[Combination]) -> list[Combination]:
        return [one for one in found if shared(one) is on_ranks and one.label not in left_out]

    for label, said in judged(trials, asked(singles(name))):
        known[label] = said
        yield label, said
    both = asked(pairs(name, known))
    yield from judged(trials, both, again=not on_ranks, breaks=False)  # rows hold them to the rest
