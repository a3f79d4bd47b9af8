"""Combinations of a parallel method with other levers, on real ranks; run by real processes, see ranks.py."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch.distributed as dist

from tests.coverage.combining import PIPELINES, Combination, Trials, settings
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
    return dict(judged(trials(), _rows(quick=True)))


def covered_in_full(rank: int, ranks: int) -> dict[str, str]:
    return dict(judged(trials(), _rows(quick=False)))


def sd15(rank: int, ranks: int) -> dict[str, str]:
    return _whole("sd15", rank)


def pixart(rank: int, ranks: int) -> dict[str, str]:
    return _whole("pixart", rank)


def wan(rank: int, ranks: int) -> dict[str, str]:
    return _whole("wan", rank)


def new(own: int, _ranks: int) -> dict[str, str]:
    """What the committed table does not have; for the script, no check of a test."""
    return {label: said for name in PIPELINES for label, said in _whole(name, own, new=True).items()}


def _whole(name: str, rank: int, new: bool = False) -> dict[str, str]:
    """Takes minutes, and says how far it is."""
    said = {}
    for label, outcome in part(trials(), name, on_ranks=True, new=new):
        said[label] = outcome
        if rank == 0:
            print(f"{label}: {outcome}", file=sys.stderr, flush=True)
    return said


def _rows(quick: bool) -> list[Combination]:
    found = [row for row in rows() if shared(row)]
    return [row for number, row in enumerate(found) if (number in QUICK_SHARED) is quick]
