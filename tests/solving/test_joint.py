"""Plans under a budget of time, some of whose evaluations leave something out."""

import pytest
import torch

import fastdiff
from fastdiff.caching.methods.joint import Joint
from fastdiff.config import Config
from fastdiff.errors import BadConfig
from fastdiff.pipelines.solving import joint
from fastdiff.pipelines.solving.calibrate import calibrate_solver, fitting
from fastdiff.pipelines.solving.candidates import student
from tests.tiny import deepest_leaf, make

from .test_fitted import PROMPTS, call, drawn, plan

KINDS = ("full", "full", "partial", "conditional")


def rows_of(pipe, **levers):
    """Rows that each call of the innermost layer of a run has."""
    seen = []
    hook = deepest_leaf(pipe).register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with fastdiff.accelerate(pipe, **levers) as fast:
        picture = drawn(pipe, "sd15")
    hook.remove()
    return seen, picture, fast.report


def test_a_plan_leaves_out_what_it_says():
    pipe = make("sd15")
    left = {"method": "joint", "kinds": KINDS}
    rows, picture, report = rows_of(pipe, solver={"method": "fitted", "plan": plan(pipe, leaves_out=Joint(**left))})
    assert rows == [2, 2, 1] and (report.steps, report.computed) == (4, 2)
    _, same, _ = rows_of(pipe, solver={"method": "fitted", "plan": plan(pipe)}, cache=left)
    assert torch.equal(picture, same)


def test_a_plan_that_leaves_something_out_and_a_cache_are_refused_together():
    pipe = make("sd15")
    solver = {"method": "fitted", "plan": plan(pipe, leaves_out=Joint(kinds=KINDS))}
    with pytest.raises(BadConfig, match="leave out cache, or take a plan of whole evaluations"):
        fastdiff.accelerate(pipe, solver=solver, cache="fora")
    assert "_fastdiff" not in vars(pipe)


def test_kinds_of_another_number_are_refused():
    pipe = make("sd15")
    with pytest.raises(ValueError, match="says of 3 evaluations"):
        plan(pipe, leaves_out=Joint(kinds=KINDS[:3]))


def test_whole_evaluations_drawn_by_the_levers_are_those_drawn_without():
    """The levers that will run a plan draw what the fit without them draws, where nothing is left out."""
    pipe = make("sd15")
    with fitting(pipe, Config(), PROMPTS, teacher_steps=12, **call("sd15")) as found:
        first = student(found.trial, found.teacher, [0, 3, 5, 9, 12], 3)
        again = joint.together(found, first, Joint(kinds=("full",) * 4))
        other = joint.together(found, first, Joint(kinds=KINDS))
    assert torch.allclose(first.error, again.error, rtol=1e-3)
    assert not torch.allclose(first.error, other.error, rtol=1e-2)
    assert "_fastdiff" not in vars(pipe) and torch.equal(drawn(pipe, "sd15"), drawn(make("sd15"), "sd15"))


def test_a_budget_is_kept(monkeypatch):
    """Evaluations that are cheaper come where there is room for them, and what was found runs."""
    pipe = make("sd15")
    monkeypatch.setattr(joint, "measured", lambda *_: {"partial": 0.5, "conditional": 0.5})
    asked = Config(solver={"method": "fitted", "budget": 4, "moves": 0, "depth": 0.5})
    made = calibrate_solver(pipe, asked, PROMPTS, teacher_steps=20, **call("sd15")).solver.plan
    assert made.use == "fitted" and made.cost <= 4 and made.evaluations in (4, 5, 6)
    if made.evaluations > 4:
        assert made.leaves_out.kinds.count("full") == 2 * 4 - made.evaluations and "the time of" in made.summary()
    with fastdiff.accelerate(pipe, solver={"method": "fitted", "plan": made}) as fast:
        drawn(pipe, "sd15")
        assert fast.report.steps == made.evaluations


def test_what_is_measured_is_what_saves_something():
    pipe = make("sd15")
    with fitting(pipe, Config(), PROMPTS, teacher_steps=12, **call("sd15")) as found:
        costs = joint.measured(found, Joint(kinds=("full",), branch=0))
    assert set(costs) <= {"partial", "conditional"} and all(0 < cost < 0.95 for cost in costs.values())


def test_a_guess_is_exact_where_the_difference_follows():
    """d = 2 d_1 - d_2 + (c - c_1) / 2, by construction."""
    generator = torch.Generator().manual_seed(0)
    cond = [torch.randn(8, 3, generator=generator) for _ in range(3)]
    delta = [torch.randn(8, 3, generator=generator) for _ in range(2)]
    delta.append(2 * delta[1] - delta[0] + (cond[2] - cond[1]) / 2)
    outputs = {(0, n, 0): (torch.cat([c + d, c]),) for n, (c, d) in enumerate(zip(cond, delta, strict=True))}
    found = joint._guess(outputs, ("full", "full", "conditional"), 2)
    assert found == pytest.approx((2, -1, 0.5), abs=1e-3)
    assert joint._guess(outputs, ("full", "conditional", "conditional"), 2) == ()


def test_a_budget_with_quantization_is_refused_with_what_to_do():
    asked = Config(solver={"method": "fitted", "budget": 4}, quant="w8a8")
    with pytest.raises(BadConfig, match="leave out quant here"):
        calibrate_solver(make("sd15"), asked, PROMPTS)
