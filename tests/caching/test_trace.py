"""A trace is the run's inner products; the influence of a step is what a real solver makes of it."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.caching import trace as tracing
from fastdiff.caching.trace import Gram, Trace, influence
from tests import tiny

_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {
    "DDIM": ("sd15", lambda: diffusers.DDIMScheduler(**_SD, clip_sample=False, set_alpha_to_one=False)),
    "DDIM v": ("sd15", lambda: diffusers.DDIMScheduler(**_SD, clip_sample=False, prediction_type="v_prediction")),
    "Euler": ("sd15", lambda: diffusers.EulerDiscreteScheduler(**_SD)),
    "DPM++ 2M": ("sd15", lambda: diffusers.DPMSolverMultistepScheduler(**_SD)),
    "DPM++ 2M Karras": ("sd15", lambda: diffusers.DPMSolverMultistepScheduler(**_SD, use_karras_sigmas=True)),
    "DPM++ singlestep": ("sd15", lambda: diffusers.DPMSolverSinglestepScheduler(**_SD)),
    "UniPC": ("sd15", lambda: diffusers.UniPCMultistepScheduler(**_SD)),
    "DEIS": ("sd15", lambda: diffusers.DEISMultistepScheduler(**_SD)),
    "PNDM": ("sd15", lambda: diffusers.PNDMScheduler(**_SD, skip_prk_steps=True)),
    "Heun": ("sd15", lambda: diffusers.HeunDiscreteScheduler(**_SD)),
    "KDPM2": ("sd15", lambda: diffusers.KDPM2DiscreteScheduler(**_SD)),
    "FlowMatchEuler": ("sd3", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "FlowMatchHeun": ("sd3", lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
}
NOISY = {
    "Euler a": ("sd15", lambda: diffusers.EulerAncestralDiscreteScheduler(**_SD)),
    "LCM": ("sd15", lambda: diffusers.LCMScheduler(**_SD)),
    "DDPM": ("sd15", lambda: diffusers.DDPMScheduler(**_SD, clip_sample=False)),
    "SDE-DPM++": ("sd15", lambda: diffusers.DPMSolverMultistepScheduler(**_SD, algorithm_type="sde-dpmsolver++")),
    "clipping": ("sd15", lambda: diffusers.DDIMScheduler(**_SD, clip_sample=True)),
    "stochastic flow": ("sd3", lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)),
}


def traced(name: str, scheduler, **call) -> Trace:
    pipe = tiny.make(name)
    pipe.scheduler = scheduler
    with fastdiff.accelerate(pipe) as handle:
        trace = Trace(handle.clock)
        for seed in (0, 1):  # the second run starts from a scheduler that has been used
            tiny.run(pipe, name, steps=5, seed=seed, **call)
    assert trace.run is not None
    return trace


def solved(scheduler, outputs: torch.Tensor, begin: int = 0) -> torch.Tensor:
    """Final latents of the solver's own loop, from fixed latents with fixed outputs."""
    if begin and hasattr(scheduler, "set_begin_index"):  # DDIM takes its place from the timestep alone
        scheduler.set_begin_index(begin)
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t, output in zip(scheduler.timesteps[begin:], outputs, strict=True):
        scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else None
        latents = scheduler.step(output, t, latents, return_dict=False)[0].double()
    return latents


def check_against_the_real_loop(trace: Trace, fresh, begin: int = 0) -> None:
    moves = influence(trace.solver, trace.run)
    assert len(moves) == trace.run.total
    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(trace.run.total, 1, 4, 2, 2, generator=generator, dtype=torch.float64)
    before = solved(fresh(), outputs, begin)
    for step, move in enumerate(moves):
        bump = torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64)
        changed = outputs.clone()
        changed[step] += bump
        actual, predicted = solved(fresh(), changed, begin) - before, move * bump
        assert float((actual - predicted).norm()) <= 1e-4 * float(abs(moves).max() * bump.norm()), step


@pytest.mark.parametrize("case", LINEAR)
def test_influence_is_what_a_real_loop_makes_of_a_changed_output(case):
    name, make = LINEAR[case]
    made = make()  # which takes KDPM2 seconds

    def fresh():
        scheduler = copy.deepcopy(made)
        scheduler.set_timesteps(5)
        return scheduler

    check_against_the_real_loop(traced(name, copy.deepcopy(made)), fresh)


