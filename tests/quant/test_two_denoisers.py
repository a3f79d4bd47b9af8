"""Wan 2.2 has two denoisers of one configuration and other weights: what is planned or learned, is for each."""

from __future__ import annotations

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.errors import BadModel
from fastdiff.pipelines.hearing import hear_each
from fastdiff.pipelines.planning import learned_by, plan
from fastdiff.pipelines.quantize import method_of, quantize
from fastdiff.pipelines.quantized_files import save
from fastdiff.plans import Each
from fastdiff.quant.prune import Removed
from fastdiff.quant.schemes.mixed import Mixed
from tests import tiny
from tests.quant.heard import plan_bits

PROMPTS, STEPS = ["a red cat"], 4
CALL = {
    key: value
    for key, value in tiny.arguments("wan", STEPS).items()
    if key not in ("prompt", "negative_prompt", "generator", "output_type")
}


def two(boundary: float = 0.8) -> diffusers.WanPipeline:
    """transformer_2 has a feed-forward layer that does nothing, and others that need more bits."""
    first, second = tiny.make("wan"), tiny.make("wan").transformer
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in second.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
        silent = [m for m in second.blocks[1].ffn.modules() if isinstance(m, torch.nn.Linear)][-1]
        silent.weight.zero_()
        silent.bias.zero_()
    parts = {**first.components, "transformer_2": second}
    pipe = diffusers.WanPipeline(**parts, boundary_ratio=boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_both_are_heard_and_each_has_calls_of_its_own():
    pipe = two()
    heard = hear_each(pipe, PROMPTS, moments=2, batch=1, **CALL)
    assert list(heard) == ["transformer", "transformer_2"]
    for name, calls in heard.items():
        assert calls.anatomy.denoiser is getattr(pipe, name) and calls.given and calls.error() < 1e-12
    assert {step for calls in heard.values() for _, step in calls.when} == set(range(STEPS))


def test_bits_are_planned_for_each_and_come_back_from_files(tmp_path):
    pipe = two()
    method = Mixed(target_error=0.05, choices=(4, 16), skip=("blocks.[2-9]*", "condition*"))
    found = plan_bits(pipe, method, PROMPTS, moments=2, batch=1, **CALL)
    bits = {name: one.bits for name, one in found.plan.root.items()}
    assert bits.keys() == {"transformer", "transformer_2"} and bits["transformer"] != bits["transformer_2"]
    file = tmp_path / "bits.json"
    file.write_text(found.plan.model_dump_json())
    config = fastdiff.Config(quant={**method.model_dump(), "plan": str(file)})
    assert config.quant.plan == found.plan and fastdiff.Config(**config.model_dump(mode="json")) == config
    with fastdiff.accelerate(pipe, config) as handle:
        live = tiny.run(pipe, "wan", steps=STEPS)
        for name, one in bits.items():
            formats = {x.name: x.format for x in handle.quantized.report.layers if x.component == name}
            assert formats == {path: {4: "int4", 16: "half"}[b] for path, b in one.items()}
    quantize(pipe, config)
    save(pipe, tmp_path / "model")
    again = fastdiff.load(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert torch.dist(tiny.run(again, "wan", steps=STEPS), live) < 1e-4 * live.norm()


def test_a_single_plan_is_for_the_first_and_the_other_is_told_to_stay_float():
    pipe = two()
    method = Mixed(target_error=0.05, choices=(4, 16), skip=("blocks.[1-9]*", "condition*"))
    found = plan_bits(pipe, method, PROMPTS, moments=2, batch=1, **CALL)
    alone = found.model_copy(update={"plan": found.plan.root["transformer"]})
    handle = fastdiff.accelerate(pipe, fastdiff.Config(quant=alone.model_dump()))
    assert {layer.component for layer in handle.quantized.report.layers} == {"transformer"}
    tiny.run(pipe, "wan", steps=STEPS)
    assert any("transformer_2 stays float" in note for note in handle.report.notes)


def test_what_is_free_is_removed_from_that_one_alone():
    pipe = two()
    config = {"quant": {"method": "w8a16", "prune": 1e-3}}
    found = plan(pipe, method_of(pipe, config), PROMPTS, batch=1, **CALL)
    assert isinstance(found, Each) and "transformer_2 removes blocks.1.ffn" in found.summary()
    report = quantize(pipe, config, PROMPTS, batch=1, predict=False, **CALL)
    assert isinstance(pipe.transformer_2.blocks[1].ffn, Removed)
    assert not any(isinstance(module, Removed) for module in pipe.transformer.modules())
    assert report.output_error < 0.05


def test_rounding_is_learned_from_the_calls_of_each():
    pipe = two()
    heard = hear_each(pipe, PROMPTS, moments=2, batch=1, **CALL)
    learned = learned_by(method_of(pipe, {"quant": {"method": "w4a16", "rounding": "flexround"}}), heard)
    assert {name: one.calls.anatomy.component for name, one in learned.items()} == {name: name for name in heard}


def test_nothing_is_planned_for_a_denoiser_that_was_not_called():
    pipe = two(boundary=0.0)
    with pytest.raises(BadModel, match="transformer_2 was not called"):
        plan_bits(pipe, Mixed(target_error=0.05), PROMPTS, moments=2, batch=1, **CALL)
