"""Blocks on different ranks, and patches that flow through them, on 2 to 4 real processes; see staged.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdiff.errors import UnsupportedModel
from fastdiff.parallel.stages import cuts

from . import staged
from .asked import Asked

NAMES = {2: ("whole", "still", "errors", "weights", "refused"), 3: ("whole", "still", "weights"), 4: ("meshes",)}
SLOW = {2: ("errors",), 3: ("whole", "still", "weights"), 4: ("meshes",)}
CHECKS = Asked(staged, NAMES, SLOW)
told = CHECKS.told
ranks_meet = pytest.mark.xdist_group("stages")


@ranks_meet
@pytest.mark.parametrize(("ranks", "name"), CHECKS.cases, ids=str)
def test_check(ranks: int, name: str) -> None:
    CHECKS.agree(ranks, name)


@ranks_meet
def test_all_checks_run() -> None:
    CHECKS.all_run()


@ranks_meet
@pytest.mark.slow
def test_what_is_old_errs_less_in_smaller_steps_and_no_more_than_displaced_patches() -> None:
    found = told(2, "errors")[0]
    assert found["flux pipefusion 16"] > 1.6 * found["flux pipefusion 32"] > 0, found
    for name in ("sd3", "flux"):
        for steps in (16, 32):
            assert 0 < found[f"{name} pipefusion {steps}"] < 1.2 * found[f"{name} distrifusion {steps}"], found


@ranks_meet
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_weights_are_those_of_a_stage_and_bytes_the_formula(ranks: int) -> None:
    """Hidden states of picture and text to the next stage, once a step; the last one's output to all. Of width 32: SD3
    has 16 tokens and 93 of text, in a batch of two halves; Flux 16 and 16, in two calls."""
    hidden = {"sd3": 2 * (16 + 93) * 32 * 4, "flux": 2 * (16 + 16) * 32 * 4}
    output = {"sd3": 2 * 4 * 64 * 4, "flux": 2 * 16 * 16 * 4}
    for name in ("sd3", "flux"):
        for rank, found in enumerate(told(ranks, "weights")):
            whole, rest, here, largest, sent = found[name]
            assert here <= rest + (whole - rest) / ranks + largest, "its own blocks; of the others one number a tensor"
            last = rank == ranks - 1
            assert sent.get("stage", 0) == (0 if last else 4 * hidden[name]), (name, rank)
            assert sent.get("output", 0) == (4 * (ranks - 1) * output[name] if last else 0), (name, rank)


@ranks_meet
def test_what_cannot_be_is_refused() -> None:
    for one in told(2, "refused"):
        assert "pipefusion cannot split a unet2d denoiser" in one["unet"]
        assert "set parallel.shard to none" in one["shard"]
        assert "take a cache of whole steps" in one["cache"]
        assert "8 tokens cannot be 99 patches; set parallel.patches lower" in one["patches"]


def test_stages_have_about_as_many_weights() -> None:
    with torch.device("meta"):
        flux = [nn.Linear(3, 100) for _ in range(19)] + [nn.Linear(1, 80) for _ in range(38)]
        few = [nn.Linear(1, size) for size in (9, 1, 1, 1)]
    sizes = [
        sum(block.weight.numel() + block.bias.numel() for block in (flux[k] for k in own)) for own in cuts(flux, 4)
    ]
    assert max(sizes) - min(sizes) <= 400 and sum(map(len, cuts(flux, 4))) == len(flux)
    assert [len(own) for own in cuts(few, 2)] == [1, 3] and [len(own) for own in cuts(few, 4)] == [1, 1, 1, 1]
    with pytest.raises(UnsupportedModel, match="4 blocks cannot be 5 stages"):
        cuts(few, 5)
