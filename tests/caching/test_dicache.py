"""DiCache: what its gate adds up, how far it goes along the last change, and where that is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.caching.methods.dicache import DiCache
from fastdiff.caching.region import Memory
from fastdiff.errors import BadConfig
from tests import tiny
from tests.caching.fakes import did, run_of, step_of

STEPS = 8
START, END = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 1.0, 1.0])  # of the probe's line
DEEP, DEEPER = torch.tensor([[5.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 4.0], [-2.0, 0.5]])


def on_a_line(at: float, *, dtype: torch.dtype = torch.float32) -> Memory:
    """Values of computed steps at 0 and 1 of both lines, and a probe at `at` of its own."""
    return Memory(
        indices=[0, 2], values=[[DEEP.to(dtype), None], [DEEPER.to(dtype), None]],
        probes=[START.to(dtype), END.to(dtype)], probe=START.lerp(END, at).to(dtype),
    )  # fmt: skip


def forecast(memory: Memory, agree: Any = None, **settings: Any) -> list[Any]:
    method = DiCache(**settings)
    return method.forecast(method.weigher(run_of(10))(4, memory.indices), memory, agree)


def test_the_gate_adds_up_changes_from_step_to_step():
    memory = Memory(probe=torch.tensor([1.5, 2.5]), previous=torch.tensor([1.0, 2.0]), probes=[END], drift=0.25)
    assert float(DiCache().change(step_of(4), memory)) == pytest.approx(0.25 + 1 / 3)


@pytest.mark.parametrize("at", [1.0, 1.2, 1.5])
def test_what_moves_in_proportion_to_the_probe_is_forecast_exactly(at):
    found, nothing = forecast(on_a_line(at))
    assert torch.allclose(found, DEEP.lerp(DEEPER, at), rtol=1e-6) and nothing is None


def test_it_goes_no_further_than_told_and_never_back():
    assert torch.allclose(forecast(on_a_line(9.0))[0], DEEP.lerp(DEEPER, 1.5))
    assert torch.allclose(forecast(on_a_line(9.0), slope_max=3)[0], DEEP.lerp(DEEPER, 3.0))
    assert torch.equal(forecast(on_a_line(0.5))[0], DEEPER) and torch.equal(forecast(on_a_line(1.0))[0], DEEPER)
    assert torch.allclose(forecast(on_a_line(1.4), damping=0.5)[0], DEEP.lerp(DEEPER, 1.2))


def test_a_probe_that_stands_still_is_reuse_and_one_value_too():
    still = on_a_line(1.0)
    still.probes[0] = still.probe = still.probes[1]
    assert torch.equal(forecast(still)[0], DEEPER)
    one = Memory(indices=[2], values=[[DEEPER]], probes=[END], probe=START)
    assert torch.equal(forecast(one)[0], DEEPER)


def test_ranks_agree_on_both_sizes():
    asked: list[float] = []

    def agree(size: Tensor) -> Tensor:
        asked.append(float(size))
        return size * 2

    assert torch.allclose(forecast(on_a_line(1.3), agree)[0], DEEP.lerp(DEEPER, 1.3)) and len(asked) == 2


def test_values_are_bounded_by_the_furthest_it_may_go_and_half_numbers_summed_in_float32():
    weigh = DiCache(slope_max=3, damping=0.5).weigher(run_of(10))
    assert weigh(4, [0, 2]) == [-1.0, 2.0] and weigh(1, [0]) == [1.0]
    (found, _), exact = forecast(on_a_line(1.25, dtype=torch.float16)), DEEP.lerp(DEEPER, 1.25)
    assert found.dtype == torch.float16 and torch.allclose(found.float(), exact, rtol=2e-3)


class Moves(nn.Module):
    """In the place of a block: what it adds goes along a line with the calls, or turns off it."""

    def __init__(self, speed: float, bent: float = 0.0) -> None:
        super().__init__()
        self.speed, self.bent, self.at = speed, bent, 0

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.at = Moves.now
        along = torch.linspace(-1, 1, hidden_states.numel()).view_as(hidden_states)
        return hidden_states + along.cos() + self.speed * self.at * along + self.bent * self.at**2 * along.sin()

    now = 0


def drawn(cache: Any, bent: float = 0.0) -> tuple[Tensor, Any]:
    pipe = tiny.make("pixart")
    for number, block in enumerate(pipe.transformer.transformer_blocks):
        block.forward = Moves(0.1 * (number + 1), bent * number).forward

    def counted(_pipe: Any, step: int) -> None:
        Moves.now = step + 1

    Moves.now = 0
    handle = fastdiff.accelerate(pipe, cache=cache)
    return tiny.run(pipe, "pixart", steps=STEPS, **tiny.at_each_step("pixart", counted)), handle


@pytest.mark.parametrize(("slope_max", "bent", "exact"), [(99, 0.0, True), (1, 0.0, False), (99, 0.3, False)])
def test_a_run_whose_blocks_move_together_is_drawn_exactly_from_two_steps(slope_max, bent, exact):
    cache = {"method": "dicache", "threshold": 1e9, "warmup_steps": 2, "cooldown_steps": 0, "slope_max": slope_max}
    latents, handle = drawn(cache, bent)
    assert did(handle) == [True, True] + [False] * (STEPS - 2)
    assert handle.report.to_dict()["predicted"] == (STEPS - 2 if slope_max > 1 else 0)
    plain = drawn(None, bent)[0]
    assert (float((latents - plain).norm() / plain.norm()) < 1e-5) is exact


def test_any_predictor_takes_the_slopes_place_where_that_is_off():
    assert DiCache(predictor="reuse", slope=False).history == 1 and DiCache().history == 2
    (reused, _) = forecast(on_a_line(1.4), predictor="reuse", slope=False)
    assert torch.equal(reused, DEEPER)
    for other in ({"predictor": "reuse"}, {"order": 3}):
        with pytest.raises(BadConfig, match="slope goes along the line through two values; set slope = false"):
            fastdiff.Config(cache={"method": "dicache", **other})
    with pytest.raises(BadConfig, match="dicache decides at each step, by its threshold; guards check what is planned"):
        fastdiff.Config(cache={"method": "dicache", "guard": "speca"})
