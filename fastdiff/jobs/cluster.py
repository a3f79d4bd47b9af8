"""The same job on a Ray cluster: actors hold the accelerated pipeline; this process claims, saves and keeps the books.

Needs the extra `ray`. The model must be found under the same name on every machine.
"""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from fastdiff import threads
from fastdiff.errors import FastdiffError
from fastdiff.images import Sampling
from fastdiff.studio.console import say
from fastdiff.studio.drawing import Drawn, Order, Studio, attempt

from .log import Log
from .manifest import Item

_TRIES = 3  # a picture that takes its worker down that often is given up
_LOOK_AGAIN = 0.5  # seconds


class Painter:
    """An actor with the pipeline. Ray starts it again where it dies; it then loads again with the next picture."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._studio: Studio | None = None

    def load(self) -> str | None:
        """The reason why this model or config cannot be had, if so."""
        try:
            self._studio = self._studio or Studio(
                self._order.model, self._order.layers, self._order.dtype, once=True, outfit=self._order.outfit
            )  # fmt: skip
            self._studio.check([], self._order.preview_every)
        except FastdiffError as error:
            return str(error)
        return None

    def draw(self, job: Sampling) -> Drawn | str:
        reason = self.load()
        return attempt(self._studio, job) if self._studio is not None else reason or ""


def draw(log: Log, order: Order, workers: int | None) -> None:
    """Draw all that is missing. Raises FastdiffError if no worker can be had, or the model cannot be loaded there."""
    first = log.manifest.claim()
    if first is None and not log.manifest.open:
        return  # no need for a cluster
    mine = not ray.is_initialized()
    if mine:
        ray.init()
    try:
        with redirect_stdout(sys.stderr):
            _share(log, _hire(order, workers, 1 + log.manifest.open), first)
    finally:
        if mine:
            ray.shutdown()


def _hire(order: Order, workers: int | None, most: int) -> list[Any]:
    """As many painters as asked for, else as the cluster has GPUs, or CPUs where it has none."""
    found = ray.cluster_resources()
    kind = "GPU" if found.get("GPU") else "CPU"
    there = int(found.get(kind, 0))
    if (workers or 1) > there:
        raise FastdiffError(f"{workers or 1} workers need a {kind} each, the Ray cluster has {there}")
    count = min(workers or there, most)
    resources: dict[str, Any] = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    resources["runtime_env"] = {"env_vars": threads.waiting()}
    actor: Any = ray.remote(Painter).options(max_restarts=-1, max_task_retries=_TRIES - 1, **resources)
    order = replace(order, jobs=(), targets=())  # each worker needs to know how, not what
    painters = [actor.remote(order) for _ in range(count)]
    say(f"{count} workers on Ray, a {kind} each")
    try:
        reasons = [reason for reason in ray.get([painter.load.remote() for painter in painters]) if reason]
    except RayError as error:
        raise FastdiffError(f"a Ray worker did not come up: {_first_line(error)}") from None
    if reasons:
        raise FastdiffError(reasons[0])
    return painters


def _share(log: Log, painters: list[Any], first: Item | None) -> None:
    """Hand out pictures as workers get free. What a dying worker had is drawn by its successor: Ray sees to that."""
    idle = list(painters)
    running: dict[Any, tuple[Any, Item]] = {}
    while first is not None or running or log.manifest.open:
        while idle and (item := first or log.manifest.claim()) is not None:
            painter, first = idle.pop(), None
            running[painter.draw.remote(item.sampling)] = painter, item
        if not running:  # another runner has what is left
            time.sleep(_LOOK_AGAIN)
            continue
        for reference in ray.wait(list(running), timeout=_LOOK_AGAIN)[0]:
            painter, item = running.pop(reference)
            idle.append(painter)
            try:
                outcome = ray.get(reference)
            except RayError as error:
                outcome = f"lost {_TRIES} workers: {_first_line(error)}"
            log.settle(item, outcome)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
