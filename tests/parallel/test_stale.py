"""What a layer is given of the other ranks' past, without processes: a peer that sends back what it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.clock import Run, Step
from fastdiff.parallel.bus import Pending
from fastdiff.parallel.codec import Codec
from fastdiff.parallel.exchange import Bundle, Exchange
from fastdiff.parallel.layers import _whole
from fastdiff.parallel.mesh import Topology
from fastdiff.parallel.rehearsal import Echo


class Mirror(Echo):
    def post(self, kind: str, layer: str, sends: dict[int, Tensor], sizes: Any, later: bool = False) -> list[Pending]:
        assert {peer: message.numel() for peer, message in sends.items()} == sizes
        return [Pending(peer, message, None, layer, 0.0) for peer, message in sends.items()]

    def wait(self, pending: Sequence[Pending], kind: str = "") -> dict[int, Tensor]:
        return {item.peer: item.buffer.clone() for item in pending}


RUN = Run(1, (5.0, 4.0, 3.0, 2.0, 1.0, 0.0), (5.0, 4.0, 3.0, 2.0, 1.0, 0.0), False)


def seen(
    visited: Sequence[int], codec: Codec = "raw", bundled: bool = False, max_age: int = 4, last: int | None = None
) -> list[float]:
    """What each step gets where step i sends i + 1, and steps 0 and 1 wait."""
    bus = Mirror(Topology(1, 1, 2, 0), torch.device("cpu"))
    exchange = Exchange(bus, "layer", "kv", codec, Bundle(bus, "kv") if bundled else None)
    found = []
    for index in visited:
        own = torch.full((2, 3), index + 1.0)
        step = Step(RUN, index, 0)
        got = exchange.swap(
            {1: own},
            {1: (2, 3)},
            own.dtype,
            step,
            index <= 1 or (last is not None and index > last),
            max_age,
            "alike",
            last,
        )
        own.fill_(-9.0)  # a layer that works in place
        found.append(round(float(got[1].mean()), 3))
    return found


@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize("codec", ["raw", "int8", "residual"])
def test_a_displaced_value_is_that_of_the_step_before(codec: Codec, bundled: bool) -> None:
    assert seen(range(6), codec, bundled) == [1, 2, 2, 3, 4, 5]


def test_steps_that_are_left_out_make_values_older() -> None:
    assert seen([0, 1, 2, 4, 5]) == [1, 2, 2, 3, 5], "step 3 was cached"
    assert seen([0, 1, 2, 4, 5], max_age=1) == [1, 2, 2, 5, 5], "too old: waited for"


def test_nothing_is_sent_on_to_steps_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []
    later = Exchange._later
    monkeypatch.setattr(Exchange, "_later", lambda *given: (sent.append(given[2][1][0, 0].item()), later(*given))[1])
    assert seen(range(6), last=3) == [1, 2, 2, 3, 5, 6], "the last two wait"
    assert sent == [3], "by step 2 for step 3; step 3 has nobody to send to"


def test_group_normalization_is_corrected_by_the_change_of_its_own_part() -> None:
    """DistriFusion, section 4.2: m_(i-1) of all ranks + own m_i - own m_(i-1), for E[x] and E[x^2]."""
    torch.manual_seed(0)
    before, other, own = (torch.randn(2, 4, 100, dtype=torch.float64) + shift for shift in (0.0, 0.5, 0.2))

    def told(x: Tensor) -> Tensor:
        return torch.stack([x.mean(-1), x.var(-1, correction=0), torch.full_like(x[..., 0], x.shape[-1])])

    mean, variance = _whole(told(own), [told(other[..., :50])], told(before))
    past = [torch.cat([before, other[..., :50]], -1).pow(power).mean(-1) for power in (1, 2)]
    wanted = [past[k] + own.pow(k + 1).mean(-1) - before.pow(k + 1).mean(-1) for k in (0, 1)]
    torch.testing.assert_close(mean, wanted[0])
    torch.testing.assert_close(variance, wanted[1] - wanted[0] ** 2)
    away = told(own + 100)
    assert torch.equal(_whole(told(own), [told(other)], away)[1], told(own)[1]), "no negative variance"
