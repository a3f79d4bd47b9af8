"""A parallel plan for a live pipeline: a step of its model is measured here, and each rank's part of it."""

from __future__ import annotations

import inspect
import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.parallel.codec import Codec
from fastdiff.parallel.planner import Plan, Site, alone, plan, trials
from fastdiff.parallel.rehearsal import Call
from fastdiff.parallel.sharing import Blocks
from fastdiff.parallel.trying import by_turns
from fastdiff.patch import PatchSet
from fastdiff.weights import nbytes

from .accelerate import restore
from .families import anatomies
from .loading import call_defaults


class _Seen(Exception):
    """The solver's first step is reached: nothing after it is of interest."""


def plan_parallel(
    pipe: Any, devices: int, link: float, *, size: int | None = None, steps: int | None = None, latency: float = 2e-5,
    memory: float | None = None, codec: Codec = "raw",
) -> Plan:  # fmt: skip
    """What each parallel method is predicted to bring on `devices` devices like this one.

    link: bytes a second that a rank can send. size: pixels of a square picture's side, the pipeline's own by default.
    latency: seconds of a message. memory: bytes of a device; default: what this one has, on a CPU its share of it. An
    accelerated pipeline is restored first.

    Raises BadConfig for numbers that cannot be, and a size that the pipeline refuses.
    """
    if devices < 2 or not 0 < link < math.inf:
        raise BadConfig(f"devices = {devices}, link = {link:g}: a plan needs 2 devices or more, and a link above 0")
    restore(pipe)
    anatomy, calls, output = observe(pipe, size)
    weights = sum(nbytes(part) for part in pipe.components.values() if isinstance(part, nn.Module))
    site = Site(
        devices, link, latency, steps or call_defaults(pipe).get("num_inference_steps", 50), output, weights,
        memory or device_memory(pipe.device, devices), blocks=Blocks.of(anatomy, calls),
    )  # fmt: skip
    one = alone(anatomy, calls)
    tried = trials(anatomy, calls, devices, one, codec)
    return plan(one, [*tried, *by_turns(anatomy, calls, devices, one, tried)], site)


def observe(pipe: Any, size: int | None) -> tuple[Anatomy, list[Call], int]:
    """The denoiser, the arguments of its calls in a picture's first step, and bytes of what the solver is given."""
    calls: list[tuple[Anatomy, Call]] = []
    output: list[int] = []

    def watch(anatomy: Anatomy) -> Any:
        def wrapper(forward: Any) -> Any:
            def watched(*args: Any, **kwargs: Any) -> Any:
                calls.append((anatomy, (args, kwargs)))
                return forward(*args, **kwargs)

            return watched

        return wrapper

    def step(*args: Any, **kwargs: Any) -> Any:
        given = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 1)
        output.append(given.nbytes)
        raise _Seen

    known = inspect.signature(pipe.__call__).parameters
    sides = {} if size is None else {"height": size, "width": size}
    told = {name: value for name, value in call_defaults(pipe).items() if name == "guidance_scale"} | sides
    if "prompt" not in known or not sides.keys() <= known.keys():
        raise UnsupportedModel(f"{type(pipe).__name__} draws no picture of a given size from a prompt: nothing to plan")
    with PatchSet() as patches:
        for anatomy in anatomies(pipe):
            patches.wrap_forward(anatomy.denoiser, watch(anatomy))
        patches.set(pipe.scheduler, "step", step)
        try:
            pipe("a photo", num_inference_steps=2, output_type="latent", **told)
        except _Seen:
            pass
        except ValueError as error:  # how diffusers refuses arguments
            raise BadConfig(f"{type(pipe).__name__} refuses: {str(error).strip().splitlines()[0]}") from error
        patches.restore()
    if not calls or not output:
        raise UnsupportedModel(f"{type(pipe).__name__} took no step of its solver: nothing to plan")
    anatomy = calls[0][0]
    return anatomy, [call for found, call in calls if found is anatomy], output[0]


def device_memory(device: torch.device, devices: int) -> float:
    """Bytes of a GPU, or of this machine's memory shared by the ranks on its CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices if hasattr(os, "sysconf") else math.inf
