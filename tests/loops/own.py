"""Denoising loops of one's own, as people write them around a pipeline's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = tuple[str, float]  # which text, and its weight in the output that the solver is given


def text(number: int) -> Tensor:
    return torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(100 + number))


def loop(
    pipe: Any, calls: Callable[[int], list[Call]], *, steps: int = 8, fresh: bool = False, scheduler: Any = None,
    between: Callable[[int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Latents after a loop of a Stable Diffusion's parts.

    calls: for each step the texts in the order of their calls, with weights. fresh: make each text anew for each call.
    """
    texts = {"cond": text(0), "uncond": text(1), "other": text(2)}
    scheduler = scheduler or pipe.scheduler
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            given = scheduler.scale_model_input(latents, t)
            output = torch.zeros_like(latents)
            for name, weight in calls(index):
                own = texts[name].clone() if fresh else texts[name]
                output = output + weight * pipe.unet(given, t, encoder_hidden_states=own).sample
            latents = scheduler.step(output, t, latents).prev_sample
            if between is not None:
                between(index)
    return latents
