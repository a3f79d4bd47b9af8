"""Which arguments of a denoiser hold the two halves of guidance that two ranks share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastdiff.parallel.methods.cfg import _Batch
from fastdiff.pipelines.families import anatomies
from tests import tiny


class Alone:
    """The bus of rank 1 of 2, whose peer gives what this one has."""

    alone = False
    topology: Any = SimpleNamespace(place=lambda axis: 1)

    def gather(self, kind: str, what: str, value: Tensor, axis: str, shapes: list[Any]) -> list[Tensor]:
        return [value, value]


def shared(**more: Any) -> tuple[dict[str, Any], list[str]]:
    """What the second rank calls the denoiser with, and what it notes."""
    notes: list[str] = []
    told: Any = SimpleNamespace(note=notes.append)
    clock: Any = SimpleNamespace(now=object())
    seen: dict[str, Any] = {}

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        seen.update(kwargs)
        return kwargs["hidden_states"]

    bus: Any = Alone()
    half = _Batch(anatomies(tiny.make("flux"))[0], bus, clock, told).shared(forward)
    known = {"hidden_states": torch.arange(8.0).view(2, 2, 2), "timestep": torch.ones(2)}
    assert len(half(**known, **more)) == 2
    return seen, notes


def test_what_has_rows_is_halved_and_a_table_with_as_many_places_is_not():
    seen, notes = shared(
        img_ids=torch.zeros(2, 3), joint_attention_kwargs={"scale": 0.5}, guidance=torch.tensor([1.0, 3])
    )
    assert torch.equal(seen["hidden_states"], torch.arange(4.0, 8.0).view(1, 2, 2))
    assert len(seen["timestep"]) == 1 and seen["guidance"].tolist() == [3.0]
    assert len(seen["img_ids"]) == 2 and notes == []


def test_of_an_argument_that_nobody_knows_both_ranks_compute_all():
    """Two rows may be two halves, or two regions of the picture."""
    seen, notes = shared(joint_attention_kwargs={"regional_mask": torch.zeros(2, 4)})
    assert len(seen["hidden_states"]) == 2 and len(seen["joint_attention_kwargs"]["regional_mask"]) == 2
    assert len(notes) == 1 and "joint_attention_kwargs" in notes[0]
