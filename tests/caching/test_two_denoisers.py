"""Wan 2.2 has two denoisers of one configuration, each for a part of the run: a plan each, made in the same passes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.caching.schedule import Costs, fewest, optimal_steps, shared_steps
from fastdiff.errors import BadConfig
from fastdiff.pipelines.calibrate import calibrate
from tests import tiny

STEPS, PROMPTS, NAMES = 8, ["a red cat"], ("transformer", "transformer_2")
CALL = {
    key: value
    for key, value in tiny.arguments("wan", STEPS).items()
    if key not in ("prompt", "negative_prompt", "generator", "output_type")
}
SETTINGS: dict[str, dict[str, Any]] = {
    "dp": {"computed_steps": 5},
    "dp stack": {"computed_steps": 5, "site": "stack"},
    "cachequant": {"interval": 2},
    "magcache": {"threshold": 0.5, "retention": 0.0},
    "teacache": {"threshold": 0.3},
    "a_sdm": {"level": "unit"},
}
MASKED = ("dp", "dp stack", "cachequant", "magcache")


def two(boundary: float = 0.9) -> diffusers.WanPipeline:
    first = tiny.make("wan")
    second = tiny.make("wan").transformer
    generator = torch.Generator().manual_seed(7)
    for weight in second.parameters():
        if weight.ndim >= 2:
            weight.data.normal_(0, 0.7 * weight[0].numel() ** -0.5, generator=generator)
    pipe = diffusers.WanPipeline(**{**first.components, "transformer_2": second}, boundary_ratio=boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def own_steps(boundary: float = 0.9) -> tuple[list[int], list[int]]:
    """The steps in which each is called."""
    pipe, called = two(boundary), ([], [])
    for which, name in enumerate(NAMES):
        getattr(pipe, name).register_forward_hook(lambda *_, to=called[which]: to.append(index[0]))
    index = [0]

    def next_step(_pipe: Any, step: int) -> None:
        index[0] = step + 1

    tiny.run(pipe, "wan", steps=STEPS, **tiny.at_each_step("wan", next_step))
    first, second = (sorted(set(steps)) for steps in called)
    return first, second


@cache
def planned(row: str) -> fastdiff.Config:
    config = fastdiff.Config(cache={"method": row.partition(" ")[0], **SETTINGS[row]})
    return calibrate(two(), config, PROMPTS, batch=1, **CALL)


def computed_of(pipe: Any, handle: Any) -> dict[str, list[int]]:
    """The steps in which the last block of each denoiser ran."""
    ran: dict[str, set[int]] = {name: set() for name in NAMES}
    for name in NAMES:
        last = [m for m in getattr(pipe, name).blocks[-1].ffn.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.register_forward_hook(lambda *_, to=ran[name]: to.add(handle.clock.index))
    tiny.run(pipe, "wan", steps=STEPS)
    return {name: sorted(steps) for name, steps in ran.items()}


@pytest.mark.parametrize("row", SETTINGS)
def test_each_has_a_plan_of_the_steps_in_which_it_is_called(row):
    plans = planned(row).cache.plan.root
    assert list(plans) == list(NAMES)
    for name, own in zip(NAMES, own_steps(), strict=True):
        assert 1 < len(own) < STEPS and list(plans[name].called) == own
        assert len(plans[name].sigmas) == STEPS
    first, second = (plan.model_dump(exclude={"called"}) for plan in plans.values())
    assert first != second


@pytest.mark.parametrize("row", MASKED)
def test_each_computes_what_its_own_plan_says(row):
    config, (one, other) = planned(row), own_steps()
    pipe = two()
    handle = fastdiff.accelerate(pipe, config)
    ran = computed_of(pipe, handle)
    assert handle.report.notes == []
    assert ran["transformer"][0] == one[0] and ran["transformer_2"][0] == other[0], "of its own it has nothing before"
    assert handle.report.computed == sum(map(len, ran.values())) < STEPS
    if not row.startswith("magcache"):
        for name, own in zip(NAMES, (one, other), strict=True):
            assert ran[name] == [step for step in config.cache.plan.root[name].compute if step in own]


@pytest.mark.parametrize("row", ["dp", "dp stack"])
def test_they_share_the_computed_steps(row):
    plans = planned(row).cache.plan.root
    counts = [len(set(plan.compute) & set(plan.called)) for plan in plans.values()]
    assert sum(counts) == SETTINGS[row]["computed_steps"] and min(counts) >= 1
    for plan in plans.values():
        assert all(anchor in plan.called for pairs in plan.weights.values() for anchor, _ in pairs)
        assert plan.weights.keys() == set(range(STEPS)) - set(plan.compute)


def test_the_corrections_are_those_of_the_denoiser_that_gave_the_value():
    plans = planned("cachequant").cache.plan.root
    for plan in plans.values():
        assert set(plan.affine) == set(range(STEPS)) - set(plan.compute) <= set(plan.called)


def test_with_quantization_layers_of_both_are_corrected():
    config = fastdiff.Config(
        cache={"method": "cachequant", "interval": 2, "live_blocks": 1}, quant={"method": "w8a16", "keep": ["*embed*"]}
    )
    plans = calibrate(two(), config, PROMPTS, batch=1, **CALL).cache.plan.root
    for plan in plans.values():
        assert plan.layers
        for table in plan.layers.values():
            assert set(table) <= set(plan.called) - set(plan.compute)


@pytest.mark.parametrize("row", ["dp", "magcache"])
def test_a_file_holds_a_plan_for_each(tmp_path, row):
    config = planned(row)
    file = tmp_path / "plans.json"
    file.write_text(config.cache.plan.model_dump_json())
    assert list(json.loads(file.read_text())) == list(NAMES)
    again = fastdiff.Config(cache={**config.cache.model_dump(exclude={"plan"}), "plan": str(file)})
    assert again == config and fastdiff.Config.from_json(config.model_dump_json()) == config
    assert [part.split(" ")[0] for part in config.cache.plan.summary().split("; ") if "transformer" in part] == [*NAMES]
    broken = json.loads(file.read_text())
    broken["transformer_2"]["sigmas"] = []
    file.write_text(json.dumps(broken))
    with pytest.raises(BadConfig, match=r"plans.json' is damaged: transformer_2.sigmas: "):
        fastdiff.Config(cache={"method": row, "plan": str(file)})


@pytest.mark.parametrize("row", SETTINGS)
def test_a_plan_of_the_first_is_not_applied_to_the_second_which_is_computed(row):
    """Both have one configuration, so that nothing else would tell."""
    config, (_, other) = planned(row), own_steps()
    method = config.cache.with_plan(config.cache.plan.root["transformer"])
    pipe = two()
    with pytest.warns(UserWarning, match="the transformer_2 is not cached: the plan is not for it"):
        handle = fastdiff.accelerate(pipe, fastdiff.Config(cache=method))
    assert computed_of(pipe, handle)["transformer_2"] == other
    assert any("transformer_2 is not cached" in note for note in handle.report.notes)


def test_one_that_is_never_called_has_no_plan_and_the_other_has():
    pipe = two(boundary=0.0)
    config = fastdiff.Config(cache={"method": "dp", "computed_steps": 5})
    with pytest.warns(UserWarning, match="the transformer_2 has no plan: no complete run was"):
        plans = calibrate(pipe, config, PROMPTS, batch=1, **CALL).cache.plan.root
    assert list(plans) == ["transformer"] and plans["transformer"].called == ()
    assert (
        plans["transformer"].compute == calibrate(tiny.make("wan"), config, PROMPTS, batch=1, **CALL).cache.plan.compute
    )


def test_the_ratios_of_a_denoiser_begin_where_it_does():
    """Magnitudes of another run, or of another denoiser, are not the ones before."""
    config = fastdiff.Config(cache={"method": "magcache"})
    once = calibrate(two(), config, PROMPTS, batch=1, **CALL).cache.plan.root
    twice = calibrate(two(), config, [*PROMPTS, *PROMPTS], batch=1, **CALL).cache.plan.root
    for name, own in zip(NAMES, own_steps(), strict=True):
        for plan in (once[name], twice[name]):
            assert all(plan.ratios[index] == 1 for index in range(STEPS) if index not in own[1:])
            assert all(plan.ratios[index] != 1 for index in own[1:])


def test_in_another_number_of_steps_each_keeps_its_share():
    pipe = two()
    handle = fastdiff.accelerate(pipe, planned("dp"))
    tiny.run(pipe, "wan", steps=2 * STEPS)
    assert handle.report.steps == 2 * STEPS and abs(handle.report.computed - 10) <= 1
    assert len([note for note in handle.report.notes if "re-mapped" in note]) == 1


# what parts of a run share


def costs_of(total: int, seed: int) -> Costs:
    f = np.random.default_rng(seed).normal(size=(total, 5)).cumsum(0)
    return Costs(f @ f.T, lambda at, computed: [1.0], longest=4)


@pytest.mark.parametrize("seed", range(4))
def test_steps_are_shared_out_so_that_the_sum_is_least(seed):
    parts, forced, budget = [costs_of(7, seed), costs_of(5, seed + 10)], [[0, 6], []], 6

    def price(counts: tuple[int, int]) -> float:
        chosen = (optimal_steps(c.table(), n, f) for c, n, f in zip(parts, counts, forced, strict=True))
        return sum(c.price(steps) for c, steps in zip(parts, chosen, strict=True))

    least = [fewest(c.total, c.longest, own) for c, own in zip(parts, forced, strict=True)]
    splits = [(n, budget - n) for n in range(least[0], budget) if least[1] <= budget - n <= 5]
    found = shared_steps(parts, budget, forced)
    assert sum(map(len, found)) == budget
    assert sum(c.price(s) for c, s in zip(parts, found, strict=True)) == pytest.approx(min(map(price, splits)))


def test_a_budget_below_what_each_part_needs_is_refused():
    with pytest.raises(ValueError, match="1 computed steps are not possible in a run of 12; give 3 to 12"):
        shared_steps([costs_of(7, 0), costs_of(5, 1)], 1, [[], []])
