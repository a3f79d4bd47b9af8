"""Faster Diffusion: propagate the encoder's features. Paper: https://arxiv.org/abs/2312.09608 (NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, Forward, Steps, every, spread
from fastdiff.caching.decoding import BatchedDecoding
from fastdiff.caching.protocols import Live
from fastdiff.caching.region import Region
from fastdiff.caching.sites import first_half
from fastdiff.caching.unet import unet_encoder
from fastdiff.clock import Run


class FasterDiffusion(CacheMethod):
    """Run the encoder at key steps only; decoders of the steps after it use its features, several in one forward.

    A transformer's encoder is the first half of its blocks. What a cached step gives does not depend on its latents,
    so decoding ahead is no further approximation. The initial noise is mixed in where the image is nearly clean.

    Formula: e_i = decoder(encoder features of key step j, t_i) for all i up to the next key step, in one batch.
    """

    method: Literal["faster_diffusion"] = "faster_diffusion"
    key_steps: Steps = Field(
        (0, 1, 2, 3, 5, 10, 15, 25, 35), min_length=1, description="steps that run the encoder, counted from 0"
    )
    of_steps: int = Field(50, ge=1, description="run length that key_steps is for; others use the same shares of it")
    interval: int | None = Field(None, ge=1, description="run the encoder every so many steps, instead of key_steps")
    max_parallel: int = Field(8, ge=1, description="steps decoded in one forward; 1 decodes each by itself")
    noise: float = Field(0.003, ge=0, le=1, description="share of the initial noise mixed into the latents")
    noise_below: float = Field(0.5, ge=0, le=1, description="share of the timesteps, from the end, it is mixed in")
    control_at_key_steps: bool = Field(True, description="run a ControlNet at key steps only")

    @property
    def predicts_inside(self) -> bool:
        return self.max_parallel > 1 or super().predicts_inside

    @property
    def unverifiable(self) -> str | None:
        """Steps that are decoded ahead are made before anything of them could be checked."""
        if self.max_parallel == 1:
            return None
        return f"max_parallel = {self.max_parallel} decodes steps before they could be checked; set max_parallel = 1"

    def regions(self, anatomy: Anatomy) -> list[Region]:
        found = unet_encoder(anatomy) if anatomy.family.kind == "unet" else first_half(anatomy)
        return found if self.control_at_key_steps else [replace(region, hides_control=False) for region in found]

    def mask(self, run: Run, region: Region) -> list[bool]:
        if self.interval is not None:
            return every(self.interval, run, self.warmup_steps)
        return spread((0, *self.key_steps), self.of_steps, run, "key_steps")

    def around(self, forward: Forward, session: Live) -> Forward:
        if self.noise > 0:
            NoiseInjection(self, session)
        return BatchedDecoding(session, forward, self.max_parallel) if self.max_parallel > 1 else forward


class NoiseInjection:
    """x <- x + noise * z_T / (its scale) before the solver's steps near the end, as the paper does against blur.

    z_T is what the first step of the run was given; a run that starts late (img2img) has none, and gets none.
    """

    def __init__(self, method: FasterDiffusion, session: Live) -> None:
        self.method, self.session = method, session
        self.initial: Tensor | None = None
        session.clock.before_step.append(self._mixed)
        session.clock.on_end.append(self._forget)

    def _mixed(self, index: int, latents: Tensor) -> Tensor:
        run = self.session.clock.run
        assert run is not None
        if not any(not all(mask) for mask in self.session.masks if mask) or run.late:
            return latents
        if index == 0:
            self.initial = latents / float(getattr(self.session.clock.scheduler, "init_noise_sigma", 1.0))
        full = 1000.0 if max(run.timesteps) > 1 else 1.0
        if self.initial is None or run.timesteps[index] >= self.method.noise_below * full:
            return latents
        return latents + self.method.noise * self.initial.to(latents.dtype)

    def _forget(self, run: Run) -> None:
        self.initial = None
