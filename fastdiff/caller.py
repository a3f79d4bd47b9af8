"""Whose call of a denoiser it is: the pipeline that is running, found on the stack."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

_INDEXES = ("model_index.json", "modular_model_index.json")  # what a diffusers pipeline says of its class


def running_pipeline() -> Any | None:
    """The innermost diffusers pipeline whose code is running in this thread; None in a loop of one's own."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            given = frame.f_locals
            for name in code.co_varnames[: min(2, code.co_argcount)]:  # blocks of modular pipelines: (self, components)
                if getattr(type(given.get(name)), "config_name", None) in _INDEXES:
                    return given[name]
        frame = frame.f_back
    return None


def uses(pipe: Any, parts: Iterable[Any]) -> bool:
    """Whether one of some objects is a component of a pipeline."""
    wanted = {id(part) for part in parts}
    return any(id(value) in wanted for value in vars(pipe).values())


def loop_length(pipe: Any) -> int | None:
    """How many timesteps the loop of a running pipeline goes through, where its code says so before it begins."""
    call = inspect.unwrap(type(pipe).__call__)
    if "_num_timesteps" not in getattr(getattr(call, "__code__", None), "co_names", ()):
        return None  # a number that is there would be of another pipeline's code, or of another call
    found = getattr(pipe, "_num_timesteps", None)
    return found if isinstance(found, int) else None


def starts_late(pipe: Any) -> bool:
    """Whether a pipeline may leave out the first of its scheduler's timesteps: it takes an image and a strength."""
    return bool({"strength", "denoising_start"} & inspect.signature(type(pipe).__call__).parameters.keys())
