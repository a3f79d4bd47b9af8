"""The clock against plain diffusers: what the scheduler really did, seen by an observer that knows no clock."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.clock import Run, Step
from tests import tiny

_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
SCHEDULERS: dict[str, tuple[Any, int]] = {  # and the evaluations that n steps make: n times this, plus that
    "DDIM": (diffusers.DDIMScheduler(**_SD, steps_offset=1), 5),
    "PNDM": (diffusers.PNDMScheduler(**_SD, skip_prk_steps=True, steps_offset=1), 6),
    "Euler": (diffusers.EulerDiscreteScheduler(**_SD, steps_offset=1), 5),
    "Euler Karras": (diffusers.EulerDiscreteScheduler(**_SD, use_karras_sigmas=True, steps_offset=1), 5),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler(**_SD, steps_offset=1), 5),
    "DPM++ 2M": (diffusers.DPMSolverMultistepScheduler(**_SD), 5),
    "DPM++ 2M SDE": (diffusers.DPMSolverMultistepScheduler(**_SD, algorithm_type="sde-dpmsolver++"), 5),
    "UniPC": (diffusers.UniPCMultistepScheduler(**_SD), 5),
    "Heun": (diffusers.HeunDiscreteScheduler(**_SD), 9),
    "KDPM2": (diffusers.KDPM2DiscreteScheduler(**_SD), 9),
    "LCM": (diffusers.LCMScheduler(**_SD), 5),
}


class Observer:
    """Every denoiser call: what the clock says, and what really happens."""

    def __init__(self, pipe, handle: fastdiff.Accelerated) -> None:
        self.steps: list[Step] = []
        self.timesteps: list[float] = []
        self.started: list[Run] = []
        self.ended: list[int] = []
        self.ticks: list[int] = []
        clock = handle.clock
        clock.on_call.append(self.steps.append)
        clock.on_start.append(self.started.append)
        clock.on_end.append(lambda run: self.ended.append(run.number))
        clock.on_tick.append(self.ticks.append)
        tiny.denoiser(pipe).register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, _module, args, kwargs) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.timesteps.append(float(torch.as_tensor(timestep).flatten()[-1]))


def observed(name: str, scheduler: Any = None) -> tuple[Any, fastdiff.Accelerated, Observer]:
    pipe = tiny.make(name)
    if scheduler is not None:
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
    handle = fastdiff.accelerate(pipe)
    return pipe, handle, Observer(pipe, handle)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_clock_is_right_for_the_scheduler(kind, name):
    scheduler, evaluations = SCHEDULERS[kind]
    pipe, _, seen = observed(name, scheduler)
    tiny.run(pipe, name, steps=5)
    (run,) = seen.started
    assert run.total == len(seen.steps) == evaluations
    assert [step.index for step in seen.steps] == seen.ticks == list(range(evaluations))
    assert {step.branch for step in seen.steps} == {0}
    assert list(run.timesteps) == pytest.approx(seen.timesteps)
    assert seen.ended == [run.number] and not run.flow


def assert_sigmas_fit(run: Run) -> None:
    """To the timesteps: as flow matching or Stable Diffusion's noise schedule has it."""
    alphas = diffusers.DDIMScheduler(**_SD).alphas_cumprod.double().numpy()
    noise = ((1 - alphas) / alphas) ** 0.5
    assert len(run.sigmas) == len(run.timesteps)
    for sigma, timestep in zip(run.sigmas, run.timesteps, strict=True):
        if run.flow:
            below = above = timestep / 1000
        else:
            below, above = noise[math.floor(timestep)], noise[math.ceil(timestep)]
        assert below * 0.999 <= sigma <= above * 1.001, (timestep, sigma)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_sigmas_are_those_of_the_noise_in_the_sample(kind):
    """sigma^2 = (1 - a) / a at the timestep of the evaluation, whatever the scheduler keeps it as."""
    scheduler, _ = SCHEDULERS[kind]
    pipe, _, seen = observed("sd15", scheduler)
    tiny.run(pipe, "sd15", steps=5)
    assert_sigmas_fit(seen.started[0])


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_coordinates_never_visit_a_place_twice(kind):
    scheduler, evaluations = SCHEDULERS[kind]
    pipe, _, seen = observed("sd15", scheduler)
    tiny.run(pipe, "sd15", steps=5)
    (run,) = seen.started
    for axis in ("step", "timestep", "sigma", "logsnr"):
        places = run.coordinates(axis)
        assert len(places) == evaluations and len(set(places)) == evaluations
        assert sorted(places) in (list(places), list(places[::-1]))
        twice = kind in ("PNDM", "Heun")
        assert (places == tuple(range(evaluations))) == (axis == "step" or twice)


