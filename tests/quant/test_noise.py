"""What of a cache's forecasts is noise of quantization: measured against the float layers, and told in the report."""

from __future__ import annotations

import pytest
import torch

import fastdiff

SAID = "noise of quantization is"


@pytest.fixture(scope="module")
def dit():
    pipe = fastdiff.load("shapes-dit")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, quant, order, times=1):
    """Reports of drawing a picture with every other step from the cache, and how often the first block ran for each."""
    called, reports = [], []
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: called.append(1))
    levers = {"cache": {"method": "ab_cache", "interval": 2, "order": order}}
    levers["quant"] = quant and {"method": quant, "speed": "smallest"}
    asked = {"num_inference_steps": 28, "guidance_scale": 3.0, "output_type": "latent"}
    with fastdiff.accelerate(pipe, **levers) as fast:
        for _ in range(times):
            called.clear()
            pipe("a large red circle", generator=torch.manual_seed(0), **asked)
            reports.append((fast.report, len(called)))
    hook.remove()
    return reports


def test_a_high_order_on_8_bit_activations_warns_and_is_measured_once(dit):
    (first, calls), (second, fewer) = drawn(dit, "w8a8", 4, times=2)
    assert first.noise["share"] > 0.3 and first.noise["amplification"] > 2
    assert sum(SAID in note for note in first.notes) == 1
    assert (calls, fewer) == (second.computed + 2, second.computed), "two calls of the float layers, in one run"
    assert second.noise == first.noise == pytest.approx(second.to_dict()["noise"], abs=1e-4)


@pytest.mark.parametrize("quant", ["w8a8", "fp8"])
def test_reuse_amplifies_nothing_and_costs_nothing(dit, quant):
    ((report, calls),) = drawn(dit, quant, 1)
    assert report.noise == {"amplification": 1.0, "share": 0.0} and calls == report.computed
    assert not any(SAID in note for note in report.notes)


def test_what_weights_err_by_cancels(dit):
    """The error of 8-bit weights is a smooth function of the step: the same order does not warn."""
    ((report, _),) = drawn(dit, "w8a16", 4)
    assert 0 < report.noise["share"] < 0.15 and report.noise["amplification"] > 2
    assert not any(SAID in note for note in report.notes)


def test_floats_have_none(dit):
    ((report, calls),) = drawn(dit, None, 4)
    assert report.noise == {} and calls == report.computed
