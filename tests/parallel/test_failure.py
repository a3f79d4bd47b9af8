"""A rank that dies or hangs: the others say so within seconds, or finish alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from fastdiff.studio import ranks

from .failing import hangs
from .ranks import start

RAISES = {"killed": (3, 30.0), "killed_in_a_cycle": (2, 30.0), "stopped": (2, 60.0)}  # ranks, most seconds when busy
GOES_ON = (
    "killed_patches_go_on", "killed_displaced_go_on", "killed_tokens_go_on", "killed_turns_go_on",
    "killed_half_goes_on", "killed_first_half_goes_on", "stopped_half_goes_on", "killed_cycle_goes_on",
    "killed_before_first_latents_go_on", "killed_first_with_the_only_half_goes_on", "killed_idle_half_goes_on",
)  # fmt: skip
TOLD = (
    "told_by_one_that_was_told", "told_by_one_that_was_late", "told_while_old_values_travel", "told_while_heads_travel",
)  # fmt: skip
pytestmark = pytest.mark.xdist_group("ranks")


@cache
def said() -> dict[str, list[Any]]:
    pairs = (*GOES_ON, "asked_whether_it_lives", "killed_with_a_prompt_of_its_own")
    groups = [((name,), count) for name, (count, _) in RAISES.items()] + [((name,), 2) for name in pairs]
    groups += [((name,), 4) for name in TOLD]
    return {name: one[name] for one in start("tests.parallel.failing", groups) for name in one}


@pytest.mark.parametrize("name", RAISES)
def test_the_others_are_told(name: str) -> None:
    count, most = RAISES[name]
    left = said()[name][: count - 1]
    for rank, one in enumerate(left):
        assert one[0] == "PeerLost", one
        assert f"rank {rank} waited" in one[1] and "at step" in one[1] and "for " in one[1]
        assert one[2] < most
    how = "did not answer" if name == "stopped" else "broke off or died"
    assert any(f"rank {count - 1} {how}" in one[1] for one in left), left  # "rank 0 or rank 2" where it waits for both


@pytest.mark.parametrize("name", GOES_ON)
def test_who_is_left_finishes_alone(name: str) -> None:
    state, notes, far = said()[name][1 if "first" in name else 0]
    assert state == "finished" and any("this rank finished alone" in note for note in notes)
    # every rank has whole latents after each step or cycle, so going on alone is what one device does
    assert far < 1e-12


def test_they_are_lost_where_only_the_solver_asks_for_them() -> None:
    where = {"killed_before_first_latents_go_on": "the latents of rank 0 at step 0"}
    where |= dict.fromkeys(GOES_ON[-2:], "the only half of guidance at step 2")
    for name, place in where.items():
        notes = said()[name][1 if "first" in name else 0][1]
        assert any(f"for {place}; this rank" in note for note in notes), (name, notes)


def test_who_drew_the_picture_of_one_that_is_lost_says_that_it_cannot_finish_it() -> None:
    kind, text, waited = said()["killed_with_a_prompt_of_its_own"][1]
    assert kind == "PeerLost" and waited < 30
    assert text.endswith("cannot finish rank 0's picture: give all ranks the same prompts and seed"), text


@pytest.mark.parametrize("name", TOLD)
def test_who_waits_for_one_that_lost_another_is_told_at_once(name: str) -> None:
    (first, *others) = said()[name]
    assert first == ["'a mistake in a callback'"]
    for one in others:
        assert len(one) == 1 and "broke off or died" in one[0], others


def test_a_peer_that_died_is_known_by_its_connection() -> None:
    assert said()["asked_whether_it_lives"][0] == [True, 0.5, True]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_hangs_does_not_keep_the_command_from_ending(which: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ranks, "GRACE", 1.0)
    assert ranks.launch(2, 60.0, hangs, which) == (1 if which == 0 else 0)
    assert f"error: rank {which} hung and was ended\n" in capsys.readouterr().err