@pytest.mark.parametrize("times", [(900.0, 500.0, 900.0, 500.0), (10.0, 30.0, 20.0)])
def test_a_loop_that_goes_back_and_forth_is_measured_in_steps(times):
    run = Run(1, times, tuple(t / 1000 for t in times), flow=True)
    assert all(run.coordinates(axis) == tuple(range(len(times))) for axis in ("timestep", "sigma", "logsnr"))


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_flow_matching_sigmas_are_the_scheduler_s_own(name):
    pipe, _, seen = observed(name)
    tiny.run(pipe, name, steps=5)
    (run,) = seen.started
    assert run.flow and run.total == 5
    assert list(run.sigmas) == pytest.approx(pipe.scheduler.sigmas[:5].tolist())
    assert list(run.timesteps) == pytest.approx(pipe.scheduler.timesteps.tolist())
    assert list(run.coordinates("logsnr")) == sorted(run.coordinates("logsnr"))


def test_timesteps_expanded_to_one_for_each_token_are_one_step():
    """Wan 2.2 tells the denoiser a timestep for every token."""
    pipe, _, seen = observed("wan")
    pipe.register_to_config(expand_timesteps=True)
    tiny.run(pipe, "wan", steps=4)
    (run,) = seen.started
    assert list(run.timesteps) == pytest.approx(pipe.scheduler.timesteps.tolist())
    assert [(step.index, step.branch) for step in seen.steps] == [(i, b) for i in range(4) for b in (0, 1)]


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("guidance", [True, False])
def test_branches_are_the_denoiser_calls_of_one_step(name, guidance):
    pipe, handle, seen = observed(name)
    tiny.run(pipe, name, steps=4, **({} if guidance else tiny.guidance_off(name)))
    branches = [0, 1] if guidance and name in tiny.TWO_CALLS else [0]
    assert [(step.index, step.branch) for step in seen.steps] == [(i, b) for i in range(4) for b in branches]
    assert handle.report.branch_names() == ({0: "cond", 1: "uncond"} if len(branches) == 2 else {0: "batch"})


IMG2IMG = {
    "DDIM": ("sd15", SCHEDULERS["DDIM"][0]),
    "PNDM": ("sd15", SCHEDULERS["PNDM"][0]),
    "Euler": ("sd15", SCHEDULERS["Euler"][0]),
    "DPM++ 2M": ("sd15", SCHEDULERS["DPM++ 2M"][0]),
    "Heun": ("sd15", SCHEDULERS["Heun"][0]),
    "SDXL Euler": ("sdxl", SCHEDULERS["Euler"][0]),
    "SD3": ("sd3", FLOW(shift=3.0)),
    "Flux": ("flux", FLOW(shift=3.0)),
}
_CLASSES = {
    "sd15": diffusers.StableDiffusionImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
    "flux": diffusers.FluxImg2ImgPipeline,
}


@pytest.mark.parametrize("kind", IMG2IMG)
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_img2img_counts_only_the_steps_it_makes(kind, strength):
    name, scheduler = IMG2IMG[kind]
    pipe = _CLASSES[name].from_pipe(tiny.make(name))
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    handle = fastdiff.accelerate(pipe)
    seen = Observer(pipe, handle)
    settings = tiny.arguments(name, steps=10) | {"image": torch.rand(1, 3, 64, 64), "strength": strength}
    if name in ("sd15", "sdxl"):
        del settings["height"], settings["width"]
    pipe(**settings)
    (run,) = seen.started
    calls = len({step.branch for step in seen.steps})
    assert run.total * calls == len(seen.steps) and seen.ended == [run.number]
    assert [step.index for step in seen.steps[::calls]] == seen.ticks == list(range(run.total))
    scale = 1000 if name == "flux" else 1  # Flux is told timestep / 1000
    assert [t * scale for t in seen.timesteps[::calls]] == pytest.approx(list(run.timesteps), rel=1e-3)
    assert_sigmas_fit(run)
    assert (handle.report.steps, handle.report.total) == (run.total, run.total)


def test_an_interrupted_call_ends_its_run_and_the_next_one_is_clean():
    pipe, handle, seen = observed("sd15")

    def interrupt(pipe, step):
        if step == 1:
            pipe._interrupt = True

    tiny.run(pipe, "sd15", steps=5, **tiny.at_each_step("sd15", interrupt))
    assert seen.ended == [1] and handle.clock.run is None
    assert (handle.report.steps, handle.report.total) == (2, 5)
    tiny.run(pipe, "sd15", steps=3)
    assert [step.index for step in seen.steps[2:]] == [0, 1, 2] and seen.ended == [1, 2]


def test_runs_are_numbered_and_each_has_its_own_length():
    pipe, _, seen = observed("sdxl")
    for steps in (3, 5, 2):
        tiny.run(pipe, "sdxl", steps=steps)
    assert [(run.number, run.total) for run in seen.started] == [(1, 3), (2, 5), (3, 2)]
    assert seen.ended == [1, 2, 3]


