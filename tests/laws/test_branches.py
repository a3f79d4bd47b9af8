"""What is remembered of the cond branch never reaches the uncond branch, and neither crosses to another run."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.caching.session import Session
from tests import tiny
from tests.laws.rows import CROSS, ONCE, ONE_A_KIND, ROWS, SCHEMES, STEPS, SUPPORTED, accelerate, each
from tests.near import apart, rounding

TWO_CALLS = [(row, name) for row, name in SUPPORTED if name in tiny.TWO_CALLS]


def calls_of_a_run(pipe, name: str, steps: int) -> list[tuple[tuple, dict, Tensor]]:
    """Arguments and output of every denoiser call."""
    calls: list[tuple[tuple, dict, Tensor]] = []

    def keep(_module, args, kwargs, output) -> None:
        kwargs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        calls.append((args, kwargs, output[0].clone()))

    hook = tiny.denoiser(pipe).register_forward_hook(keep, with_kwargs=True)
    tiny.run(pipe, name, steps=steps)
    hook.remove()
    return calls


def replay(pipe, name: str, calls: list[Any]) -> list[Tensor]:
    """The same calls as one branch of a loop that makes no other."""
    scheduler, outputs = pipe.scheduler, []
    if name == "flux":  # whose pipeline chooses the sigmas itself
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / len(calls), len(calls)))
    else:
        scheduler.set_timesteps(len(calls))
    for timestep, (args, kwargs, output) in zip(scheduler.timesteps, calls, strict=True):
        with torch.no_grad():
            outputs.append(tiny.denoiser(pipe)(*args, **kwargs)[0])
        scheduler.step(output, timestep, torch.zeros_like(output))
    return outputs


@each(TWO_CALLS)
def test_each_branch_is_cached_as_if_it_were_alone(row, name):
    pipe = tiny.make(name)
    handle = accelerate(pipe, row)
    calls = calls_of_a_run(pipe, name, STEPS)
    assert len(calls) == 2 * STEPS
    assert (handle.report.cached, handle.report.partly) == (ROWS[row].cached, ROWS[row].partly)
    cond, uncond = calls[0::2], calls[1::2]
    drops_guidance = ROWS[row].saves == 1
    if drops_guidance:  # by design: after the gate the uncond branch is given what the cond one gives
        gate = STEPS // 2
        assert all(torch.equal(uncond[step][2], cond[step][2]) for step in range(gate, STEPS))
        assert not any(torch.equal(uncond[step][2], cond[step][2]) for step in range(gate))
    else:
        assert not torch.equal(cond[-1][2], uncond[-1][2])
    for branch, steps in ((cond, STEPS), (uncond, STEPS // 2 if drops_guidance else STEPS)):
        alone = tiny.make(name)
        alone.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        accelerate(alone, row)
        for step, (mine, (_, _, theirs)) in enumerate(zip(replay(alone, name, branch)[:steps], branch, strict=False)):
            assert torch.equal(mine, theirs), step


STATIC_ON_PIXART = (
    "ab_cache", "ab_cache blocks", "static stack", "taylorseer", "fora", "pab", "tgate", "tgate keep",
    "faster_diffusion", "faster_diffusion serial", "a_sdm", "a_sdm unit", "dp pixart", "cachequant pixart",
    "magcache pixart",
)  # fmt: skip


@cache
def drawn(name: str, row: str, *prompts: str) -> Tensor:
    """Pictures of prompts in one call, in float64: in float32 the roundings of another batch move a value to the next
    level of a scheme here and there. Of plain diffusers without a row."""
    pipe = copy.deepcopy(tiny.make(name)).to(torch.float64)  # text encoders are others' too
    if row:
        accelerate(pipe, row)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return tiny.run(
        pipe, name, steps=STEPS, prompt=list(prompts), negative_prompt=["bad"] * len(prompts), generator=seeds
    )


# first_block skips whatever it sees; schemes have static ranges, or dynamic ones for each token and picture
@pytest.mark.parametrize(
    ("name", "row"),
    [("pixart", row) for row in (*STATIC_ON_PIXART, "first_block")]
    + [(name, f"{scheme} {name}") for name in ("pixart", "sd15") for scheme in SCHEMES],
)
def test_one_prompt_of_a_batch_does_not_change_the_other(name, row):
    """With another one beside it, no more than plain diffusers; alone, as little as roundings do."""

    def of(row: str, *prompts: str) -> Tensor:
        return drawn(name, row, *prompts)

    cat, both, others = ("a red cat",), ("a red cat", "a dog"), ("a red cat", "something else")
    beside = apart(of(row, *others)[:1], of(row, *both)[:1])
    assert beside <= apart(of("", *others)[:1], of("", *both)[:1])
    assert apart(of(row, *others)[1:], of(row, *both)[1:]) > 0.01
    alone, plain = of(row, *cat), of("", *cat)
    assert apart(alone, plain) > 1e-4
    assert apart(of(row, *both)[:1], alone) < rounding(of("", *both)[:1], plain)


# where tgate drops guidance and finds no cross-attention, it remembers nothing but the present step's output; switch
# remembers nothing at all
REMEMBER = [(row, name) for row, name in SUPPORTED if ROWS[row].method != "switch"]


@each(
    (case for case in ONE_A_KIND if case in REMEMBER and (ROWS[case[0]].saves == 2 or case[1] in CROSS)),
    quick=ONCE[::3],
)
def test_what_was_remembered_is_given_back_when_the_run_ends(row, name):
    pipe = tiny.make(name)
    kept: list[weakref.ref] = []

    def of_run(_pipe, step):
        if step == 2:
            kept.extend(
                weakref.ref(tensor)
                for session in sessions
                for memories in session._branches.values()
                for memory in memories
                for own in (memory, *memory.again)
                for tensor in [*own.probes, *(leaf for values in own.values for leaf in values)]
                if isinstance(tensor, Tensor)
            )

    handle = accelerate(pipe, row)
    sessions = [c.__self__ for c in handle.clock.on_start if isinstance(c.__self__, Session)]
    tiny.run(pipe, name, steps=STEPS, **tiny.at_each_step(name, of_run))
    gc.collect()
    assert kept and not any(reference() is not None for reference in kept)


@each((row, name) for row, name in REMEMBER if name == "sd15")
def test_when_the_batch_shrinks_in_a_run_nothing_is_served_from_the_larger_one(row, name):
    """Guidance ends halfway, as diffusers' documentation does it: the uncond half leaves the batch."""
    pipe = tiny.make(name)
    handle = accelerate(pipe, row)

    def end_guidance(pipe, step, timestep, kwargs):
        if step == 3:  # the next step would be cached by every row
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
        return kwargs

    watched = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    latents = tiny.run(pipe, name, steps=STEPS, **watched)
    assert latents.shape == (1, 4, 8, 8) and torch.isfinite(latents).all()
    assert handle.report.branches[0][4] == "computed"
