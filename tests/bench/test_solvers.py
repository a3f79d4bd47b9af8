"""Schedulers by name: the same ODE, or a reason why not."""

import diffusers
import pytest
import torch
from diffusers.schedulers import AysSchedules

import fastdiff
from fastdiff.bench.measure import draw
from fastdiff.bench.metrics import psnr
from fastdiff.bench.plan import fewer_steps, other_solvers
from fastdiff.errors import BadConfig, UnknownName
from fastdiff.pipelines.solving.schedulers import solver
from tests.tiny import make


@pytest.mark.parametrize("name", ["dpm++", "unipc", "euler"])
def test_noise_schedule_and_end_are_kept(name):
    own = make("sd15").scheduler
    other = solver(name, own)
    assert torch.equal(other.alphas_cumprod, own.alphas_cumprod)
    assert other.config.prediction_type == own.config.prediction_type
    other.set_timesteps(10)
    end = other.sigmas[-1]
    assert end == pytest.approx(float(((1 - own.final_alpha_cumprod) / own.final_alpha_cumprod) ** 0.5), rel=1e-4)
    back = solver("ddim", other)
    assert back.final_alpha_cumprod == own.final_alpha_cumprod


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_flow_matching_keeps_its_shift(name):
    own = make("sd3").scheduler
    other = solver(name, own)
    own.set_timesteps(8), other.set_timesteps(8)
    assert other.config.flow_shift == own.config.shift == 3.0
    assert 0.99 < other.sigmas[0] < 1 and other.sigmas[-1] == 0
    sigmas = other.sigmas[:-1]
    plain = sigmas / (3 - 2 * sigmas)  # the shift taken back: an even grid
    assert torch.allclose(plain.diff(), plain.diff()[0].expand(7), atol=1e-4)
    assert type(solver("flowmatch", other)) is type(own) and solver("flowmatch", other).config.shift == 3.0


@pytest.mark.parametrize("kind", ["dpm++", "unipc", "deis", "euler"])
@pytest.mark.parametrize(
    ("grid", "table"), [("ays", "StableDiffusionTimesteps"), ("aysxl", "StableDiffusionXLTimesteps")]
)
def test_align_your_steps_takes_the_published_timesteps_and_is_even_in_log_sigma_between_them(kind, grid, table):
    own = make("sd15").scheduler
    made, plain, published = solver(f"{kind}@{grid}", own), solver(kind, own), AysSchedules[table]
    made.set_timesteps(10), plain.set_timesteps(10)
    assert type(made).__name__ == type(plain).__name__ and isinstance(made, type(plain))
    assert made.timesteps.tolist() == pytest.approx(published, abs=1e-3)
    known = ((1 - own.alphas_cumprod) / own.alphas_cumprod).sqrt()
    assert torch.allclose(made.sigmas[:-1], known[published], rtol=1e-4) and made.sigmas[-1] == plain.sigmas[-1]
    made.set_timesteps(20)
    assert made.timesteps[::2].tolist() == pytest.approx(published, abs=1e-3)
    middle = (known[published[0]] * known[published[1]]).sqrt()
    assert float(made.sigmas[1]) == pytest.approx(float(middle), rel=1e-4)
    made.set_timesteps(5)
    assert made.timesteps.tolist() == pytest.approx(published[::2], abs=1e-3)


def test_a_pipeline_draws_on_the_grid_of_align_your_steps():
    pipe, pictures = make("sd15"), []
    for name in ("unipc", "unipc@ays", "unipc@ays", "unipc@aysxl"):
        pipe.scheduler, seen = solver(name, pipe.scheduler), []
        pipe.unet.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(float(args[1])))
        pictures.append(draw(pipe, ["a cat"], [0], 5, 3.0))
        if name == "unipc@ays":
            assert seen == pytest.approx(AysSchedules["StableDiffusionTimesteps"][::2], abs=1e-3)
    plain, once, again, other = pictures
    assert (once == again).all(), "a scheduler made of one on the grid has it by its own name only"
    assert not (once == plain).all() and not (once == other).all()


def test_grids_that_a_scheduler_cannot_take_are_refused():
    flow, noise = make("sd3").scheduler, make("sd15").scheduler
    for name, scheduler, said in (
        ("unipc@ays", flow, "ays is no grid of flow matching"),
        ("dpm++@karras", flow, "karras is no grid of flow matching"),
        ("unipc@shift2", noise, "shift2 is no grid of a noise schedule"),
        ("ddim@ays", noise, "take dpm.+@ays"),
    ):
        with pytest.raises(BadConfig, match=said):
            solver(name, scheduler)
    with pytest.raises(UnknownName, match="unipc@ays"):
        solver("unipc@aysx", noise)


def test_what_cannot_solve_the_same_ode_is_refused():
    flow, noise = make("sd3").scheduler, make("sd15").scheduler
    with pytest.raises(UnknownName, match="dpm"):
        solver("dpm", flow)
    for name, scheduler in (("ddim", flow), ("flowmatch", noise)):
        with pytest.raises(BadConfig, match="flow"):
            solver(name, scheduler)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    found, remarks = other_solvers(dynamic, ("dpm++", "unipc"))
    assert not found and len(remarks) == 2 and "resolution" in remarks[0]


def test_the_pipelines_own_solver_is_not_a_rival_to_itself():
    own = solver("unipc", make("sd15").scheduler)
    found, remarks = other_solvers(own, ("dpm++", "unipc"))
    assert list(found) == ["DPM++ 2M"] and not remarks
    names = [c.name for c in fewer_steps([7, 4, 4, 1], 4, 7, found)]
    assert names == ["2 steps", "1 steps", "4 steps DPM++ 2M", "1 steps DPM++ 2M"]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "names"), [("shapes-dit", ("dpm++", "unipc")), ("shapes-unet", ("dpm++", "euler"))])
def test_many_steps_converge_to_the_same_picture(model, names):
    pipe = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    own, steps = pipe.scheduler, 250  # a divisor of 1000: diffusers' DDIM strides past its end otherwise
    reference = draw(pipe, ["a red circle above a blue square"], [0], steps, 3.0)
    for name in names:
        pipe.scheduler = solver(name, own)
        assert psnr(draw(pipe, ["a red circle above a blue square"], [0], steps, 3.0), reference)[0] > 45
