"""Calls of a pipeline's denoisers in real runs, and what is planned on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastdiff.config import Compile, Config, Resolved
from fastdiff.errors import BadModel
from fastdiff.method import Settings
from fastdiff.patch import PatchSet
from fastdiff.plans import Each
from fastdiff.quant.calls import Calls

from .accelerate import Accelerated, put, restore
from .calibrate import Watch, draw_all
from .families import anatomies

P = TypeVar("P", bound=Settings)


def hear_each(
    pipe: Any, prompts: Sequence[str], *, config: Config | None = None, moments: int = 4, seed: int = 0, batch: int = 4,
    watch: Watch | None = None, **call: Any,
) -> dict[str, Calls]:  # fmt: skip
    """Calls of each denoiser, by component, at `moments` of its steps spread over runs with these prompts, in every
    branch; the main denoiser comes first.

    The pipeline runs with the levers of `config`, but uncached and uncompiled; one that is accelerated is restored
    first.
    """
    restore(pipe)
    found, patches = anatomies(pipe), PatchSet()
    plain = (config or Config()).model_copy(update={"cache": None, "compile": Compile()})
    handle = Accelerated(pipe, Resolved(plain, {}))
    heard = {anatomy.component: Calls(anatomy, moments * len(found)) for anatomy in found}  # who share the steps
    try:
        for calls in heard.values():
            calls.listen(lambda: handle.clock.now, patches)
        put(handle, found)
        with handle:
            handle.clock.on_output += [calls.solved for calls in heard.values()]
            draw_all(handle, prompts, seed, batch, watch, call)
    finally:
        patches.restore()
    return heard


def planned(heard: Mapping[str, Calls], plan: Callable[[Calls], P]) -> P | Each[P]:
    """The plan for a pipeline's denoiser or, where it has several, one for each.

    Raises BadModel for a denoiser that was not called.
    """
    for name, calls in heard.items():
        if not calls.given:
            raise BadModel(
                f"{name} was not called in these runs, so that nothing can be planned for it: give more steps"
            )
    found = {name: plan(calls) for name, calls in heard.items()}
    first = next(iter(found.values()))
    several: Any = Each[type(first)]  # type: ignore[misc]
    return several(found) if len(found) > 1 else first