def test_two_pipelines_in_one_process_have_two_clocks():
    first, _, seen_first = observed("sd15")
    second, _, seen_second = observed("sd15")

    def run_the_second(_pipe, step):
        if step == 1:
            tiny.run(second, "sd15", steps=3)

    tiny.run(first, "sd15", steps=4, **tiny.at_each_step("sd15", run_the_second))
    assert [step.index for step in seen_first.steps] == [0, 1, 2, 3]
    assert [step.index for step in seen_second.steps] == [0, 1, 2]


@pytest.mark.parametrize("before_the_first_call", [True, False])
def test_a_scheduler_swapped_after_accelerate_is_followed(before_the_first_call):
    pipe, handle, seen = observed("sd15")
    first = pipe.scheduler
    if not before_the_first_call:
        tiny.run(pipe, "sd15", steps=4)
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(first.config)
    tiny.run(pipe, "sd15", steps=4)
    assert seen.started[-1].total == 7 and [step.index for step in seen.steps[-7:]] == list(range(7))
    assert not callable(vars(first).get("step")), "the old scheduler is left as it was"
    tiny.run(pipe, "sd15", steps=2)
    assert seen.started[-1].total == 3
    handle.restore()
    assert not callable(vars(pipe.scheduler).get("step"))


@pytest.mark.parametrize("scheduler", [None, diffusers.UniPCMultistepScheduler(**_SD)])
def test_a_denoiser_call_outside_a_run_belongs_to_no_step(scheduler):
    pipe, handle, seen = observed("sd15")
    if scheduler is not None:
        pipe.scheduler = scheduler
    latents, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 32)
    with torch.no_grad():
        for _ in range(3):
            pipe.unet(latents, 10, encoder_hidden_states=text)
        tiny.run(pipe, "sd15", steps=2)
        counted = len(seen.steps)
        pipe.unet(latents, timestep=10, encoder_hidden_states=text)
    assert counted == len(seen.steps) == 2 and handle.clock.now is None and len(seen.started) == 1


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_scheduler_keeps_its_signatures(kind):
    """Pipelines read them to see whether eta, a generator, sigmas or timesteps are taken."""
    scheduler, _ = SCHEDULERS[kind]
    pipe, *_ = observed("sd15", scheduler)
    for name in ("step", "set_timesteps", "scale_model_input"):
        assert inspect.signature(getattr(pipe.scheduler, name)) == inspect.signature(getattr(scheduler, name))
    assert inspect.signature(pipe.unet.forward) == inspect.signature(type(pipe.unet).forward.__get__(pipe.unet))


@pytest.mark.parametrize("kind", ["DDIM", "Euler ancestral", "DPM++ 2M SDE", "LCM"])
def test_stochastic_steps_use_the_generator_and_eta_that_the_caller_gave(kind):
    scheduler, _ = SCHEDULERS[kind]
    plain, watched = tiny.make("sd15"), tiny.make("sd15")
    for pipe in (plain, watched):
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
    fastdiff.accelerate(watched)
    torch.manual_seed(1)
    expected = tiny.run(plain, "sd15", steps=4, eta=0.7)
    torch.manual_seed(2)
    assert torch.equal(tiny.run(watched, "sd15", steps=4, eta=0.7), expected)


def test_a_deep_copy_of_the_scheduler_goes_its_own_way():
    """Pipelines with sound copy their scheduler and step both."""
    pipe, _, seen = observed("wan")
    other = copy.deepcopy(pipe.scheduler)
    other.set_timesteps(3)
    pipe.scheduler.set_timesteps(5)
    assert (len(other.timesteps), len(pipe.scheduler.timesteps)) == (3, 5)
    other.step(torch.zeros(1), other.timesteps[0], torch.zeros(1))
    assert other.step_index == 1 and pipe.scheduler.step_index is None and not seen.ticks


# what rooms are told before the denoiser runs, and what they may change


def test_the_upcoming_step_is_known_before_its_calls_but_not_before_the_first():
    """What runs before the denoiser, a ControlNet for example, reads it; the run is made at the first call."""
    pipe, handle, _ = observed("sd15")
    clock, seen = handle.clock, []
    step = pipe.scheduler.scale_model_input  # called before each call of the denoiser

    def spied(*args, **kwargs):
        seen.append((clock.upcoming, clock.number))
        return step(*args, **kwargs)

    assert (clock.upcoming, clock.number) == (None, 1)
    pipe.scheduler.scale_model_input = spied
    for _ in range(2):
        tiny.run(pipe, "sd15", steps=3)
    assert seen == [(None, 1), (1, 1), (2, 1), (None, 2), (1, 2), (2, 2)]
    assert (clock.upcoming, clock.number) == (None, 3)


