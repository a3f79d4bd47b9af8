"""Which call of a step is which: by what it is conditioned on, in loops that call in another order, or not always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

import fastdiff
from fastdiff.branches import Branches
from fastdiff.report import UNTOLD
from tests import tiny

from .own import Call, loop, text

G = 3.0
REUSE = {"method": "ab_cache", "interval": 2, "warmup_steps": 1, "predictor": "reuse"}
BOTH: list[Call] = [("cond", G), ("uncond", 1 - G)]
SWAPPED = BOTH[::-1]
ONE: list[Call] = [("cond", 1.0)]
LOOPS: dict[str, Callable[[int], list[Call]]] = {
    "guidance": lambda i: BOTH,
    "the unconditional call first": lambda i: SWAPPED,
    "guidance in an interval": lambda i: BOTH if 2 <= i < 5 else ONE,
    "guidance in an interval, unconditional first": lambda i: SWAPPED if 2 <= i < 5 else ONE,
    "turns": lambda i: BOTH if i % 2 else SWAPPED,
    "three texts": lambda i: [*BOTH, ("other", 0.5)] if i > 2 else [("other", 0.5), *BOTH],
    "another text halfway": lambda i: ONE if i < 4 else [("other", 1.0)],
}


def remembering(pipe: Any) -> list[tuple[str, bool]]:
    """For each call, whose text it has and whether what it gave is remembered of that very text."""
    seen: dict[str, list[torch.Tensor]] = {}
    said: list[tuple[str, bool]] = []
    names = {"cond": text(0), "uncond": text(1), "other": text(2)}

    def hook(_module: Any, _args: Any, kwargs: dict, output: Any) -> None:
        name = next(n for n, own in names.items() if torch.equal(own, kwargs["encoder_hidden_states"]))
        others = [old for n, all_ in seen.items() if n != name for old in all_]
        own = output.sample
        said.append((name, any(torch.equal(own, old) for old in others)))
        seen.setdefault(name, []).append(own.clone())

    pipe.unet.register_forward_hook(hook, with_kwargs=True)
    return said


@pytest.mark.parametrize("fresh", [False, True], ids=["kept", "made anew"])
@pytest.mark.parametrize("name", LOOPS)
def test_no_branch_is_served_what_another_one_gave(name, fresh):
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache=REUSE)
    said = remembering(pipe)
    loop(pipe, LOOPS[name], fresh=fresh)
    assert not any(mixed for _, mixed in said)
    assert handle.report.cached + handle.report.partly > 0


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("method", ["ab_cache", "deepcache", "tgate"])
def test_each_branch_is_as_in_a_loop_in_the_usual_order(name, method):
    """The same calls in the usual order are the control."""
    cache = {"ab_cache": REUSE, "deepcache": {"method": "deepcache", "interval": 2},
             "tgate": {"method": "tgate", "gate": 1.0, "self_interval": 2}}[method]  # fmt: skip
    order = ["cond", "uncond", "other"]
    pipe = tiny.make("sd15")
    fastdiff.accelerate(pipe, cache=cache)
    found = loop(pipe, LOOPS[name])
    usual = loop(pipe, lambda i: sorted(LOOPS[name](i), key=lambda call: order.index(call[0])))
    torch.testing.assert_close(found, usual, rtol=1e-4, atol=1e-4)


def views(pipe: Any, latents: list[torch.Tensor]) -> torch.Tensor:
    """A loop whose steps call the model for each of these latents, with one text."""
    pipe.scheduler.set_timesteps(6)
    own = text(0)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            output = torch.stack([pipe.unet(given, t, encoder_hidden_states=own).sample for given in latents]).mean(0)
            latents = [pipe.scheduler.step(output, t, latents[0]).prev_sample, *latents[1:]]
    return latents[0]


def test_two_calls_that_nothing_tells_apart_are_computed_and_said():
    pipe = tiny.make("sd15")
    latents = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    plain = views(pipe, latents)
    handle = fastdiff.accelerate(pipe, cache=REUSE)
    assert torch.equal(views(pipe, latents), plain)
    assert "nothing tells apart" in str(handle.report) and handle.report.cached == 0
    assert handle.report.branch_names()[UNTOLD] == "untold"


def test_the_very_same_call_once_more_is_a_branch_too():
    """A guider of diffusers that is given no negative prompt calls the model twice with all the same."""
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache=REUSE)
    loop(pipe, lambda i: [("cond", 0.5), ("cond", 0.5)])
    assert handle.report.cached == 4 and set(handle.report.branches) == {0, 1}


@pytest.mark.parametrize("moved", [False, True])
def test_equal_texts_are_told_by_where_they_lie_while_they_lie_there(moved):
    """Without a prompt both halves of guidance have the same text."""
    branches, twins = Branches(tiny.make("sd15").unet), [text(0), text(0)]
    found = []
    for _ in range(3):
        branches.turn()
        given = [own.clone() for own in twins] if moved else twins
        found.append([branches.of(None, (), {"encoder_hidden_states": own}) for own in given])
    assert found == ([[0, 1], [UNTOLD, UNTOLD], [UNTOLD, UNTOLD]] if moved else [[0, 1]] * 3)


def test_a_text_that_is_written_over_is_another_text():
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache=REUSE | {"interval": 8})
    own, given = text(0), torch.zeros(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for index, t in enumerate(pipe.scheduler.timesteps):
            if index == 2:
                own.mul_(-1)
            output = pipe.unet(given, t, encoder_hidden_states=own).sample
            given = pipe.scheduler.step(output, t, given).prev_sample
    rows = handle.report.branches
    assert rows[0] == ["computed", "cached"] and rows[1][2:] == ["computed", "cached"]


def test_cache_context_tells_calls_of_one_text_apart():
    pipe = tiny.make("flux")
    handle = fastdiff.accelerate(pipe, cache=REUSE)
    branches = []
    handle.clock.on_call.append(lambda step: branches.append(step.branch))
    with torch.no_grad():
        pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=1.0)
        config = pipe.transformer.config
        inputs = {
            "hidden_states": torch.zeros(1, 4, config.in_channels),
            "encoder_hidden_states": torch.zeros(1, 4, config.joint_attention_dim),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
            "txt_ids": torch.zeros(4, 3),
            "img_ids": torch.zeros(4, 3),
        }
        for t in pipe.scheduler.timesteps:
            for name in ("second", "first"):
                with pipe.transformer.cache_context(name):
                    pipe.transformer(timestep=t.expand(1) / 1000, **inputs)
            pipe.scheduler.step(torch.zeros(1), t, torch.zeros(1))
    assert branches == [0, 1, 0, 1]


def test_perturbed_attention_and_skipped_layers_are_branches_of_their_own():
    """What a guider sets on the modules, without a word in the arguments."""
    unet = tiny.make("sd15").unet
    branches, given = Branches(unet), {"encoder_hidden_states": text(0)}
    own, skips = unet.attn_processors, PAGIdentitySelfAttnProcessor2_0()
    perturbed = {name: skips if "attn1" in name else kept for name, kept in own.items()}
    numbers = []
    for _ in range(2):
        branches.turn()
        for processors in (own, perturbed):
            unet.set_attn_processor(dict(processors))
            numbers.append(branches.of(None, (), given))
    assert numbers == [0, 1, 0, 1]


def test_texts_without_end_are_not_kept():
    branches = Branches(tiny.make("sd15").unet)
    found = []
    for number in range(40):
        branches.turn()
        found.append(branches.of(None, (), {"encoder_hidden_states": text(number)}))
    assert found[:16] == list(range(16)) and set(found[16:]) == {UNTOLD}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("guidance", ["drop", "delta"])
def test_tgate_drops_the_unconditional_call_and_no_other(name, guidance):
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache={"method": "tgate", "gate": 0.5, "guidance": guidance})
    left: list[str] = []
    ran: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    names = {"cond": text(0), "uncond": text(1), "other": text(2)}

    def hook(_module: Any, _args: Any, kwargs: dict, _output: Any) -> None:
        if not ran:
            left.append(next(n for n, own in names.items() if torch.equal(own, kwargs["encoder_hidden_states"])))
        ran.clear()

    pipe.unet.register_forward_hook(hook, with_kwargs=True)
    loop(pipe, LOOPS[name])
    assert set(left) <= {"uncond"}
    if name == "guidance":
        assert left == ["uncond"] * 4 and handle.report.cached == 4
