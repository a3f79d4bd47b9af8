"""The strip: one cell a step, of the right kind, readable without eyes and without a style sheet."""

from __future__ import annotations

import re

import pytest

import fastdiff
from fastdiff import strip
from fastdiff.report import RunReport
from tests import tiny

WORDS = {"x": "computed", ".": "cached", "-": "absent"}


def report(*branches: str, predicted: set[int] = frozenset()) -> RunReport:
    rows = {number: [WORDS[letter] for letter in row] for number, row in enumerate(branches)}
    return RunReport(branches=rows, predicted=set(predicted), step_seconds=[0.01] * max(map(len, branches)))


@pytest.mark.parametrize(
    ("branches", "predicted", "kinds"),
    [
        (["x..x"], (), "computed cached cached computed"),
        (["x..x"], (2,), "computed cached predicted computed"),
        (["xx..", "x.x."], (3,), "computed partly partly predicted"),
        (["x.--", "-.x-"], (), "computed cached computed computed"),  # absent twice: another rank's step
    ],
)
def test_kinds_of_steps(branches, predicted, kinds):
    made = report(*branches, predicted=set(predicted))
    assert strip.cells(made) == kinds.split()
    assert strip.html(made).count("<span style=") >= made.steps


def test_counts_are_said_to_those_who_do_not_see_the_cells():
    text = strip.html(report("x..x", predicted={1}))
    assert 'role="img" aria-label="4 steps: 2 computed, 1 predicted, 1 reused"' in text
    assert 'title="step 1: predicted, 10 ms"' in text
    assert "class=" not in text and "<script" not in text and "<style" not in text


def test_what_others_wrote_is_escaped():
    made = report("x")
    made.notes.append("<img src=x onerror=alert(1)>")
    text = strip.html(made, '<b>"title"')
    assert "<img" not in text and "<b>&lt;b&gt;&quot;title&quot;</b>" in text


def test_nothing_ran_yet():
    assert strip.cells(RunReport()) == [] and "nothing ran yet" in strip.html(RunReport())


@pytest.mark.parametrize(
    ("cache", "kinds"),
    [
        ({"method": "fora", "interval": 3}, {"computed", "cached"}),
        ({"method": "ab_cache", "interval": 3, "order": 2, "warmup_steps": 2}, {"computed", "predicted"}),
    ],
)
def test_of_a_real_run(cache, kinds):
    pipe = tiny.make("pixart")
    with fastdiff.accelerate(pipe, cache=cache) as fast:
        assert "nothing ran yet" in fast._repr_html_()
        tiny.run(pipe, "pixart", steps=7)
        assert set(strip.cells(fast.report)) == kinds
        shown = fast._repr_html_()
    assert re.search(r"fastdiff PixArt\w+ \{.*cache.*" + cache["method"], shown) and "7 steps" in shown
    assert fast.report.to_dict()["predicted"] == strip.cells(fast.report).count("predicted")
