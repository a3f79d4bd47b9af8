"""All weights moved at once: nearer to the teacher's end, never farther, for as many evaluations as it says."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastdiff.config import Config
from fastdiff.pipelines.solving.calibrate import fitting
from fastdiff.pipelines.solving.candidates import held_out, student
from fastdiff.pipelines.solving.combine import counts, onward
from fastdiff.pipelines.solving.fitting import Fitting
from fastdiff.pipelines.solving.polish import RIDGES, draws, polished
from tests.solving.test_fitted import PROMPTS, call
from tests.tiny import make

POINTS, ORDER = [0, 3, 5, 9, 12], 3


@pytest.fixture(scope="module", params=["sd15", pytest.param("flux", marks=pytest.mark.slow)])
def found(request) -> Iterator[Fitting]:
    with fitting(make(request.param), Config(), PROMPTS, batch=4, teacher_steps=12, **call(request.param)) as found:
        yield found


def test_the_end_is_nearer_for_it_and_the_plan_draws_what_it_says(found):
    first = student(found.trial, found.teacher, POINTS, ORDER)
    held = held_out(len(PROMPTS))
    better = polished(found.trial, found.teacher, first)
    assert better.points == first.points and better.psnr(held) >= first.psnr(held)
    spoiled = replace(first, weights=(*first.weights[:-1], ()), error=torch.ones(len(PROMPTS)))
    again = polished(found.trial, found.teacher, spoiled)
    assert again.psnr(~held) > first.psnr(~held) - 1, "the last step is linear in its weights: they are found again"

    def settle(index, seen):
        return [onward(steps, again.weights[index], ORDER) for steps in seen]

    last, _ = found.trial.students(again.places, ORDER, settle)
    error = (last.flatten(1) - found.teacher.states[-1]).square().mean(1)
    assert torch.allclose(error, again.error, rtol=1e-3)
    assert [len(w) for w in again.weights] == [sum(counts(step, ORDER)) for step in range(4)]


def test_what_is_no_nearer_is_not_taken(found):
    first = replace(student(found.trial, found.teacher, POINTS, ORDER), error=torch.zeros(len(PROMPTS)))
    assert polished(found.trial, found.teacher, first) is first


def test_it_draws_as_often_as_is_foretold_and_computes_only_what_a_varied_weight_can_change(found):
    first = student(found.trial, found.teacher, POINTS, ORDER)
    steps, calls = [], []
    (denoiser,) = found.trial.denoisers
    hook = next(denoiser.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    student(found.trial, found.teacher, POINTS, ORDER)
    whole = len(calls) / 4
    polished(replace(found.trial, tick=lambda: steps.append(1)), found.teacher, first)
    hook.remove()
    batches, weights = len(PROMPTS) // 4, [sum(counts(step, ORDER)) for step in range(4)]
    assert len(steps) == draws(4, ORDER) * 4 * batches
    varied = sum(count * (3 - step) for step, count in enumerate(weights))
    assert len(calls) / whole - 4 == varied + len(RIDGES) * 4
