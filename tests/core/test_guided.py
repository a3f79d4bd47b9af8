"""The scale that one asks for is the one that a pipeline guides with, where it has two of them."""

from __future__ import annotations

import pytest

from fastdiff.errors import BadConfig
from fastdiff.images import Sampling
from fastdiff.studio.pictures import check, guided
from tests import tiny
from tests.zoo_images import ZOO

BLANK = {"negative_prompt": " "}


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("qwen image", {}, {"true_cfg_scale": 4.0, **BLANK}),
        ("qwen image", {"guidance_scale": 3.0}, {"true_cfg_scale": 3.0, **BLANK}),
        ("qwen image", {"guidance_scale": 3.0, "negative_prompt": "dog"}, {"true_cfg_scale": 3.0}),
        ("qwen image", {"guidance_scale": 1.0}, {"true_cfg_scale": 1.0}),
        ("flux", {"guidance_scale": 3.0}, {"true_cfg_scale": 1.0}),
        ("flux", {"guidance_scale": 3.0, "negative_prompt": "dog"}, {"true_cfg_scale": 3.0}),
        ("sd15", {"guidance_scale": 3.0, "negative_prompt": "dog"}, {}),
    ],
)
def test_the_scale_of_two_calls(name: str, asked: dict[str, object], expected: dict[str, object]) -> None:
    pipe = ZOO[name].make() if name in ZOO else tiny.make(name)
    job = Sampling(prompt="a cat", **asked)
    check(pipe, job, "picture")
    assert guided(pipe, job) == expected


def test_a_model_that_is_told_its_scale_heeds_no_negative_prompt() -> None:
    pipe = tiny.make("flux")
    pipe.transformer.register_to_config(guidance_embeds=True)
    assert guided(pipe, Sampling(prompt="a cat", guidance_scale=3.0)) == {"true_cfg_scale": 1.0}
    with pytest.raises(BadConfig, match="FluxPipeline, distilled from guidance, heeds no negative prompt"):
        check(pipe, Sampling(prompt="a cat", negative_prompt="dog"), "picture")


@pytest.mark.parametrize("asked", [{}, {"guidance_scale": 1.0}])
def test_without_a_scale_to_guide_by_a_negative_prompt_is_refused(asked: dict[str, float]) -> None:
    with pytest.raises(BadConfig, match="FluxPipeline at a guidance scale of 1 or less heeds no negative prompt"):
        check(tiny.make("flux"), Sampling(prompt="a cat", negative_prompt="dog", **asked), "picture")
