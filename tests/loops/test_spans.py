"""Where a loop begins and ends in its scheduler's list, and how often it steps."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.unets import StableCascadeUNet

import fastdiff
from fastdiff.clock import Run
from fastdiff.run import noise_levels
from tests import tiny
from tests.zoo import ZOO

from .own import text

REUSE = {"method": "ab_cache", "interval": 2, "warmup_steps": 1, "predictor": "reuse"}
_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def runs(handle: fastdiff.Accelerated) -> list[Run]:
    started: list[Run] = []
    handle.clock.on_start.append(started.append)
    return started


def test_the_base_of_a_refiner_ends_where_it_is_told_to():
    pipe = tiny.make("sdxl")
    handle = fastdiff.accelerate(pipe, cache={**REUSE, "interval": 3, "cooldown_steps": 3})
    started = runs(handle)
    tiny.run(pipe, "sdxl", steps=20, denoising_end=0.5)
    assert (started[0].total, handle.report.total, handle.report.steps) == (10, 10, 10) and not started[0].late
    assert handle.report.branches[0][-3:] == ["computed"] * 3 and handle.report.cached > 0


@pytest.mark.parametrize("end", [None, 0.8])
def test_a_refiner_begins_where_the_base_ended(end):
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(tiny.make("sdxl"))
    pipe.set_progress_bar_config(disable=True)
    handle = fastdiff.accelerate(pipe, cache={**REUSE, "cooldown_steps": 2})
    started = runs(handle)
    pipe(
        "a cat", image=torch.randn(1, 4, 8, 8), num_inference_steps=20, denoising_start=0.5, denoising_end=end,
        output_type="latent",
    )  # fmt: skip
    (run,) = started
    assert run.late and run.total == handle.report.steps == pipe.num_timesteps
    assert run.timesteps[0] == float(pipe.scheduler.timesteps[20 - 10]) and run.timesteps[-1] == float(
        pipe.scheduler.timesteps[20 - 10 + run.total - 1]
    )
    assert handle.report.branches[0][-2:] == ["computed"] * 2


@pytest.mark.parametrize("strength", [0.35, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_img2img_reports_all_the_steps_that_it_makes(kind, strength):
    """PNDM lists one time twice; a place in the list is no value."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.make("sd15"))
    more = {"skip_prk_steps": True, "steps_offset": 1} if kind == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, kind)(**_SD, **more)
    pipe.set_progress_bar_config(disable=True)
    handle, calls = fastdiff.accelerate(pipe), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe("a cat", image=torch.rand(1, 3, 64, 64), num_inference_steps=10, strength=strength, output_type="latent")
    assert handle.report.steps == handle.report.total == len(calls)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("given", ["views", "numbers"])
def test_a_loop_whose_model_is_given_a_part_of_the_time_begins_at_the_beginning(scale, given):
    """A thousandth of the first time may stand in the list itself."""
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe)
    started = runs(handle)
    pipe.scheduler.set_timesteps(1000)
    times = pipe.scheduler.timesteps if given == "views" else pipe.scheduler.timesteps.tolist()
    latents = torch.zeros(1, 4, 8, 8)
    with torch.no_grad():
        pipe.unet(latents, times[0] * scale, encoder_hidden_states=text(0))
    handle.clock.abandon()
    assert started[0].total == 1000 and not started[0].late


def test_a_loop_over_a_part_of_the_list_begins_at_its_place():
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache=REUSE)
    started = runs(handle)
    pipe.scheduler = diffusers.PNDMScheduler(**_SD, skip_prk_steps=True, steps_offset=1)
    latents = torch.zeros(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[2:]:  # the time at place 1 stands there twice
            output = pipe.unet(latents, t.expand(1), encoder_hidden_states=text(0)).sample
            latents = pipe.scheduler.step(output, t, latents).prev_sample
    assert (started[0].late, started[0].total, handle.report.steps) == (True, 9, 9)


def test_stable_cascade_goes_through_all_of_its_list_but_the_last():
    denoiser = StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=16, block_out_channels=[16, 16], num_attention_heads=[-1, 1],
        down_num_layers_per_block=[1, 1], up_num_layers_per_block=[1, 1], down_blocks_repeat_mappers=[1, 1],
        up_blocks_repeat_mappers=[1, 1], block_types_per_layer=[["SDCascadeResBlock", "SDCascadeTimestepBlock"]] * 2,
        clip_text_pooled_in_channels=16, clip_seq=2, effnet_in_channels=16, kernel_size=3,
    ).eval()  # fmt: skip
    pipe = diffusers.StableCascadeDecoderPipeline(
        decoder=denoiser, tokenizer=None, text_encoder=None, scheduler=diffusers.DDPMWuerstchenScheduler(), vqgan=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    told: dict[str, Any] = {
        "image_embeddings": torch.randn(1, 16, 2, 2), "prompt_embeds": torch.randn(1, 2, 16),
        "prompt_embeds_pooled": torch.randn(1, 1, 16), "negative_prompt_embeds": torch.randn(1, 2, 16),
        "negative_prompt_embeds_pooled": torch.randn(1, 1, 16), "num_inference_steps": 6, "guidance_scale": 2.0,
        "output_type": "latent",
    }  # fmt: skip
    plain = pipe(**told, generator=torch.Generator().manual_seed(0))[0]
    handle = fastdiff.accelerate(pipe, cache={**REUSE, "interval": 1})
    started = runs(handle)
    assert torch.equal(pipe(**told, generator=torch.Generator().manual_seed(0))[0], plain)
    assert (started[0].total, handle.report.steps, started[0].late) == (6, 6, False)
    assert list(started[0].timesteps) == pytest.approx(pipe.scheduler.timesteps[:-1].tolist())


def test_a_loop_that_steps_twice_an_iteration_is_counted_once():
    """Cosmos 1.0 asks the solver for the clean latents first, and then for the step."""
    pipe = tiny.make("sd15")
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**_SD)

    def twice() -> torch.Tensor:
        pipe.scheduler.set_timesteps(6)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                given = pipe.scheduler.scale_model_input(latents, t)
                output = pipe.unet(given, t, encoder_hidden_states=text(0)).sample
                clean = pipe.scheduler.step(output, t, latents, return_dict=False)[1]
                pipe.scheduler._step_index -= 1
                latents = pipe.scheduler.step(output + 0.01 * clean, t, latents, return_dict=False)[0]
        return latents

    plain = twice()
    handle = fastdiff.accelerate(pipe, cache={**REUSE, "interval": 1})
    started, outputs = runs(handle), []
    handle.clock.on_output.append(lambda index, output: outputs.append(index))
    assert torch.equal(twice(), plain)
    assert (len(started), started[0].total, handle.report.steps) == (1, 6, 6)
    assert outputs == [index for index in range(6) for _ in range(2)]


