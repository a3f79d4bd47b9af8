"""Blocks on different ranks, and patches that flow through them; run by real processes, see ranks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.errors import FastdiffError
from fastdiff.weights import nbytes
from tests import tiny

from .checks import EXACT, _first, exact, latents, moved, pipeline
from .sharded import held

NAMES = ("sd3", "flux", "pixart", "wan")


def whole(rank: int, ranks: int) -> dict:
    """One patch is the picture of one device; so are steps that all are warm-up, and a single step."""
    found = {name: exact(name, {"method": "pipefusion", "patches": 1}) for name in NAMES}
    for name in ("sd3", "wan"):
        found[f"{name} warm"] = exact(name, {"method": "pipefusion", "warmup_steps": 9})
        found[f"{name} once"] = exact(name, "pipefusion", steps=1)
    return found


def still(rank: int, ranks: int) -> dict[str, float]:
    """Where nothing changes from step to step, what is a step old is true. Flux' patches come behind its text."""
    far = {}
    for name in ("flux", "sd3", "pixart", "wan"):
        pipe = pipeline(name)
        freeze(pipe, name)
        alone = latents(pipe, name, 4)
        with fastdiff.accelerate(pipe, parallel={"method": "pipefusion", "patches": 3}) as fast:
            far[name] = moved(latents(pipe, name, 4), alone)
            assert far[name] < EXACT, (name, far[name])
            assert fast.report.notes == []
    return far


def freeze(pipe: Any, name: str) -> None:
    """The denoiser is given the same latents and time in all steps."""
    net, seen = tiny.denoiser(pipe), dict[Any, Any]()
    forward = net.forward

    def always(*args: Any, **kwargs: Any) -> Any:
        for key in ("hidden_states", "timestep"):
            if key in kwargs:
                kwargs[key] = seen.setdefault(key, kwargs[key].clone())
        args = tuple(seen.setdefault(k, a.clone()) if isinstance(a, Tensor) else a for k, a in enumerate(args))
        return forward(*args, **kwargs)

    net.forward = always


def errors(rank: int, ranks: int) -> dict[str, float]:
    """How far from one device, by number of steps and of patches."""
    found = {}
    for name in ("sd3", "flux"):
        for steps in (16, 32):
            pipe, start = pipeline(name), list[Tensor]()
            alone = latents(pipe, name, steps, guidance_scale=1.0, callback_on_step_end=_first(start))
            for label, method in (
                ("pipefusion", {"method": "pipefusion"}),
                ("distrifusion", {"method": "distrifusion"}),
            ):
                with fastdiff.accelerate(pipe, parallel={"warmup_steps": steps // 8} | method):
                    result = latents(pipe, name, steps, guidance_scale=1.0)
                found[f"{name} {label} {steps}"] = moved(result, alone, start[0])
    return found


def weights(rank: int, ranks: int) -> dict[str, Any]:
    """Bytes of weights on this rank, bytes sent in a run, and by the formula."""
    found = {}
    for name in ("sd3", "flux"):
        pipe = pipeline(name, torch.float32)
        root = tiny.denoiser(pipe)
        blocks = [b for s in ("transformer_blocks", "single_transformer_blocks") for b in getattr(root, s, ())]
        rest = nbytes(root) - sum(map(nbytes, blocks))
        with fastdiff.accelerate(pipe, parallel={"method": "pipefusion", "patches": 4}) as fast:
            latents(pipe, name, 4)
            sent = fast.report.ranks[rank]["sent"]
            found[name] = [nbytes(root), rest, held(root), max(map(nbytes, blocks)), sent]
    return found


def meshes(rank: int, ranks: int) -> dict:
    found = {"cfg": exact("sd3", {"method": "pipefusion", "cfg": 2, "patches": 1})}
    pipe = pipeline("wan")
    alone = latents(pipe, "wan", 6)
    easy = {"method": "easycache", "warmup_steps": 1, "threshold": 1e9, "max_consecutive_cached": 1}
    with fastdiff.accelerate(pipe, parallel={"method": "pipefusion", "cfg": 2}, cache=easy) as fast:
        assert 0 < moved(latents(pipe, "wan", 6), alone) < 0.3 and fast.report.cached > 0
    return found


def refused(rank: int, ranks: int) -> dict[str, str]:
    said = {}
    for label, name, levers in (
        ("unet", "sd15", {"parallel": "pipefusion"}),
        ("shard", "sd3", {"parallel": {"method": "pipefusion", "shard": "blocks"}}),
        ("cache", "sd3", {"parallel": "pipefusion", "cache": "first_block"}),
        ("patches", "wan", {"parallel": {"method": "pipefusion", "patches": 99}}),
    ):
        pipe = pipeline(name)
        before = {k: v.clone() for k, v in tiny.denoiser(pipe).state_dict().items()}
        try:
            handle = fastdiff.accelerate(pipe, **levers)
            latents(pipe, name)
            handle.restore()
            said[label] = "went through"
        except FastdiffError as error:
            said[label] = str(error)
            fastdiff.restore(pipe)
        assert all(torch.equal(v, before[k]) for k, v in tiny.denoiser(pipe).state_dict().items()), label
    return said
