"""When and where displaced methods wait; run by real processes, see ranks.py."""

from __future__ import annotations

from typing import Any, Literal

import torch

import fastdiff
from fastdiff.config import Config
from fastdiff.errors import FastdiffError
from fastdiff.parallel import REGISTRY
from fastdiff.parallel.base import ParallelMethod
from fastdiff.parallel.waiting import chosen
from fastdiff.pipelines.freshness import calibrate_layers
from tests import tiny

from .checks import EXACT, digest, latents, moved, pipeline

STALE = {"method": "distrifusion", "warmup_steps": 0}
STEPS = 4
SMALL = {"height": 64}  # rows enough for two ranks


class Plain(ParallelMethod):
    """DistriFusion without a schedule."""

    method: Literal["plain"] = "plain"

    def fresh(self, index: int, total: int | None = None) -> bool:
        return index <= self.warmup_steps


def drawn(pipe: Any, name: str, parallel: Any, steps: int = STEPS) -> tuple[torch.Tensor, Any, dict[str, int]]:
    """The latents, the report, and what this rank sent by kind."""
    with fastdiff.accelerate(pipe, parallel=parallel) as handle:
        found = latents(pipe, name, steps, **_small(name))
    return found, handle.report, handle.report.ranks[handle.rank]["sent"]


def _small(name: str) -> dict[str, int]:
    return SMALL if name in tiny.UNETS else {}


def who_waits_always_is_exact(rank: int, ranks: int) -> dict:
    return waiting_always("sd3")


def who_waits_always_is_exact_in_unets(rank: int, ranks: int) -> dict:
    return waiting_always("sd15")


def waiting_always(*names: str) -> dict:
    out = {}
    for name in names:
        pipe = pipeline(name)
        alone = latents(pipe, name, STEPS, **_small(name))
        patch, _, sent = drawn(pipe, name, "patch")
        assert moved(patch, alone) < EXACT
        rest: list[dict[str, Any]] = [{"cooldown_steps": 99}, {"refresh": 1}] if name == "sd3" else []
        for more in ({"cooldown_steps": STEPS}, {"sync_layers": ["*"]}, *rest):
            found, report, own = drawn(pipe, name, STALE | more)
            assert torch.equal(found, patch) and own == sent, (name, more)
            assert {one["oldest"] for one in report.ranks} == {0}
            covered = f"cooldown_steps = {more.get('cooldown_steps')} cover all {STEPS} steps: each of them waited"
            assert any(covered in note for note in report.notes) is ("cooldown_steps" in more), report.notes
        partial = {"method": "pcpp", "portion": 0.3, "warmup_steps": 0}
        biased, _, own = drawn(pipe, name, partial | {"synchronous": True})
        found, _, same = drawn(pipe, name, partial | {"sync_layers": ["*"]})
        assert torch.equal(found, biased) and own == same and moved(found, alone) > 1e-6, "the bias stays"
        assert torch.equal(drawn(pipe, name, partial | {"cooldown_steps": STEPS})[0], patch)
        out[name] = {"digest": digest(patch)}
    return out


def who_never_waits_is_as_before(rank: int, ranks: int) -> dict:
    REGISTRY.register(Plain)
    out = {}
    for name in ("sd15", "sd3"):
        pipe = pipeline(name)
        settings = {"warmup_steps": 0, "codec": "residual" if name == "sd3" else "raw"}
        plain, _, sent = drawn(pipe, name, settings | {"method": "plain"})
        found, report, own = drawn(pipe, name, settings | {"method": "distrifusion", "cooldown_steps": 0})
        assert torch.equal(found, plain) and own == sent and report.ranks[rank]["oldest"] == 1
        some, _, _ = drawn(pipe, name, settings | {"method": "distrifusion", "sync_layers": ["*blocks.1*"]})
        assert not torch.equal(some, found)
        out[name] = {"digest": digest(some)}
    return out


