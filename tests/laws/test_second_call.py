"""Law 4: a second call with anything changed equals the same call of a fresh pipeline, bit for bit."""

from __future__ import annotations

import diffusers
import pytest
import torch

import fastdiff
from tests import tiny
from tests.laws.rows import (
    ONCE,
    ONE_A_KIND,
    QUANTIZED_KINDS,
    QUANTIZED_ONCE,
    ROWS,
    STEPS,
    SUPPORTED,
    accelerate,
    cached_afresh,
    each,
    fresh,
)  # fmt: skip

CHANGES = {
    "size": {"height": 128, "width": 64},
    "fewer steps": {"steps": 5},  # no fewer, for the lists of static
    "more steps": {"steps": 9},
    "batch": {"prompt": ["a red cat", "a dog"], "negative_prompt": ["bad", "worse"]},
}


def changes(name: str) -> dict[str, dict]:
    known = CHANGES | {"guidance off": tiny.guidance_off(name)}
    if name in tiny.VIDEO:
        known |= {"size": {"height": 64, "width": 32}}
    return known


@each([*SUPPORTED, *QUANTIZED_KINDS], quick=[*ONCE[::4], *QUANTIZED_ONCE[::3]])  # several runs each
def test_a_call_with_everything_changed_equals_that_of_a_fresh_pipeline(row, name):
    """The solver, too: each takes its own arguments."""
    pipe = tiny.make(name)
    accelerate(pipe, row)
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), cached_afresh(row, name))
    known = changes(name)
    settings = {"seed": 5, **known["size"], **known["batch"], **known["more steps"]}
    first, pipe.scheduler = pipe.scheduler, tiny.other_scheduler(name)
    changed = fresh(row, name, scheduler=tiny.other_scheduler(name), **settings)
    assert torch.equal(tiny.run(pipe, name, **settings), changed)
    pipe.scheduler = first
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), cached_afresh(row, name)), "and the first one again"


# ten runs each: where a change of everything is a fresh start, this tells which change was not
@each([*ONCE, *QUANTIZED_ONCE], quick=ONCE[1::7])
def test_a_call_with_one_thing_changed_equals_that_of_a_fresh_pipeline(row, name):
    pipe = tiny.make(name)
    accelerate(pipe, row)
    for change, overrides in changes(name).items():
        settings = {"steps": STEPS} | overrides
        assert torch.equal(tiny.run(pipe, name, **settings), fresh(row, name, **overrides)), change


@each(ONE_A_KIND, quick=ONE_A_KIND[::2])
def test_a_call_with_another_scheduler_is_cached_as_much_and_leaves_nothing_on_it(row, name):
    pipe = tiny.make(name)
    handle = accelerate(pipe, row)
    first, pipe.scheduler = pipe.scheduler, tiny.other_scheduler(name)
    tiny.run(pipe, name, steps=STEPS)
    assert (handle.report.cached, handle.report.partly) == (ROWS[row].cached, ROWS[row].partly)
    handle.restore()
    for scheduler in (first, pipe.scheduler):
        assert not {"step", "set_timesteps", "scale_model_input"} & vars(scheduler).keys()


IMG2IMG = {
    "sd15": diffusers.StableDiffusionImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
    "flux": diffusers.FluxImg2ImgPipeline,
}


def img2img(name: str):
    pipe = IMG2IMG[name].from_pipe(tiny.make(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def repaint(pipe, name: str, strength: float) -> torch.Tensor:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    settings = tiny.arguments(name, steps=10) | {"image": image, "strength": strength}
    if name in ("sd15", "sdxl"):
        del settings["height"], settings["width"]
    return pipe(**settings)[0]


LISTED = ("static", "joint")  # their steps are those of a list, which says nothing of a part of it


@each(((row, name) for row, name in ONE_A_KIND if name in IMG2IMG and ROWS[row].method not in LISTED), quick=ONCE[::2])
def test_a_call_with_another_strength_equals_that_of_a_fresh_pipeline(row, name):
    pipe = img2img(name)
    handle = accelerate(pipe, row)
    for strength in (0.6, 0.4):
        alone = img2img(name)
        accelerate(alone, row)
        assert torch.equal(repaint(pipe, name, strength), repaint(alone, name, strength)), strength
        report = handle.report
        assert report.steps == report.total == round(10 * strength)
        assert report.cached + report.partly > 0


@pytest.mark.parametrize("name", IMG2IMG)
def test_img2img_with_nothing_enabled_changes_no_bit(name):
    pipe = img2img(name)
    expected = repaint(pipe, name, 0.6)
    with fastdiff.accelerate(pipe):
        assert torch.equal(repaint(pipe, name, 0.6), expected)
