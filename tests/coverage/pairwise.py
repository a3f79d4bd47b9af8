"""A covering array: few combinations in which every two values that work together meet.

Values that do not work together are kept apart, so that a refusal of one pair hides no other. Greedy: each row begins
with a pair that no row has yet, and takes, lever by lever, the value that meets most others for the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

Row = dict[str, str]
Value = tuple[str, str]
Pair = frozenset[Value]
Works = Callable[[Pair], bool]


def covering(
    levers: Mapping[str, Sequence[str]], homes: Mapping[str, Works], off: str, after: Sequence[Row] = ()
) -> list[Row]:  # fmt: skip
    """Rows with a `pipeline` and a value of each lever, or `off`, of what the rows `after` which they come have not.

    homes: for each pipeline, whether two values of two levers, or one alone, work there. Every pair that works
    somewhere is in a row, and every value with every pipeline that it works on.
    """
    values = [(kind, value) for kind, known in levers.items() for value in known]
    sets = [frozenset(both) for both in combinations(values, 2) if len({kind for kind, _ in both}) == 2]
    sets += [frozenset([value]) for value in values]
    left = {(home, one) for home, works in homes.items() for one in sets if len(one) == 1 and works(one)}
    left |= {("", one) for one in sets if len(one) == 2 and any(works(one) for works in homes.values())}
    rows: list[Row] = []
    for row in after:
        left -= set(met({kind: row[kind] for kind in row.keys() & levers.keys() if row[kind] != off}, row["pipeline"]))
    place = {value: number for number, value in enumerate(values)}
    for begin in sorted(left, key=lambda at: (-len(at[1]), at[0], sorted(place[value] for value in at[1]))):
        if begin in left:
            home = begin[0] or _home(homes, begin[1], left)
            row = _row(dict(begin[1]), home, levers, homes[home], left)
            left -= set(met(row, home))
            rows.append({"pipeline": home} | {kind: row.get(kind, off) for kind in levers})
    return rows


def met(row: Row, home: str) -> Iterator[tuple[str, Pair]]:
    """What a row covers: its pairs, wherever, and its values on this pipeline."""
    for both in combinations(row.items(), 2):
        yield "", frozenset(both)
    for value in row.items():
        yield home, frozenset([value])


def _home(homes: Mapping[str, Works], pair: Pair, left: set[tuple[str, Pair]]) -> str:
    """Of the pipelines on which a pair works, that with most values that no row has on it."""
    fit = [home for home, works in homes.items() if works(pair)]
    return max(fit, key=lambda home: sum(at == home for at, _ in left))


def _row(
    begun: Row, home: str, levers: Mapping[str, Sequence[str]], works: Works, left: set[tuple[str, Pair]]
) -> Row:  # fmt: skip
    """The pair, and for each other lever the value that works with all before it and meets most that is new."""
    row = dict(begun)
    for kind, known in levers.items():
        if kind in row:
            continue
        gains = {}
        for value in known:
            new = [frozenset([(kind, value), other]) for other in row.items()]
            if works(frozenset([(kind, value)])) and all(map(works, new)):
                gains[value] = sum(("", pair) in left for pair in new) + ((home, frozenset([(kind, value)])) in left)
        best = max(gains, key=lambda value: gains[value], default=None)
        if best is not None and gains[best]:
            row[kind] = best
    return row
