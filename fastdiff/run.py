"""One pass of a denoising loop as numbers: its steps, their noise levels, and the axes that predictions go along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch


@dataclass(frozen=True)
class Run:
    """One pass of the denoising loop.

    `timesteps` and `sigmas` hold one float per evaluation that will be made (img2img has fewer than the scheduler
    lists); sigma is noise over signal, or the flow-matching sigma in [0, 1] if `flow`. `scheduler` is its class name,
    `guidance_scale` what the pipeline says of itself, if anything, `shape` that of the denoiser's input without the
    batch, `late` whether the run leaves out the scheduler's first steps (img2img), `device` where the denoiser runs,
    `loop` the pipeline's name for the scheduler, of which some have several (priors, decoders).
    """

    number: int
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    flow: bool
    scheduler: str = ""
    guidance_scale: float | None = None
    shape: tuple[int, ...] = ()
    late: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loop: str = "scheduler"
    _axes: dict[str, tuple[float, ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def total(self) -> int:
        return len(self.timesteps)

    def only(self, steps: Sequence[int]) -> Run:
        """A run of some of the steps."""
        timesteps, sigmas = ([axis[i] for i in steps] for axis in (self.timesteps, self.sigmas))
        return replace(self, timesteps=tuple(timesteps), sigmas=tuple(sigmas), _axes={})

    def coordinates(self, kind: str) -> tuple[float, ...]:
        """Positions of the evaluations on one axis: step, timestep, sigma or logsnr; strictly monotone or steps."""
        if kind not in self._axes:
            self._axes[kind] = self._positions(kind)
        return self._axes[kind]

    def signal_and_noise(self, index: int) -> tuple[float, float]:
        """How much signal and how much noise the latents of a step hold, x = signal * x_0 + noise * epsilon."""
        sigma = self.sigmas[index]
        if self.flow:
            return 1 - sigma, sigma
        signal = 1 / math.sqrt(1 + sigma * sigma)
        return signal, sigma * signal

    def _positions(self, kind: str) -> tuple[float, ...]:
        steps = tuple(float(i) for i in range(self.total))
        if kind == "step":
            return steps
        if kind == "timestep":
            found = self.timesteps
        elif kind == "sigma":
            found = self.sigmas
        else:
            found = tuple(self._logsnr(s) for s in self.sigmas)
        falls = [a > b for a, b in pairwise(found)]
        monotone = (all(falls) or not any(falls)) and len(set(found)) == len(found)
        return found if monotone else steps  # Heun and PNDM visit a time twice

    def _logsnr(self, sigma: float) -> float:
        sigma = min(max(sigma, 1e-4), 1 - 1e-4 if self.flow else 1e4)
        return 2 * math.log((1 - sigma) / sigma if self.flow else 1 / sigma)


@dataclass(frozen=True)
class Step:
    """One call of the denoiser.

    `branch` numbers the conditionings of a run in the order of their first calls (0 is cond or the batch); it is
    `UNTOLD` where nothing tells this call from another of its step.
    """

    run: Run
    index: int
    branch: int


def noise_levels(scheduler: Any, timesteps: list[float]) -> tuple[list[float], bool]:
    """Noise level at each timestep, and whether it is a flow-matching sigma."""
    flow = hasattr(scheduler, "scale_noise") or getattr(scheduler.config, "use_flow_sigmas", False) is True
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        found = [float(s) for s in torch.as_tensor(sigmas).flatten().tolist()[: len(timesteps)]]
        if hasattr(scheduler, "sigmas_interpol"):  # KDPM2: every other evaluation lies between two of its sigmas
            between = scheduler.sigmas_interpol.tolist()
            found[1::2] = between[1 : len(found) : 2]
        if flow and getattr(scheduler.config, "invert_sigmas", False) is True:  # Mochi counts signal, not noise
            found = [1 - sigma for sigma in found]
        return found, flow
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return timesteps, flow
    known = alphas.tolist()
    kept = [max(known[min(max(int(t), 0), len(known) - 1)], 1e-12) for t in timesteps]
    return [math.sqrt((1 - a) / a) for a in kept], flow
