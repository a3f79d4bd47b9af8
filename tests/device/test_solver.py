"""A step of a fitted solver on the device: its weights are numbers, so nothing is copied there and nothing is read."""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff.pipelines.solving.combine import counts
from tests import tiny
from tests.solving.test_fitted import FAMILIES, solver

from .replay import Replay

WEIGHTS = tuple((0.01,) * sum(counts(step, 2)) for step in range(4))


def stepped(name: str, weights: tuple | None) -> Replay:
    """The solver's steps alone, with latents and a model's outputs that are on the device."""
    pipe = tiny.make(name)
    fastdiff.accelerate(pipe, solver=solver(pipe, weights=weights))
    given = {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 1.0} if name == "flux" else {"num_inference_steps": 4}
    scheduler, mode = pipe.scheduler, Replay()
    scheduler.set_timesteps(**given)  # on the CPU: on meta they have no values to be found by
    sample = torch.zeros(1, 4, 8, 8, device="meta")
    with mode:
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.zeros_like(sample), t, sample)[0]
    assert bool(scheduler._fastdiff_seen) is bool(weights), "the weights were added, or there were none"
    return mode


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_meet_no_other_device_and_nothing_is_read(name):
    """The control is the stock solver on these levels, which is run below ours."""
    found, control = stepped(name, WEIGHTS), stepped(name, None)
    assert not found.wrong
    assert set(found.reads) <= set(control.reads) and set(found.copies) <= set(control.copies)
    assert sum(found.reads.values()) == sum(control.reads.values())
