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


def where(device: torch.device) -> str:
    """The machine that a time holds for."""
    return _gpu_name(device) if device.type == "cuda" else f"{_cpu_name()}, {torch.get_num_threads()} threads"


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def _cpu_name() -> str:
    return cpu_name()


def verdict(used: Mapping[str, int], times: Mapping[str, Times]) -> str | None:
    """One sentence on what the clock chose: used has the number of layers by what was timed."""
    stay, run = [], []
    for key, layers in used.items():
        best = min(ms for name, ms in times[key].items() if name != FLOAT)
        pair = (layers, times[key].get(FLOAT, best) / max(best, 1e-9))
        (stay if fastest(times[key]) == FLOAT else run).append(pair)
    said = []
    if stay:
        said.append(f"{_layers(stay)} stay float, as quantized ones are {_times(stay)} times as fast here")
    if run:
        said.append(f"{_layers(run)} run quantized, {_times(run)} times as fast as float")
    if stay and not run:
        said.append("quant.speed = smallest insists on the quantized ones")
    return "; ".join(said) or None


def _layers(pairs: list[tuple[int, float]]) -> str:
    return f"{sum(layers for layers, _ in pairs)} layers"


def _times(pairs: list[tuple[int, float]]) -> str:
    low, high = (f"{found(ratio for _, ratio in pairs):.2f}" for found in (min, max))
    return low if low == high else f"{low} to {high}"
