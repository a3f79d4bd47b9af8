"""What a request has in the queue, and while it is drawn."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdiff.images import Sampling
from fastdiff.pipelines.loading import call_defaults
from fastdiff.studio import pictures

from .protocol import Problem
from .written import Form

_SIDE = 512  # pixels of a picture whose size nobody knows
_PACE = 1e-6  # seconds a pixel and step, until it is known


@dataclass(eq=False)
class Ticket:
    """One request: what to draw, what has become of it, and whether it is still wanted.

    `events` gets a dict for each step, preview and picture, and at last None. `result` is the list of pictures, or the
    Problem that ended it. Both belong to the event loop; the drawing thread only looks at `stopped`.
    """

    jobs: Sequence[Sampling]
    preset: str
    form: Form = field(default_factory=Form)
    previews: int = 0
    progress: bool = False
    kind: str = "image_generation"  # begins the names of its events
    loras: Mapping[str, str] = field(default_factory=dict)
    folder: tempfile.TemporaryDirectory[str] | None = None  # with the pictures that it is drawn from
    lasting: bool = False  # whether nobody holds a line for it, and no time is too long

    def __post_init__(self) -> None:
        self.stopped = self.alone = self.begun = False
        self.asked = self.since = time.monotonic()
        self.pixels = self.work = self.todo = 0.0  # of a step; and what is to be done in all, and still, in pixels
        self.paces: Mapping[str, float] = {}
        self.index = 0
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.result: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self.result.add_done_callback(lambda _: self.events.put_nowait(None))

    @property
    def inputs(self) -> frozenset[str]:
        return frozenset(option for option, _ in self.jobs[0].pictures)

    def weigh(self, pipe: Any, paces: Mapping[str, float]) -> None:
        """How much it is; `paces` are the seconds of a pixel and step, by preset."""
        first, usual = self.jobs[0], pictures.usual_sides(pipe) or (_SIDE, _SIDE)
        steps = first.steps or call_defaults(pipe).get("num_inference_steps") or 1
        self.pixels = float((first.width or usual[0]) * (first.height or usual[1]) * (first.frames or 1))
        self.todo = self.work = self.pixels * (steps * (first.strength or 1) + 1) * len(self.jobs)
        self.paces = paces

    @property
    def left(self) -> float:
        return self.todo * self.paces.get(self.preset, min(self.paces.values(), default=_PACE))

    @property
    def done(self) -> float:
        """The share of it that is done."""
        return 1 - self.todo / self.work if self.work else 0.0

    def stop(self, why: Problem) -> None:
        """End it, in the queue or in the middle of denoising; does nothing once it is done."""
        self.stopped = True
        if not self.result.done():
            self.result.set_exception(why)
            self.result.exception()  # a client that is gone reads no answer; that is no news for the log

    def finish(self, made: list[dict[str, Any]] | Problem) -> None:
        if isinstance(made, Problem):
            self.stop(made)
        elif not self.result.done():
            self.result.set_result(made)

    def forget(self) -> None:
        """Nothing reads its pictures any more."""
        if self.folder is not None:
            self.folder.cleanup()
