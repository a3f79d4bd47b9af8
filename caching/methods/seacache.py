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

    Formula: skipped while the sum over skipped steps of mean |y_i - y_(i-1)| / mean |y_(i-1)|, y_i = W_i x_i, stays
    below `threshold`; W_i multiplies a frequency f of each axis by a P / (a^2 P + s^2), P = |f|^-3, with signal a and
    noise s of step i (equation 7).
    """

    method: Literal["seacache"] = "seacache"
    threshold: float = Field(0.25, ge=0, description="sum of filtered changes from which on a step is computed")
    predictor: str = Field("adams_bashforth", description="how a skipped value is made")
    max_consecutive_cached: int | None = Field(2, ge=1, description="compute at the latest after so many cached steps")
    cooldown_steps: int = Field(1, ge=0, description="computed steps at the end")
    site: Site = Field("auto", description="what a cached step leaves out; auto: the block stack, else all")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        site = self.site if self.site != "auto" else "stack" if anatomy.blocks else "output"
        return [at(site, anatomy, live=0, probe=latent_probe(anatomy))]

    def change(self, step: Step, memory: Memory) -> Tensor:
        assert memory.probe is not None and memory.previous is not None
        levels = step.run.signal_and_noise
        now = wiener(memory.probe, *levels(step.index))
        return memory.drift + relative_change(now, wiener(memory.previous, *levels(memory.at)))


def wiener(latents: Tensor, signal: float, noise: float) -> Tensor:
    """The part of the latents that is signal, by the Wiener gain a P / (a^2 P + s^2) of natural images, P = |f|^-3.

    latents: (batch, channels, height, width), with frames before the height for video, or (batch, tokens, channels)
    as packed by some transformers; the filter is a product over all axes of place, normalised to mean gain 1.
    """
    axes = [1] if latents.ndim == 3 else list(range(2, latents.ndim))
    signal, gain = max(signal, 1e-6), torch.ones((), device=latents.device)
    for axis in axes:
        inverse = torch.fft.fftfreq(latents.shape[axis], device=latents.device).abs() ** 3 + 1e-16  # 1 / P
        own = signal / (signal**2 + noise**2 * inverse)
        gain = gain * own.view([-1 if dim == axis else 1 for dim in range(latents.ndim)])
    return torch.fft.ifftn(torch.fft.fftn(latents.float(), dim=axes) * (gain / gain.mean()), dim=axes).real
