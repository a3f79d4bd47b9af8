"""Faster Diffusion: decoding in one batch is decoding one by one on every pipeline; noise, key steps, ControlNets."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.caching.methods.faster_diffusion import FasterDiffusion
from fastdiff.caching.region import Region
from fastdiff.clock import Run
from tests import tiny
from tests.caching.control import control_image, controlled
from tests.laws.rows import ROWS
from tests.some import some
from tests.zoo import ZOO

STEPS = 6
SD = tiny.SD_BETAS
SCHEDULERS = {
    "DDIM": lambda: diffusers.DDIMScheduler(**SD, clip_sample=False, steps_offset=1),
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(**SD),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**SD, steps_offset=1),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**SD),
}
# not all of their inputs have the batch first, or their timesteps are not the scheduler's
ONE_BY_ONE = ("hidream", "lumina2", "z image", "kandinsky prior")


def settings(most: int, **more: Any) -> dict[str, Any]:
    return {"method": "faster_diffusion", "interval": 3, "max_parallel": most} | more


def executions(module: nn.Module) -> list[int]:
    """Rows of each real execution of a module that no method replaces."""
    rows: list[int] = []
    module.register_forward_hook(lambda _m, args, _out: rows.append(len(args[0]) if args else 0))
    return rows


def assert_close(a: Tensor, b: Tensor) -> None:
    assert float((a.double() - b.double()).abs().max() / b.double().abs().max()) < 1e-4


def last_layer(entry: Any, pipe: Any) -> nn.Module:
    """A layer that runs in every forward of the denoiser, however much of it is left out."""
    denoiser = entry.denoiser(pipe)
    return denoiser.conv_out if hasattr(denoiser, "conv_out") else entry.deepest_leaf(pipe)


@pytest.mark.parametrize("name", some((name for name, entry in ZOO.items() if entry.method), 3))
def test_decoding_in_one_batch_is_decoding_one_by_one(name):
    entry, results, counts = ZOO[name], [], []
    for most in (8, 1):
        pipe = entry.make()
        ran = executions(last_layer(entry, pipe))
        handle = fastdiff.accelerate(pipe, cache=settings(most))
        results.append(entry.run(pipe, STEPS))
        counts.append(len(ran))
        assert (handle.report.computed, handle.report.cached) == (2, STEPS - 2)
        step_by_step = any("decoded step by step" in note for note in handle.report.notes)
        assert step_by_step == (most > 1 and name in ONE_BY_ONE), handle.report.notes
    assert torch.isfinite(results[0]).all()
    assert_close(*results)
    # two groups in a forward each, and one more for the first: it shows what holds the batch
    assert counts == [(STEPS if name in ONE_BY_ONE else 3) * entry.calls, STEPS * entry.calls]


@pytest.mark.parametrize(
    ("name", "scheduler"), [*(("sd15", kind) for kind in SCHEDULERS), ("sdxl", "Euler"), ("flux", ""), ("wan", "")]
)
def test_so_it_is_with_a_batch_of_two_and_other_solvers(name, scheduler):
    """Euler scales what the denoiser is given, which loops of others forget."""
    results = []
    for most in (8, 1):
        pipe = tiny.make(name)
        if scheduler:
            pipe.scheduler = SCHEDULERS[scheduler]()
        handle = fastdiff.accelerate(pipe, cache=settings(most))
        both = {"prompt": ["a red cat", "a dog"], "negative_prompt": ["bad", "worse"]}
        results.append(tiny.run(pipe, name, steps=STEPS, **both))
        assert handle.report.cached == STEPS - 2 and handle.report.notes == []
    assert_close(*results)


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_a_group_larger_than_max_parallel_takes_several_forwards(name):
    results, calls = [], 2 if name in tiny.TWO_CALLS else 1
    for most, forwards in ((4, 4), (1, 9)):
        pipe = tiny.make(name)
        last = pipe.unet.conv_out if name == "sd15" else pipe.transformer.proj_out
        ran = executions(last)
        handle = fastdiff.accelerate(pipe, cache=settings(most, interval=9))
        results.append(tiny.run(pipe, name, steps=9))
        assert (handle.report.computed, len(ran)) == (1, calls * forwards)
        if most == 4:
            assert sorted(ran) == sorted([rows * (2 // calls) for rows in (1, 3, 4, 1)] * calls)
    assert_close(*results)


def run_of(total: int) -> Run:
    return Run(1, tuple(float(total - i) for i in range(total)), tuple(1 - i / total for i in range(total)), True)


def key_steps(total: int, **more: Any) -> list[int]:
    mask = FasterDiffusion(**more).mask(run_of(total), Region("anywhere", ()))
    return [index for index, key in enumerate(mask) if key]


def test_key_steps_are_those_of_50_steps_at_the_same_shares_of_other_runs():
    """The authors' list is of absolute steps: of 20 it would make 15 the last key step, the paper's place is 14."""
    assert key_steps(50) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert key_steps(99) == [0, 2, 4, 6, 10, 20, 30, 50, 70]
    assert key_steps(20) == [0, 1, 2, 4, 6, 10, 14]
    assert key_steps(1) == [0]
    assert key_steps(11, key_steps=(3,), of_steps=11) == [0, 3], "step 0 is always one"
    with pytest.raises(fastdiff.errors.BadConfig, match="key_steps holds 9, but the run has steps 0 to 5"):
        key_steps(6, key_steps=(9,), of_steps=6)


# noise


def given_to_the_solver(pipe: Any, draw: Any, **more: Any) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Timesteps, what was mixed into the latents before each step of the solver, and the latents given to it."""
    times, given, made = [], [], []
    step = pipe.scheduler.step

    def spied(output, timestep, sample, **kwargs):
        times.append(float(timestep))
        given.append(sample.clone())
        result = step(output, timestep, sample, **kwargs)
        made.append(result[0].clone())
        return result

    pipe.scheduler.step = spied
    fastdiff.accelerate(pipe, cache=settings(8, **more))
    draw(pipe)
    mixed = [torch.zeros_like(given[0]), *(now - before for now, before in zip(given[1:], made[:-1], strict=True))]
    return times, mixed, given