def who_waits_sends_once_more(rank: int, ranks: int) -> dict[str, int]:
    """Keys and values sent for SD3 in float32."""
    pipe, found = pipeline("sd3", torch.float32), {}
    cases: dict[str, dict[str, Any]] = {
        "none": {}, "two bits": {"codec": "residual2"}, "cooldown": {"cooldown_steps": 2},
        "layer": {"sync_layers": ["transformer_blocks.1"]},
        "layers": {"sync_layers": ["transformer_blocks.[12].attn"]},
    }  # fmt: skip
    for label, more in cases.items():
        found[label] = drawn(pipe, "sd3", STALE | more)[2]["kv"]
    return found


def planned(rank: int, ranks: int) -> dict[str, Any]:
    return planning(rank, "sd3")


def planned_in_unets(rank: int, ranks: int) -> dict[str, Any]:
    return planning(rank, "sd15")


def planning(rank: int, *names: str) -> dict[str, Any]:
    """A calibration ranks all layers alike on all ranks; what its plan says of bytes is what its layers send."""
    out: dict[str, Any] = {}
    for name in names:
        pipe = pipeline(name)
        alone = latents(pipe, name, STEPS, **_small(name))
        given = tiny.arguments(name, STEPS)
        call = {k: v for k, v in given.items() if k not in ("prompt", "generator", "output_type")}
        call["negative_prompt"] = [given["negative_prompt"]]
        config = Config(parallel=STALE | {"sync_kb": 1e9})
        plan = calibrate_layers(pipe, config, [given["prompt"]], moments=1, batch=1, **call).parallel.plan
        plans = {"all": plan, "some": plan.model_copy(update={"layers": chosen(plan.table, 20_000)})}
        found, _, sent = drawn(pipe, name, STALE | {"plan": plans["all"]})
        assert moved(found, alone) < 1e-11, "layers that were left out move nothing"
        stale, _, less = drawn(pipe, name, STALE)
        some, _, own = drawn(pipe, name, STALE | {"plan": plans["some"]})
        for waited, plan in ((sent, plans["all"]), (own, plans["some"])):
            more = sum(waited.values()) - sum(less.values())  # a message for each layer, of the last step
            assert more <= plan.bytes and (rank or more == plan.bytes), "the first of two rows sends most"
        assert plans["some"].bytes <= 20_000
        assert moved(some, alone) < moved(stale, alone)
        out[name] = {"digest": digest(some), "table": {k: list(v) for k, v in plans["all"].table.items()}}
        out[name]["layers"] = list(plans["some"].layers)
    return out


def refused(rank: int, ranks: int) -> dict[str, str]:
    said = {}
    pipe = pipeline("sd3")
    plan = {
        "denoiser": "Other 0", "ranks": 2, "budget": 1, "layers": ["a"], "table": {"a": [0.5, 1]},
    }  # fmt: skip
    cases = {
        "name": STALE | {"sync_layers": ["transformer_blocks.1.atn"]},
        "pattern": STALE | {"sync_layers": ["*.attn", "down*"]},
        "model": STALE | {"plan": plan},
        "method": {"method": "patch", "sync_layers": ["*"]},
    }
    for label, parallel in cases.items():
        try:
            with fastdiff.accelerate(pipe, parallel=parallel):
                said[label] = "went through"
        except FastdiffError as error:
            said[label] = str(error)
    for label, config in {"budget": STALE, "exact": {"method": "patch"}}.items():
        try:
            calibrate_layers(pipe, Config(parallel=config), ["a"])
        except FastdiffError as error:
            said[label] = str(error)
    settings = Config(parallel={"method": "distrifusion", "warmup_steps": 3, "sync_kb": 1.0})
    try:
        calibrate_layers(pipe, settings, ["a"], num_inference_steps=4, height=64, width=64, max_sequence_length=16)
    except FastdiffError as error:
        said["steps"] = str(error)
    assert "_fastdiff" not in vars(pipe)
    return said
