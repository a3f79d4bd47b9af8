"""What comes out of a job: files, their rows in the manifest, and what the user is told."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fastdiff import media
from fastdiff.studio.console import say, warn
from fastdiff.studio.drawing import Drawn, Order, announce, described
from fastdiff.studio.settings import early
from fastdiff.studio.wanted import Asked

from .manifest import Item, Manifest, items_of


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
        outfit = [sorted((name, str(value)) for name, value in order.outfit.items())] if order.outfit else []
        items, mistakes = items_of(batch.asked, [model, order.dtype, order.layers, *outfit])
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
        path = media.save(outcome.image, path.with_suffix(media.suffix(outcome.image)), made, overwrite=overwrite)
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
