"""The lever on real pipelines: what it promises exactly, what it refuses, and what becomes of it."""

import copy
import json
import pickle
import warnings
from functools import wraps
from types import SimpleNamespace

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.anatomy import fingerprint
from fastdiff.config import Config
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.patch import PatchSet
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.solving import schedulers
from fastdiff.pipelines.solving.calibrate import calibrate_solver, fitting
from fastdiff.pipelines.solving.candidates import Candidate, held_out, moved, student
from fastdiff.pipelines.solving.install import install
from fastdiff.pipelines.solving.plan import SolverPlan
from fastdiff.pipelines.solving.students import Trial
from tests.tiny import arguments, denoiser, make

PROMPTS = ["a red cat", "a blue dog", "two green birds", "one old house", "a boat", "a tree", "rain", "a small fish"]
FAMILIES = ("sd15", "sdxl", "sd3", "flux", "wan")


def plan(pipe, places=(0, 0.2, 0.5, 0.8, 1), weights=None, **values):
    count = len(places) - 1
    [main, *_] = anatomies(pipe)
    given = {"order": 2, "weights": weights or ((),) * count, "evaluations": count, "scheduler": "any"} | values
    return SolverPlan(denoiser=fingerprint(main), places=places, **given)


def solver(pipe, **values):
    return {"method": "fitted", "plan": plan(pipe, **values)}


def call(name):
    """Arguments without what a calibration sets itself."""
    kept = arguments(name, steps=4)
    return {key: kept[key] for key in kept if key not in ("prompt", "generator", "output_type", "negative_prompt")}


def drawn(pipe, name, **more):
    return pipe(**arguments(name) | more)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_weights_it_is_the_stock_scheduler_on_these_levels(name):
    """Bit for bit: the control has the same levels put into a scheduler by hand."""
    pipe = make(name)
    own = vars(pipe)["scheduler"]
    with fastdiff.accelerate(pipe, solver=solver(pipe)) as fast:
        found = drawn(pipe, name)
        assert (fast.report.steps, fast.report.computed) == (4, 4)
        timesteps, sigmas = pipe.scheduler.timesteps, pipe.scheduler.sigmas
    assert vars(pipe)["scheduler"] is own
    control = schedulers.host(own)
    stock = control.set_timesteps

    @wraps(stock)  # pipelines look for the names of what it takes
    def by_hand(*_, mu=None, **__):
        stock(4, **({} if mu is None else {"mu": mu}))
        control.timesteps, control.sigmas = timesteps.clone(), sigmas.clone()

    control.set_timesteps = by_hand
    pipe.scheduler = control
    assert torch.equal(drawn(pipe, name), found)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_draws_what_calibration_drew(name):
    """The weights act in the installed lever as they did on the student, in the pipeline's own loop."""
    pipe = make(name)
    how = call(name) | {"num_inference_steps": 9}
    with fitting(pipe, Config(), PROMPTS, batch=2, teacher_steps=12, **how) as found:
        made = student(found.trial, found.teacher, [0, 3, 5, 9, 12], 3)
        fitted = SolverPlan(
            denoiser=fingerprint(found.main), scheduler="any", evaluations=4, order=3, places=made.places,
            weights=made.weights,
        )  # fmt: skip
        goal = found.teacher.states[-1]
    assert any(made.weights)
    with fastdiff.accelerate(pipe, solver={"method": "fitted", "plan": fitted}):
        last = pipe(
            PROMPTS[:2], generator=[torch.Generator().manual_seed(k) for k in (0, 1)], output_type="latent", **how
        )[0]
    error = (last.flatten(1) - goal[:2]).square().mean(1)
    assert torch.allclose(error, made.error[:2], rtol=1e-3)


