"""Two denoisers that take turns in one run, as Wan 2.2's do, and guidance that two ranks share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.errors import UnsupportedModel
from fastdiff.parallel.methods.cfg import _Calls, split_guidance
from fastdiff.pipelines.families import Families, anatomies
from tests import tiny

STEPS = 4


class Second:
    """The bus of rank 1 of 2, whose peer gives ones."""

    alone = False
    topology: Any = SimpleNamespace(place=lambda axis: 1)

    def gather(self, kind: str, what: str, value: Tensor, axis: str, shapes: list[Any]) -> list[Tensor]:
        return [torch.ones_like(value), value]


def drawn(calls: int) -> tuple[dict[str, list[int]], list[str]]:
    """Steps in which each of two denoisers computed, the first in steps 0 and 1, the second after; and the notes."""
    notes: list[str] = []
    listeners: list[str] = ["on_start", "on_tick", "on_output", "before_step"]
    clock: Any = SimpleNamespace(now=None, **{name: [] for name in listeners})
    recorder: Any = SimpleNamespace(note=notes.append, elsewhere=lambda: None)
    bus: Any = Second()
    anatomy = anatomies(tiny.make("wan"))[0]
    computed: dict[str, list[int]] = {"high": [], "low": []}

    def denoiser(name: str) -> Any:
        def forward(value: Tensor) -> Tensor:
            computed[name].append(clock.now.index)
            return value + 1

        return _Calls(anatomy, bus, clock, recorder).shared(forward)

    both = {name: denoiser(name) for name in computed}
    for started in clock.on_start:
        started(SimpleNamespace(number=1))
    for index in range(STEPS):
        clock.now = SimpleNamespace(index=index, branch=0)
        outputs = [both["high" if index < STEPS // 2 else "low"](torch.zeros(2)) for _ in range(calls)]
        assert all(torch.equal(out, torch.ones(2)) for out in outputs)
        for ticked in clock.on_tick:
            ticked(index)
    return computed, notes


def test_each_denoiser_learns_its_calls_where_it_begins_and_nobody_speaks_of_an_idle_one():
    computed, notes = drawn(calls=2)
    assert computed == {"high": [0, 0, 1], "low": [2, 2, 3]} and not notes


def test_one_that_is_called_once_a_step_is_named_when_it_has_run():
    computed, notes = drawn(calls=1)
    assert computed == {"high": [0, 1], "low": [2, 3]}
    assert len(set(notes)) == 1 and "called 1 times a step" in notes[0]


def test_an_undescribed_denoiser_is_not_shared_since_nothing_tells_how_guidance_reaches_it(monkeypatch):
    monkeypatch.setattr("fastdiff.pipelines.families.FAMILIES", Families({}))
    (anatomy,) = anatomies(tiny.make("wan"))
    nothing: Any = None
    with pytest.raises(UnsupportedModel, match="is not described: nobody told fastdiff of its style of guidance"):
        split_guidance(anatomy, nothing, nothing, nothing, nothing)
