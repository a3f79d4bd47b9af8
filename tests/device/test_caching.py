"""Every cache method on real denoisers whose tensors are all on the device, with what the stock pipelines give them.

`READS` is all that waits for the device in a step, and is meant to.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fastdiff
from fastdiff.errors import FastdiffError
from tests import tiny

from .replay import Replay

FAMILIES = ("sdxl", "flux", pytest.param("wan", marks=pytest.mark.slow))
STEPS = 5
CACHES: dict[str, dict[str, Any]] = {
    "ab_cache": {"method": "ab_cache", "interval": 2, "warmup_steps": 1, "predictor": "reuse"},
    "fora": {"method": "fora", "interval": 2},
    "pab": {"method": "pab", "between": [0.0, 1.0]},
    "deepcache": {"method": "deepcache", "interval": 2},
    "faster_diffusion": {"method": "faster_diffusion", "interval": 3},
    "a_sdm": {"method": "a_sdm", "interval": 2},
    "tgate": {"method": "tgate", "gate": 0.5, "guidance": "keep"},
    "joint": {"method": "joint", "kinds": ["full", "full", "partial", "full", "partial"], "predictor": "reuse"},
    "first_block": {"method": "first_block", "threshold": 0.5, "warmup_steps": 1},
    "dbcache": {"method": "dbcache", "threshold": 0.5, "warmup_steps": 1},
    "teacache": {"method": "teacache", "threshold": 0.5, "warmup_steps": 1},
    "easycache": {"method": "easycache", "threshold": 0.5, "warmup_steps": 2},
    "seacache": {"method": "seacache", "threshold": 0.5, "warmup_steps": 1},
    "taylorseer": {"method": "taylorseer", "interval": 2, "warmup_steps": 2},
    "verify": {
        "method": "static",
        "compute_steps": [0, 1, 3],
        "of_steps": STEPS,
        "guard": "verify",
        "predictor": "adams_bashforth",
    },
    "spectrum": {"method": "ab_cache", "interval": 2, "warmup_steps": 3, "predictor": "spectrum", "order": 3},
    "adams_bashforth": {"method": "ab_cache", "interval": 2, "warmup_steps": 2},
}
DECIDES = "caching/reading.py:__float__"
READS = {  # the most reads of one denoiser call, by place: thresholds look once, predictors at the peaks they amplify
    "first_block": {DECIDES: 1}, "dbcache": {DECIDES: 1}, "teacache": {DECIDES: 1}, "easycache": {DECIDES: 1},
    "seacache": {DECIDES: 1},
    "verify": {DECIDES: 1},  # of a check two steps before
    "faster_diffusion": {"caching/decoding.py:_share": 1},
}  # fmt: skip


@cache
def recorded(name: str) -> list[list[tuple[tuple, dict]]]:
    """What the stock pipeline gives its denoiser in the calls of each step, on the device."""
    pipe = tiny.make(name)
    steps: list[list[tuple[tuple, dict]]] = [[] for _ in range(STEPS)]
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    handle = fastdiff.accelerate(pipe)

    def there(leaf: Any) -> Any:
        """The same tensor for the same tensor: texts are told by where they lie."""
        if not isinstance(leaf, Tensor):
            return leaf
        return moved.setdefault(id(leaf), (leaf, leaf.to("meta")))[1]

    def seen(_module: Any, args: tuple, kwargs: dict) -> None:
        steps[handle.clock.upcoming or 0].append(pytree.tree_map(there, (args, kwargs)))

    tiny.denoiser(pipe).register_forward_pre_hook(seen, with_kwargs=True)
    tiny.run(pipe, name, steps=STEPS)
    return steps


def replayed(name: str, **levers: Any) -> tuple[fastdiff.Accelerated, Replay, list[Counter[str]]]:
    """The loop with the denoiser on the device; reads by call."""
    calls, pipe = recorded(name), tiny.make(name)
    denoiser = tiny.denoiser(pipe).to("meta")
    handle = fastdiff.accelerate(pipe, **levers)
    told = {"sigmas": [1 - i / STEPS for i in range(STEPS)], "mu": 1.0} if name == "flux" else {}
    pipe.scheduler.set_timesteps(**(told or {"num_inference_steps": STEPS}))
    mode, reads = Replay(), []
    zeros = torch.zeros(1, 4, 8, 8)
    for index, t in enumerate(pipe.scheduler.timesteps):
        for args, kwargs in calls[index]:
            before = Counter(mode.reads)
            with torch.no_grad(), mode:
                denoiser(*args, **kwargs)
            reads.append(mode.reads - before)
        with mode:  # the guard's last numbers are read when the run is over
            pipe.scheduler.step(zeros, t, zeros)
    return handle, mode, reads


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", CACHES)
def test_nothing_meets_another_device_and_nothing_waits_that_is_not_listed(case, name):
    plain = replayed_plain(name)
    try:
        handle, mode, reads = replayed(name, cache=CACHES[case])
    except FastdiffError:
        pytest.skip("the method is not for this family")
    assert handle.report.cached + handle.report.partly > 0
    assert not {k: n for k, n in mode.wrong.items() if k not in plain.wrong}
    most: Counter[str] = Counter()
    for call in reads:
        for where, count in call.items():
            most[where] = max(most[where], count)
    assert {where: n for where, n in most.items() if where} == {
        w: n for w, n in READS.get(case, {}).items() if w in most
    }
    assert not {where for where in mode.copies if where} - set(plain.copies)


@cache
def replayed_plain(name: str) -> Replay:
    return replayed(name)[1]