def test_a_calibrated_plan_is_near_the_teacher_and_says_how_near():
    pipe = make("sd15")
    before = drawn(pipe, "sd15")
    seen = []
    made = calibrate_solver(
        pipe, Config(solver={"method": "fitted", "evaluations": 5}), PROMPTS, teacher_steps=30,
        watch=lambda done, total: seen.append((done, total)), **call("sd15"),
    ).solver.plan  # fmt: skip
    assert torch.equal(drawn(pipe, "sd15"), before)
    assert made.evaluations == 5 and made.psnr >= made.stock_psnr and made.stock in ("own", "dpm++", "unipc")
    assert made.use == "fitted" and made.scheduler == type(pipe.scheduler).__name__ and made.guidance_scale == 4.0
    assert [done for done, _ in seen[:-1]] == list(range(1, len(seen))) and seen[-1] == (1, 1)
    assert made.shape == before.shape[1:]
    assert "evaluations at 0.000" in made.summary()


def test_what_a_draw_takes_from_another_changes_nothing():
    """Levels that a draw shares with an earlier one are not computed again, and the rest is as if they were."""
    pipe = make("sd15")
    calls = []
    with fitting(pipe, Config(), PROMPTS, teacher_steps=12, **call("sd15")) as found:
        first = student(found.trial, found.teacher, [0, 3, 5, 9, 12], 3)
        hook = pipe.unet.conv_in.register_forward_pre_hook(lambda *_: calls.append(1))
        again = student(found.trial, found.teacher, [0, 3, 5, 10, 12], 3, first, 3)
        counts = [len(calls)]
        fresh = student(found.trial, found.teacher, [0, 3, 5, 10, 12], 3)
        counts.append(len(calls) - counts[0])
        hook.remove()
    assert torch.equal(again.error, fresh.error) and again.weights == fresh.weights
    assert not torch.equal(first.error, fresh.error)
    assert counts == [2, 8]  # two calls of four pictures each: one step of each, and all four


def test_levels_move_to_where_the_pictures_end_nearer():
    pipe = make("sd15")
    with fitting(pipe, Config(), PROMPTS, teacher_steps=12, **call("sd15")) as found:
        fit = ~held_out(len(PROMPTS))
        first = student(found.trial, found.teacher, [0, 1, 2, 3, 12], 3)
        best = moved(found.trial, found.teacher, first, 1)
        assert best.psnr(fit) > first.psnr(fit) + 1
        assert best.points[0] == 0 and best.points[-1] == 12 and list(best.points) == sorted(set(best.points))
        again = student(found.trial, found.teacher, best.points, 3)
        assert torch.equal(again.error, best.error)


def test_where_nothing_is_to_be_won_the_stock_solver_stays(monkeypatch):
    pipe = make("sd15")
    with fitting(pipe, Config(), PROMPTS, teacher_steps=12, **call("sd15")) as found:
        bad = Candidate("fitted", torch.full((len(PROMPTS),), 1e9))
        monkeypatch.setattr(type(found), "_fitted", lambda *_: iter([bad]))
        made = found.plan(4, 2, polish=0)
    assert made.use != "fitted" and not made.weights and "nothing fitted beat" in made.summary()
    with fastdiff.accelerate(pipe, solver={"method": "fitted", "plan": made}) as fast:
        found = drawn(pipe, "sd15")
        assert fast.report.steps == 4
    if made.use != "own":
        pipe.scheduler = schedulers.solver(made.use, pipe.scheduler)
    assert torch.equal(drawn(pipe, "sd15", num_inference_steps=4), found)


def test_a_run_of_a_part_of_the_plan_takes_the_stock_weights_and_says_so():
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**make("sd15").components)
    pipe.set_progress_bar_config(disable=True)
    weights = ((0.0, 0.0), *(((0.5, 0.0, 0.0),) * 3))
    given = {key: value for key, value in arguments("sd15").items() if key not in ("height", "width")}
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ends = {}
    for own in (weights, ((),) * 4):
        with fastdiff.accelerate(pipe, solver=solver(pipe, weights=own)) as fast:
            made = given | {"image": image, "strength": 0.5, "generator": torch.Generator().manual_seed(0)}
            ends[own] = pipe(**made)[0]
            assert fast.report.steps == 2
            assert any("begins inside the plan" in note for note in fast.report.notes) is (own is weights)
    assert torch.equal(*ends.values())


