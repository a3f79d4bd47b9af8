"""What callbacks, interrupts and shared schedules do to the denoising loop while steps are cached."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import fastdiff
from tests import tiny
from tests.coverage.test_attachments import STEPS, each, run
from tests.coverage.test_features import OF_A_UNET, aggressive, image, neutral
from tests.zoo import ZOO


@pytest.mark.parametrize("method", OF_A_UNET)
def test_guidance_that_a_callback_drops_halfway_halves_the_batch(method):
    rows: list[int] = []

    def drop(pipe: DiffusionPipeline, step: int, _timestep: Any, given: dict) -> dict:
        if step == 2:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"][-1:]
        return given

    told = {"callback_on_step_end": drop, "callback_on_step_end_tensor_inputs": ["prompt_embeds", "latents"]}
    pipe = tiny.make("sd15")
    plain = run(pipe, "sd15", **told)
    with fastdiff.accelerate(pipe, cache=neutral(method)):
        assert torch.equal(run(pipe, "sd15", **told), plain)
    handle = fastdiff.accelerate(pipe, cache=aggressive(method))
    pipe.unet.conv_out.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
    found = run(pipe, "sd15", **told)
    assert torch.isfinite(found).all() and handle.report.steps == STEPS and handle.report.cached >= 1
    # which is shown the half batch by a step alone, and decodes the two after it in one forward
    assert rows[-1] == (2 if method == "faster_diffusion" else 1)
    assert handle.report.branches[0][3] == "computed", "what is remembered of two halves does not fit one"
    fresh = tiny.make("sd15")
    fastdiff.accelerate(fresh, cache=aggressive(method))
    assert torch.equal(run(pipe, "sd15"), run(fresh, "sd15"))


@each
def test_a_callback_sees_and_may_change_the_latents_of_cached_steps(name, method):
    def nudge(_pipe: DiffusionPipeline, step: int, _timestep: Any, given: dict) -> dict:
        seen.append(given["latents"])
        return {"latents": given["latents"] * 0.9} if step == 3 else given

    seen: list[Tensor] = []
    pipe = tiny.make(name)
    plain = run(pipe, name, callback_on_step_end=nudge)
    with fastdiff.accelerate(pipe, cache=neutral(method)):
        assert torch.equal(run(pipe, name, callback_on_step_end=nudge), plain)
    fastdiff.accelerate(pipe, cache=aggressive(method))
    seen.clear()
    changed = run(pipe, name, callback_on_step_end=nudge)
    assert len(seen) == STEPS and not torch.equal(changed, run(pipe, name))


@each
def test_an_interrupted_run_leaves_nothing_to_the_next(name, method):
    def stop(pipe: DiffusionPipeline, step: int, _timestep: Any, given: dict) -> dict:
        pipe._interrupt = step == 2
        return given

    used, fresh = tiny.make(name), tiny.make(name)
    handle = fastdiff.accelerate(used, cache=aggressive(method))
    run(used, name, callback_on_step_end=stop)
    assert handle.report.steps == 3 and handle.clock.run is None
    fastdiff.accelerate(fresh, cache=aggressive(method))
    assert torch.equal(run(used, name), run(fresh, name))
    assert handle.report.steps == STEPS


@pytest.mark.parametrize("method", OF_A_UNET)
def test_base_and_refiner_share_the_steps_of_one_picture(method):
    def draw(base: DiffusionPipeline, refiner: DiffusionPipeline) -> Tensor:
        half = run(base, "sdxl", denoising_end=0.5)
        told = {"image": half, "denoising_start": 0.5, "strength": 0.3, "num_inference_steps": 8}
        return ZOO["sdxl refiner"].run(refiner, 8, **told)

    base, refiner = tiny.make("sdxl"), ZOO["sdxl refiner"].make()
    refiner.scheduler = base.scheduler  # as when the two are made of shared parts
    plain = draw(base, refiner)
    with fastdiff.accelerate(base, cache=neutral(method)), fastdiff.accelerate(refiner, cache=neutral(method)):
        assert torch.equal(draw(base, refiner), plain)
    handles = [fastdiff.accelerate(pipe, cache=aggressive(method)) for pipe in (base, refiner)]
    found = draw(base, refiner)
    assert torch.isfinite(found).all() and not torch.equal(found, plain)
    assert [handle.report.steps for handle in handles] == [3, 4]
    assert all(handle.report.cached for handle in handles[:1] if method != "tgate")
    for handle in reversed(handles):
        handle.restore()
    assert torch.equal(draw(base, refiner), plain)


def test_a_refiner_of_the_same_unet_is_fast_too():
    base = tiny.make("sdxl")
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**base.components)
    refiner.set_progress_bar_config(disable=True)
    told = {"image": image(1), "strength": 0.5, "height": None, "width": None}
    told = {key: value for key, value in (tiny.arguments("sdxl", STEPS) | told).items() if value is not None}
    plain = refiner(**told)[0]
    handle = fastdiff.accelerate(base, cache=aggressive("deepcache"))
    run(base, "sdxl", denoising_end=0.5)
    found = refiner(**{**told, "generator": seeded()})[0]
    assert (handle.report.steps, handle.report.cached) == (3, 2) and not torch.equal(found, plain)
    handle.restore()
    assert torch.equal(refiner(**{**told, "generator": seeded()})[0], plain)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
