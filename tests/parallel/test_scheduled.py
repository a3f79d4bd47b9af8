"""When and where displaced methods wait, on 2 real processes; what is checked is in scheduled.py."""

from __future__ import annotations

import pytest

from fastdiff.parallel.displaced import _is
from fastdiff.parallel.methods.distrifusion import DistriFusion
from fastdiff.parallel.methods.pcpp import PCPP
from fastdiff.parallel.waiting import LayerPlan, chosen

from . import scheduled
from .asked import Asked

NAMES = {
    2: (
        "who_waits_always_is_exact", "who_waits_always_is_exact_in_unets", "who_never_waits_is_as_before",
        "who_waits_sends_once_more", "planned", "planned_in_unets", "refused",
    ),
}  # fmt: skip
SLOW = {2: ("who_waits_always_is_exact_in_unets", "planned_in_unets")}  # half a minute; who never waits has one, too
CHECKS = Asked(scheduled, NAMES, SLOW)
told = CHECKS.told
pytestmark = pytest.mark.xdist_group("scheduled")


@pytest.mark.parametrize(("ranks", "name"), CHECKS.cases, ids=str)
def test_check(ranks: int, name: str) -> None:
    CHECKS.agree(ranks, name)


def test_all_checks_run() -> None:
    CHECKS.all_run()


def test_bytes_are_the_formula() -> None:
    """A rank's 8 of 16 tokens of 32 channels, keys and values, batch 2, float32; 4 blocks, 6 steps of which the first
    waits and the last, or the one before the cool-down, sends nothing on."""
    message, blocks, steps = 8 * 2 * 32 * 4 * 2, 4, scheduled.STEPS
    for one in told(2, "who_waits_sends_once_more"):
        assert one["none"] == one["cooldown"] == message * blocks * (steps - 1)
        coded = 2 * 4 * 8 * (2 + 16 // 4)  # batch, heads and tokens are rows: a scale, and 16 numbers of 2 bits
        assert one["two bits"] == blocks * (message + (steps - 2) * coded), "the first is raw"
        assert one["layer"] == message * (blocks * (steps - 1) + 1)
        assert one["layers"] == message * (blocks * (steps - 1) + 2)


@pytest.mark.parametrize("check", ["planned", pytest.param("planned_in_unets", marks=pytest.mark.slow)])
def test_all_ranks_make_the_same_plan(check: str) -> None:
    first, second = told(2, check)
    for name, one in first.items():
        assert one == second[name]
        errors = {layer: error for layer, (error, _) in one["table"].items()}
        assert max(errors.values()) > 0 and one["layers"]
        assert all(size > 0 for _, size in one["table"].values()), "layers that ask nobody are not in the table"


SAID = {
    "name": "parallel.sync_layers names 'transformer_blocks.1.atn', but none of the 4 layers of SD3Transformer2DModel "
    "that ask other ranks matches it; nearest are transformer_blocks.1.attn and transformer_blocks",
    "pattern": "parallel.sync_layers names 'down*', but none of the 4 layers",
    "model": "the layer plan was made for Other 0, this model is SD3Transformer2DModel",
    "method": "unknown key in parallel: 'sync_layers'",
    "budget": "layers that wait are chosen for parallel.method = distrifusion or pcpp with step = 1, and within",
    "exact": "layers that wait are chosen for parallel.method = distrifusion or pcpp with step = 1, and within",
    "steps": "only 0 of 4 steps use values of a step that did, and calibrate looks at 4: give more steps",
}


def test_bad_input_is_refused_with_the_reason() -> None:
    for one in told(2, "refused"):
        for label, reason in SAID.items():
            assert reason in one[label], one[label]


def test_a_schedule_of_steps() -> None:
    def fresh(method: DistriFusion | PCPP, total: int = 10) -> list[int]:
        return [index for index in range(total) if method.fresh(index, total)]

    assert fresh(DistriFusion(warmup_steps=1)) == [0, 1]
    assert fresh(DistriFusion(warmup_steps=1, cooldown_steps=3)) == [0, 1, 7, 8, 9]
    assert fresh(DistriFusion(warmup_steps=1, refresh=4)) == [0, 1, 5, 9]
    assert fresh(PCPP(warmup_steps=0, refresh=5, cooldown_steps=1)) == [0, 5, 9]
    assert not DistriFusion(warmup_steps=1, cooldown_steps=3).fresh(7), "where the end is not known"
    assert [DistriFusion(cooldown_steps=c).last(10) for c in (0, 3, 99)] == [9, 6, 0]


def test_names_and_patterns_of_layers() -> None:
    assert _is("mid_block.attentions.0.attn1", "mid_block") and _is("mid_block.norm", "mid_block.norm")
    assert _is("up_blocks.1.resnets.0.conv1", "*.conv1") and _is("up_blocks.1.conv1.base_layer", "*.conv1")
    assert not _is("mid_block_more.norm", "mid_block") and not _is("up_blocks.10.conv", "up_blocks.1")


def test_layers_are_chosen_by_error_for_each_byte() -> None:
    table = {"wide": (4.0, 100), "dear": (0.9, 90), "small": (0.5, 2), "none": (0.0, 1), "next": (0.3, 40)}
    assert chosen(table, 1000) == ("small", "wide", "dear", "next")
    assert chosen(table, 50) == ("small", "next"), "what does not fit is passed over"
    assert chosen(table, 1) == ()
    plan = LayerPlan(denoiser="d", ranks=2, budget=50, layers=chosen(table, 50), table=table)
    assert plan.bytes == 42
    assert plan.summary() == (
        "2 of 5 layers wait, for 0.042 of 0.233 kB a picture and step; they make 14% of the error that single old "
        "layers make"
    )
    assert LayerPlan.model_validate_json(plan.model_dump_json()) == plan