def test_pipelines_with_copies_of_the_scheduler_keep_their_own_history():
    pipe = make("sd15")
    with fastdiff.accelerate(pipe, solver=solver(pipe, weights=((0.1, 0.0), *(((0.1, 0.2, 0.0),) * 3)))):
        pipe.scheduler.set_timesteps(9)
        other = copy.deepcopy(pipe.scheduler)
        outputs = torch.randn(5, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        ends = []
        for scheduler in (pipe.scheduler, other):
            state = outputs[0]
            for timestep, output in zip(scheduler.timesteps, outputs[1:], strict=True):
                state = scheduler.step(output, timestep, state).prev_sample
            ends.append(state)
    assert torch.equal(*ends)


def test_what_is_saved_is_the_pipelines_own_scheduler(tmp_path):
    pipe = make("sd15")
    pipe.scheduler.save_pretrained(tmp_path / "own")
    with fastdiff.accelerate(pipe, solver=solver(pipe)):
        assert type(pipe.scheduler) == diffusers.DPMSolverMultistepScheduler  # noqa: E721 some pipelines ask so
        pipe.scheduler.save_pretrained(tmp_path / "other")
    own, other = (json.loads((tmp_path / n / "scheduler_config.json").read_text()) for n in ("own", "other"))
    assert own == other and own["_class_name"] == type(pipe.scheduler).__name__


def test_a_cache_on_top_counts_the_plans_steps():
    pipe = make("sd15")
    table = solver(pipe, places=(0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1))
    with fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2}, solver=table) as fast:
        drawn(pipe, "sd15")
        assert (fast.report.steps, fast.report.cached) == (7, 3)


@pytest.mark.parametrize(
    ("scheduler", "options", "said"),
    [
        ("EulerAncestralDiscreteScheduler", {}, "adds noise"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "adds noise"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding"),
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDIMInverseScheduler", {}, "other noise levels"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "other noise levels"),
        ("CogVideoXDDIMScheduler", {}, "noise schedule"),
        ("CogVideoXDPMScheduler", {}, "not those of a solver"),
    ],
)
def test_schedulers_that_no_weights_can_stand_for_are_refused(scheduler, options, said):
    pipe = make("sd15")
    pipe.scheduler = own = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    before = dict(vars(pipe))
    with pytest.raises(BadConfig, match=said):
        fastdiff.accelerate(pipe, solver=solver(pipe))
    assert vars(pipe) == before and pipe.scheduler is own


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_any_deterministic_scheduler_may_be_the_pipelines_own(scheduler):
    pipe = make("sd15")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with fastdiff.accelerate(pipe, solver=solver(pipe)) as fast:
        assert torch.isfinite(drawn(pipe, "sd15")).all() and fast.report.steps == 4


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_the_host_ends_where_the_own_scheduler_does(scheduler):
    """Both solved finely: an ODE with other levels, or another end, would be another picture."""
    pipe = make("sd15")
    spaced = {"timestep_spacing": "trailing"}  # from the noisiest level on, however many steps there are
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **spaced)
    own = drawn(pipe, "sd15", num_inference_steps=50)  # DDIM takes whole numbers of training steps only
    rough = drawn(pipe, "sd15", num_inference_steps=10)
    pipe.scheduler = schedulers.host(pipe.scheduler)
    fine = drawn(pipe, "sd15", num_inference_steps=50)
    assert (fine - own).square().mean() < 0.25 * (rough - own).square().mean()


