"""What a cached step puts in the place of what it leaves out, seen from outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.caching.methods.first_block import FirstBlock
from tests import tiny
from tests.laws.rows import ROWS, STEPS, SUPPORTED, accelerate, each, plain
from tests.some import some


def hidden(anatomy_returns: tuple[str, ...], output) -> Tensor:
    return output[anatomy_returns.index("hidden_states")] if isinstance(output, tuple) else output


@each((row, name) for row, name in SUPPORTED if row in ("first_block", "static stack", "dbcache"))
def test_a_skipped_stack_adds_the_residual_of_the_last_computed_step(row, name):
    from fastdiff.pipelines.families import anatomies

    pipe = tiny.make(name)
    (anatomy,) = anatomies(pipe)
    entered, left = [], []
    for block, seen in ((anatomy.blocks[0], entered), (anatomy.blocks[-1], left)):
        returns = anatomy.stack_of(block).returns
        block.register_forward_hook(lambda *io, seen=seen, returns=returns: seen.append(hidden(returns, io[2]).clone()))
    handle = accelerate(pipe, row)
    tiny.run(pipe, name, steps=STEPS)
    calls = len(handle.report.branches)
    for branch, states in handle.report.branches.items():
        residual = None
        for index, state in enumerate(states):
            change = left[index * calls + branch] - entered[index * calls + branch]
            if state == "computed":
                assert residual is None or not torch.allclose(change, residual, rtol=1e-3)
                residual = change
            else:
                assert torch.allclose(change, residual, rtol=1e-3, atol=1e-4 * float(residual.abs().max()))
    assert not torch.equal(entered[0], entered[calls]), "the live block follows the latents"


@each((row, name) for row, name in SUPPORTED if row in ("static", "ab_cache") and name in ("sd15", "pixart", "wan"))
def test_a_skipped_output_is_predicted_from_the_computed_ones(row, name):
    """Straight-line extrapolation or reuse, worked out by hand on the timesteps of the run."""
    pipe = tiny.make(name)
    outputs = []
    tiny.denoiser(pipe).register_forward_hook(lambda _m, _a, output: outputs.append(output[0].double()))
    handle = accelerate(pipe, row)
    times = []
    handle.clock.on_start.append(lambda run: times.extend(run.timesteps))
    tiny.run(pipe, name, steps=STEPS)
    for branch, states in handle.report.branches.items():
        mine = outputs[branch :: len(handle.report.branches)]
        computed: list[int] = []
        for index, state in enumerate(states):
            if state == "computed":
                computed.append(index)
                continue
            expected = mine[computed[-1]]
            if row == "ab_cache" and len(computed) > 1:
                before, last = computed[-2:]
                ahead = (times[index] - times[last]) / (times[last] - times[before])
                if 1 + 2 * ahead <= 6:  # sum |w|, the default lebesgue_max; beyond it the order is dropped
                    expected = mine[last] + (mine[last] - mine[before]) * ahead
            assert torch.allclose(mine[index], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("row", ["static", "ab_cache"])
def test_a_caller_may_write_into_what_it_was_given(row):
    """Guidance and schedulers work in place here and there; neither the memory nor the next value may change."""
    results = []
    for spoil in (False, True):
        pipe = tiny.make("pixart")
        accelerate(pipe, row)
        pipe.scheduler.set_timesteps(STEPS)
        x, given = torch.ones(1, 4, 8, 8), []
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                out = pipe.transformer(
                    x, encoder_hidden_states=torch.ones(1, 4, 32), timestep=t.expand(1), return_dict=False,
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                )[0]  # fmt: skip
            given.append(out.clone())
            x = pipe.scheduler.step(out[:, :4].clone(), t, x, return_dict=False)[0]
            if spoil:
                out.mul_(0)
        results.append(torch.stack(given))
    assert torch.equal(*results)


def test_a_dynamic_policy_compares_with_the_last_computed_step(monkeypatch):
    compared: list[tuple[Tensor, Tensor]] = []

    def skip_until_the_fourth(self, step, memory) -> Tensor:
        compared.append((memory.probe.clone(), memory.probes[-1].clone()))
        return torch.tensor(1.0 if len(compared) == 3 else 0.0)

    monkeypatch.setattr(FirstBlock, "change", skip_until_the_fourth)
    pipe = tiny.make("pixart")
    handle = fastdiff.accelerate(pipe, cache="first_block")
    tiny.run(pipe, "pixart", steps=STEPS)
    assert [s == "computed" for s in handle.report.branches[0]] == [True, False, False, True, False, False]
    first = compared[0][1]
    assert all(torch.equal(last, first) for _, last in compared[:3]), "of step 0"
    assert all(torch.equal(last, compared[2][0]) for _, last in compared[3:]), "of step 3"
    assert not torch.equal(compared[0][0], first)


@pytest.mark.parametrize("row", some(ROWS, 5))
def test_the_rows_that_skip_differ_from_plain_diffusers_but_not_wildly(row):
    """A cached picture is close to the plain one: one that is not would be a wrong value, not an approximate one."""
    name = ROWS[row].families[0]
    pipe = tiny.make(name)
    settings = {"compute_steps": list(range(0, 30, 2))} if ROWS[row].method == "static" else {}
    settings |= {"max_consecutive_cached": 1}
    if ROWS[row].method == "joint":
        settings = {"kinds": [ROWS[row].aggressive["kinds"][k % 2 * (STEPS - 1)] for k in range(30)]}
    elif ROWS[row].saves == 1:  # without guidance it is another picture by design; its difference kept, it is not
        settings = {"gate": 0.8, "guidance": "delta"}
    handle = fastdiff.accelerate(pipe, cache=ROWS[row].aggressive | settings)
    cached = tiny.run(pipe, name, steps=30)
    assert handle.report.cached + handle.report.partly > 5
    assert 0 < float((cached - plain(name, 30)).norm() / plain(name, 30).norm()) < 0.2
