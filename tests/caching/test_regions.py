"""Regions that one call of the denoiser enters more than once."""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff.caching.session import Session
from tests.caching.fakes import did
from tests.zoo import ZOO

STEPS = 6


def feed_forward(pipe):
    return pipe.transformer.transformer_blocks[0].ff


@pytest.mark.parametrize(("predictor", "ahead"), [("reuse", False), ("reuse", True), ("adams_bashforth", False)])
def test_a_layer_that_runs_twice_in_a_call_has_two_memories(predictor, ahead):
    """CogView4's blocks send picture and text through one feed-forward layer, one after the other."""
    entry = ZOO["cogview4"]
    pipe, gave, ran = entry.make(), [], []
    feed_forward(pipe).register_forward_hook(lambda _m, _a, output: gave.append(output.clone()))
    leaf = next(m for m in feed_forward(pipe).modules() if isinstance(m, torch.nn.Linear))
    cache = {"method": "taylorseer", "interval": 3, "warmup_steps": 1, "predictor": predictor, "order": 1}
    handle = fastdiff.accelerate(pipe, cache=cache)
    sessions = [c.__self__ for c in handle.clock.on_start if isinstance(c.__self__, Session)]
    for session in sessions:
        session.ahead = ahead
    leaf.register_forward_hook(lambda *_: ran.append(handle.clock.index))
    kept = []
    handle.clock.on_return.append(
        lambda step: kept.append([1 + len(first.again) for first in sessions[0]._branches[step.branch]])
    )
    entry.run(pipe, STEPS)
    assert did(handle) == [True, False, False, True, False, False]
    calls = entry.calls
    assert ran == [step for step in (0, 3) for _ in range(2 * calls)]
    assert max(map(max, kept)) == 2 and min(map(min, kept)) == 1, "twice for ff, once for attention"
    assert len(gave) == 2 * calls * STEPS
    for branch in range(calls):
        for visit in range(2):
            own = gave[2 * branch + visit :: 2 * calls]
            shapes = {output.shape for output in own}
            assert len(shapes) == 1, "each visit is answered with its own stream"
            for step, output in enumerate(own):
                assert torch.equal(output, own[step - step % 3])
        assert gave[2 * branch].shape != gave[2 * branch + 1].shape


def test_it_is_exact_where_nothing_is_skipped():
    entry, results = ZOO["cogview4"], []
    for interval in (None, 1):
        pipe = entry.make()
        if interval:
            fastdiff.accelerate(pipe, cache={"method": "fora", "interval": interval})
        results.append(entry.run(pipe, STEPS))
    assert torch.equal(*results)
