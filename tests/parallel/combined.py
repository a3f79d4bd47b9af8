"""Combinations of a parallel method with other levers, on real ranks; run by real processes, see ranks.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.distributed as dist

from tests.coverage.combining import Combination, Trials, settings
from tests.coverage.table import QUICK_SHARED, judged, part, rows, shared


@cache
def trials() -> Trials:
    """One for all checks of a process: what others are compared with is drawn once."""
    return Trials(_alike)


def _alike(asked: Combination) -> dict[str, Any]:
    """Rank 0's settings, with the files that it wrote."""
    told = [settings(asked) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    assert told[0] is not None
    return told[0]


def covered(rank: int, ranks: int) -> dict[str, str]:
    return judged(trials(), _rows()[:QUICK_SHARED])


def covered_in_full(rank: int, ranks: int) -> dict[str, str]:
    return judged(trials(), _rows()[QUICK_SHARED:])


def sd15(rank: int, ranks: int) -> dict[str, str]:
    return part(trials(), "sd15", on_ranks=True)


def pixart(rank: int, ranks: int) -> dict[str, str]:
    return part(trials(), "pixart", on_ranks=True)


def wan(rank: int, ranks: int) -> dict[str, str]:
    return part(trials(), "wan", on_ranks=True)


def _rows() -> list[Combination]:
    return [row for row in rows() if shared(row)]
