"""What a rank of ParaStep remembers of a call: that of this run, and of one like it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run, Step
from fastdiff.parallel.methods.parastep import Cycle, ParaStep
from fastdiff.parallel.recompute import recompute
from fastdiff.patch import PatchSet
from fastdiff.pipelines.families import KNOWN

TOTAL = 5


class Counted(nn.Module):
    """A denoiser that gives its latents, and how often it was run."""

    ran = 0

    def forward(self, sample: Tensor, text: Tensor | None = None) -> Tensor:
        self.ran += 1
        return sample


class Rank:
    """Rank 1 of 2, which after the first step computes steps 2 and 4."""

    def __init__(self) -> None:
        self.clock: Any = SimpleNamespace(on_start=[], on_end=[], now=None, repeats=False, solve=None)
        bus: Any = SimpleNamespace(alone=False, topology=SimpleNamespace(place=lambda axis: 1, step=2))
        told: Any = SimpleNamespace(elsewhere=lambda: None, note=lambda text: None)
        self.denoiser = Counted()
        self.cycle = Cycle(ParaStep(warmup_steps=1, devices=2), bus, self.clock, told)
        self.cycle.attach(Anatomy(self.denoiser, KNOWN["UNet2DConditionModel"], "unet"), PatchSet())

    def begin(self, number: int) -> None:
        sigmas = tuple(1 - i / TOTAL for i in range(TOTAL))
        self.run = Run(number, tuple(1000 * s for s in sigmas), sigmas, True)
        for told in self.clock.on_start:
            told(self.run)

    def end(self) -> None:
        for told in self.clock.on_end:
            told(self.run)

    def call(self, index: int, branch: int, sample: Tensor) -> Tensor:
        self.clock.now = Step(self.run, index, branch)
        return self.denoiser(sample)


def test_a_branch_that_a_run_calls_later_is_not_answered_by_the_run_before():
    """Guidance that begins in a step of another rank: this one has nothing to stand for its output."""
    rank = Rank()
    rank.begin(1)
    rank.call(0, 0, torch.zeros(1, 2)), rank.call(0, 1, torch.ones(1, 2))
    assert torch.equal(rank.call(1, 1, torch.full((1, 2), 9.0)), torch.ones(1, 2)) and rank.denoiser.ran == 2
    rank.end()
    rank.begin(2)
    rank.call(0, 0, torch.zeros(1, 2))
    assert torch.equal(rank.call(1, 1, torch.full((1, 2), 5.0)), torch.full((1, 2), 5.0))


def test_a_call_of_another_shape_is_computed():
    rank = Rank()
    rank.begin(1)
    rank.call(0, 0, torch.zeros(2, 2))
    assert rank.call(1, 0, torch.zeros(1, 2)).shape == (1, 2), "guidance was dropped: half the batch"


def test_after_a_run_nothing_of_it_is_kept():
    rank = Rank()
    rank.begin(1)
    rank.call(0, 0, torch.zeros(1, 2))
    rank.cycle.known.append((1.0, torch.zeros(1, 2)))
    rank.end()
    kept = [value for value in vars(rank.cycle).values() if isinstance(value, list | dict)]
    assert not any(kept) and not rank.cycle._mine.numel()


def test_the_latents_of_a_call_are_found_by_their_name():
    """Some pipelines name the text first; a step that is computed again is computed at other latents."""
    rank = Rank()
    rank.begin(1)
    rank.clock.now = Step(rank.run, 0, 0)
    rank.denoiser(text=torch.zeros(1, 3), sample=torch.ones(1, 2))
    ((_, _, kwargs, output),) = rank.cycle._calls
    given, other = torch.ones(1, 2), torch.full((1, 2), 4.0)
    assert next(iter(kwargs)) == "sample"
    again = recompute(rank.cycle._calls, given, output, other)
    assert again is not None and torch.allclose(again, other)
