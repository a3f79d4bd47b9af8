"""PAB: each kind of attention has its own interval, inside a range of timesteps only."""

from __future__ import annotations

from collections import Counter

import pytest

import fastdiff
from fastdiff.caching.methods.pab import PAB
from fastdiff.caching.region import Region
from fastdiff.caching.sites import attention_kind
from fastdiff.clock import Run
from fastdiff.pipelines.families import anatomies
from tests import tiny
from tests.caching.fakes import run_of
from tests.zoo import ZOO


def computed(kind: str, run: Run, **settings) -> list[int]:
    mask = PAB(**settings).mask(run, Region("anywhere", (), kind=kind))
    return [index for index, wanted in enumerate(mask) if wanted]


def test_attention_is_broadcast_at_its_kind_s_interval_inside_the_range():
    """Timesteps 1000, 900 ... 100: those from 850 to 150 are steps 2 to 8."""
    run, inside = run_of(10), {"between": (0.15, 0.85)}
    assert computed("self", run, **inside) == [0, 1, 2, 4, 6, 8, 9]
    assert computed("temporal", run, **inside) == [0, 1, 2, 6, 9]
    assert computed("cross", run, **inside) == [0, 1, 2, 8, 9]
    assert computed("cross", run, **inside, cross_interval=3) == [0, 1, 2, 5, 8, 9]
    assert computed("self", run, between=(0, 0.05)) == list(range(10)), "no step is in that range"


def test_timesteps_between_0_and_1_have_the_same_range():
    run = Run(1, tuple(1 - i / 10 for i in range(10)), tuple(1 - i / 10 for i in range(10)), True)
    assert computed("self", run, between=(0.15, 0.85)) == computed("self", run_of(10), between=(0.15, 0.85))


@pytest.mark.parametrize("ends", [(0.8, 0.1), (-0.1, 0.5), (0.5, 1.5)])
def test_a_range_must_be_one(ends):
    with pytest.raises(ValueError, match=r"two shares from 0 to 1|than or equal to [01]"):
        PAB(between=ends)


def kinds(pipe) -> Counter:
    return Counter(region.kind for region in PAB().regions(anatomies(pipe)[0]))


def test_kinds_of_attention_are_told_apart():
    assert kinds(tiny.make("sd15")) == {"self": 7, "cross": 7}
    assert kinds(tiny.make("wan")) == {"self": 4, "cross": 4}
    assert kinds(tiny.make("sd3")) == {"self": 4}, "joint attention counts as self-attention"
    clips = kinds(ZOO["animatediff"].make())
    assert clips["temporal"] > 0 and clips["cross"] > 0 and clips["self"] > 0
    assert "temporal" in kinds(ZOO["svd"].make())
    assert attention_kind("down_blocks.0.motion_modules.1.transformer_blocks.0.attn2") == "temporal"
    assert attention_kind("blocks.0.cross_attn") == "cross"


@pytest.mark.parametrize(("name", "path", "kind"), [
    ("sd15", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "self"),
    ("sd15", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "cross"),
    ("animatediff", "mid_block.motion_modules.0.transformer_blocks.0.attn1.to_q", "temporal"),
])  # fmt: skip
def test_a_layer_really_runs_as_its_kind_says(name, path, kind):
    intervals = {"self_interval": 2, "temporal_interval": 3, "cross_interval": 6}
    pipe, ran = ZOO[name].make(), []
    pipe.unet.get_submodule(path).register_forward_hook(lambda *_: ran.append(handle.clock.index))
    handle = fastdiff.accelerate(pipe, cache={"method": "pab", "between": (0, 1), **intervals})
    ZOO[name].run(pipe, 7)
    assert ran == list(range(0, 7, intervals[f"{kind}_interval"]))
