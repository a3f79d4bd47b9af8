"""Weights of which each rank keeps a share; run by real processes, see ranks.py."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from torch import nn

import fastdiff
from fastdiff.errors import FastdiffError
from fastdiff.parallel.shards import Shelf, units
from fastdiff.parallel.sharing import Blocks
from fastdiff.patch import PatchSet
from fastdiff.pipelines.families import anatomies
from fastdiff.weights import absent, nbytes
from tests import tiny

from .checks import CACHES, EXACT, digest, exact, latents, moved, pipeline


def held(module: nn.Module) -> int:
    """Bytes of memory that a module's tensors look at."""
    found = {}
    for tensor in (*module.parameters(), *module.buffers()):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def looks(root: nn.Module, shelf: Shelf, shares: int, peaks: list[int]) -> Any:
    """Notes the bytes of weights that are here: of the rest of the model, of all shares, and of blocks."""
    blocks = {id(view.tensor) for kept in shelf.kept for view in kept.views}
    rest = sum(t.nbytes for t in (*root.parameters(), *root.buffers()) if id(t) not in blocks)

    def look(*_: Any) -> None:
        peaks.append(rest + shares + sum(kept.here.nbytes for kept in shelf.kept if kept.here is not None))

    return look


def pictures(rank: int, ranks: int) -> dict:
    """The same picture to the bit as without shares; and the weights are themselves again afterwards."""
    return _pictures({"sd3": "patch", "flux": "ring"}, ranks)


def other_pictures(rank: int, ranks: int) -> dict:
    return _pictures({"wan": "cfg", "sd15": "patch", "pixart": "ulysses"}, ranks)


def _pictures(methods: dict[str, str], ranks: int) -> dict:
    for name, method in methods.items():
        if method == "cfg" and ranks != 2:
            continue
        pipe = pipeline(name)
        with fastdiff.accelerate(pipe, parallel=method):
            whole = latents(pipe, name)
        with fastdiff.accelerate(pipe, parallel={"method": method, "shard": "blocks"}):
            assert torch.equal(latents(pipe, name), whole), "gathering changes nothing"
    first = next(iter(methods))
    return {first: exact(first, {"method": "patch", "shard": "blocks"})}


def memory(rank: int, ranks: int) -> dict[str, Any]:
    """What a rank holds: between blocks, and while each of them runs."""
    found = {}
    for name in ("sd3", "flux", "sd15"):
        pipe = pipeline(name)
        root, blocks = tiny.denoiser(pipe), units(anatomies(pipe)[0])
        whole, each = nbytes(root), [nbytes(block) for block in blocks]
        with fastdiff.accelerate(pipe, parallel={"method": "patch", "shard": "blocks"}) as fast:
            (shelf,) = fast.crew.shelves  # type: ignore[union-attr]
            assert absent(root) == "are sharded: some are empty here"
            shares = sum(kept.share.nbytes for kept in shelf.kept)
            between, peaks = held(root) + shares, list[int]()
            look = looks(root, shelf, shares, peaks)
            hooks = [block.register_forward_pre_hook(look) for block in blocks]
            hooks += [list(block.modules())[-1].register_forward_hook(look) for block in blocks]
            latents(pipe, name, 2)
            for hook in hooks:
                hook.remove()
            pieces = sum(len(kept.views) + ranks for kept in shelf.kept)
            predicted, kept = Blocks(tuple(each)).sent(fast.crew.bus.topology), sum(kept.size for kept in shelf.kept)  # type: ignore[union-attr]
            assert abs(predicted - kept * (ranks - 1)) <= 64 * pieces, "the planner's"
        found[name] = {
            "whole": whole, "blocks": each, "between": between, "peak": max(peaks), "rounding": 64 * pieces,
        }  # fmt: skip
    return found


def skipped(rank: int, ranks: int) -> dict[str, list[int]]:
    """Blocks that computed, blocks that were fetched, steps that were cached, and bytes sent for them."""
    found = {}
    for name, cache in (("flux", "first_block"), ("sd3", "ab_cache stack"), ("sd3", None), ("sd15", "deepcache")):
        pipe, runs = pipeline(name), list[int]()
        levers = {} if cache is None else {"cache": CACHES[cache]}
        with fastdiff.accelerate(pipe, parallel="patch", **levers):
            alone = latents(pipe, name, 6)
        blocks = units(anatomies(pipe)[0])
        with PatchSet() as patches:  # inside of all else: what really computes
            for number, block in enumerate(blocks):
                patches.wrap_forward(block, partial(_noted, runs, number))
            with fastdiff.accelerate(pipe, parallel={"method": "patch", "shard": "blocks"}, **levers) as fast:
                (shelf,) = fast.crew.shelves  # type: ignore[union-attr]
                assert torch.equal(latents(pipe, name, 6), alone), (name, cache)
                sizes = [kept.size for kept in shelf.kept]
                sent = fast.report.ranks[rank]["sent"]["weights"] // (ranks - 1)
                ahead = sent - sum(sizes[number] for number in runs)
                found[f"{name} {cache}"] = [len(runs), shelf.fetched, fast.report.cached, ahead, max(sizes)]
            patches.restore()
    return found


