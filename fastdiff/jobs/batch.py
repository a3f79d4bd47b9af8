"""Draws a list of prompts into a folder: what is missing, as long as anything is, here or on a Ray cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.cli.console import say, warn
from fastdiff.cli.jobs import Asked
from fastdiff.cli.previews import Previews
from fastdiff.cli.studio import Drawn, Order, Studio, announce, described, early
from fastdiff.errors import FastdiffError, PeerLost
from fastdiff.images import Sampling, save

from .manifest import Item, Manifest, items_of

_LOOK_AGAIN = 0.5  # seconds between looks whether another runner has finished, or died


@dataclass(frozen=True)
class Batch:
    """An order whose pictures are `asked` one by one; those that cannot be drawn are told, the rest goes on."""

    order: Order
    folder: Path
    asked: list[Asked]
    workers: int | None = None  # of a Ray cluster; 0 takes what it has


class Log:
    """Saves, announces and writes down what comes out of a job."""

    def __init__(self, batch: Batch) -> None:
        order = self.order = batch.order
        early(order.layers, described(order.model), order.model)
        model = str(Path(order.model).resolve()) if Path(order.model).is_dir() else order.model
        items, mistakes = items_of(batch.asked, [model, order.dtype, order.layers])
        self.manifest = Manifest(batch.folder, items, mistakes, order.overwrite)
        self._began, self._total, self._drawn = time.monotonic(), len(items), 0
        self._mistakes = len(mistakes)
        self._out = sys.stdout  # which Ray's own threads print to, unless they are told another one
        for row in mistakes:
            warn(f"{row.where}: {row.error}")
        if done := self.manifest.counts()["done"]:
            say(f"{done} of {len(items)} pictures are there already")

    def settle(self, item: Item, outcome: Drawn | str) -> None:
        """A picture, or why there is none. Raises FastdiffError if it cannot be written: nor could the next."""
        if isinstance(outcome, str):
            self.manifest.settle(item, status="failed", error=outcome)
            warn(f"{item.where or repr(item.sampling.prompt[:40])}: {outcome}")
            return
        path, overwrite = self.manifest.place(item)
        made = outcome.made.model_copy(update={"job": item.id}) if self.order.metadata else None
        path = save(outcome.image, path, made, overwrite=overwrite)
        self.manifest.settle(item, status="done", file=path.name, seconds=round(outcome.seconds, 3))
        self._drawn += 1
        announce(outcome, path, self.order.as_json, self._out)
        left = self.manifest.counts()["pending"]
        seconds = (time.monotonic() - self._began) / self._drawn * left
        say(f"{self._total - left} of {self._total}" + (f", about {seconds / 60:.0f} min left" if seconds > 90 else ""))

    def close(self) -> int:
        """What became of the job, in a line; the exit code."""
        counts = self.manifest.counts()
        wrong = counts["failed"] + self._mistakes
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        refused = f", {self._mistakes} lines refused" if self._mistakes else ""
        say(f"{self._drawn} drawn now, {counts['done']} of {self._total} done{failed}{refused}")
        return 1 if wrong else 0


def run(batch: Batch) -> int:
    """Draw all that is missing; 1 if something could not be drawn. In a parallel run every rank calls this."""
    if batch.workers is not None:
        from . import cluster

        log = Log(batch)
        cluster.draw(log, batch.order, batch.workers or None)
        return log.close()
    return _draw_here(batch)


def _draw_here(batch: Batch) -> int:
    from fastdiff.cli import ranks

    order, log = batch.order, None
    studio = _open(order) if ranks.launched() else None  # which knows who leads
    if studio is None or studio.leads:
        log = Log(batch)
    while True:
        item = _next(log.manifest) if log else None
        if studio is not None:
            item = studio.told(item)
        if item is None:
            return log.close() if log else 0
        studio = studio or _open(order)
        outcome = attempt(studio, item.sampling, _previews(studio, log, item, order))
        if log is not None:
            log.settle(item, outcome)


def _open(order: Order) -> Studio:
    studio = Studio(order.model, order.layers, order.dtype)
    studio.check([], order.preview_every)
    if order.made is not None:
        studio.compare(order.made)
    return studio


def _next(manifest: Manifest) -> Item | None:
    """The next picture to draw; waits for those that other runners draw, in case they do not live to finish."""
    told = False
    while (item := manifest.claim()) is None and manifest.open:
        if not told:
            say(f"waiting for {manifest.open} pictures that another runner is drawing")
        told = True
        time.sleep(_LOOK_AGAIN)
    return item


def attempt(studio: Studio, job: Sampling, on_step_end: Callable[..., Any] | None = None) -> Drawn | str:
    """A picture, or the reason why there is none; what breaks the whole run is raised."""
    try:
        studio.check([job], None)
        return studio.draw(job, on_step_end)
    except PeerLost:
        raise
    except FastdiffError as error:
        return str(error)
    except Exception as error:  # whatever a pipeline raises for one prompt must not cost the others
        return f"{type(error).__name__}: {error}"


def _previews(studio: Studio, log: Log | None, item: Item, order: Order) -> Previews | None:
    if log is None or order.preview_every is None:
        return None
    return Previews(studio.pipe.vae, order.preview_every, log.manifest.place(item)[0])
