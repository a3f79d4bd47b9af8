"""Schedulers by name: the same ODE, or a reason why not."""

import diffusers
import pytest
import torch

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
