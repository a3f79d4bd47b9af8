"""Bits by layer: the table is measured, the choice keeps its budget, and errors sum up."""

from __future__ import annotations

import json

import pytest
import torch

import fastdiff
from fastdiff.caching.plan import LARGEST
from fastdiff.errors import BackendUnavailable, BadConfig, BadModel
from fastdiff.quant.build import layers_of
from fastdiff.quant.calls import relative
from fastdiff.quant.schemes.mixed import BitPlan, Mixed
from fastdiff.quant.sensitivity import rounded, sensitivities, stored, together, weights
from tests import tiny
from tests.quant.heard import hear, plan_bits
from tests.quant.test_prune import PROMPTS, arguments
from tests.state import differences, snapshot


def table_of(name: str, choices=(4, 5, 8)):
    pipe = tiny.make(name)
    calls = hear(pipe, PROMPTS, batch=2, moments=2, **arguments(name))
    method = Mixed(budget_mb=1)
    layers = {f.name: f for f in layers_of(tiny.denoiser(pipe)) if method.takes(f.name)}
    return pipe, calls, layers, sensitivities(calls, layers, choices, 64, "mse")


@pytest.fixture(scope="module")
def sd3():
    return table_of("sd3")


def test_the_table_is_what_one_rounded_layer_does_to_the_output(sd3):
    _, calls, layers, table = sd3
    assert set(table) == set(layers)
    assert all(row[8] < row[4] for row in table.values() if row[4] > 1e-9), "more bits, less error"
    assert sum(row[5] for row in table.values()) < 0.9 * sum(row[4] for row in table.values())
    name = max(table, key=lambda n: table[n][4])
    layer = layers[name].layer
    before = layer.weight
    with weights({layer: rounded(layer, 4, 64, "mse")}):
        assert calls.error(guided=True) == pytest.approx(table[name][4])
        assert torch.unique(layer.weight.flatten(1)[0]).numel() <= 16
    assert layer.weight is before
    assert calls.error() == 0


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_halves_are_weighed_by_what_guidance_makes_of_them(name):
    """One batch of two halves, and two calls: the factors are those of guidance, the error that of the mixture."""
    calls = hear(tiny.make(name), PROMPTS, batch=2, moments=2, **{**arguments(name), "guidance_scale": 5.0})
    wanted = [5.0, -4.0] if name == "wan" else [-4.0, 5.0]
    assert [factors for *_, factors in calls.guidance.shares.values()] == [pytest.approx(wanted, abs=1e-3)] * 2
    last = [layer for layer in calls.anatomy.denoiser.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with weights({last: 1.1 * last.weight.detach()}):
        found, rows, outputs = calls.error(guided=True), calls.error(), list(calls.outputs())
    errors = []
    for step in range(2):
        told = outputs, calls.truth
        pairs = [of[2 * step : 2 * step + 2] if name == "wan" else of[step].chunk(2) for of in told]
        now, truth = (wanted[0] * one + wanted[1] * other for one, other in pairs)
        errors.append(relative(now, truth))
    assert found == pytest.approx(sum(errors) / 2, rel=1e-3) != pytest.approx(rows, rel=1e-3)


def test_errors_sum_up(sd3):
    """The linear model, on random weights: the joint error within a factor of two of the sum at 4 bits everywhere."""
    _, calls, layers, table = sd3
    for bits in (4, 8):
        joint = together(calls, layers, dict.fromkeys(layers, bits), 64, "mse")
        assert 0.5 < joint / sum(row[bits] for row in table.values()) < 2


def test_measuring_leaves_no_trace_and_the_choice_keeps_the_budget():
    pipe = tiny.make("sd3")
    calls = hear(pipe, PROMPTS, batch=2, moments=2, **arguments("sd3"))
    before = snapshot(pipe)
    denoiser = tiny.denoiser(pipe)
    whole = sum(t.numel() * t.element_size() for t in [*denoiser.parameters(), *denoiser.buffers()])
    method = Mixed(budget_mb=whole * 0.6 / 1e6)
    seen = []
    found = plan_bits(pipe, method, PROMPTS, batch=2, moments=2, watch=lambda *at: seen.append(at), **arguments("sd3"))
    assert not differences(before, snapshot(pipe))
    plan = found.plan
    assert plan.bytes <= method.budget_mb * 1e6
    assert len(set(plan.bits.values())) > 1
    assert seen[-1] == (len(plan.bits), len(plan.bits))
    kept = whole - sum(denoiser.get_submodule(name).weight.numel() * 4 for name in plan.bits)
    assert plan.bytes == kept + sum(stored(denoiser.get_submodule(n), bits, 64) for n, bits in plan.bits.items())
    assert plan.predicted == pytest.approx(sum(plan.table[n][b] for n, b in plan.bits.items()))
    assert 0.3 < plan.additivity < 3
    again = Mixed(target_error=2 * plan.predicted**0.5, plan=plan)
    loose = again.planned(calls)
    assert loose.table == plan.table, "measured once"
    assert loose.predicted <= 4 * plan.predicted and loose.bytes <= plan.bytes
    for name, bits in plan.bits.items():
        recipe = found.recipe(name, denoiser.get_submodule(name))
        form, group = {4: ("int4", 64), 5: ("int4", 16), 8: ("int8", 64), 16: ("half", 64)}[bits]
        assert (recipe.format, recipe.group) == (form, group)
    with pytest.raises(BadConfig, match=r"the smallest is [\d.]+ MB"):
        Mixed(budget_mb=0.001).planned(calls)


def test_normal_levels_are_chosen_from_too(sd3):
    """3 and 2 bits are smaller and worse; a plan of them is what a file says, and is quantized and drawn with."""
    pipe, calls, layers, _ = sd3
    few = {name: layers[name] for name in list(layers)[:4]}
    skip = tuple(name for name in layers if name not in few)
    table = sensitivities(calls, few, (4, "normal4", "normal3", "normal2"), 64, "mse")
    sums = {bits: sum(row[bits] for row in table.values()) for bits in (4, "normal4", "normal3", "normal2")}
    assert sums["normal4"] < sums["normal3"] < sums["normal2"]
    layer = few[name := next(iter(few))].layer
    sizes = [stored(layer, bits, 64) for bits in ("normal2", "normal3", "normal4")]
    assert sizes == sorted(set(sizes)) and sizes[1] < stored(layer, 4, 64)
    least = Mixed(target_error=0.99, choices=("normal2", 16), skip=skip).planned(calls)
    assert set(least.bits.values()) == {"normal2"}, "the fewest bytes"
    assert least.summary().startswith("4 layers of normal2: ")
    again = BitPlan.model_validate_json(least.model_dump_json())
    assert again == least and {type(bits) for bits in again.table[name]} == {str, int}
    before = tiny.run(pipe, "sd3", steps=2)
    told = {"method": "mixed", "plan": again, "skip": skip}
    with fastdiff.accelerate(pipe, quant={**told, "speed": "smallest"}) as handle:
        report = handle.quantized.report
        assert [(one.format, one.kernel) for one in report.layers] == [("normal2", "reference")] * 4, "the only kernel"
        assert not torch.equal(tiny.run(pipe, "sd3", steps=2), before)
    assert torch.equal(tiny.run(pipe, "sd3", steps=2), before)
    with pytest.raises(BackendUnavailable, match="computes grouped 4-bit weights only"):
        fastdiff.accelerate(pipe, quant={**told, "kernel": "triton"})


def test_a_layer_that_breaks_is_named(sd3):
    pipe = tiny.make("sd3")
    calls = hear(pipe, PROMPTS, batch=2, moments=2, **arguments("sd3"))
    found = next(f for f in layers_of(tiny.denoiser(pipe)) if f.name.endswith("attn.to_q"))
    with torch.no_grad():
        found.layer.weight[0, 0] = float("nan")
    with pytest.raises(BadModel, match=found.name.replace(".", r"\.")):
        sensitivities(calls, {found.name: found}, (8,), 64, "mse")


def test_bad_settings_are_told(tmp_path):
    for settings, said in (
        ({}, "needs one of budget_mb and target_error"),
        ({"budget_mb": 1, "target_error": 0.1}, "needs one of"),
        ({"budget_mb": 1, "components": ["vae"]}, "mixed measures the denoiser"),
        ({"plan": str(tmp_path / "none.json")}, "does not exist"),
        ({"budget_mb": -1}, "greater than 0"),
        ({"budget_mb": 1, "choices": [3]}, "choices"),
    ):
        with pytest.raises(BadConfig, match=said):
            fastdiff.Config(quant={"method": "mixed", **settings})
    layer = torch.nn.Linear(8, 8)
    with pytest.raises(BadConfig, match="needs a plan"):
        Mixed(budget_mb=1).recipe("layer", layer)
    plan = BitPlan(denoiser="X 1", bits={"other": 4}, bytes=1, predicted=0.1, measured=0.1, table={"other": {4: 0.1}})
    with pytest.raises(BadConfig, match="says nothing of layer"):
        Mixed(plan=plan).recipe("layer", layer)
    file = tmp_path / "bits.json"
    file.write_text(plan.model_dump_json())
    assert Mixed(plan=str(file)).plan == plan
    file.write_text(plan.model_dump_json() + " " * LARGEST)  # plans of maps are larger than those of caches may be
    assert Mixed(plan=str(file)).plan == plan
    file.write_text(json.dumps({**plan.model_dump(mode="json"), "bits": {"other": 3}}))
    with pytest.raises(BadConfig, match="damaged"):
        fastdiff.Config(quant={"method": "mixed", "plan": str(file)})
