"""One denoiser in several pipelines and threads: only its own pipeline's calls are cached."""

from __future__ import annotations

import copy
import threading
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.errors import UnsupportedModel
from tests import tiny

from .own import loop

CACHES: list[dict[str, Any]] = [
    {"method": "ab_cache", "interval": 2, "warmup_steps": 1},
    {"method": "deepcache", "interval": 3},
    {"method": "easycache", "threshold": 10.0, "warmup_steps": 1},
    {"method": "faster_diffusion", "interval": 3},
]


def two() -> tuple[Any, Any]:
    """Pipelines with the same UNet, each with a scheduler of its own."""
    first = tiny.make("sd15")
    parts = {**first.components, "scheduler": copy.deepcopy(first.scheduler)}
    second = type(first)(**parts, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    return first, second


def drawn(pipe: Any, seed: int, **told: Any) -> Tensor:
    return tiny.run(pipe, "sd15", prompt="a dog", seed=seed, **told)


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache["method"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_pipeline_that_draws_in_the_middle_of_another_s_run_is_computed(cache, at):
    first, second = two()
    plain = drawn(second, 5)
    handle = fastdiff.accelerate(first, cache=cache)
    alone = drawn(first, 1)
    got = []

    def between(_pipe: Any, step: int, _t: Any, given: dict) -> dict:
        if step == at:
            got.append(drawn(second, 5))
        return given

    both = drawn(first, 1, callback_on_step_end=between)
    assert torch.equal(got[0], plain) and torch.equal(both, alone)
    assert handle.report.cached > 0 and "another pipeline or thread" in str(handle.report)


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache["method"])
def test_two_threads_in_one_denoiser_do_not_meet(cache):
    first, second = two()
    plain = [drawn(second, seed) for seed in range(4)]
    fastdiff.accelerate(first, cache=cache)
    alone = drawn(first, 1, steps=20)
    found: dict[str, Any] = {}
    went = threading.Event()

    def started(_pipe: Any, step: int, _t: Any, given: dict) -> dict:
        went.set()
        return given

    def fast() -> None:
        found["fast"] = drawn(first, 1, steps=20, callback_on_step_end=started)

    thread = threading.Thread(target=fast)
    thread.start()
    went.wait(60)
    slow = [drawn(second, seed) for seed in range(4)]
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(slow, plain, strict=True))
    assert torch.equal(found["fast"], alone)


def test_a_loop_over_another_scheduler_in_the_middle_of_ones_own_is_computed():
    pipe = tiny.make("sd15")
    other = copy.deepcopy(pipe.scheduler)

    def single(_index: int) -> list[tuple[str, float]]:
        return [("cond", 1.0)]

    plain = loop(pipe, single, scheduler=other)
    fastdiff.accelerate(pipe, cache=CACHES[0])
    alone = loop(pipe, single)
    got = []
    both = loop(pipe, single, between=lambda i: got.append(loop(pipe, single, scheduler=other)) if i == 2 else None)
    assert torch.equal(got[0], plain) and torch.equal(both, alone)


def test_a_shared_denoiser_is_refused_with_what_is_true():
    first, second = two()
    fastdiff.accelerate(first, cache=CACHES[0])
    with pytest.raises(UnsupportedModel, match=r"its calls here are computed.*restore\(\)"):
        fastdiff.accelerate(second, cache="ab_cache")
    same = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(first)
    with pytest.raises(UnsupportedModel, match="the same scheduler and is fast here too"):
        fastdiff.accelerate(same, cache="ab_cache")


def test_a_pipeline_made_of_the_same_parts_is_fast_too():
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache=CACHES[0])
    same = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    same.set_progress_bar_config(disable=True)
    same("a cat", image=torch.rand(1, 3, 64, 64), num_inference_steps=8, strength=0.75, output_type="latent")
    assert (handle.report.steps, handle.report.cached) == (6, 3)


def test_a_control_net_of_two_pipelines_answers_each_for_itself():
    control = diffusers.ControlNetModel.from_unet(tiny.make("sd15").unet)
    first, second = (
        diffusers.StableDiffusionControlNetPipeline(**p.components, controlnet=control, requires_safety_checker=False)
        for p in two()
    )
    told = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)), "height": 64, "width": 64}
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)
    plain = drawn(second, 5, **told)
    fastdiff.accelerate(first, cache=CACHES[0])
    got = []

    def between(_pipe: Any, step: int, _t: Any, given: dict) -> dict:
        if step == 2:
            got.append(drawn(second, 5, **told))
        return given

    drawn(first, 1, callback_on_step_end=between, **told)
    assert torch.equal(got[0], plain)
