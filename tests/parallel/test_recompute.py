"""What a pipeline does around its denoiser is read off one step and done again at other latents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdiff.parallel.recompute import recompute


def denoiser(sample: Tensor, timestep: float) -> tuple[Tensor]:
    """Twice the channels, as models that learn a variance have."""
    return (torch.cat([torch.sin(sample[:, :4] + timestep), sample[:, :4]], 1),)


def step(latents: Tensor, calls: list, *, halves: bool, bent: bool = False) -> Tensor:
    """What some pipeline gives its solver; beside the latents the denoiser sees a picture."""
    picture = torch.ones_like(latents)
    if halves:
        args: tuple = (torch.cat([torch.cat([latents, picture], 1) / 3] * 2), 0.5)
        calls.append((denoiser, args, {}, denoiser(*args)))
        other, own = calls[-1][3][0][:, :4].chunk(2)
        other = other * 0.5  # as if it had been given another prompt
    else:
        for time in (0.1, 0.7):
            call = {"timestep": time, "sample": latents / 3}
            calls.append((denoiser, (), call, denoiser(**call)))
        other, own = (call[3][0][:, :4] for call in calls)
    found = other + 4 * (own - other)
    return found.square() if bent else found


@pytest.mark.parametrize("halves", [True, False])
def test_a_linear_step(halves: bool) -> None:
    torch.manual_seed(0)
    given, latents = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    calls: list = []
    output = step(given, calls, halves=halves)
    found = recompute(calls, given, output, latents)
    assert found is not None
    torch.testing.assert_close(found, step(latents, [], halves=halves), rtol=1e-9, atol=1e-12)
    assert torch.equal(output, step(given, [], halves=halves)), "what passed is as it was"


def test_a_step_that_is_not_linear() -> None:
    given, latents = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    calls: list = []
    output = step(given, calls, halves=False, bent=True)
    assert recompute(calls, given, output, latents) is None
    assert recompute(calls, given.square(), step(given, [], halves=False), latents) is None