def _noted(runs: list[int], number: int, forward: Any) -> Any:
    @wraps(forward)
    def noted(*args: Any, **kwargs: Any) -> Any:
        runs.append(number)
        return forward(*args, **kwargs)

    return noted


def quantized(rank: int, ranks: int) -> dict[str, Any]:
    """Packed numbers are shared out as they are."""
    found = {}
    for method in ("w4a16", "w8a16"):
        pipe = pipeline("sd3", torch.float32)
        levers = {"quant": {"method": method, "components": ["transformer"], "speed": "smallest"}}
        with fastdiff.accelerate(pipe, parallel="patch", **levers):
            whole, bytes_ = latents(pipe, "sd3"), nbytes(pipe.transformer)
        with fastdiff.accelerate(pipe, parallel={"method": "patch", "shard": "blocks"}, **levers) as fast:
            (shelf,) = fast.crew.shelves  # type: ignore[union-attr]
            kept = sum(kept.share.nbytes for kept in shelf.kept) + held(pipe.transformer)
            assert torch.equal(latents(pipe, "sd3"), whole), method
        found[method] = [bytes_, kept]
    return found


def broken_off(rank: int, ranks: int) -> str:
    """An exception on one rank, in the middle of a picture, leaves nothing behind; the next picture is right."""
    pipe = pipeline("sd3")
    alone = latents(pipe, "sd3")
    settings = {"method": "distrifusion", "shard": "blocks", "warmup_steps": 1, "timeout": 4}
    handle = fastdiff.accelerate(pipe, parallel=settings)
    said = ""

    def fails(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        if step == 2 and rank == ranks - 1:
            raise KeyError("a mistake in a callback")
        return kwargs

    try:
        latents(pipe, "sd3", 8, callback_on_step_end=fails)
    except (FastdiffError, KeyError) as error:
        said = type(error).__name__
    first, second = latents(pipe, "sd3", 8), latents(pipe, "sd3", 8)
    assert torch.equal(first, second) and torch.isfinite(first).all()
    handle.restore()
    assert torch.equal(latents(pipe, "sd3"), alone)
    return said


def with_everything(rank: int, ranks: int) -> dict:
    """Four ranks are halves of guidance, and teams; blocks that are compiled; a mode without gradients."""
    if ranks == 4:
        return {
            "cfg x patch": exact("sd3", {"method": "patch", "cfg": 2, "shard": "blocks"}),
            "teams": exact("flux", {"method": "ring", "ulysses": 2, "shard": "blocks"}),
        }
    pipe = pipeline("flux")
    alone = latents(pipe, "flux")
    with torch.inference_mode(), fastdiff.accelerate(pipe, parallel={"method": "ring", "shard": "blocks"}):
        found = latents(pipe, "flux")
    assert moved(found.clone(), alone) < EXACT
    assert torch.equal(latents(pipe, "flux"), alone)
    graphs: dict[str, Any] = {"enabled": True, "backend": "eager"}
    with fastdiff.accelerate(pipe, parallel={"method": "patch", "shard": "blocks"}, compile=graphs):
        assert moved(latents(pipe, "flux"), alone) < EXACT
    return {"digest": digest(found.clone())}


def half_of_a_step(rank: int, ranks: int) -> str:
    """A step with one half of guidance, of two calls: who has nothing to compute says so, and nobody waits."""

    def off(pipe: Any, step: int, timestep: Any, given: dict) -> dict:
        pipe._guidance_scale = 1.0
        return given

    pipe = pipeline("wan")
    try:
        with fastdiff.accelerate(pipe, parallel={"method": "cfg", "shard": "blocks"}):
            latents(pipe, "wan", 4, callback_on_step_end=off)
    except FastdiffError as error:
        return str(error)
    return "went through"


def refused(rank: int, ranks: int) -> dict[str, str]:
    said = {}
    for label, method in (
        ("parastep", {"method": "parastep", "shard": "blocks"}),
        ("local", {"method": "patch", "shard": "blocks", "on_peer_loss": "local"}),
    ):
        try:
            fastdiff.accelerate(pipeline("sd3"), parallel=method)
            said[label] = "went through"
        except FastdiffError as error:
            said[label] = str(error)
    return said