def test_pipelines_that_share_the_scheduler_are_told_and_have_it_back():
    pipe = make("sd15")
    before = drawn(pipe, "sd15")
    with fastdiff.accelerate(pipe, solver=solver(pipe)):
        other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        copied = copy.deepcopy(pipe.scheduler)
        with pytest.warns(UserWarning, match="shares its scheduler"):
            drawn(other, "sd15")
        assert len(other.scheduler.timesteps) == 6, "as many steps as were asked for"
        unpickled = pickle.loads(pickle.dumps(pipe.scheduler))
        assert type(unpickled) is diffusers.DDIMScheduler
    assert type(other.scheduler) is diffusers.DDIMScheduler
    assert torch.equal(drawn(other, "sd15"), before)
    copied.set_timesteps(9)
    assert len(copied.timesteps) == 9, "a copy outlives the plan as a plain scheduler"
    first = make("sd15")
    second = diffusers.StableDiffusionPipeline(**first.components, requires_safety_checker=False)
    with fastdiff.accelerate(first, cache="fora"), pytest.raises((BadConfig, UnsupportedModel)):
        fastdiff.accelerate(second, solver=solver(second))


def test_a_scheduler_that_is_exchanged_is_said_and_kept():
    pipe = make("sd15")
    own = pipe.scheduler
    fast = fastdiff.accelerate(pipe, solver=solver(pipe))
    pipe.scheduler = other = diffusers.UniPCMultistepScheduler.from_config(own.config)
    drawn(pipe, "sd15")
    assert fast.report.steps == 6 and any("exchanged" in note for note in fast.report.notes)
    fast.restore()
    assert pipe.scheduler is other and type(own) is diffusers.DDIMScheduler


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_strength_is_a_noise_level_and_not_a_share_of_the_evaluations(strength):
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**make("sd15").components)
    pipe.set_progress_bar_config(disable=True)
    given = {key: value for key, value in arguments("sd15").items() if key not in ("height", "width")}
    places = (0, 0.05, 0.1, 0.2, 0.4, 0.65, 0.9, 1)
    with fastdiff.accelerate(pipe, solver=solver(pipe, places=places)) as fast:
        pipe(**given | {"image": torch.zeros(1, 3, 64, 64), "strength": strength})
    assert fast.report.steps == max(1, sum(place >= 1 - strength for place in places[:-1]))


def test_what_a_plan_leaves_out_is_said():
    pipe = make("sd15")
    with fastdiff.accelerate(pipe, solver=solver(pipe)) as fast:
        drawn(pipe, "sd15", eta=1.0)
        assert any("eta = 1" in note for note in fast.report.notes)
    pipe = make("flux")
    with fastdiff.accelerate(pipe, solver=solver(pipe)) as fast:
        drawn(pipe, "flux")
        assert "the solver's plan of 4 evaluations takes the place of 6 steps" in fast.report.notes


def test_a_stock_plan_of_a_pipeline_that_gives_sigmas_draws_what_it_draws_in_as_many_steps():
    pipe = make("flux")
    stock = drawn(pipe, "flux", num_inference_steps=4)
    [main, *_] = anatomies(pipe)
    own = SolverPlan(denoiser=fingerprint(main), scheduler="any", evaluations=4, use="own")
    with fastdiff.accelerate(pipe, solver={"method": "fitted", "plan": own}):
        assert torch.equal(drawn(pipe, "flux"), stock)