@pytest.mark.parametrize("case", ["DDIM", "DPM++ 2M", "UniPC", "Euler"])
def test_influence_of_a_run_that_starts_late(case):
    name, make = LINEAR[case]
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.make(name))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with fastdiff.accelerate(pipe) as handle:
        trace = Trace(handle.clock)
        pipe("a cat", image=image, num_inference_steps=10, strength=0.5, output_type="latent")
    assert trace.run.total == 5

    def fresh():
        scheduler = make()
        scheduler.set_timesteps(10)
        return scheduler

    check_against_the_real_loop(trace, fresh, begin=5)


@pytest.mark.parametrize("case", NOISY)
def test_a_solver_that_adds_noise_or_clips_is_refused(case):
    name, make = NOISY[case]
    trace = traced(name, make())
    with pytest.raises(ValueError, match="not linear in the model's outputs, or adds noise"):
        influence(trace.solver, trace.run)


def test_a_solver_with_a_step_of_its_own_is_refused():
    trace = traced("cogvideox", diffusers.CogVideoXDPMScheduler())
    with pytest.raises(ValueError, match=r"CogVideoXDPMScheduler.step needs more"):
        influence(trace.solver, trace.run)


def collected(pipe, name: str, prompts: int) -> tuple[Trace, np.ndarray]:
    """A trace of one batch, and the outputs given to the solver: images, steps, numbers."""
    seen: list[torch.Tensor] = []
    with fastdiff.accelerate(pipe) as handle:
        trace = Trace(handle.clock)
        handle.clock.on_output.append(lambda _index, output: seen.append(output.flatten(1).double()))
        generators = [torch.Generator().manual_seed(k) for k in range(prompts)]
        tiny.run(pipe, name, prompt=["a cat"] * prompts, negative_prompt=["bad"] * prompts, generator=generators)
    return trace, torch.stack(seen, 1).numpy()


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_gram_matrix_is_the_mean_of_the_inner_products(name):
    trace, outputs = collected(tiny.make(name), name, 2)
    assert trace.images == 2 and trace.gram is not None
    assert np.allclose(trace.gram, np.mean([f @ f.T for f in outputs], 0), rtol=1e-6)


def test_images_of_several_calls_count_alike():
    together = collected(tiny.make("sd15"), "sd15", 3)[0]
    pipe = tiny.make("sd15")
    with fastdiff.accelerate(pipe) as handle:
        apart = Trace(handle.clock)
        tiny.run(pipe, "sd15", prompt="a cat", seed=0)
        generators = [torch.Generator().manual_seed(k) for k in (1, 2)]
        tiny.run(pipe, "sd15", prompt=["a cat"] * 2, negative_prompt=["bad"] * 2, generator=generators)
    assert apart.images == 3
    assert np.allclose(apart.gram, together.gram, rtol=1e-4)


def test_a_run_cut_short_leaves_no_trace_and_another_grid_is_refused():
    pipe = tiny.make("sd15")
    with fastdiff.accelerate(pipe) as handle:
        trace = Trace(handle.clock)

        def stop(_pipe, step):
            if step == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiny.run(pipe, "sd15", **tiny.at_each_step("sd15", stop))
        assert trace.gram is None and trace.images == 0
        tiny.run(pipe, "sd15", steps=5)
        with pytest.raises(ValueError, match="cannot go on with a run on another grid"):
            tiny.run(pipe, "sd15", steps=4)


def test_a_projection_keeps_distances():
    gram = Gram()
    generator = torch.Generator().manual_seed(4)
    wide = torch.randn(6, 5 * tracing._SKETCH, generator=generator)
    wide[1] = wide[0] + 0.01 * wide[1]  # near ones as well
    small = gram.sketch(wide)
    assert small.shape == (6, tracing._SKETCH)
    assert torch.allclose(torch.cdist(small, small), torch.cdist(wide.double(), wide.double()), rtol=0.03, atol=1e-3)
    assert torch.equal(gram.sketch(wide[:2]), small[:2]), "the same projection at every step"
    narrow = wide[:, :100]
    assert torch.equal(gram.sketch(narrow), narrow.double())
