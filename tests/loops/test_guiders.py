"""Modular pipelines, whose guiders decide in each step which calls are made, and with what in the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, LayerSkipConfig, PerturbedAttentionGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from torch import Tensor

import fastdiff
from tests import tiny

BLOCKS = "mid_block.attentions.0.transformer_blocks"


def perturbed() -> Any:
    layers = LayerSkipConfig([0], BLOCKS, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    return PerturbedAttentionGuidance(
        4.0, 2.0, perturbed_guidance_start=0.2, perturbed_guidance_stop=0.8, perturbed_guidance_config=layers
    )


GUIDERS: dict[str, tuple[Callable[[], Any], int]] = {  # and the most calls in a step
    "guidance": (lambda: ClassifierFreeGuidance(guidance_scale=4.0), 2),
    "guidance in an interval": (lambda: ClassifierFreeGuidance(guidance_scale=4.0, start=0.3, stop=0.7), 2),
    "perturbed attention": (perturbed, 3),
}


def made() -> Any:
    parts = tiny.make("sdxl").components
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{n: part for n, part in parts.items() if part is not None and n in pipe.component_names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, guider: Callable[[], Any]) -> Tensor:
    pipe.update_components(guider=guider())
    return pipe(
        prompt="a cat", negative_prompt="bad", num_inference_steps=10, height=64, width=64, output_type="latent",
        generator=torch.Generator().manual_seed(0), output="latents",
    )  # fmt: skip


@pytest.mark.parametrize("name", GUIDERS)
def test_each_call_of_a_guider_has_a_branch_of_its_own(name):
    guider, most = GUIDERS[name]
    pipe = made()
    plain = drawn(pipe, guider)
    with fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 1}):
        assert torch.equal(drawn(pipe, guider), plain)
    handle = fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 2, "warmup_steps": 1})
    called: list[tuple[int, int]] = []
    handle.clock.on_call.append(lambda step: called.append((step.index, step.branch)))
    drawn(pipe, guider)
    assert {branch for _, branch in called} == set(range(most)), "told by the text, and by hooks on the layers"
    assert len(called) == len(set(called)) and handle.report.cached + handle.report.partly >= 4
