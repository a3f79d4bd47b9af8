"""Methods tried again with what overlaps an exchange: groups of heads, and halves of the batch that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastdiff.anatomy import Anatomy

from .planner import Trial, attempt, batch
from .rehearsal import Call, Rehearsed


def by_turns(
    anatomy: Anatomy, calls: Sequence[Call], devices: int, one: Rehearsed, tried: Sequence[Trial]
) -> list[Trial]:
    """What was tried, again with heads in groups and halves of the batch that take turns, where a method has that."""
    played = [trial for trial in tried if trial.played]
    groups = [t.method.model_copy(update={"groups": 2}) for t in played if hasattr(t.method, "groups")]
    grouped = [attempt(anatomy, calls, method, devices, one) for method in groups]
    halved = [
        replace(trial, method=trial.method.model_copy(update={"halves": True})) for trial in (*played, *grouped)
        if hasattr(trial.method, "halves") and batch(calls) >= 2 * trial.mesh.cfg
    ]  # fmt: skip
    return grouped + halved
