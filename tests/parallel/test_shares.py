"""How much of the work each rank gets; on real ranks it is checked in circles.py."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from fastdiff.parallel.shares import Speeds, shares


def seconds(parts: list[tuple[int, int]], speeds: tuple[float, ...]) -> float:
    return max((end - begin) / speed for (begin, end), speed in zip(parts, speeds, strict=True))


@pytest.mark.parametrize("speeds", [(1, 1), (2, 1), (1, 3.5), (1, 2, 4), (5, 1, 1)])
@pytest.mark.parametrize("total", [3, 4, 7, 12])
def test_shares_are_the_best_that_whole_rows_allow(total: int, speeds: tuple[float, ...]) -> None:
    parts = shares(total, len(speeds), speeds)
    assert parts[0][0] == 0 and parts[-1][1] == total
    assert all(a[1] == b[0] and a[1] > a[0] for a, b in pairwise(parts))
    ways = (way for way in product(range(1, total + 1), repeat=len(speeds)) if sum(way) == total)
    best = min(max(count / speed for count, speed in zip(way, speeds, strict=True)) for way in ways)
    assert seconds(parts, speeds) == pytest.approx(best)


def test_without_speeds_they_are_even_the_longer_ones_first() -> None:
    assert shares(7, 3) == [(0, 3), (3, 5), (5, 7)] and shares(2, 3) == [(0, 1), (1, 2), (2, 2)]
    assert shares(2, 3, (1.0, 2.0, 3.0)) == shares(2, 3), "too few for a part each"


def test_speeds_are_learned_from_a_run_and_a_slow_rank_holds_nobody_up() -> None:
    """One rank has half the speed: after a run whose shares were wrong, a step takes three quarters at most."""
    true, learned = (2.0, 1.0), Speeds([1.0, 1.0], measured=True)
    took = []
    for _ in range(3):
        parts = learned.cut(64, 2)
        took.append(seconds(parts, true))
        own = [(end - begin) / speed for (begin, end), speed in zip(parts, true, strict=True)]
        waits = max(own)
        reports = [{"step_seconds": [waits], "waited_seconds": waits - one} for one in own]
        learned.learn(reports, [0, 1])
    assert took[0] / took[1] > 1.25 and took[1] == took[2]
    assert learned.values[0] / learned.values[1] == pytest.approx(2)
    given = Speeds([1.0, 3.0])
    given.cut(8, 2)
    given.learn([{"step_seconds": [1.0], "waited_seconds": 0.0}] * 2, [0, 1])
    assert given.values == [1.0, 3.0] and given.among([1]) == [3.0] and Speeds().among([0, 1]) == []