def test_inside_a_run_its_own_number_is_told():
    pipe, handle, _ = observed("wan")
    numbers = []
    handle.clock.on_call.append(lambda step: numbers.append((handle.clock.number, handle.clock.upcoming, step.index)))
    tiny.run(pipe, "wan", steps=2)
    assert numbers == [(1, 0, 0), (1, 0, 0), (1, 1, 1), (1, 1, 1)]


BEFORE_STEP = {
    "sd15": None, "sd3": None, "wan": None, "cogvideox": None,
    "cogvideox dpm": diffusers.CogVideoXDPMScheduler(),  # whose step takes two things more before the latents
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_STEP)
def test_the_latents_given_to_the_solver_may_be_replaced(case):
    name = case.split()[0]
    pipe, handle, _ = observed(name, BEFORE_STEP[case])
    shapes: list[Any] = []
    plain = tiny.run(pipe, name, steps=4)

    def seen(index: int, latents: torch.Tensor) -> torch.Tensor:
        shapes.append((index, tuple(latents.shape)))
        return latents

    handle.clock.before_step.append(seen)
    assert torch.equal(tiny.run(pipe, name, steps=4), plain)
    assert shapes == [(index, tuple(plain.shape)) for index in range(4)]
    handle.clock.before_step.append(lambda index, latents: latents + 1)
    assert not torch.equal(tiny.run(pipe, name, steps=4), plain)


def test_latents_that_are_named_may_be_replaced_too_and_none_outside_a_run():
    pipe, handle, _ = observed("sd15")
    given = []
    handle.clock.before_step.append(lambda index, latents: given.append(index) or latents * 0)
    latents, text = torch.ones(1, 4, 8, 8), torch.ones(1, 4, 32)
    pipe.scheduler.set_timesteps(3)
    first, *_ = pipe.scheduler.timesteps
    zeros = torch.zeros_like(latents)
    assert pipe.scheduler.step(model_output=zeros, timestep=first, sample=latents).prev_sample.any()
    with torch.no_grad():
        pipe.unet(latents, first, text)
    assert not pipe.scheduler.step(model_output=zeros, timestep=first, sample=latents).prev_sample.any()
    assert given == [0]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_run_knows_the_shape_of_what_the_denoiser_is_given(name):
    pipe, _, seen = observed(name)
    shapes = []
    tiny.denoiser(pipe).register_forward_pre_hook(
        lambda _m, args, kwargs: shapes.append((args[0] if args else kwargs["hidden_states"]).shape), with_kwargs=True
    )
    tiny.run(pipe, name, steps=2, prompt=["a", "b"], negative_prompt=["c", "d"])
    assert seen.started[0].shape == tuple(shapes[0][1:]) and len(seen.started[0].shape) >= 2
    assert seen.started[0].guidance_scale == getattr(pipe, "guidance_scale", None)
    assert seen.started[0].scheduler == type(pipe.scheduler).__name__


@pytest.mark.parametrize(("strength", "late"), [(0.5, True), (1.0, False)])
@pytest.mark.parametrize("kind", ["DDIM", "DPM++ 2M", "Euler"])
def test_a_run_knows_whether_it_starts_late(kind, strength, late):
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.make("sd15"))
    pipe.scheduler = type(SCHEDULERS[kind][0]).from_config(SCHEDULERS[kind][0].config)
    pipe.set_progress_bar_config(disable=True)
    handle = fastdiff.accelerate(pipe)
    seen = Observer(pipe, handle)
    pipe("a cat", image=torch.rand(1, 3, 64, 64), num_inference_steps=4, strength=strength, output_type="latent")
    assert seen.started[0].late is late


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_signal_and_noise_are_those_of_the_noise_schedule(kind):
    """x = sqrt(a) x_0 + sqrt(1 - a) e; between two training steps where the solver's sigmas are."""
    pipe, _, seen = observed("sd15", SCHEDULERS[kind][0])
    tiny.run(pipe, "sd15", steps=5)
    (run,) = seen.started
    alphas = pipe.scheduler.alphas_cumprod.double()
    for index, timestep in enumerate(run.timesteps):
        signal, noise = run.signal_and_noise(index)
        assert signal**2 + noise**2 == pytest.approx(1)
        least, most = (float(alphas[place(timestep)]) for place in (math.ceil, math.floor))
        assert least * 0.999 <= signal**2 <= most * 1.001


def test_signal_and_noise_of_flow_matching_add_up_to_1():
    pipe, _, seen = observed("sd3")
    tiny.run(pipe, "sd3", steps=5)
    (run,) = seen.started
    for index, sigma in enumerate(run.sigmas):
        assert run.signal_and_noise(index) == pytest.approx((1 - sigma, sigma))
