"""A loop that any denoiser can be drawn with, and made-up arguments for its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

from fastdiff.anatomy import parameters
from tests import tiny
from tests.zoo_entry import noise

Given = dict[str, Any]


class Loop(DiffusionPipeline):
    """Draws with a denoiser: `call` makes its arguments of latents and time."""

    def __init__(self, transformer: nn.Module, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, steps: int) -> Tensor:
        self.scheduler.set_timesteps(steps)
        latents = noise(*denoiser.shape, seed=7)
        tuples = {"return_dict": False} if "return_dict" in parameters(self.transformer) else {}
        for t in self.scheduler.timesteps:
            output = self.transformer(**denoiser.call(latents, t.expand(1)), **tuples)
            while not isinstance(output, Tensor):  # of picture and sound the picture, of a list of pictures the first
                output = output[0]
            latents = self.scheduler.step(output[:, : latents.shape[1]], t, latents).prev_sample
        return latents


@dataclass(frozen=True)
class Denoiser:
    """A tiny denoiser: its class and configuration, the shape of its latents, and the arguments of a call, made of
    latents and a time (1,) from 0 to 1000."""

    name: str
    config: Given
    shape: tuple[int, ...]
    call: Callable[[Tensor, Tensor], Given]

    def make(self) -> Loop:
        """A fresh loop; the same weights each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(diffusers, self.name)(**self.config)
        return Loop(tiny.lively(model), FlowMatchEulerDiscreteScheduler())

    def draw(self, pipe: Loop, steps: int) -> Tensor:
        return pipe(self, steps)


def text(width: int, tokens: int = 7, seed: int = 1) -> Tensor:
    """Embeddings of a prompt; no picture here has seven tokens, so that streams can be told apart by shape."""
    return noise(1, tokens, width, seed=seed)


def ids(tokens: int, axes: int = 3) -> Tensor:
    """Places of tokens."""
    return torch.arange(tokens, dtype=torch.float32)[:, None].repeat(1, axes)


def ones(tokens: int = 7, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.ones(1, tokens, dtype=dtype)


def plain(x: Tensor, t: Tensor) -> Given:
    """What most denoisers take."""
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text(32)}
