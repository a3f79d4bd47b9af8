"""How long a step takes whose messages travel while a rank computes: what it posts and waits for, played in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

# operations since the event before, the number of an exchange, and its bytes, or None where it is waited for
Event: TypeAlias = tuple[int, int, int | None]


def elapsed(
    events: Sequence[Event], flops: int, computing: float, link: float, latency: float, parts: int = 1
) -> float:  # fmt: skip
    """Seconds of a step with so many of `computing`, in which `flops` are done; `link` in bytes a second, `latency` in
    seconds. What leaves travels while the rank computes, one behind the other, until it is waited for; of several
    `parts` of the batch the next one computes then."""
    pace, now, free = computing / max(1, flops) / parts, 0.0, 0.0

    def turns() -> Iterator[None]:
        nonlocal now, free
        there: dict[int, float] = {}
        for work, number, size in events:
            now += work * pace
            if size is not None:
                free = max(free, now) + size / parts / link
                there[number] = free + latency
            else:
                yield
                now = max(now, there[number])

    left = [turns() for _ in range(parts)]
    while left:
        left = [part for part in left if next(part, left) is None]
    rest = computing - sum(work for work, *_ in events) * pace * parts
    return max(now + rest, free)
