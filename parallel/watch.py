"""Waits that a device takes in the order of its work, while the host goes on.

NCCL's own time-out would block the host at each of them, and without one the host never learns of a peer that is lost:
at the next value that it reads it stops for ever. So the device marks where a wait begins and ends, and a thread looks
at the marks: a device that stands at a wait for too long has lost a peer, one that computes for long has not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.timing import moment

LOOK, PACE, ASK = 0.001, 0.2, 1.0  # seconds between looks of the host, of the thread, and questions to the peer


@dataclass(frozen=True)
class Stand:
    """Where a device waits, and for whom."""

    peers: frozenset[int]
    layer: str
    step: int | None
    begin: Any  # moments
    end: Any
    posted: Any = None  # when what it waits for was expected first, if it is to be told of
    kind: str = ""


class Watch:
    """The waits of one run on one device. `lost` is the one that did not end within `limit` seconds, or whose peer is
    `gone`; the device is then set `free`. The thread lives while there is something to wait for."""

    def __init__(self, limit: float, gone: Callable[[Set[int]], bool], free: Callable[[], None]) -> None:
        self.limit, self.gone, self.free = limit, gone, free
        self.lost: Stand | None = None
        self.seconds = self.waited = 0.0  # that the device stood, in all, and at the wait that was lost
        self.past: list[tuple[Stand, list[float]]] = []  # and when, in seconds from the first: posted, begun, ended
        self._stands: deque[Stand] = deque()
        self._first: Any = None
        self._lock, self._ended, self._looks = threading.Lock(), threading.Event(), False

    def stop(self) -> None:
        self._ended.set()

    def mark(self, device: torch.device) -> Any:
        """This moment."""
        found = moment(device)
        self._first = self._first or found
        return found

    def wait(
        self, works: Iterable[Any], device: torch.device, peers: Set[int], layer: str, step: int | None,
        posted: Any = None, kind: str = "",
    ) -> None:  # fmt: skip
        """Order the device to wait."""
        begin, self._first = moment(device), self._first or posted  # which may be of the run before
        for work in works:
            work.wait()  # without a time-out, which would make the host wait, too
        stand = Stand(frozenset(peers), layer, step, begin, moment(device), posted, kind)
        with self._lock:
            self._stands.append(stand)
            if not self._looks:
                threading.Thread(target=self._look, name="fastdiff watch", daemon=True).start()
            self._looks = True

    def settle(self) -> None:
        """Come back when the device is past all waits, or one is lost."""
        while self._next() is not None and self.lost is None:
            time.sleep(LOOK)

    def _next(self) -> Stand | None:
        """The wait that the device is at, or comes to next."""
        with self._lock:
            while self._stands and self._stands[0].end.query():
                stand = self._stands.popleft()
                self.seconds += stand.begin.elapsed_time(stand.end) / 1e3
                if stand.posted is not None:
                    ends = (stand.posted, stand.begin, stand.end)
                    self.past.append((stand, [self._first.elapsed_time(end) / 1e3 for end in ends]))
            return self._stands[0] if self._stands else None

    def _look(self) -> None:
        at, since, asked = None, 0.0, 0.0
        while not self._ended.wait(PACE):
            stand, now = self._next(), time.perf_counter()
            with self._lock:
                self._looks = bool(self._stands)
                if not self._looks:
                    return
            if stand is None or stand is not at or not stand.begin.query():
                at, since, asked = stand, now, now  # it computes what comes before
                continue
            gone = now - asked > ASK and self.gone(stand.peers)
            if gone or now - since > self.limit:
                self.lost, self.waited = stand, now - since
                self.free()
                return
            asked = now if now - asked > ASK else asked
