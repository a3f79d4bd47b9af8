"""Whose turn it is to compute: one at a time, and it changes only between two steps."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

AGEING = 0.05  # seconds of work that a second of waiting makes up for


class Work(Protocol):
    """What waits, is begun in one of the places, and goes on there."""

    asked: float  # by the clock
    alone: bool  # whether the first place is the only one that it can be done in
    stopped: bool  # whether nobody wants it any more

    @property
    def left(self) -> float:
        """Seconds of work, as far as known."""


W = TypeVar("W", bound=Work)


def urgency(left: float, waited: float) -> float:
    """The lowest goes first: the shortest remaining, less a share of the time since it was asked for.

    What is there already does not change its order, since all of it waits, and what has the turn gets shorter: only
    what comes anew goes before, if it is shorter, and not if it comes more than left / AGEING seconds later.
    """
    return left - AGEING * waited


class Turns(Generic[W]):
    """Work begins in a thread of its place, and parks there while it is the turn of something more urgent. It gets a
    place that `suits` it, if one is free.

    What has not begun goes before what has only if it takes less than half as long: else requests of about one length
    would fill the places, and a short one would find none. With one place everything is done in the order in which it
    was asked for.
    """

    def __init__(self, places: int, do: Callable[[W, int], None], suits: Callable[[W, int], bool]) -> None:
        self.waiting: list[W] = []  # not begun
        self.begun: list[W] = []
        self._places, self._do, self._suits = places, do, suits
        self._free = set(range(places))
        self._parked: list[W] = []
        self._holder: W | None = None
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(places, "draw")

    def add(self, work: W) -> None:
        with self._changed:
            self.waiting.append(work)
            self._pass_on()

    def drop(self, work: W) -> bool:
        """It was stopped: it leaves the queue, or its parking place; says whether it had not begun."""
        with self._changed:
            self._changed.notify_all()
            if work not in self.waiting:
                return False
            self.waiting.remove(work)
            return True

    def pause(self, work: W) -> None:
        """Let what is more urgent go first. Work that is stopped meanwhile comes back without a turn."""
        with self._changed:
            self._parked.append(work)
            self._holder = None
            self._pass_on()
            self._changed.wait_for(lambda: self._holder is work or work.stopped)
            if self._holder is not work:
                self._parked.remove(work)

    def close(self) -> None:
        self._pool.shutdown()

    def _pass_on(self) -> None:
        most = min((work.left for work in self._parked), default=math.inf) / 2
        free = [work for work in self.waiting if self._free and (not work.alone or 0 in self._free)]
        able = [*self._parked, *(work for work in free if work.left < most)]
        if self._holder is not None or not able:
            return
        now = time.monotonic()
        in_turn = self._places == 1
        chosen = min(able, key=lambda work: work.asked if in_turn else urgency(work.left, now - work.asked))
        self._holder = chosen
        if chosen in self._parked:
            self._parked.remove(chosen)
            self._changed.notify_all()
            return
        self.waiting.remove(chosen)
        self.begun.append(chosen)
        place = 0 if chosen.alone else max(self._free, key=lambda free: (self._suits(chosen, free), free))
        self._free.remove(place)
        self._pool.submit(self._begin, chosen, place)

    def _begin(self, work: W, place: int) -> None:
        try:
            self._do(work, place)
        finally:
            with self._changed:
                self.begun.remove(work)
                self._free.add(place)
                if self._holder is work:
                    self._holder = None
                self._pass_on()
