"""Dynamic methods decide for each picture of a batch: its neighbours change neither its decisions nor its numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff import batches
from fastdiff.caching.pictures import Pictures
from tests import tiny
from tests.some import some

STEPS = 10
SCALES = torch.tensor([1.0, 0.3, 4.0])  # of the initial noise: pictures that move at different speeds
PROMPTS = ["a red cat", "two blue dogs on a roof", "x"]
FREE = {"max_consecutive_cached": 4, "cooldown_steps": 0}
METHODS: dict[str, dict[str, Any]] = {
    "easycache": {"threshold": 0.4, "warmup_steps": 2, **FREE},
    "seacache": {"threshold": 0.4, **FREE},
    "seacache output": {"threshold": 0.4, "site": "output", **FREE},
    "seacache inner": {"threshold": 0.4, "site": "inner", **FREE},
    "first_block": {"threshold": 0.4, **FREE},
    "dbcache": {"threshold": 0.4, "live_blocks": 1, "warmup_steps": 1, **FREE},
    "dicache": {"threshold": 0.4, "warmup_steps": 2, **FREE},
    "teacache": {"threshold": 0.4, **FREE},
}
UNET = ("easycache", "seacache output", "seacache inner")
CASES = [
    *((row, "sd15") for row in UNET),
    *((row, name) for row in METHODS if row != "seacache inner" for name in ("sd3", "flux")),
    *(("first_block", name) for name in ("pixart", "wan")),
]


def test_rows_of_a_picture_are_its_place_in_both_halves():
    of = Pictures(6, 3)
    rows = torch.arange(6)
    assert of.of(rows, [1]).tolist() == [1, 4]
    assert of.of(rows, [0, 2]).tolist() == [0, 2, 3, 5], "halves stay halves"
    assert of.of(list("abcdef"), [2]) == ["c", "f"]
    assert of.of(torch.arange(12), [1]).tolist() == [2, 3, 8, 9], "frames lie next to each other"
    (joined,) = of.joined([of.one([rows], k) for k in range(3)])
    assert joined.tolist() == rows.tolist()
    assert of.spread([torch.tensor([10, 12, 13, 15])], [0, 2])[0].tolist() == [10, 0, 12, 13, 0, 15]


@cache
def noise(name: str) -> torch.Tensor:
    one = tiny.run(tiny.make(name), name, steps=1)
    drawn = torch.randn((3, *one.shape[1:]), generator=torch.Generator().manual_seed(0))
    return drawn * SCALES.view(-1, *[1] * (one.ndim - 1))


class Drawn:
    """Latents of a call, in how many steps each picture was computed by branch, and rows that a leaf was given."""

    def __init__(self, name: str, row: str | None, chosen: list[int], **extra: Any) -> None:
        pipe, self.rows = tiny.make(name), 0
        own = {} if row is None else {"method": row.split()[0], **METHODS[row], **extra}
        with fastdiff.accelerate(pipe, cache=own or None) as handle:
            leaf = tiny.deepest_leaf(pipe)
            hook = leaf.register_forward_pre_hook(self._count)
            told = {"prompt": [PROMPTS[k] for k in chosen], "negative_prompt": ["bad"] * len(chosen)}
            self.latents = tiny.run(pipe, name, steps=STEPS, latents=noise(name)[chosen], **told)
            hook.remove()
            self.report = handle.report
        alone = {branch: [row.count("computed")] for branch, row in self.report.branches.items()}
        self.counts = self.report.pictures or alone

    def _count(self, _: Any, args: tuple) -> None:
        self.rows += len(args[0])


drawn = cache(lambda name, row, *chosen: Drawn(name, row, list(chosen)))


@pytest.mark.parametrize(("row", "name"), some(CASES, 2))
def test_a_picture_does_not_depend_on_its_neighbours(row, name):
    together, plain = drawn(name, row, 0, 1, 2), drawn(name, None, 0, 1, 2)
    counts: dict[int, set[int]] = {}
    moved = []
    for k in range(3):
        alone, control = drawn(name, row, k).latents[0], drawn(name, None, k).latents[0]
        rounding = 1e-5 * control.abs().max()
        assert (plain.latents[k] - control).abs().max() < rounding, "plain diffusers does not keep to it itself"
        assert (together.latents[k] - alone).abs().max() < rounding
        moved.append((alone - control).abs().max() / rounding)
        for branch, (count,) in drawn(name, row, k).counts.items():
            assert together.counts[branch][k] == count
            counts.setdefault(branch, set()).add(count)
    assert max(moved) > 3, "what is skipped can be seen"
    assert any(len(found) > 1 for found in counts.values()), "the pictures need different numbers of steps"
    halves = 1 if name in tiny.TWO_CALLS else 2
    assert together.rows == halves * sum(map(sum, together.counts.values())), "no more rows run than are needed"
    assert together.report.to_dict()["pictures"] and "by picture" in str(together.report)


@pytest.mark.parametrize(("row", "name"), [("first_block", "sd3"), ("seacache output", "sd15")])
def test_where_nobody_knows_what_holds_the_batch_all_rows_run_and_nothing_else_changes(row, name, monkeypatch):
    known = drawn(name, row, 0, 1, 2)
    monkeypatch.setattr(batches, "BY_ROW", batches.BY_ROW - {"encoder_hidden_states"})
    unknown = Drawn(name, row, [0, 1, 2])
    assert unknown.rows > known.rows and unknown.counts == known.counts
    assert torch.allclose(unknown.latents, known.latents, atol=1e-3 * float(known.latents.abs().max()))
    assert any("encoder_hidden_states holds the batch" in note for note in unknown.report.notes)
    assert not known.report.notes


def test_pictures_that_all_decide_alike_are_one_batch():
    """Nothing is cut where all pictures are computed, so that the neutral setting is bit-identical in a batch, too."""
    neutral = Drawn("sd3", "first_block", [0, 1, 2], threshold=0)
    assert torch.equal(neutral.latents, drawn("sd3", None, 0, 1, 2).latents)
    assert neutral.counts == {0: [STEPS] * 3}
    assert any("skipped nothing" in note for note in neutral.report.notes)


def test_the_strictest_of_a_batch_decides_for_all_where_that_is_asked_for():
    together, each = Drawn("sd3", "seacache", [0, 1, 2], pictures="strictest"), drawn("sd3", "seacache", 0, 1, 2)
    (counts,) = together.counts.values()
    assert len(set(counts)) == 1 and max(each.counts[0]) <= counts[0] < STEPS
    assert together.rows == 2 * sum(counts) == 6 * together.report.computed


def test_other_ranks_and_compiled_graphs_get_whole_batches():
    """Decisions stay those of each picture; what runs beside them is thrown away."""
    pipe, known = tiny.make("sd3"), drawn("sd3", "first_block", 0, 1, 2)
    compiled = {"enabled": True, "backend": "eager", "scope": "blocks"}
    told = {"prompt": PROMPTS, "negative_prompt": ["bad"] * 3, "latents": noise("sd3")}
    with fastdiff.accelerate(pipe, cache={"method": "first_block", **METHODS["first_block"]}, compile=compiled) as fast:
        latents = tiny.run(pipe, "sd3", steps=STEPS, **told)
        assert fast.report.pictures == known.counts
        assert any("for whole batches" in note for note in fast.report.notes)
    assert torch.allclose(latents, known.latents, atol=1e-4)
