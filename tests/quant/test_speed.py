"""What runs a layer is settled by the clock, which tells here what a test wants it to tell."""

import copy

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.pipelines.quantize import quantize
from fastdiff.pipelines.quantized_files import save
from fastdiff.quant import timed
from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.recipe import Recipe
from tests import tiny

SMALL = "sd15"
FEW = ["down_blocks*", "up_blocks*"]


@pytest.fixture
def says(monkeypatch):
    """A clock for which the quantized layer takes 2 seconds, and the float one what it is told; all that was timed."""

    def tells(other):
        told = []

        def seconds(run, device):
            told.append(run())
            return other if len(told) % 2 == 0 else 2.0

        monkeypatch.setattr(timed, "seconds", seconds)
        return told

    return tells


def made(speed, **floats):
    torch.manual_seed(0)
    layer = nn.Linear(32, 16).eval().requires_grad_(False)
    quantized = build(layer, Recipe("int8", "int8", speed=speed), Present())
    quantized.floats = (layer,) if floats.get("kept", True) else ()
    return layer, quantized, torch.randn(5, 32)


@torch.no_grad()
def test_a_float_layer_that_is_faster_runs_and_its_result_is_exact(says):
    told, (layer, quantized, x) = says(1.0), made("never slower")
    assert torch.equal(quantized(x), layer(x))
    timings = len(told)
    assert timings == 4  # two candidates in two rounds: twice as fast is clear
    assert torch.equal(quantized(x[:, :]), layer(x)) and len(told) == timings, "a shape is timed once"
    quantized(x[:3])
    assert len(told) == 2 * timings
    (first, second) = quantized.present.times
    assert first.startswith("5x32 by 16x32") and second.startswith("3x32 by 16x32")
    assert timed.verdict(quantized.present.used, quantized.present.times).startswith(
        "2 layers stay float, as quantized ones are 0.50 times as fast as float here"
    )


@torch.no_grad()
def test_a_quantized_layer_that_is_not_slower_runs(says):
    says(2.0)
    layer, quantized, x = made("never slower")
    assert not torch.equal(quantized(x), layer(x))
    told = timed.verdict(quantized.present.used, quantized.present.times)
    assert told == "1 layers run quantized, 1.00 times as fast as float here"


@torch.no_grad()
@pytest.mark.parametrize("speed", ["smallest", "never slower"])
def test_where_the_float_weight_is_gone_it_stays_gone_unless_asked_for(says, speed):
    told, (layer, quantized, x) = says(1.0), made(speed, kept=False)
    assert not torch.equal(quantized(x), layer(x)) and told == [] and quantized.present.times == {}
    layer, quantized, x = made("fastest", kept=False)
    torch.testing.assert_close(quantized(x), nn.functional.linear(x, quantized.float_weight(), quantized.bias))
    assert len(told) == 4


@torch.no_grad()
def test_layers_alike_are_timed_once_and_copies_choose_anew(says):
    told, (layer, quantized, x) = says(1.0), made("never slower")
    other = build(layer, quantized.recipe, quantized.present)
    other.floats = (layer,)
    quantized(x), other(x)
    assert len(told) == 4 and list(quantized.present.used.values()) == [2]
    alone = copy.deepcopy(quantized)
    assert alone.floats == () and not torch.equal(alone(x), layer(x))


@torch.no_grad()
def test_nothing_is_timed_inside_a_graph_where_ranks_must_agree_and_for_a_kernel_by_name(says, monkeypatch):
    told, (layer, quantized, x) = says(1.0), made("never slower")
    wanted = build(layer, Recipe("int8", "int8"), Present())(x)
    quantized.choose_kernel()
    with monkeypatch.context() as graph:
        graph.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.testing.assert_close(quantized(x), wanted)
    quantized.present.by_clock = False
    assert torch.equal(quantized(x), wanted)
    named = build(layer, Recipe("int8", "int8", kernel="reference", speed="never slower"), Present())
    named.floats = (layer,)
    assert not torch.equal(named(x), layer(x))
    assert told == []


def test_a_pipeline_is_never_slower_and_says_why(says):
    pipe = tiny.make(SMALL)
    plain = tiny.run(pipe, "sd15", steps=2)
    says(1.0)
    with fastdiff.accelerate(pipe, quant={"method": "w8a8", "skip": FEW}) as handle:
        assert torch.equal(tiny.run(pipe, "sd15", steps=2), plain)
        assert any("stay float, as quantized ones are 0.50 times" in note for note in handle.report.notes)
    with fastdiff.accelerate(pipe, quant={"method": "w8a8", "skip": FEW, "speed": "smallest"}) as handle:
        assert not torch.equal(tiny.run(pipe, "sd15", steps=2), plain)
        assert not any("timed" in note for note in handle.report.notes)
    assert torch.equal(tiny.run(pipe, "sd15", steps=2), plain)


def test_choices_are_kept_in_the_directory(says, tmp_path):
    pipe, told = tiny.make(SMALL), says(1.0)
    quantize(pipe, {"quant": {"method": "w8a8", "skip": FEW, "speed": "fastest"}})
    latents = tiny.run(pipe, "sd15", steps=2)
    assert told
    save(pipe, tmp_path / "model")
    again = fastdiff.load(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    told.clear()
    assert torch.equal(tiny.run(again, "sd15", steps=2), latents) and told == []
