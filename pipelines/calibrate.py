"""Calibration: run a pipeline uncached, show the cache method what it wants to see, keep what it finds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, TypeAlias

from fastdiff.caching.base import CacheMethod
from fastdiff.caching.calibration import Drawing, Loops
from fastdiff.caching.plan import quantization
from fastdiff.caching.planned import Planned
from fastdiff.caching.protocols import Install
from fastdiff.caching.session import Session
from fastdiff.config import Compile, Config, Resolved
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.patch import PatchSet
from fastdiff.plans import Each

from .accelerate import Accelerated, put, restore
from .conditions import calls_of
from .families import Anatomy, anatomies
from .fed_layers import with_fed_layers

Watch = Callable[[int, int], None]
Installs: TypeAlias = dict[str, Install]  # by component


def calibrate(
    pipe: Any, config: Config, prompts: Sequence[str], *, seed: int = 0, batch: int = 4, watch: Watch | None = None,
    **call: Any,
) -> Config:  # fmt: skip
    """The config with what calibration finds for this pipeline in its cache method, for each denoiser.

    Image k is drawn from seed + k, in calls of `batch` with the arguments `call` (`corrupt=True` among them mixes noise
    into its pictures), with the config's other levers on, but not compiled; `watch` is told how many steps of how many
    are done in the pass under way. An accelerated pipeline is restored first.

    Raises BadConfig for a method that takes no plan, a number of computed steps that is not possible, and a solver
    that adds noise of its own, for which no fixed plan can be right.
    """
    method = config.cache
    if not isinstance(method, CacheMethod):
        raise BadConfig("calibrate needs a cache method that takes a plan; add --set cache.method=dp")
    restore(pipe)
    found = anatomies(pipe)
    plain = config.model_copy(update={"cache": None, "compile": Compile()})  # it looks inside what would be compiled

    def draw(handle: Accelerated) -> None:
        draw_all(handle, prompts, seed, batch, watch, call)

    try:
        made = _made(method, found, lambda installs, drawings: _pass(pipe, plain, found, installs, drawings, draw))
        return with_fed_layers(pipe, config.model_copy(update={"cache": made}), found, draw)
    except ValueError as error:
        raise BadConfig(f"{error}; calibrate with a deterministic solver such as DDIM, Euler or DPM++") from None


def _made(method: CacheMethod, found: list[Anatomy], draw: Callable[[Installs, list[Drawing]], None]) -> CacheMethod:
    """The method with what it finds for each denoiser, all in the same passes; a denoiser other than the main one of
    which nothing can be found has no plan."""
    drawings = [Drawing(anatomy) for anatomy in found]
    making = {drawing.anatomy.component: method.calibrated(drawing) for drawing in drawings}
    done: dict[str, Any] = {}
    try:
        while making:
            installs: Installs = {}
            for name, one in list(making.items()):
                try:
                    installs[name] = next(one)
                except StopIteration as end:
                    done[name] = end.value
                except (ValueError, FastdiffError) as error:
                    if name == found[0].component:
                        raise
                    warnings.warn(f"the {name} has no plan: {error}", stacklevel=4)
            making = {name: one for name, one in making.items() if name in installs}
            if installs:
                draw(installs, drawings)
    finally:
        for one in making.values():
            one.close()
    main = done[found[0].component]
    if len(found) == 1 or not isinstance(main, Planned):
        return main
    several: Any = Each[type(main.found)]  # type: ignore[misc]
    return main.with_plan(several({name: own.plan for name, own in done.items()}))


def _pass(
    pipe: Any, plain: Config, found: list[Anatomy], installs: Installs, drawings: list[Drawing],
    draw: Callable[[Accelerated], None],
) -> None:  # fmt: skip
    """All prompts, with what each denoiser's calibration installs."""
    handle, loops, patches = Observed(pipe, plain, installs), Loops(), PatchSet()
    try:
        for anatomy in found:
            patches.wrap_forward(anatomy.denoiser, loops.ear(anatomy.component, lambda: handle.clock.now))
        put(handle, found)
        with handle:
            loops.listen(handle.clock)
            for drawing in drawings:
                drawing.loops, drawing.weights = loops, quantization(drawing.anatomy)
            draw(handle)
    finally:
        patches.restore()


class Observed(Accelerated):
    """A pipeline whose denoisers have, in the place of a cache, what a calibration installs."""

    def __init__(self, pipe: Any, config: Config, installs: Installs) -> None:
        self._installs = installs
        super().__init__(pipe, Resolved(config, {}))

    def _session(self, anatomy: Anatomy, ahead: bool) -> Session | None:
        install = self._installs.get(anatomy.component)
        return None if install is None else install(anatomy, self.clock, self._recorder)


def draw_all(
    handle: Accelerated, prompts: Sequence[str], seed: int, batch: int, watch: Watch | None, call: dict[str, Any]
) -> None:
    """Draw the prompts in calls of `batch`, see `calls_of`. Raises FastdiffError if no run was complete."""
    pipe, clock, whole = handle.pipe, handle.clock, [0]
    calls, ticks = calls_of(prompts, seed, batch, call), count(1)
    clock.on_start.append(lambda run: whole.append(run.total))
    if watch is not None:
        clock.on_tick.append(lambda _: watch(next(ticks), len(calls) * whole[-1]))
    for given in calls:
        try:
            pipe(given.pop("prompt"), output_type="latent", **given)
        except ValueError as error:  # how diffusers refuses arguments
            raise BadConfig(f"{type(pipe).__name__} refuses: {str(error).strip().splitlines()[0]}") from error
    if handle.report.steps < max(1, whole[-1]):
        raise FastdiffError(f"{type(pipe).__name__} made no complete denoising run to calibrate on")
