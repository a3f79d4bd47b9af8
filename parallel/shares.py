"""How much of the work each rank gets: even shares, or shares that suit how fast each of them is."""

from __future__ import annotations

from collections.abc import Sequence


def shares(total: int, parts: int, speeds: Sequence[float] = ()) -> list[tuple[int, int]]:
    """Begin and end of each part of a range: in proportion to the speeds, else even, the longer ones first.

    With `speeds` each part is at least 1, and the last ends of rounding go to whom they slow down least: the time of a
    step is the largest of parts / speed (STADI, https://arxiv.org/abs/2509.04719, without its skipped steps).
    """
    if not speeds:
        base, extra = divmod(total, parts)
        counts = [base + (k < extra) for k in range(parts)]
    else:
        counts = [1] * parts
        for _ in range(total - parts):  # whoever is ready first with one more
            counts[min(range(parts), key=lambda k: ((counts[k] + 1) / speeds[k], k))] += 1
    ends = [sum(counts[: k + 1]) for k in range(parts)]
    return list(zip([0, *ends[:-1]], ends, strict=True))