@pytest.mark.parametrize("kind", ["DDIM", "Euler"])
def test_noise_of_unit_scale_is_mixed_in_below_the_middle(kind):
    """Euler's initial noise is 14 times as large as DDIM's; the authors' code mixes in 0.003 of that."""
    pipe = tiny.make("sd15")
    pipe.scheduler = SCHEDULERS[kind]()
    draw = lambda pipe: tiny.run(pipe, "sd15", steps=STEPS)  # noqa: E731
    times, mixed, given = given_to_the_solver(pipe, draw, noise=0.003)
    scale = float(pipe.scheduler.init_noise_sigma)
    assert (scale > 10) == (kind == "Euler")
    assert min(times) < 500 < max(times)
    for time, added in zip(times, mixed, strict=True):
        expected = 0.003 * given[0] / scale if time < 500 else torch.zeros_like(added)
        assert torch.allclose(added, expected, atol=2e-6)
    assert 0.8 < float(mixed[-1].std() / 0.003) < 1.2


def test_an_image_that_is_painted_over_gets_no_noise():
    """Its run starts late: what it begins with is not noise, but a picture."""

    def draw(pipe):
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
        pipe("a cat", image=image, num_inference_steps=10, strength=0.6, output_type="latent")

    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.make("sd15"))
    pipe.set_progress_bar_config(disable=True)
    times, mixed, _ = given_to_the_solver(pipe, draw, noise=0.5)
    assert len(times) == 6 and min(times) < 500
    assert not any(added.any() for added in mixed)


def test_where_nothing_is_skipped_no_noise_is_mixed_in():
    times, mixed, _ = given_to_the_solver(tiny.make("sd15"), lambda p: tiny.run(p, "sd15"), noise=0.5, interval=1)
    assert len(times) == STEPS and not any(added.any() for added in mixed)


def test_the_latents_are_found_among_the_arguments_of_any_solver():
    """CogVideoX's DPM solver takes two things more before them."""
    pipe = tiny.make("cogvideox")
    pipe.scheduler = diffusers.CogVideoXDPMScheduler()
    results = []
    for noise in (0.0, 0.5):
        with fastdiff.accelerate(pipe, cache=settings(8, noise=noise)):
            results.append(tiny.run(pipe, "cogvideox", steps=STEPS))
    assert torch.isfinite(results[1]).all() and not torch.equal(*results)


# ControlNets


def count_control(**cache: Any) -> tuple[list[int], fastdiff.Accelerated, Tensor]:
    pipe = controlled()
    ran = executions(pipe.controlnet.conv_in)
    handle = fastdiff.accelerate(pipe, cache=cache)
    return ran, handle, tiny.run(pipe, "sd15", steps=STEPS, image=control_image(1))


@pytest.mark.parametrize("most", [1, 8])
@pytest.mark.parametrize(("at_key_steps", "count"), [(True, 2), (False, STEPS)])
def test_a_controlnet_runs_at_key_steps_unless_told_otherwise(most, at_key_steps, count):
    ran, handle, _ = count_control(**settings(most, control_at_key_steps=at_key_steps))
    assert (len(ran), handle.report.cached) == (count, STEPS - 2)


def test_a_controlnet_is_asked_again_in_every_call():
    pipe = controlled()
    fastdiff.accelerate(pipe, cache=settings(8))
    first, second, again = (tiny.run(pipe, "sd15", steps=STEPS, image=control_image(seed)) for seed in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)


AB = {"method": "ab_cache", "interval": 3, "warmup_steps": 1}


@pytest.mark.parametrize(("cache", "count"), [
    (lambda: AB | {"site": "output"}, 2),
    (lambda: AB | {"site": "blocks"}, STEPS),  # between the blocks, the UNet adds what the ControlNet says
    (lambda: ROWS["dp sd15"].aggressive, 3),
], ids=["ab_cache", "ab_cache blocks", "dp"])  # fmt: skip
def test_where_no_one_looks_at_a_controlnet_it_is_left_out_and_the_picture_is_the_same(monkeypatch, cache, count):
    ran, _, picture = count_control(**cache())
    assert len(ran) == count
    monkeypatch.setattr("fastdiff.caching.session.at_key_steps", lambda forward, **_: forward)
    always, _, same = count_control(**cache())
    assert len(always) == STEPS and torch.equal(picture, same)
