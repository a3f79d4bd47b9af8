"""Made-up runs, and a denoiser whose output is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.caching.region import Region
from fastdiff.clock import Run, Step
from tests import tiny

ANYWHERE = Region("anywhere", ())


def run_of(total: int, flow: bool = True) -> Run:
    """From noise 1 to nearly none, in equal steps."""
    sigmas = tuple(1 - i / total for i in range(total))
    return Run(1, tuple(1000 * s for s in sigmas), sigmas, flow)


def step_of(index: int, total: int = 10, flow: bool = True) -> Step:
    return Step(run_of(total, flow), index, 0)


def did(handle: Any, branch: int = 0) -> list[bool]:
    """Which steps of the last run were computed."""
    return [state == "computed" for state in handle.report.branches[branch]]


def answering(answer: Callable[[float], float]) -> Any:
    """The tiny SD 1.5 whose UNet gives `answer(timestep)` everywhere, whatever it is asked."""
    pipe = tiny.make("sd15")

    def forward(sample, timestep, encoder_hidden_states=None, return_dict=True, **_):
        return (torch.full_like(sample, answer(float(timestep))),)

    pipe.unet.forward = forward
    return pipe


def draw(pipe: Any, steps: int) -> Tensor:
    """A call of `answering` in float64."""
    return tiny.run(pipe, "sd15", steps=steps, latents=torch.ones(1, 4, 8, 8, dtype=torch.float64))


def outputs_of(pipe: Any, draw: Callable[[Any], Any]) -> list[Tensor]:
    """What every call of the denoiser gives."""
    seen: list[Tensor] = []
    hook = tiny.denoiser(pipe).register_forward_hook(lambda _m, _a, output: seen.append(output[0].clone()))
    draw(pipe)
    hook.remove()
    return seen
