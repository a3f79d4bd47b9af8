"""Whatever way a pipeline was made: diffusers' auto classes, from another pipeline, or out of modular blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.pipelines.loading import EMBEDDED
from tests import tiny
from tests.state import differences, snapshot

STEPS = 6
HALF = {"method": "ab_cache", "interval": 2, "warmup_steps": 1}


@pytest.mark.parametrize("model", ["shapes-unet", "shapes-dit"])
def test_what_the_auto_class_loads_is_known_by_its_name(model):
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(EMBEDDED / model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": STEPS, "output_type": "latent"}

    def draw() -> Tensor:
        return pipe("a small green ring", generator=torch.Generator().manual_seed(0), **given).images

    plain = draw()
    with fastdiff.accelerate(pipe, "fast") as fast:
        found = draw()
        assert fast.report.steps == 10 and not torch.equal(found, plain), "the plan that comes with the model"
    assert torch.equal(draw(), plain)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("auto", ["AutoPipelineForImage2Image", "AutoPipelineForInpainting"])
def test_a_pipeline_made_from_an_accelerated_one_is_fast_too_and_restored_with_it(name, auto):
    """They share denoiser and scheduler."""
    pipe = tiny.make(name)
    plain = tiny.run(pipe, name)  # after it the hooks and caches that diffusers makes when first called are there
    clean = snapshot(pipe)
    handle = fastdiff.accelerate(pipe, cache=HALF)
    other = getattr(diffusers, auto).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    given = tiny.arguments(name, STEPS) | {"image": torch.rand(1, 3, 64, 64), "strength": 1.0}
    if "Inpainting" in auto:
        given["mask_image"] = torch.ones(1, 1, 64, 64)
    taken = inspect.signature(other.__call__).parameters
    other(**{key: value for key, value in given.items() if key in taken})
    assert handle.report.steps >= STEPS - 1 and handle.report.cached >= 2
    handle.restore()
    changed = differences(clean, snapshot(pipe))  # runs move a scheduler on, accelerated or not
    assert [found for found in changed if not found.startswith("scheduler.")] == []
    assert torch.equal(tiny.run(pipe, name), plain)


@dataclass(frozen=True)
class Modular:
    """blocks: of diffusers; calls: of the denoiser in a step; method: one that goes inside of this denoiser."""

    blocks: str
    calls: int
    method: dict[str, Any]
    given: dict[str, Any]

    def make(self, name: str) -> Any:
        pipe = getattr(diffusers, self.blocks)().init_pipeline()
        parts = {k: v for k, v in tiny.make(name).components.items() if k in pipe.components and v is not None}
        pipe.update_components(**parts)
        return pipe

    def run(self, pipe: Any, steps: int = STEPS, seed: int = 0) -> Tensor:
        told = {"prompt": "a red cat", "num_inference_steps": steps, "height": 64, "width": 64, **self.given}
        return pipe(**told, generator=torch.Generator().manual_seed(seed), output_type="latent", output="images")


_GATED = {"method": "first_block", "threshold": 1e9, "max_consecutive_cached": 2}
_FEW_TOKENS = {"max_sequence_length": 16}
MODULAR = {
    "sdxl": Modular("StableDiffusionXLAutoBlocks", 2, {"method": "deepcache", "interval": 3}, {}),
    "sd3": Modular("StableDiffusion3AutoBlocks", 2, _GATED, _FEW_TOKENS),
    "flux": Modular("FluxAutoBlocks", 1, _GATED, _FEW_TOKENS),
}
each_modular = pytest.mark.parametrize("name", MODULAR)


@each_modular
def test_a_modular_pipeline_is_exact_where_nothing_is_skipped(name):
    """The guider of diffusers calls the denoiser once for each branch, where the stock pipeline takes one batch."""
    case = MODULAR[name]
    pipe = case.make(name)
    plain = case.run(pipe)
    with fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 1}) as handle:
        assert torch.equal(case.run(pipe), plain)
    assert (handle.report.steps, handle.report.cached, len(handle.report.branches)) == (STEPS, 0, case.calls)


@each_modular
@pytest.mark.parametrize("which", ["whole model", "inside"])
def test_a_modular_pipeline_skips_starts_afresh_at_each_call_and_is_restored(name, which):
    case = MODULAR[name]
    pipe = case.make(name)
    denoiser = tiny.denoiser(pipe)
    clean, plain = vars(denoiser).copy(), case.run(pipe)
    cache = HALF if which == "whole model" else case.method

    def fresh(steps: int) -> Tensor:
        other = case.make(name)
        fastdiff.accelerate(other, cache=cache)
        return case.run(other, steps)

    handle = fastdiff.accelerate(pipe, cache=cache)
    found = case.run(pipe)
    assert handle.report.cached >= 3 and not torch.equal(found, plain)
    assert torch.equal(case.run(pipe, 4), fresh(4)) and handle.report.steps == 4
    assert torch.equal(case.run(pipe), found)
    handle.restore()
    assert torch.equal(case.run(pipe), plain) and vars(denoiser).keys() == clean.keys()


def test_a_modular_pipeline_that_fails_halfway_leaves_nothing_to_the_next_call():
    case = MODULAR["sd3"]
    pipe = case.make("sd3")
    handle = fastdiff.accelerate(pipe, cache=HALF)
    expected = case.run(pipe)
    calls: list[Callable] = []

    def fail(*_: Any) -> None:
        calls.append(fail)
        if len(calls) == 5:
            raise RuntimeError("stop")

    hook = pipe.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        case.run(pipe)
    hook.remove()
    assert torch.equal(case.run(pipe), expected)
    handle.restore()


def test_a_modular_pipeline_without_its_model_is_refused_in_one_sentence():
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    with pytest.raises(fastdiff.FastdiffError, match="StableDiffusionXLModularPipeline has no denoiser with a sched"):
        fastdiff.accelerate(pipe, "balanced")
