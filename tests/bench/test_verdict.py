"""The rule on made-up rows."""

import json

import pytest

from fastdiff.bench.row import Row
from fastdiff.bench.verdict import markdown, verdict


def row(name, kind, speedup=None, psnr=None, error=None):
    return Row(
        name=name, kind=kind, model="m", scheduler="DDIMScheduler", steps=50, speedup=speedup, psnr=psnr, error=error,
        speedup_denoising=speedup, spread={}, config={}, prompts=1, batch=1, rounds=1, seeds=[0], guidance_scale=None,
        notes=[], environment={}, command="",
    )  # fmt: skip


BASELINE = row("baseline", "baseline", 1.0, 120.0)


def judge(rival, *ours):
    (found,) = verdict(
        [BASELINE, row("rival", "peer", *rival), *(row(f"o{k}", "fastdiff", *o) for k, o in enumerate(ours))]
    )
    return found


def test_faster_at_the_same_quality():
    found = judge((2.0, 40.0), (2.6, 41.0))
    assert found == {
        "rival": "rival", "kind": "peer", "speedup": 2.0, "psnr": 40.0, "beaten_by": "o0", "rule": "faster",
        "margin": 1.3, "nearest": "o0",
    }  # fmt: skip


def test_closer_at_the_same_speed():
    found = judge((2.0, 40.0), (2.1, 44.0))
    assert (found["beaten_by"], found["rule"], found["margin"]) == ("o0", "closer", 4.0)


@pytest.mark.parametrize(
    ("rival", "ours", "rule"),
    [
        ((2.0, 40.0), (2.5, 40.0), "faster"),
        ((1.2, 40.1), (1.2, 43.1), "closer"),
        ((1.1, 33.3), (1.375, 33.3), "faster"),
    ],
)
def test_exact_ties_count(rival, ours, rule):
    found = judge(rival, ours)
    assert found["beaten_by"] == "o0" and found["rule"] == rule


@pytest.mark.parametrize("ours", [(2.49, 42.9), (2.499, 40.0), (2.0, 42.99), (1.99, 60.0), (9.0, 39.99)])
def test_nearly_is_not_enough(ours):
    found = judge((2.0, 40.0), ours)
    assert found["beaten_by"] is None


def test_equal_is_not_beaten_but_nearest():
    found = judge((2.0, 40.0), (2.0, 40.0))
    assert found["beaten_by"] is None and found["nearest"] == "o0" and found["margin"] == 1.0


def test_the_clearest_win_is_named():
    found = judge((2.0, 40.0), (2.5, 40.0), (2.0, 52.0), (3.0, 41.0))
    assert found["beaten_by"] == "o1" and found["margin"] == 12.0


def test_identical_pictures_can_only_be_beaten_by_identical_ones():
    assert judge((1.0, 120.0), (1.5, 119.0))["beaten_by"] is None
    found = judge((1.0, 120.0), (1.5, 120.0))
    assert found["beaten_by"] == "o0" and found["rule"] == "faster"
    assert "| identical |" in markdown([found])


def test_nothing_comparable():
    found = judge((4.0, 50.0), (2.0, 40.0))
    assert found["beaten_by"] is found["rule"] is found["margin"] is found["nearest"] is None
    assert "nothing of ours" in markdown([found]) and markdown([found]).startswith("0 of 1")
    assert judge((4.0, 50.0))["nearest"] is None


def test_failed_and_unmeasured_rows_are_left_out():
    rows = [
        BASELINE, row("dead", "peer", error="no"), row("unmeasured", "peer", 2.0), row("few", "fewer_steps", 2.0, 40.0),
        row("broken", "fastdiff", 9.0, 99.0, error="no"), row("half", "fastdiff", 9.0),
        row("ok", "fastdiff", 2.0, 43.0),
    ]  # fmt: skip
    found = verdict(rows)
    assert [(entry["rival"], entry["beaten_by"]) for entry in found] == [("few", "ok")]
    assert "1 of 1 rivals beaten" in markdown(found) and "+3.0 dB" in markdown(found)
    json.dumps(found, allow_nan=False)
    assert markdown(verdict([BASELINE])) == "No rival was measured."
