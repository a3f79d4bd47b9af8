"""Every cache method on real denoisers whose tensors are all on the device, with what the stock pipelines give them.

`READS` is all that waits for the device in a step, and is meant to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fastdiff
from fastdiff.affine import Affine
from fastdiff.caching import decoding, guidance
from fastdiff.caching.methods.cachequant import Corrected
from fastdiff.caching.methods.magcache import Ratios
from fastdiff.caching.plan import Schedule
from fastdiff.errors import FastdiffError
from fastdiff.registry import registry
from tests import tiny
from tests.laws.rows import STEPS, origin

from .replay import Replay

FAMILIES = ("sd15", "flux", "sdxl", "wan")


def _corrected(name: str) -> dict[str, Any]:
    """With a scale and a shift at each step that is left out."""
    affine = {step: {0: Affine.of(torch.ones(1), torch.ones(1))} for step in (1, 3, 5)}
    return {"method": "cachequant", "plan": Corrected(**origin(name), compute=(0, 2, 4), affine=affine)}


CACHES: dict[str, dict[str, Any] | Callable[[str], dict[str, Any]]] = {
    "ab_cache": {"method": "ab_cache", "interval": 2, "warmup_steps": 1, "predictor": "reuse"},
    "fora": {"method": "fora", "interval": 2},
    "pab": {"method": "pab", "between": [0.0, 1.0]},
    "deepcache": {"method": "deepcache", "interval": 2},
    "faster_diffusion": {"method": "faster_diffusion", "interval": 3},
    "a_sdm": {"method": "a_sdm", "interval": 2},
    "tgate": {"method": "tgate", "gate": 0.5, "guidance": "keep"},
    "tgate delta": {"method": "tgate", "gate": 0.5, "guidance": "delta"},
    "joint": {"method": "joint", "kinds": ["full", "full", "partial"] * 2, "predictor": "reuse"},
    "joint conditional": {
        "method": "joint", "kinds": ["full"] * 3 + ["conditional"] * 3, "guesses": {4: (1.0, 0.0, 0.5)},
    },
    "first_block": {"method": "first_block", "threshold": 0.5, "warmup_steps": 1},
    "lagged": {"method": "first_block", "threshold": 0.5, "warmup_steps": 1, "lagged": True},
    "dbcache": {"method": "dbcache", "threshold": 0.5, "warmup_steps": 1},
    "dicache": {"method": "dicache", "threshold": 0.5, "warmup_steps": 2, "cooldown_steps": 0},
    "teacache": {"method": "teacache", "threshold": 0.5, "warmup_steps": 1},
    "easycache": {"method": "easycache", "threshold": 0.5, "warmup_steps": 2},
    "seacache": {"method": "seacache", "threshold": 0.5, "warmup_steps": 1},
    "taylorseer": {"method": "taylorseer", "interval": 2, "warmup_steps": 2},
    "static": {"method": "static", "compute_steps": [0, 1, 3], "site": "inner"},
    "verify": {"method": "static", "compute_steps": [0, 1, 3], "guard": "verify", "predictor": "adams_bashforth"},
    "speca": {"method": "static", "compute_steps": [0, 1], "site": "stack", "guard": "speca", "predictor": "taylor"},
    "spectrum": {"method": "ab_cache", "interval": 2, "warmup_steps": 3, "predictor": "spectrum", "order": 3},
    "adams_bashforth": {"method": "ab_cache", "interval": 2, "warmup_steps": 2},
    "dp": lambda name: {
        "method": "dp", "plan": Schedule(**origin(name), compute=(0, 2, 4), weights={3: ((0, -0.5), (2, 1.5))}),
    },
    "cachequant": _corrected,
    "magcache": lambda name: {
        "method": "magcache", "threshold": 9, "retention": 0, "plan": Ratios(**origin(name), ratios=(1.0,) * STEPS),
    },
    "switch": lambda name: {"method": "switch", "second": tiny.denoiser(tiny.make(name)).to("meta")},
}  # fmt: skip
DECIDES, ROLES = "caching/reading.py:values", "caching/roles.py:conditional"
READS = {  # the most reads of one call of the denoiser or the solver, by place: thresholds look once
    "first_block": {DECIDES: 1}, "lagged": {DECIDES: 1}, "dbcache": {DECIDES: 1}, "teacache": {DECIDES: 1},
    "dicache": {DECIDES: 1}, "speca": {DECIDES: 1},  # of the check in the step before
    "easycache": {DECIDES: 1}, "seacache": {DECIDES: 1},
    "verify": {DECIDES: 1},  # of a check two steps before
    "faster_diffusion": {"caching/decoding.py:_share": 1},
    "tgate delta": {ROLES: 1}, "joint conditional": {ROLES: 1},  # once a run: which half is the conditional one
}  # fmt: skip
COPIES = {"cachequant": "caching/methods/cachequant.py"}  # of the correction, when a run begins


@dataclass
class Recorded:
    """What a stock pipeline gave: its scheduler's `set_timesteps`, its denoiser in the calls of each step, on the
    device, and the solver: shapes of outputs and latents."""

    timesteps: list[tuple[tuple, dict]] = field(default_factory=list)
    steps: list[list[tuple[tuple, dict]]] = field(default_factory=list)
    outputs: list[torch.Size] = field(default_factory=list)
    latents: list[torch.Size] = field(default_factory=list)


@cache
def recorded(name: str) -> Recorded:
    pipe, found = tiny.make(name), Recorded(steps=[[] for _ in range(STEPS)])
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    own = pipe.scheduler.set_timesteps

    @wraps(own)
    def told(*args: Any, **kwargs: Any) -> None:
        found.timesteps.append((args, kwargs))
        own(*args, **kwargs)

    pipe.scheduler.set_timesteps = told
    handle = fastdiff.accelerate(pipe)

    def there(leaf: Any) -> Any:
        """The same tensor for the same tensor: texts are told by where they lie."""
        if not isinstance(leaf, Tensor):
            return leaf
        return moved.setdefault(id(leaf), (leaf, leaf.to("meta")))[1]

    def seen(_module: Any, args: tuple, kwargs: dict) -> None:
        found.steps[handle.clock.upcoming or 0].append(pytree.tree_map(there, (args, kwargs)))

    def latents(index: int, given: Tensor) -> Tensor:
        found.latents.append(given.shape)
        return given

    handle.clock.before_step.append(latents)
    handle.clock.on_output.append(lambda index, output: found.outputs.append(output.shape))
    tiny.denoiser(pipe).register_forward_pre_hook(seen, with_kwargs=True)
    tiny.run(pipe, name, steps=STEPS)
    return found


def replayed(
    name: str, dtype: torch.dtype | None = None, **levers: Any
) -> tuple[fastdiff.Accelerated, Replay, list[Counter[str]]]:
    """The loop with denoiser and latents on the device; reads by call of the denoiser, and of the solver."""
    found, pipe = recorded(name), tiny.make(name)
    denoiser = tiny.denoiser(pipe).to("meta", dtype)
    handle = fastdiff.accelerate(pipe, **levers)
    for args, kwargs in found.timesteps:
        pipe.scheduler.set_timesteps(*args, **kwargs)
    mode, reads = Replay(), []

    def counted(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        before = Counter(mode.reads)
        with torch.no_grad(), mode:
            call(*args, **kwargs)
        reads.append(mode.reads - before)

    halves: dict[int, Tensor] = {}

    def typed(leaf: Any) -> Any:
        """The same again for the same."""
        if not isinstance(leaf, Tensor) or dtype is None or not leaf.is_floating_point():
            return leaf
        return halves.setdefault(id(leaf), leaf.to(dtype))

    for index, t in enumerate(pipe.scheduler.timesteps):
        for args, kwargs in found.steps[index]:
            args, kwargs = pytree.tree_map(typed, (args, kwargs))
            counted(denoiser, *args, **kwargs)
        output, latents = (torch.zeros(shape, device="meta") for shape in (found.outputs[index], found.latents[index]))
        counted(pipe.scheduler.step, output, t, latents)
    return handle, mode, reads


def most(reads: list[Counter[str]], but: Counter[str]) -> dict[str, int]:
    """In one call, by place of ours."""
    places = {where for call in reads for where in call if where and where not in but}
    return {where: max(call[where] for call in reads) for where in places}


def told(name: str, monkeypatch: Any) -> None:
    """Numbers on meta say nothing: what looked at them is told. The conditional output is the second half of a batch,
    or the first call; the denoiser is given the scheduler's timesteps, or a thousandth."""
    for module, look, answer in (
        (guidance, "conditional", int(name in ("sd15", "sdxl"))),
        (decoding, "_share", 1e-3 if name == "flux" else 1.0),
    ):
        plain = getattr(module, look)
        monkeypatch.setattr(module, look, lambda *given, plain=plain, answer=answer: (plain(*given), answer)[1])


