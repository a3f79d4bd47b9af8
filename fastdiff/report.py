"""What a run did: steps computed and cached, seconds, bytes, memory. Never silent about doing nothing."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

COMPUTED, CACHED, ABSENT = "computed", "cached", "absent"
UNTOLD = -1  # the branch of calls that nothing tells from another one


@dataclass
class RunReport:
    """Filled while the pipeline runs; `str()` is the one-line log, `to_dict()` is what `--json` prints.

    `ranks` has an entry for each rank of a parallel run (bytes sent by kind, seconds waited, age of the oldest value
    used, seconds by step), `spans` this rank's transfers and waits for a timeline.

    `branches` has one list a branch (`UNTOLD` for calls that nothing tells apart), with "computed", "cached" or
    "absent" (not called) for each step; `predicted` the steps in which a skipped value was made of several, or
    corrected, and not used as it was; `step_seconds` has one entry a step, in seconds of the device, `host_seconds`
    what the host took to launch it; `cache_mb` the most that a cache held; `verified` how many steps a guard checked,
    found failed, and computed for it; `pictures`, by branch, in how many steps each picture of a batch was computed,
    where that was decided for each; `attention`, by denoiser, how many calls were block-sparse, the mean share of
    blocks that these computed, and how many were dense and why; `noise`, of a cached and quantized run, what part of
    the change that forecasts make is noise of quantization ("share"), and by how much they amplify it in squares.
    """

    total: int = 0
    branches: dict[int, list[str]] = field(default_factory=dict)
    predicted: set[int] = field(default_factory=set)
    step_seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    peak_memory_mb: float = 0.0
    cache_mb: float = 0.0
    verified: dict[str, int] = field(default_factory=dict)
    pictures: dict[int, list[int]] = field(default_factory=dict)
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    bytes_sent: int = 0
    ranks: list[dict[str, Any]] = field(default_factory=list)
    spans: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.step_seconds)

    @property
    def computed(self) -> int:
        """Steps in which some branch of the denoiser ran in full."""
        return self.steps - self.cached

    @property
    def cached(self) -> int:
        """Steps in which no branch ran in full."""
        return sum(map(self.is_cached, range(self.steps)))

    @property
    def partly(self) -> int:
        """Steps in which one branch ran in full and another was served from the cache."""
        states = [{row[i] for row in self.branches.values() if len(row) > i} for i in range(self.steps)]
        return sum({COMPUTED, CACHED} <= found for found in states)

    def is_cached(self, index: int) -> bool:
        """Whether every branch that was called at a step was served from the cache."""
        states = {row[index] for row in self.branches.values() if len(row) > index} - {ABSENT}
        return states == {CACHED}

    @property
    def seconds(self) -> float:
        """Wall-clock of the denoising loop, without text encoding and decoding."""
        return sum(self.step_seconds)

    def branch_names(self) -> dict[int, str]:
        told = [b for b in self.branches if b != UNTOLD]
        known = ("cond", "uncond") if len(told) > 1 else ("batch",)
        names = {b: known[b] if b < len(known) else f"call {b}" for b in told}
        return names | ({UNTOLD: "untold"} if UNTOLD in self.branches else {})

    def saved_seconds(self) -> float:
        """Cached steps times the difference between a computed and a cached step of this very run (medians)."""
        kinds: dict[str, list[float]] = {COMPUTED: [], CACHED: []}
        for i, seconds in enumerate(self.step_seconds[1:], 1):  # the first step warms up
            kinds[CACHED if self.is_cached(i) else COMPUTED].append(seconds)
        if not all(kinds.values()):
            return 0.0
        difference = statistics.median(kinds[COMPUTED]) - statistics.median(kinds[CACHED])
        return max(0.0, difference * len(kinds[CACHED]))

    def to_dict(self) -> dict[str, Any]:
        names = self.branch_names()
        return {
            "steps": self.steps,
            "computed": self.computed,
            "cached": self.cached,
            "partly": self.partly,
            "predicted": len(self.predicted),
            "seconds": round(self.seconds, 4),
            "host_seconds": round(sum(self.host_seconds), 4),
            "saved_seconds": round(self.saved_seconds(), 4),
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            "cache_mb": round(self.cache_mb, 3),
            "pictures": {names[b]: counts for b, counts in self.pictures.items()},
            "attention": dict(self.attention),
            "noise": {name: round(value, 4) for name, value in self.noise.items()},
            "bytes_sent": self.bytes_sent,
            "verified": dict(self.verified),
            "ranks": list(self.ranks),
            "branches": {names[b]: row for b, row in sorted(self.branches.items())},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if not self.steps:
            return "nothing ran yet"
        parts = [
            f"{self.steps} steps: {self.computed} computed, {self.cached} cached"
            + (f" ({self.partly} with one branch cached)" if self.partly else ""),
            f"{self.seconds:.2f} s denoising" + self._launched(),
        ]
        if saved := self.saved_seconds():
            parts.append(f"about {saved:.2f} s saved")
        if self.verified:
            parts.append("verify: " + ", ".join(f"{count} {what}" for what, count in self.verified.items()))
        parts += [f"by picture {', '.join(map(str, counts))} computed" for counts in self.pictures.values()]
        for told in self.attention.values():
            shares = f" (density {told['density']:.2f})" if told["sparse"] else ""
            parts.append(f"{told['sparse']} attention calls sparse{shares}, {told['dense']} dense")
        if self.bytes_sent:
            parts.append(f"{self.bytes_sent / 2**20:.1f} MiB sent")
        cached = f", {self.cache_mb:.0f} of them cached values" if self.cache_mb >= 1 else ""
        parts.append(f"peak {self.peak_memory_mb:.0f} MB{cached}")
        return " · ".join([*parts, *self.notes])

    def _launched(self) -> str:
        """The host's time, where it is another: work that waits for its launch, or launches far ahead."""
        host = sum(self.host_seconds)
        return f" ({host:.2f} s on the host)" if abs(host - self.seconds) > 0.2 * self.seconds else ""


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: of the CUDA allocator, or of the process on a CPU (since it started)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