def test_a_cached_loop_that_steps_twice_skips_what_it_should():
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache=REUSE)
    pipe.scheduler.set_timesteps(6)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            output = pipe.unet(latents, t, encoder_hidden_states=text(0)).sample
            pipe.scheduler.step(output, t, latents)
            latents = pipe.scheduler.step(output, t, latents).prev_sample
    assert handle.report.branches[0] == ["computed", "cached"] * 3


def test_state_that_is_copied_and_put_back_leaves_the_scheduler_its_own():
    """MultiDiffusion keeps the state of the scheduler for each view of a panorama."""
    pipe = tiny.make("sd15")
    plain = copy.deepcopy(pipe.scheduler)
    before, kind = dict(vars(pipe.scheduler)), type(pipe.scheduler)
    handle = fastdiff.accelerate(pipe, cache=REUSE)
    scheduler = pipe.scheduler
    assert isinstance(scheduler, kind) and scheduler.__class__ is kind and vars(scheduler).keys() == before.keys()
    vars(scheduler).update(copy.deepcopy(vars(scheduler)))
    scheduler.set_timesteps(5)
    plain.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, plain.timesteps)
    vars(plain).update(vars(scheduler))  # into another object of the class
    plain.set_timesteps(7)
    assert len(scheduler.timesteps) == 5 and len(plain.timesteps) == 7
    tiny.run(pipe, "sd15", steps=6)
    assert handle.report.cached == 3
    handle.restore()
    assert type(scheduler) is kind and vars(scheduler).keys() == before.keys() | vars(plain).keys()


@pytest.mark.parametrize("views", [1, 3])
def test_a_panorama_counts_steps_not_views(views):
    pipe = tiny.make("sd15")
    scheduler = pipe.scheduler

    def panorama() -> torch.Tensor:
        scheduler.set_timesteps(6)
        latents = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(views)]
        states = [copy.deepcopy(vars(scheduler)) for _ in range(views)]
        with torch.no_grad():
            for t in scheduler.timesteps:
                for k in range(views):
                    vars(scheduler).update(states[k])
                    output = pipe.unet(latents[k], t, encoder_hidden_states=text(0)).sample
                    latents[k] = scheduler.step(output, t, latents[k]).prev_sample
                    states[k] = copy.deepcopy(vars(scheduler))
        return torch.cat(latents)

    plain = panorama()
    handle = fastdiff.accelerate(pipe, cache=REUSE)
    found = panorama()
    assert handle.report.steps == 6
    if views == 1:
        assert handle.report.cached == 3
    else:  # nothing tells the views apart
        assert torch.equal(found, plain) and "nothing tells apart" in str(handle.report)


def test_steps_that_copies_of_the_scheduler_take_are_said_and_nothing_is_kept():
    """Diffusion forcing gives each frame a scheduler of its own."""
    pipe = tiny.make("sd15")

    def forced() -> torch.Tensor:
        pipe.scheduler.set_timesteps(6)
        own = copy.deepcopy(pipe.scheduler)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                output = pipe.unet(latents, t, encoder_hidden_states=text(0)).sample
                latents = own.step(output, t, latents).prev_sample
        return latents

    plain = forced()
    handle = fastdiff.accelerate(pipe, cache=REUSE)
    assert torch.equal(forced(), plain)
    assert "copies of the scheduler" in str(handle.report.notes) and handle.clock.run is None


def test_a_scheduler_that_counts_signal_is_read_as_noise():
    """Mochi's sigmas are those of the signal."""
    pipe = ZOO["mochi"].make()
    handle = fastdiff.accelerate(pipe)
    started = runs(handle)
    ZOO["mochi"].run(pipe, 4)
    noise = [started[0].signal_and_noise(index)[1] for index in range(4)]
    assert pipe.scheduler.config.invert_sigmas and noise == sorted(noise, reverse=True) and noise[0] > 0.9
    usual, flow = noise_levels(diffusers.FlowMatchEulerDiscreteScheduler(), [1000.0, 500.0])
    assert flow and usual[0] == 1.0
