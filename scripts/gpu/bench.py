"""The card, its clock, and rows that survive what fails in them."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.timing import Moments

Row = dict[str, Any]


@dataclass
class Bench:
    """`dry` is the rehearsal on a CPU: the same code, tiny sizes, numbers that say nothing of a card."""

    device: torch.device
    dry: bool
    rounds: int = 3

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], least: float = 0.005) -> float:
        """Of one call, out of as many as last `least` seconds, after one that warms up."""
        call()
        self.wait()
        count = min(max(1, math.ceil(least / max(self.once(call), 1e-6))), 200)
        return self._span(call, count) / count

    def once(self, call: Callable[[], Any]) -> float:
        return self._span(call, 1)

    def _span(self, call: Callable[[], Any], count: int) -> float:
        moments = Moments(self.device)
        for _ in range(count):
            call()
        moments.mark()
        return moments.seconds()[0]

    def interleaved(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Row]:
        """Median milliseconds of each call, and the spread, one round after the other."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, call in calls.items():
                found[name].append(1e3 * self.seconds(call))
        return {name: spread(values) for name, values in found.items()}

    @contextmanager
    def memory(self, row: Row) -> Iterator[None]:
        """Writes the most MB that were held meanwhile."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        row["peak_mb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e6)

    def held(self) -> Row:
        """MB that are held now."""
        return {"held_mb": round(torch.cuda.memory_allocated(self.device) / 1e6)} if self.device.type == "cuda" else {}

    @contextmanager
    def waits(self, row: Row) -> Iterator[None]:
        """Writes how often the host waited for the device: torch itself says so, once for each time."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        row["waits"] = sum("synchroniz" in str(warning.message) for warning in said)


def spread(values: list[float]) -> Row:
    return {name: round(f(values), 4) for name, f in (("ms", statistics.median), ("least", min), ("most", max))}


def tried(name: str, measure: Callable[[], Row]) -> Row:
    """A row, or the first line of why there is none: what fails on a card is a result."""
    try:
        return {"name": name, **measure()}
    except ModuleNotFoundError as error:
        return {"name": name, "skipped": f"{error.name} is not installed"}
    except Exception as error:
        first = (str(error) or "without a word").strip().splitlines()[0][:200]
        return {"name": name, "failed": f"{type(error).__name__}: {first}"}


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The error relative to what is wanted, in float64 on the CPU; NaN where something is not finite."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