def test_plans_that_do_not_fit_are_refused(tmp_path):
    pipe = make("sd15")
    with pytest.raises(BadConfig, match=r"needs a plan.*fastdiff calibrate --set solver.evaluations=7"):
        fastdiff.accelerate(pipe, solver={"method": "fitted", "evaluations": 7})
    with pytest.raises(BadConfig, match="was made for"):
        fastdiff.accelerate(pipe, solver=solver(make("sdxl")))
    with pytest.raises(BadConfig, match="evaluations = 7, but the plan is of 4"):
        Config(solver=solver(pipe) | {"evaluations": 7})
    with pytest.raises(BadConfig, match="parastep"):
        fastdiff.accelerate(pipe, solver=solver(pipe), parallel={"method": "parastep", "devices": 2})
    with pytest.raises(BadConfig, match="was made for flow matching"):
        fastdiff.accelerate(pipe, solver=solver(pipe, ode="flow matching"))
    with pytest.raises(BadConfig, match="more steps than 10"):
        calibrate_solver(pipe, Config(solver={"method": "fitted", "evaluations": 12}), PROMPTS, teacher_steps=10)
    with pytest.raises(BadConfig, match="strength"):
        calibrate_solver(pipe, Config(solver="fitted"), PROMPTS, strength=0.5)
    with pytest.raises(BadConfig, match="8 or more"):
        calibrate_solver(pipe, Config(solver="fitted"), PROMPTS[:4])
    file = tmp_path / "plan.json"
    for text, said in (
        ("{", "truncated"),
        ("[]", "no plan"),
        ('{"version": 9, "places": [], "weights": []}', "version 9"),
    ):
        file.write_text(text)
        with pytest.raises(BadConfig, match=said):
            Config(solver={"method": "fitted", "plan": str(file)})
    whole = plan(pipe).model_dump()
    for wrong, said in (
        ({"places": (0, 0.5, 0.4, 0.8, 1)}, "rise"), ({"weights": ((0.1,), (), (), ())}, "1 weights at step 0"),
        ({"evaluations": 9}, "one noise level more"),
    ):  # fmt: skip
        file.write_text(json.dumps(whole | wrong))
        with pytest.raises(BadConfig, match=said):
            Config(solver={"method": "fitted", "plan": str(file)})
    file.write_text(json.dumps(whole))
    read = Config(solver={"method": "fitted", "plan": str(file)})
    assert read.solver.plan == plan(pipe) and read.solver.evaluations == 4
    assert Config.from_json(read.model_dump_json()) == read


def test_no_scheduler_no_solver():
    pipe = make("sd15")
    [main, *_] = anatomies(pipe)
    with pytest.raises(UnsupportedModel, match="SimpleNamespace has no scheduler"):
        install(
            SimpleNamespace(prior_scheduler=pipe.scheduler, config={}),
            Config(solver=solver(pipe)),
            main,
            None,
            print,
            PatchSet(),
        )


def test_differences_are_said():
    pipe = make("sd15")
    table = solver(pipe, guidance_scale=7.5, shape=(4, 64, 64))
    with fastdiff.accelerate(pipe, solver=table) as fast:
        drawn(pipe, "sd15")
    told = " ".join(fast.report.notes)
    assert "fitted at guidance 7.5, this run has 4" in told and "fitted at 4x64x64, this run is at 4x" in told


def test_a_failing_run_leaves_no_thread_waiting():
    import threading

    pipe = make("sd15")
    before = threading.active_count()
    trial = Trial(pipe, schedulers.host(pipe.scheduler), lambda: [{"prompt": 5}])
    with pytest.raises(ValueError, match="prompt"):
        trial.students([0, 0.3, 0.7, 1], 2, lambda index, seen: [steps[-1].plain for steps in seen])
    calls = [{"prompt": ["a"], "height": 64, "width": 64}] * 2

    def fails(index, seen):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        Trial(pipe, trial.scheduler, lambda: calls).students([0, 0.3, 0.7, 1], 2, fails)
    assert threading.active_count() == before


@pytest.mark.slow
def test_a_wan_of_two_transformers_is_calibrated_and_drawn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = make("wan")
        pipe.register_modules(transformer_2=copy.deepcopy(denoiser(pipe)))
        pipe.register_to_config(boundary_ratio=0.6)
        made = calibrate_solver(
            pipe,
            Config(solver={"method": "fitted", "evaluations": 4}),
            PROMPTS,
            batch=2,
            teacher_steps=10,
            **call("wan"),
        )
        with fastdiff.accelerate(pipe, made) as fast:
            drawn(pipe, "wan")
            assert fast.report.steps == 4
