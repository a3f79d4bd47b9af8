"""The guard speca: what its block is given, what a verdict decides, what it costs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.caching.speca import Speculating
from fastdiff.errors import BadConfig, FastdiffError, UnsupportedModel
from fastdiff.parallel.mesh import Topology
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.together import check_shared
from tests import tiny
from tests.caching.fakes import did, run_of

STEPS = 8
STACK = {"method": "static", "compute_steps": [0], "of_steps": STEPS, "site": "stack", "guard": "speca"}
CACHES: dict[str, dict[str, Any]] = {
    "stack": {"method": "ab_cache", "interval": 3, "site": "stack"},
    "blocks": {"method": "ab_cache", "interval": 3, "site": "blocks"},
    "taylorseer": {"method": "taylorseer"},
    "fora": {"method": "fora", "interval": 3, "predictor": "adams_bashforth"},
}


def session_of(handle: Any) -> Speculating:
    (found,) = {c.__self__ for c in handle.clock.on_start if isinstance(getattr(c, "__self__", None), Speculating)}
    return found


@pytest.mark.parametrize("row", CACHES)
@pytest.mark.parametrize("name", ["pixart", pytest.param("wan", marks=pytest.mark.slow), "flux"])
def test_a_bound_that_nothing_reaches_is_no_guard_to_the_bit_and_0_computes_all(row, name):
    results = []
    for more in ({}, {"guard": "speca", "verify_bound": 1e30}, {"guard": "speca", "verify_bound": 0}):
        pipe = tiny.make(name)
        handle = fastdiff.accelerate(pipe, cache=CACHES[row] | more)
        results.append((tiny.run(pipe, name, steps=STEPS), handle.report))
    (free, plan), (loose, seen), (exact, all_of_them) = results
    assert torch.equal(loose, free) and seen.branches == plan.branches and plan.cached == seen.verified["checked"] > 0
    assert seen.verified["computed"] == seen.verified["failed"] == 0
    assert torch.equal(exact, tiny.run(tiny.make(name), name, steps=STEPS)) and all_of_them.cached == 0


def test_a_verdict_decides_the_next_step_and_not_its_own():
    pipe = tiny.make("pixart")
    handle = fastdiff.accelerate(pipe, cache=STACK | {"verify_bound": 1e-9})
    tiny.run(pipe, "pixart", steps=STEPS)
    assert did(handle) == [True, False] * (STEPS // 2)
    half = STEPS // 2
    assert handle.report.verified == {"checked": half, "failed": half, "computed": half - 1, "blocks run": half}
    assert f"{half} blocks run" in str(handle.report)


@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_what_it_costs_is_a_block_in_each_step_that_is_left_out_and_the_report_counts_it(name):
    pipe, ran = tiny.make(name), []
    blocks = anatomies(pipe)[0].blocks
    for block in (blocks[-2], blocks[-1]):
        own = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
        own.register_forward_hook(lambda *_, block=block: ran.append(block))
    handle = fastdiff.accelerate(pipe, cache=STACK | {"verify_bound": 1e9})
    tiny.run(pipe, name, steps=STEPS)
    calls = 2 if name in tiny.TWO_CALLS else 1
    once = 1 if name == "pixart" else ran.count(blocks[-2]) // calls
    assert ran.count(blocks[-2]) == calls * once and ran.count(blocks[-1]) == calls * once * STEPS
    assert handle.report.verified["blocks run"] == calls * (STEPS - 1)


def test_the_block_runs_on_the_forecast_of_what_enters_it_and_is_compared_with_what_is_handed_on():
    """Worked out by hand with reuse: x of step 0 with the conditions of step 1, beside what entered step 1 and what the
    blocks added in step 0."""
    pipe, seen = tiny.make("pixart"), []
    blocks = pipe.transformer.transformer_blocks
    entered, last = [], blocks[-1].forward
    blocks[0].register_forward_hook(lambda _m, _a, output: entered.append(output.clone()))
    blocks[-1].register_forward_hook(
        lambda _m, args, kwargs, out: seen.append((args[0].clone(), args[1:], dict(kwargs), out)), with_kwargs=True
    )
    handle = fastdiff.accelerate(pipe, cache=STACK | {"verify_bound": 1e9})
    session, found = session_of(handle), []
    handle.clock.on_end.insert(0, lambda run: found.append(dict(session._verify._worst)))
    tiny.run(pipe, "pixart", steps=STEPS)
    (given, *_), (_, rest, conditions, served) = seen[:2]
    with torch.no_grad():
        truth = last(given, *rest, **conditions)
    assert torch.allclose(served, entered[1] + (seen[0][3] - entered[0]), atol=1e-5)
    error = (served - truth).norm() / truth.norm()
    assert float(found[0][1]) == pytest.approx(float(error), rel=1e-4) and float(error) > 1e-4


def test_a_forecast_that_is_exact_has_no_error():
    """Blocks that give the same at every step."""
    pipe = tiny.make("pixart")
    for number, block in enumerate(pipe.transformer.transformer_blocks):
        block.forward = lambda hidden_states, *_, number=number, **__: torch.full_like(hidden_states, number + 1.0)
    handle = fastdiff.accelerate(pipe, cache=STACK | {"live_blocks": 1, "verify_bound": 1e-6})
    tiny.run(pipe, "pixart", steps=STEPS)
    assert handle.report.verified["failed"] == 0 and handle.report.cached == STEPS - 1


def test_the_bound_falls_over_the_run():
    handle = fastdiff.accelerate(tiny.make("pixart"), cache=STACK | {"verify_bound": 0.4, "verify_decay": 0.25})
    assert session_of(handle)._checks(run_of(5)).bounds == pytest.approx([0.4 * 0.25 ** (k / 4) for k in range(5)])
    handle = fastdiff.accelerate(tiny.make("pixart"), cache=STACK)
    assert session_of(handle)._checks(run_of(3)).bounds == pytest.approx([0.1, 0.1 * 0.3**0.5, 0.03])


def test_a_second_run_begins_anew():
    pipe = tiny.make("wan")
    handle = fastdiff.accelerate(pipe, cache=STACK | {"verify_bound": 0.02, "predictor": "adams_bashforth"})
    first, said = tiny.run(pipe, "wan", steps=STEPS), dict(handle.report.verified)
    assert torch.equal(tiny.run(pipe, "wan", steps=STEPS), first) and handle.report.verified == said
    assert handle.report.branches[0] == handle.report.branches[1], "both halves decide together"


@pytest.mark.parametrize(
    ("name", "cache", "kind", "said"),
    [
        ("pixart", {"site": "output"}, BadConfig, "static leaves out the model as one; set a site inside"),
        ("sd15", {"site": "inner"}, UnsupportedModel, "no stack of transformer blocks"),
        ("pixart", {"verify_decay": 0}, BadConfig, "verify_decay"),
    ],
)
def test_what_has_no_last_block_is_refused_with_what_to_do(name, cache, kind, said):
    with pytest.raises(kind, match=said) as told:
        fastdiff.accelerate(tiny.make(name), cache=STACK | cache)
    assert "\n" not in str(told.value)


def test_ranks_and_graphs_of_the_whole_denoiser_are_refused():
    with pytest.raises(BadConfig, match="which parallel methods do not expect"):
        check_shared(fastdiff.Config(cache=STACK).cache, Topology(cfg=1, step=1, patch=2, rank=0))
    with pytest.raises(FastdiffError, match=r"makes predictions inside the denoiser.*set compile.scope = blocks"):
        fastdiff.accelerate(tiny.make("pixart"), cache=STACK, compile={"enabled": True, "scope": "denoiser"})
