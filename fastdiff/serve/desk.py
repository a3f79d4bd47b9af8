"""The queue in front of one pipeline: requests wait their turn, and are drawn one after the other in one thread."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastdiff.clock import Step
from fastdiff.config import Layer
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.images import Sampling, encode
from fastdiff.pipelines.loading import call_defaults
from fastdiff.studio.drawing import Drawn, Studio
from fastdiff.studio.previews import Palette

from .meters import Meters
from .protocol import Limits, Problem

_SAME_EACH_TIME = ("steps", "computed", "cached", "partly")  # of a report; seconds and memory are not
_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """Raised inside the denoising loop when nobody wants the picture any more."""


class Ticket:
    """One request: what to draw, what has become of it, and whether it is still wanted.

    `events` gets a dict for each step, preview and picture, and at last None. `result` is the list of pictures, or the
    Problem that ended it. Both belong to the event loop; the drawing thread only looks at `stopped`.
    """

    def __init__(self, jobs: Sequence[Sampling], preset: str, previews: int = 0) -> None:
        self.jobs, self.preset, self.previews = jobs, preset, previews
        self.stopped = False
        self.asked = time.monotonic()
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.result: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self.result.add_done_callback(lambda _: self.events.put_nowait(None))

    def stop(self, why: Problem) -> None:
        """End it, in the queue or in the middle of denoising; does nothing once it is done."""
        self.stopped = True
        if not self.result.done():
            self.result.set_exception(why)
            self.result.exception()  # a client that is gone reads no answer; that is no news for the log


class Desk:
    """Takes tickets up to a limit and serves them in turn. One model, one thread that draws."""

    def __init__(self, studio: Studio, shelf: Mapping[str, Sequence[Layer]], limits: Limits, meters: Meters) -> None:
        self.studio, self.shelf, self.limits, self.meters = studio, shelf, limits, meters
        self.closing = False
        self._waiting: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._preset: str | None = None
        self._thread = ThreadPoolExecutor(1, "draw")
        for name in reversed(list(shelf)):  # a preset that cannot work is found before anybody is served
            self._switch(name)

    @property
    def drawing(self) -> bool:
        return self._current is not None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket. Raises Problem 429 when the queue is full, 503 when the server is closing."""
        if self.closing:
            raise Problem(503, "closing", "the server is shutting down; ask another one")
        if len(self._waiting) >= self.limits.queue:
            raise Problem(429, "queue_full", f"{len(self._waiting)} requests are waiting already; try again later")
        self._waiting.append(ticket)
        late = Problem(504, "timeout", f"not done within {self.limits.timeout:g} s; ask for fewer steps or images")
        timer = self._loop.call_later(self.limits.timeout, ticket.stop, late)
        ticket.result.add_done_callback(lambda _: self._done(ticket, timer))
        self._wake.set()

    def _done(self, ticket: Ticket, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        with contextlib.suppress(ValueError):
            self._waiting.remove(ticket)  # its place in the queue is free at once

    def close(self) -> None:
        """Take nothing more; what is not done after the grace fails. A second call ends the grace."""
        delay = 0.0 if self.closing else self.limits.grace
        self.closing = True
        self._loop.call_later(delay, self._fail_all)

    def _fail_all(self) -> None:
        for ticket in [*self._waiting, *([self._current] if self._current else [])]:
            ticket.stop(Problem(503, "closing", "the server is shutting down; ask another one"))

    @contextlib.asynccontextmanager
    async def open(self) -> Any:
        """Serve tickets inside this context, on the event loop that enters it."""
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        serving = asyncio.create_task(self._serve())
        try:
            yield self
        finally:
            self.closing = True
            self._fail_all()
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            await asyncio.to_thread(self._thread.shutdown)

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            while self._waiting:
                ticket = self._current = self._waiting.popleft()
                try:
                    await self._answer(ticket)
                finally:
                    self._current = None
            self._wake.clear()

    async def _answer(self, ticket: Ticket) -> None:
        self.meters.waited.observe(time.monotonic() - ticket.asked)
        try:
            pictures = await self._loop.run_in_executor(self._thread, self._draw, ticket)
        except _Stopped:
            return
        except BadConfig as error:
            ticket.stop(Problem(400, "refused", str(error)))
        except FastdiffError as error:
            ticket.stop(Problem(500, "failed", str(error)))
        except Exception:
            _log.exception("a request failed")
            ticket.stop(Problem(500, "failed", "drawing failed; the server's log says why"))
        else:
            if not ticket.result.done():
                ticket.result.set_result(pictures)

    # from here on: the drawing thread

    def _draw(self, ticket: Ticket) -> list[dict[str, Any]]:
        self._heed()
        self._switch(ticket.preset)
        return [self._picture(ticket, index, job) for index, job in enumerate(ticket.jobs)]

    def _picture(self, ticket: Ticket, index: int, job: Sampling) -> dict[str, Any]:
        self._index = index
        shown = self._previewer(ticket) if ticket.previews and not index else None
        drawn = self.studio.draw(job, shown)
        self.meters.drew(drawn)
        made = {
            "b64_json": _png(drawn),
            "seed": drawn.made.seed,
            "seconds": round(drawn.seconds, 4),
            "prompt_cut": self.studio.too_long(job.prompt),
            "report": drawn.made.report,
        }
        size = f"{drawn.image.width}x{drawn.image.height}"
        self._tell(ticket, {"type": "image_generation.completed", "index": index, "size": size} | made)
        return made | {"size": size}

    def _switch(self, name: str) -> None:
        if name != self._preset:
            self.studio.use(self.shelf[name])
            self._preset = name
            clock = self.studio.fast.clock
            clock.on_call.append(self._heed)
            clock.on_tick.append(self._progress)

    def _heed(self, step: Step | None = None) -> None:
        """Before every call of the denoiser."""
        if self._current is not None and self._current.stopped:
            raise _Stopped

    def _progress(self, step: int) -> None:
        ticket, run = self._current, self.studio.fast.clock.run
        if ticket is not None and run is not None:
            self._tell(ticket, {"type": "image_generation.progress", "index": self._index, "step": step + 1,
                                "steps": run.total})  # fmt: skip

    def _tell(self, ticket: Ticket, event: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(ticket.events.put_nowait, event)

    def _previewer(self, ticket: Ticket) -> Any:
        """A `callback_on_step_end` that tells of evenly spread previews."""
        palette = Palette(self.studio.pipe.vae)
        steps = ticket.jobs[0].steps or call_defaults(self.studio.pipe)["num_inference_steps"]
        due = [round((k + 1) * steps / (ticket.previews + 1)) for k in range(ticket.previews)]

        def show(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step + 1 in due:
                shown = base64.b64encode(encode(palette.picture(values["latents"]))).decode()
                self._tell(ticket, {"type": "image_generation.partial_image", "b64_json": shown,
                                    "partial_image_index": due.index(step + 1)})  # fmt: skip
            return values

        return show


def _png(drawn: Drawn) -> str:
    """The same bytes each time: with the settings, without the seconds of this run."""
    report = {name: drawn.made.report[name] for name in _SAME_EACH_TIME}
    made = drawn.made.model_copy(update={"report": report})
    return base64.b64encode(encode(drawn.image, made)).decode()