def _pair(case: str, name: str) -> Any:
    """What looks at the device is quick on FLUX, every fourth row on the UNet."""
    quick = (name == "sd15" and [*CACHES].index(case) % 4 == 0) or (name == "flux" and case in READS)
    return pytest.param(case, name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("case", "name"), [_pair(case, name) for case in CACHES for name in FAMILIES])
def test_nothing_meets_another_device_and_nothing_waits_that_is_not_listed(case, name, monkeypatch):
    told(name, monkeypatch)
    plain, row = replayed_plain(name), CACHES[case]
    try:
        handle, mode, reads = replayed(name, cache=row(name) if callable(row) else row)
    except FastdiffError:
        pytest.skip("the method is not for this family")
    assert handle.report.cached + handle.report.partly > 0
    assert not {k: n for k, n in mode.wrong.items() if k not in plain.wrong}
    found = most(reads, plain.reads)
    assert found == {where: n for where, n in READS.get(case, {}).items() if where in found}
    copies = {where for where in mode.copies if where} - set(plain.copies)
    assert {where.split(":")[0] for where in copies} <= {*COPIES.get(case, "").split()}
    assert not any("decoded step by step" in note for note in handle.report.notes)
    if ROLES in READS.get(case, {}):
        assert sum(call[ROLES] for call in reads) <= 1


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_in_float16_the_peaks_of_a_step_are_one_look(name):
    """Which a prediction might leave: of all regions together, and once, however many predictions use them."""
    cache = {"method": "taylorseer", "interval": 2, "warmup_steps": 2}
    handle, mode, reads = replayed(name, torch.float16, cache=cache)
    branches = len(recorded(name).steps[0])
    assert handle.report.cached == 2
    assert sum(call[DECIDES] for call in reads) == 3 * branches, "of steps 0, 1 and 3"
    assert not mode.wrong


def test_every_method_is_here():
    rows = [row("sd15") if callable(row) else row for row in CACHES.values()]
    assert {row["method"] for row in rows} == {name for name, cls in registry("cache").items() if not cls.language}


@cache
def replayed_plain(name: str) -> Replay:
    return replayed(name)[1]
