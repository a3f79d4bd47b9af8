"""What of the exchange is exposed, on a link of limited rate in virtual time; see paced.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from .ranks import start

pytestmark = pytest.mark.xdist_group("ranks")
MODELS = pytest.mark.parametrize("model", [pytest.param("sd15", marks=pytest.mark.slow), "sd3"])  # a minute of UNet


@cache
def found(model: str) -> list[dict[str, Any]]:
    (said,) = start("tests.parallel.paced", [((model,), 2)])
    for one in said[model]:
        assert isinstance(one, dict), one
    return said[model]


def test_a_ring_waits_only_for_what_its_attention_does_not_cover() -> None:
    layers = 2 * 4  # in each of two steps
    for one in found("circles"):
        for share in (0.5, 1.0, 2.0):
            patch, ring, token = (one[f"{name} {share}"] for name in ("patch", "ring", "token_ring"))
            block = min(ring["costs"])  # the text is longer
            travels = share * block * layers
            assert patch["waited"] == pytest.approx(travels), "what is gathered first hides nothing"
            left = max(0.0, travels - block * layers)
            assert ring["waited"] == pytest.approx(left, abs=1e-12)
            # a half of the own keys over the queries' way there, the other over the results' way back
            more = token["bytes"] / ring["bytes"] - 1  # the results' weights
            assert left - 1e-12 <= token["waited"] <= left + more * travels + 1e-12


def exposed(step: dict[str, float]) -> float:
    return step["waited"] + step["output"]


@pytest.mark.parametrize("share", [0.5, 0.95, 2.0])
@MODELS
def test_exposed_wait_is_what_does_not_fit_into_computing(model: str, share: float) -> None:
    for one in found(model):
        patch = one[f"patch {share}"]
        assert exposed(patch) == pytest.approx(patch["transfer"], rel=1e-6), "what is synchronous hides nothing"
        for method in ("distrifusion", "pcpp"):
            step = one[f"{method} {share}"]
            left = max(0.0, step["transfer"] - step["computed"])
            assert step["waited"] <= left + 1e-9, "what has a whole step to travel waits for the link alone"
            # the output, which no step can end without, shares the wire
            assert patch["output"] - 1e-9 <= step["output"] <= 2 * patch["output"] + 1e-9
            assert exposed(step) == pytest.approx(max(left, step["output"]), rel=1e-2), (method, step)


@MODELS
def test_a_part_of_the_keys_and_values_takes_less_time(model: str) -> None:
    for one in found(model):
        whole, part = (one[f"{method} 2.0"] for method in ("distrifusion", "pcpp"))
        assert part["bytes"] < whole["bytes"] and exposed(part) < exposed(whole)
