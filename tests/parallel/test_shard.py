"""Weights of which each rank keeps a share, on 2, 3 and 4 real processes; what is checked is in sharded.py."""

from __future__ import annotations

import pytest

from . import sharded
from .asked import Asked

NAMES = {
    2: (
        "pictures", "memory", "skipped", "quantized", "broken_off", "half_of_a_step", "refused", "other_pictures",
        "with_everything",
    ),
    3: ("pictures", "other_pictures", "memory"),
    4: ("with_everything",),
}  # fmt: skip
SLOW = {2: ("other_pictures", "with_everything"), 3: ("pictures", "other_pictures", "memory"), 4: ("with_everything",)}
CHECKS = Asked(sharded, NAMES, SLOW)
told = CHECKS.told
pytestmark = pytest.mark.xdist_group("shards")


@pytest.mark.parametrize(("ranks", "name"), CHECKS.cases, ids=str)
def test_check(ranks: int, name: str) -> None:
    CHECKS.agree(ranks, name)


def test_all_checks_run() -> None:
    CHECKS.all_run()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_holds_its_share_and_the_blocks_that_are_here(ranks: int) -> None:
    """What is no block is whole everywhere; besides, a block that computes and the one after it. Pieces begin at 64
    bytes, and shares are alike."""
    for found in told(ranks, "memory"):
        for name, one in found.items():
            blocks, (largest, second, *_) = sum(one["blocks"]), sorted(one["blocks"], reverse=True)
            rounding = one["rounding"]
            between = one["whole"] - blocks + blocks / ranks + rounding
            assert one["between"] <= between, name
            assert between < one["peak"] + rounding <= between + largest + second + 3 * rounding, name


def test_only_what_computes_is_fetched() -> None:
    """And one block that was expected, at the end."""
    for found in told(2, "skipped"):
        for name, (runs, fetched, cached, ahead, largest) in found.items():
            assert fetched - runs in (0, 1) and 0 <= ahead <= largest, name
            assert (cached > 0) is ("None" not in name)


def test_packed_weights_are_shared_out() -> None:
    for found in told(2, "quantized"):
        for method, (whole, kept) in found.items():
            assert kept < 0.7 * whole, method


def test_an_exception_ends_all_ranks_and_the_next_picture_is_right() -> None:
    assert told(2, "broken_off") == ["PeerLost", "KeyError"]


def test_what_cannot_be_is_refused() -> None:
    first, second = told(2, "half_of_a_step")
    assert second == "step 1 has one half of guidance, and parallel.shard needs both: set cfg = 1"
    assert first.startswith("rank 1 broke off or died")
    for one in told(2, "refused"):
        for text in one.values():
            assert "parallel.shard = blocks, for which all ranks are at a block together, needs on_peer_loss" in text
