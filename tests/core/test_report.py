"""The report: right numbers, one line, never silent about doing nothing."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest

import fastdiff
from fastdiff.clock import Run, Step
from fastdiff.recorder import Recorder
from fastdiff.report import RunReport
from tests import tiny


def report(seconds: list[float], **branches: str) -> RunReport:
    """Branches as strings: x computed, . cached, - absent."""
    words = {"x": "computed", ".": "cached", "-": "absent"}
    rows = {number: [words[letter] for letter in row] for number, row in enumerate(branches.values())}
    return RunReport(total=len(seconds), branches=rows, step_seconds=seconds)


@pytest.mark.parametrize(
    ("branches", "computed", "cached"),
    [
        ({"batch": "xx..x."}, 3, 3),
        ({"cond": "x..x..", "uncond": "x..x.."}, 2, 4),
        ({"cond": "x.x.x.", "uncond": "xx.xx."}, 5, 1),
        ({"cond": "x.....", "uncond": "x.----"}, 1, 5),
        ({"cond": "x.....", "uncond": "--x..."}, 2, 4),
        ({}, 6, 0),
    ],
)
def test_a_step_is_cached_if_no_branch_ran_in_full(branches, computed, cached):
    made = report([1.0] * 6, **branches)
    assert (made.steps, made.computed, made.cached) == (6, computed, cached)
    assert made.to_dict()["computed"] + made.to_dict()["cached"] == made.to_dict()["steps"] == 6


@pytest.mark.parametrize(
    ("branches", "partly"),
    [
        ({"cond": "xxxx", "uncond": "xx.."}, 2),
        ({"cond": "x..x", "uncond": "x..x"}, 0),
        ({"cond": "x.x.", "uncond": "x..x"}, 2),
        ({"cond": "xx..", "uncond": "x---"}, 0),
        ({"batch": "x..x"}, 0),
        ({}, 0),
    ],
)
def test_steps_in_which_one_of_two_calls_is_cached_are_counted_apart(branches, partly):
    made = report([1.0] * 4, **branches)
    assert made.partly == made.to_dict()["partly"] == partly
    assert (f"({partly} with one branch cached)" in str(made)) == (partly > 0)
    assert made.cached + partly <= made.steps


def test_what_was_saved_is_measured_on_this_very_run():
    assert report([9, 2, 1, 1, 2, 1], batch="xx..x.").saved_seconds() == pytest.approx(3)
    assert report([9, 2, 2], batch="xxx").saved_seconds() == 0
    assert report([9, 1, 2], batch="x.x").saved_seconds() == pytest.approx(1)
    assert report([9, 3, 2], batch="x.x").saved_seconds() == 0, "a cached step that is slower saves nothing"


def test_the_dictionary_is_json_and_has_the_promised_keys():
    told = report([0.5, 0.25], cond="x.", uncond="x.").to_dict()
    assert {"steps", "computed", "cached", "seconds", "peak_memory_mb", "bytes_sent"} <= told.keys()
    assert json.loads(json.dumps(told)) == told and told["seconds"] == 0.75
    assert told["branches"] == {"cond": ["computed", "cached"], "uncond": ["computed", "cached"]}


def test_the_line_says_what_matters():
    made = report([0.5, 0.5, 0.1, 0.1], batch="xx..")
    made.bytes_sent, made.notes = 3 * 2**20, ["something to know"]
    line = str(made)
    assert "\n" not in line and line.startswith("4 steps: 2 computed, 2 cached")
    for part in ("1.20 s", "about 0.80 s saved", "3.0 MiB sent", "something to know"):
        assert part in line


def test_before_the_first_run_it_says_so():
    assert str(RunReport()) == "nothing ran yet" and RunReport().to_dict()["steps"] == 0


def test_more_branches_than_two_are_numbered():
    assert report([1.0], a="x", b="x", c="x").branch_names() == {0: "cond", 1: "uncond", 2: "call 2"}


def recorder() -> Recorder:
    listeners = {name: [] for name in ("on_start", "on_end", "on_tick", "on_call", "on_return", "on_note")}
    return Recorder(SimpleNamespace(**listeners))


def test_a_branch_that_is_not_called_at_a_step_is_absent_there():
    """Guidance may start late or end early; later steps must not slide into the gap."""
    run, made = Run(1, (3.0, 2.0, 1.0), (3.0, 2.0, 1.0), False), recorder()
    made._start(run)
    for index, branches in enumerate([(0,), (0, 1), (0,)]):
        for branch in branches:
            made._call(Step(run, index, branch))
            if index:
                made.skipped()
            made._return(Step(run, index, branch))
        made._tick(index)
    assert made.report.branches == {0: ["computed", "cached", "cached"], 1: ["absent", "cached"]}
    assert (made.report.computed, made.report.cached) == (1, 2)


def test_a_note_is_said_once():
    made = recorder()
    made.note("slow")
    made.note("slow")
    assert made.report.notes == ["slow"]


def test_each_run_has_its_own_report():
    pipe = tiny.make("pixart")
    handle = fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 3, "warmup_steps": 1})
    tiny.run(pipe, "pixart", steps=7)
    first = handle.report
    tiny.run(pipe, "pixart", steps=4)
    assert (first.steps, first.cached) == (7, 4) and (handle.report.steps, handle.report.cached) == (4, 2)
    assert handle.report.seconds > 0 and handle.report.peak_memory_mb > 10
    assert str(handle.report) in repr(handle) and "ab_cache" in repr(handle)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_pipelines_own_bar_shows_what_was_saved_so_far(name):
    pipe, shown = tiny.make(name), io.StringIO()
    pipe.set_progress_bar_config(file=shown, mininterval=0)
    with fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 2, "warmup_steps": 1}) as fast:
        tiny.run(pipe, name)
        saved = fast.report.cached
    found = [line.rpartition(", ")[2].strip() for line in shown.getvalue().split("\r") if "saved" in line]
    assert saved == 3 and {"1 saved]", "3 saved]"} <= set(found), found
    shown.truncate(0)
    with fastdiff.accelerate(pipe):
        tiny.run(pipe, name)
    assert "6/6" in shown.getvalue() and "saved" not in shown.getvalue()
