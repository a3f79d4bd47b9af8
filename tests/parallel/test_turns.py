"""Halves of a batch and groups of heads that take turns: the same picture, and shorter waits; see turned.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from fastdiff.parallel.turns import Turns

from .ranks import start

pytestmark = pytest.mark.xdist_group("ranks")
CHECKS = ("halves", "three_pictures", "coded", "groups", "order", "broken", "paced")


@cache
def said() -> tuple[dict[str, list[Any]], ...]:
    two, three = start("tests.parallel.turned", [(CHECKS, 2), (("halves", "order"), 3)])
    for name, told in (*two.items(), *three.items()):
        for one in told:
            assert not isinstance(one, str) or name == "broken", f"{name}: {one}"
    return two, three


def test_two_parts_hand_over_where_they_wait() -> None:
    turns, seen = Turns(), list[str]()

    def part(name: str, waits: int) -> str:
        for k in range(waits):
            seen.append(f"{name}{k}")
            turns.hand_over()
        seen.append(f"{name} ends")
        return name

    assert turns.run(lambda: part("a", 2), lambda: part("b", 3)) == ("a", "b")
    assert seen == ["a0", "b0", "a1", "b1", "a ends", "b2", "b ends"]
    seen.clear()
    assert turns.run(lambda: part("a", 2), lambda: part("b", 0)) == ("a", "b")
    assert seen == ["a0", "b ends", "a1", "a ends"]
    turns.hand_over()  # nobody is there


@pytest.mark.parametrize("who", [0, 1])
def test_one_part_ends_the_other(who: int) -> None:
    turns, ended = Turns(), list[int]()

    def part(number: int) -> None:
        try:
            for k in range(4):
                turns.hand_over()
                if k == 1 and number == who:
                    raise ValueError("here")
        finally:
            ended.append(number)

    with pytest.raises(ValueError, match="here"):
        turns.run(lambda: part(0), lambda: part(1))
    assert sorted(ended) == [0, 1] and turns.run(lambda: 1, lambda: 2) == (1, 2)


def test_halves_equal_one_device() -> None:
    for ranks in said():
        for name in ranks["halves"][0]:
            digests = {one[name]["digest"] for one in ranks["halves"]}
            assert len(digests) == 1, (name, "the ranks ended with different latents")
    for one in said()[0]["halves"]:
        assert one["sd3 patch"]["sent"] == one["sd3 patch whole"]["sent"], "as many bytes"
        assert not one["sd3 patch"]["notes"]


def test_a_batch_of_one_has_no_halves() -> None:
    for one in said()[0]["three_pictures"]:
        assert not one["three"]["notes"]
        assert one["one"]["notes"] == ["a batch of 1 has no two halves: parallel.halves changed nothing"]


def test_codecs_remember_each_half() -> None:
    assert all(0 < far < 1e-2 for far in said()[0]["coded"]), said()[0]["coded"]


def test_groups_of_heads_are_the_same_to_the_bit() -> None:
    for one in said()[0]["groups"]:
        for name in ("sd3", "pixart"):
            first, second, most = (one[f"{name} {count}"] for count in (1, 2, 9))
            assert first[:2] == second[:2] == most[:2]
            assert first[2] < second[2] == most[2], "four heads on two ranks are two groups at most"


def test_all_ranks_send_in_the_same_order() -> None:
    for ranks in said():
        first, *others = ([entry[:2] for entry in one] for one in ranks["order"])
        assert first and all(one == first for one in others)
        parts = [layer[-1] for kind, layer in first if kind == "kv"]
        assert {"0", "1"} == set(parts)


def test_what_breaks_one_half_breaks_both() -> None:
    one, other = said()[0]["broken"]
    assert one == other


@pytest.mark.parametrize("method", ["patch", "ring", "ulysses"])
def test_waits_are_less_than_half(method: str) -> None:
    """Where the exchange takes a half of the computing, and nine tenths; what `ulysses` sends back after its attention
    has the time of that alone."""
    for one in said()[0]["paced"]:
        for share, most in ((0.5, 0.5), (0.9, 0.55 if method == "ulysses" else 0.5)):
            whole, halves = (one[f"{method} {name} {share}"] for name in ("whole", "halves"))
            assert halves["waited"] <= most * whole["waited"], (share, whole, halves)
            if method == "ulysses":
                assert one[f"{method} groups {share}"]["waited"] < whole["waited"]
