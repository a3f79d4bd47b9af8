"""Caching and quantization together: calibrated on the quantized model, corrected on both sides of a cached value."""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff.affine import AffineFit, corrected
from fastdiff.caching.trace import SiteTrace
from fastdiff.pipelines.calibrate import calibrate
from fastdiff.quant.layer import QLayer
from tests import tiny
from tests.quant.test_prune import PROMPTS, arguments
from tests.state import differences, snapshot

STEPS = 6


def joint(name: str, pipe=None, quant: object = "w8a8", **cache) -> fastdiff.Config:
    config = fastdiff.Config(cache={"method": "cachequant", "interval": 2, **cache}, quant=quant)
    return calibrate(pipe or tiny.make(name), config, PROMPTS, batch=2, **arguments(name, STEPS))


@pytest.fixture(scope="module")
def sd15() -> fastdiff.Config:
    return joint("sd15")


def test_the_schedule_and_the_fits_see_the_quantized_model(monkeypatch):
    pipe, counted = tiny.make("sd3"), []
    seen = SiteTrace.seen

    def watched(self, sample):
        counted.append(sum(isinstance(m, QLayer) for m in pipe.transformer.modules()))
        seen(self, sample)

    monkeypatch.setattr(SiteTrace, "seen", watched)
    plan = joint("sd3", pipe, quant={"method": "w4a16", "group_size": 8}, live_blocks=1).cache.plan
    assert counted and min(counted) > 0
    assert plan.quantization == "int4"
    assert not any(isinstance(m, QLayer) for m in pipe.transformer.modules()), "the float layers are back"


def test_fed_layers_are_corrected_at_cached_steps_only(sd15):
    plan = sd15.cache.plan
    cached = set(range(STEPS)) - set(plan.compute)
    assert plan.quantization == "int8 with int8 activations"
    assert plan.layers, "the last up block is fed by the cached value"
    assert all(path.startswith("up_blocks.2.") for path in plan.layers)
    assert all(set(table) == cached for table in plan.layers.values())
    assert fastdiff.Config.from_json(sd15.model_dump_json()) == sd15


def test_a_run_takes_both_corrections_and_restores(sd15):
    pipe = tiny.make("sd15")
    tiny.run(pipe, "sd15", steps=STEPS)
    before = snapshot(pipe)
    bare = sd15.cache.plan.model_copy(update={"layers": {}})
    input_only = sd15.model_copy(update={"cache": sd15.cache.model_copy(update={"plan": bare})})
    found = []
    for config in (sd15, input_only, sd15):
        with fastdiff.accelerate(pipe, config) as handle:
            found.append(tiny.run(pipe, "sd15", steps=STEPS))
            assert handle.report.cached == STEPS - len(sd15.cache.plan.compute)
            assert not any("the plan was made with" in note for note in handle.report.notes)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert not differences(before, snapshot(pipe))


def test_without_quantization_there_is_nothing_to_fit_on_the_output_side():
    plan = joint("sd3", quant=None).cache.plan
    assert not plan.layers and plan.quantization is None


def test_without_bias_the_fold_is_exact():
    """scale * (y - bias) + shift + bias, as fitted, is scale * y + folded shift, as run."""
    generator = torch.Generator().manual_seed(0)
    y, truth = torch.randn(16, 4, generator=generator), torch.randn(16, 4, generator=generator)
    bias = torch.randn(4, generator=generator)
    fit = AffineFit(0.01)
    fit.add(y - bias, truth - bias)
    scale, shift = fit.solve()
    run = corrected(y, scale, shift + (1 - scale) * bias)
    assert torch.allclose(run, corrected(y - bias, scale, shift) + bias, atol=1e-6)
    assert (run - truth).square().mean() < (y - truth).square().mean()
