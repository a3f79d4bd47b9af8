"""Noise levels of a scheduler on one scale from 0 (noise) to 1 (the picture), and grids on it.

Of a flow-matching scheduler that scale is 1 - sigma before the shift, so that a grid found at one resolution is one at
another; else it is the training time, counted from its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_LEAST = 1e-3  # signal or noise that log SNR is told apart from


@dataclass(frozen=True)
class Levels:
    """What a scheduler whose timesteps were set says of its noise levels.

    `flow`: x = (1 - sigma) x_0 + sigma noise, else x = (x_0 + sigma noise) / sqrt(1 + sigma^2). `last` is the sigma
    that a run ends with, `trained` the number of timesteps of the training, `known` their sigmas (not of a flow),
    `shift` what moves sigmas of a flow.
    """

    flow: bool
    last: float
    trained: int
    shift: float = 1.0
    known: Floats | None = None

    @classmethod
    def of(cls, scheduler: Any, mu: float | None = None) -> Levels:
        """mu: the shift that a pipeline asks for, as it gives it to set_timesteps."""
        config = scheduler.config
        trained = int(config.get("num_train_timesteps", 1000))
        if hasattr(scheduler, "scale_noise") or config.get("use_flow_sigmas"):
            shift = float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)
            if mu is not None and config.get("use_dynamic_shifting"):
                shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else float(mu)
            return cls(True, 0.0, trained, shift)
        alphas = scheduler.alphas_cumprod.double().numpy().clip(1e-12)
        return cls(False, float(scheduler.sigmas[-1]), trained, 1.0, np.sqrt((1 - alphas) / alphas))

    def sigmas(self, places: Sequence[float] | Floats) -> Floats:
        """Sigma at each place between 0 and 1; at 1 that of the end."""
        at = np.asarray(places, float)
        if self.flow:
            sigma = 1 - at
            found = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        else:
            assert self.known is not None
            times = (1 - at) * (self.trained - 1)
            found = np.exp(np.interp(times, np.arange(self.trained), np.log(self.known)))
        return np.where(at >= 1, self.last, found)

    def timesteps(self, places: Sequence[float]) -> Floats:
        """What the model is told at each place."""
        if self.flow:
            return self.sigmas(places) * self.trained
        return (1 - np.asarray(places, float)) * (self.trained - 1)

    def signal_and_noise(self, places: Sequence[float] | Floats) -> list[tuple[float, float]]:
        """How much of the picture and how much noise the latents hold at each place."""
        sigmas = self.sigmas(places)
        if self.flow:
            return [(1 - s, s) for s in sigmas.tolist()]
        return [(1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s)) for s in sigmas.tolist()]


def put(scheduler: Any, places: Sequence[float], mu: float | None = None, device: Any = None) -> Levels:
    """Give a scheduler whose timesteps were set, with `mu`, another grid; the last of the places is where the run ends.
    What its levels are."""
    levels = Levels.of(scheduler, mu)
    scheduler.sigmas = torch.from_numpy(levels.sigmas(places)).to(scheduler.sigmas)
    scheduler.timesteps = torch.from_numpy(levels.timesteps(places[:-1])).to(device, torch.float32)
    scheduler.num_inference_steps = len(places) - 1
    return levels


def blend(levels: Levels, steps: int) -> list[float]:
    """Places of so many steps that are even, half in themselves and half in log SNR: fine at both ends."""
    dense = np.linspace(0, 1, 4_001)
    ratios = [math.log(max(signal, _LEAST) / max(noise, _LEAST)) for signal, noise in levels.signal_and_noise(dense)]
    even = (np.asarray(ratios) - ratios[0]) / (ratios[-1] - ratios[0])
    inner = np.interp(np.linspace(0, 1, steps + 1)[1:-1], (dense + even) / 2, dense)
    return [0.0, *inner.tolist(), 1.0]
