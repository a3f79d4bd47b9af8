"""SeaCache: spectral-evolution-aware caching. Paper: https://arxiv.org/abs/2602.18993 (CVPR 2026)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import Gated, relative_change
from fastdiff.caching.region import Memory, Region
from fastdiff.caching.sites import Site, at, latent_probe
from fastdiff.clock import Step


class SeaCache(Gated):
    """Skip until the changes of the latents, filtered to what is signal at their noise level, reach the threshold.

    Formula: skipped while the sum over skipped steps of mean |W x_i - W x_(i-1)| / mean |W x_(i-1)| stays below
    `threshold`; W multiplies a frequency f by a P / (a^2 P + s^2), P = |f|^-3, with signal a and noise s of the
    step.
    """

    method: Literal["seacache"] = "seacache"
    threshold: float = Field(0.25, ge=0, description="sum of filtered changes from which on a step is computed")
    predictor: str = Field("adams_bashforth", description="how a skipped value is made")
    max_consecutive_cached: int | None = Field(2, ge=1, description="compute at the latest after so many cached steps")
    cooldown_steps: int = Field(1, ge=0, description="computed steps at the end")
    site: Site = Field("output", description="what a cached step leaves out")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        if self.site != "output":
            return [at(self.site, anatomy, live=0, probe=latent_probe(anatomy))]
        return [at("output", anatomy, probe=latent_probe(anatomy))]

    def change(self, step: Step, memory: Memory) -> Tensor:
        """Both latents pass the same filter, that of the present noise level, so that only they differ."""
        assert memory.probe is not None and memory.previous is not None
        signal, noise = step.run.signal_and_noise(step.index)
        now, before = (wiener(latents, signal, noise) for latents in (memory.probe, memory.previous))
        return memory.drift + relative_change(now, before)


def wiener(latents: Tensor, signal: float, noise: float) -> Tensor:
    """The part of the latents that is signal, by the Wiener gain a P / (a^2 P + s^2) of natural images, P = |f|^-3.

    latents: (batch, channels, height, width), with frames before the height for video, or (batch, tokens, channels)
    as packed by some transformers; the filter acts on all axes of place, normalised to mean gain 1.
    """
    axes = [1] if latents.ndim == 3 else list(range(2, latents.ndim))
    if not axes:
        return latents
    squared = torch.zeros([latents.shape[axis] for axis in axes], device=latents.device)
    for place, axis in enumerate(axes):
        shape = [-1 if k == place else 1 for k in range(len(axes))]
        squared = squared + torch.fft.fftfreq(latents.shape[axis], device=latents.device).view(shape) ** 2
    lowest = 1 / max(latents.shape[axis] for axis in axes)
    power = squared.clamp_min(lowest**2) ** -1.5
    gain = signal * power / (signal**2 * power + noise**2).clamp_min(1e-12)
    gain = gain / gain.mean().clamp_min(1e-12)
    if latents.ndim == 3:
        gain = gain[:, None]
    return torch.fft.ifftn(torch.fft.fftn(latents.float(), dim=axes) * gain, dim=axes).real
