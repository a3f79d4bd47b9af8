"""Draws a list of prompts into a folder: what is missing, as long as anything is, here or on a Ray cluster."""

from __future__ import annotations

import time

from fastdiff.studio import ranks
from fastdiff.studio.console import say
from fastdiff.studio.drawing import Order, Studio, attempt
from fastdiff.studio.previews import Previews

from .log import Batch, Log
from .manifest import Item, Manifest

_LOOK_AGAIN = 0.5  # seconds between looks whether another runner has finished, or died


def run(batch: Batch) -> int:
    """Draw all that is missing; 1 if something could not be drawn. In a parallel run every rank calls this."""
    if batch.workers is not None:
        from . import cluster  # ray is an extra

        log = Log(batch)
        cluster.draw(log, batch.order, batch.workers or None)
        return log.close()
    return _draw_here(batch)


def _draw_here(batch: Batch) -> int:
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
    studio = Studio(order.model, order.layers, order.dtype, once=True, outfit=order.outfit)
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


def _previews(studio: Studio, log: Log | None, item: Item, order: Order) -> Previews | None:
    if log is None or order.preview_every is None:
        return None
    return Previews(studio.pipe.vae, order.preview_every, log.manifest.place(item)[0])
