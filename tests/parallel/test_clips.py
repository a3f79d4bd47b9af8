"""Parallel methods on videos and sound, on 2 and 3 real processes over gloo; what is checked is in clips.py."""

from __future__ import annotations

import pytest

from . import clips
from .asked import Asked

NAMES = {
    2: (
        "masked_text", "frames_that_are_given", "refused", "every_method", "halves", "two_transformers", "errors",
    ),
    3: ("masked_text",),
}  # fmt: skip
SLOW = {2: ("every_method", "halves", "two_transformers", "errors"), 3: ("masked_text",)}
CHECKS = Asked(clips, NAMES, SLOW)
pytestmark = pytest.mark.xdist_group("clips")


@pytest.mark.parametrize(("ranks", "name"), CHECKS.cases, ids=str)
def test_check(ranks: int, name: str) -> None:
    CHECKS.agree(ranks, name)


@pytest.mark.slow
def test_errors_fall_with_the_step() -> None:
    found = CHECKS.told(2, "errors")[0]
    few = [name for name in found if name.endswith(" 8")]
    assert len(few) == 14
    for name in few:  # where hardly a step of 8 goes by what is old, 16 may be farther
        coarse = max(found[name], found[f"{name[:-2]} 16"])
        assert coarse > 1.3 * found[f"{name[:-2]} 32"] > 0, f"{name}: {found}"


def test_what_cannot_be_split_is_refused_with_the_reason() -> None:
    for one in CHECKS.told(2, "refused"):
        for name, said in one.items():
            wanted = "denoiser by rows; cfg and"
            if "hunyuan" in name:
                wanted = "masks its keys, of which pcpp has only a part" if "pcpp" in name else "set patches = 1"
            assert wanted in said, (name, said)


def test_all_checks_run() -> None:
    CHECKS.all_run()
