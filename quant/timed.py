"""Which of the candidates for a layer is the fastest on this machine: the clock says, capability is often wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from fastdiff.machine import cpu_name
from fastdiff.timing import Moments

FLOAT = "float"  # the candidate that is no kernel: the float layer
Times = Mapping[str, float]  # milliseconds by candidate
_ROUNDS = 5
_ENOUGH = 0.5  # seconds for a shape, after which no further round begins
_CLEAR = 1.5  # times as fast: seen in two rounds, no further one is needed


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What a run takes on its device; the tests put a clock that stands still in its place."""
    moments = Moments(device)
    run()
    moments.mark()
    return moments.seconds()[0]


def timed(runs: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """The least milliseconds of each in interleaved rounds: others may hold the machine for most of the time."""
    least = dict.fromkeys(runs, float("inf"))
    spent = 0.0
    for done in range(1, _ROUNDS + 1):
        for name, run in runs.items():
            took = seconds(run, device)
            least[name], spent = min(least[name], took), spent + took
        best, *others = sorted(least.values())
        if done > 1 and (spent > _ENOUGH or all(other > _CLEAR * best for other in others)):
            break
    return {name: round(1e3 * took, 4) for name, took in least.items()}


def fastest(times: Times) -> str:
    """Of equal ones the first, so that a quantized layer need not be faster than the float one."""
    return min(times, key=lambda name: times[name])


@cache
def machine(device: torch.device, threads: int) -> str:
    """What a time holds for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {threads} threads"


def verdict(used: Mapping[str, int], times: Mapping[str, Times]) -> str | None:
    """One sentence on what the clock chose: used has the number of layers by what was timed."""
    said, layers = [], {}
    for what, floats in (("stay float, as quantized ones are", True), ("run quantized,", False)):
        own = [key for key in used if (fastest(times[key]) == FLOAT) is floats]
        layers[floats] = sum(used[key] for key in own)
        ratios = sorted(f"{_ratio(times[key]):.2f}" for key in own)
        if ratios:
            span = " to ".join(dict.fromkeys((ratios[0], ratios[-1])))
            said.append(f"{layers[floats]} layers {what} {span} times as fast as float here")
    insist = ["quant.speed = smallest insists on the quantized ones"] if layers[True] and not layers[False] else []
    return "; ".join(said + insist) or None


def _ratio(times: Times) -> float:
    best = min(ms for name, ms in times.items() if name != FLOAT)
    return times.get(FLOAT, best) / max(best, 1e-9)
