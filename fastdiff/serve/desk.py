"""The queue in front of one model: requests are drawn in turns, which change between two steps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from PIL import Image

from fastdiff.config import Layer
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.images import Sampling
from fastdiff.pipelines.inputs import fitting
from fastdiff.pipelines.loading import call_defaults
from fastdiff.studio.drawing import Studio
from fastdiff.studio.previews import Palette

from .meters import Meters
from .places import Place, places
from .protocol import Limits, Problem
from .tickets import Ticket
from .turns import Turns
from .written import tokens, usage

_FRESH = 0.2  # share of the newest step in what a preset's steps take
_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """Raised inside the denoising loop when nobody wants the picture any more."""


class Desk:
    """Takes tickets up to a limit and serves them in turns. One model, one thread that computes at a time."""

    def __init__(
        self, studio: Studio, shelf: Mapping[str, Sequence[Layer]], limits: Limits, meters: Meters,
        loras: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.studio, self.shelf, self.limits, self.meters = studio, shelf, limits, meters
        self.loras = loras or {}
        self.closing = False
        self.places = places(studio, limits.in_progress)
        self._able: dict[frozenset[str], Studio] = {}
        self._alone: set[str] = set()
        self._paces: dict[str, float] = {}
        self._turns: Turns[Ticket] = Turns(
            len(self.places), self._serve, lambda one, n: self.places[n].suits(one.inputs, one.preset, one.loras)
        )
        for name in reversed(list(shelf)):  # a preset that cannot work is found before anybody is served
            self._suit(self.places[0], frozenset(), name, {})
            config = self.places[0].studio.fast.config
            if config.quant is not None or config.parallel is not None or config.compile.enabled:
                self._alone.add(name)  # what it makes of the layers is too much to have several times
        for name, file in self.loras.items():
            self._suit(self.places[0], frozenset(), next(iter(shelf)), {name: file})
        self._suit(self.places[0], frozenset(), next(iter(shelf)), {})

    @property
    def drawing(self) -> bool:
        return bool(self._turns.begun)

    @property
    def waiting(self) -> int:
        return len(self._turns.waiting)

    def able(self, inputs: frozenset[str]) -> Studio:
        """What checks requests that are drawn from these inputs. Raises UnsupportedModel where the model takes none."""
        if inputs not in self._able:
            self._able[inputs] = self.studio.over(fitting(self.studio.pipe, inputs))
        return self._able[inputs]

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket. Raises Problem 429 when the queue is full, 503 when the server is closing."""
        if self.closing:
            raise Problem(503, "closing", "the server is shutting down; ask another one")
        if self.waiting >= self.limits.queue:
            raise Problem(429, "queue_full", f"{self.waiting} requests are waiting already; try again later")
        ticket.weigh(self.able(ticket.inputs).pipe, self._paces)
        ticket.alone = ticket.preset in self._alone
        timers: list[asyncio.TimerHandle] = []
        if not ticket.lasting:
            late = Problem(504, "timeout", f"not done within {self.limits.timeout:g} s; ask for fewer steps or images")
            timers.append(self._loop.call_later(self.limits.timeout, ticket.stop, late))
        ticket.result.add_done_callback(lambda _: self._done(ticket, timers))
        self._turns.add(ticket)

    def _done(self, ticket: Ticket, timers: Sequence[asyncio.TimerHandle]) -> None:
        for timer in timers:
            timer.cancel()
        if self._turns.drop(ticket):  # its place in the queue is free at once
            ticket.forget()

    def close(self) -> None:
        """Take nothing more; what is not done after the grace fails. A second call ends the grace."""
        delay = 0.0 if self.closing else self.limits.grace
        self.closing = True
        self._loop.call_later(delay, self._fail_all)

    def _fail_all(self) -> None:
        for ticket in [*self._turns.waiting, *self._turns.begun]:
            ticket.stop(Problem(503, "closing", "the server is shutting down; ask another one"))

    @contextlib.asynccontextmanager
    async def open(self) -> Any:
        """Serve tickets inside this context, on the event loop that enters it."""
        self._loop = asyncio.get_running_loop()
        try:
            yield self
        finally:
            self.closing = True
            self._fail_all()
            await asyncio.to_thread(self._turns.close)

    # from here on: the threads that draw, of which one computes at a time

    def _serve(self, ticket: Ticket, number: int) -> None:
        place = self.places[number]
        made: list[dict[str, Any]] | Problem | None = None
        self.meters.waited.observe(time.monotonic() - ticket.asked)
        place.ticket, ticket.begun = ticket, True
        try:
            made = self._draw(ticket, place)
        except _Stopped:
            pass
        except BadConfig as error:
            made = Problem(400, "refused", str(error))
        except FastdiffError as error:
            made = Problem(500, "failed", str(error))
        except Exception:
            _log.exception("a request failed")
            made = Problem(500, "failed", "drawing failed; the server's log says why")
        finally:
            place.ticket = None
            ticket.forget()
        if made is not None:
            self._loop.call_soon_threadsafe(ticket.finish, made)

    def _draw(self, ticket: Ticket, place: Place) -> list[dict[str, Any]]:
        self._heed(ticket)
        self._suit(place, ticket.inputs, ticket.preset, ticket.loras)
        ticket.since = time.monotonic()
        return [self._picture(ticket, place, index, job) for index, job in enumerate(ticket.jobs)]

    def _suit(self, place: Place, inputs: frozenset[str], preset: str, loras: Mapping[str, str]) -> None:
        if place.suit(inputs, preset, self.shelf[preset], loras):
            clock = place.studio.fast.clock
            clock.on_call.append(lambda _: self._heed(place.ticket))
            clock.on_tick.append(partial(self._stepped, place))

    def _picture(self, ticket: Ticket, place: Place, index: int, job: Sampling) -> dict[str, Any]:
        ticket.index = index
        drawn = place.studio.draw(job, self._previewer(ticket, place) if ticket.previews and not index else None)
        self.meters.drew(drawn)
        data = ticket.form.written(drawn)
        made: dict[str, Any] = {
            "seed": drawn.made.seed,
            "seconds": round(drawn.seconds, 4),
            "prompt_cut": place.studio.too_long(job.prompt),
            "report": drawn.made.report,
        }
        width, height = drawn.image.size
        size = f"{width}x{height}"
        if not isinstance(drawn.image, Image.Image):
            return made | {"size": size, "clip": drawn.image, "data": data}
        counts, shown = tokens(place.studio, job, (width, height)), b64encode(data).decode()
        event = {"type": f"{ticket.kind}.completed", "index": index, "b64_json": shown, "usage": usage([counts])}
        self._tell(ticket, event | made | ticket.form.event(size))
        return made | ticket.form.shown(shown) | {"size": size, "tokens": counts}

    def _heed(self, ticket: Ticket | None) -> None:
        """Before every call of the denoiser."""
        if ticket is not None and ticket.stopped:
            raise _Stopped

    def _stepped(self, place: Place, step: int) -> None:
        """Between two steps: what is more urgent goes first."""
        ticket, run = place.ticket, place.studio.fast.clock.run
        if ticket is None or run is None:
            return
        place.leash.step(run.device)
        if step:  # the first has the text in it
            pace = (time.monotonic() - ticket.since) / ticket.pixels
            known = self._paces.get(ticket.preset, pace)
            self._paces[ticket.preset] = known + _FRESH * (pace - known)
        later = len(ticket.jobs) - ticket.index - 1
        ticket.todo = ticket.pixels * (run.total - step + later * (run.total + 1))
        if ticket.progress:
            told = {"type": f"{ticket.kind}.progress", "index": ticket.index, "step": step + 1, "steps": run.total}
            self._tell(ticket, told)
        self._turns.pause(ticket)
        self._heed(ticket)
        ticket.since = time.monotonic()

    def _tell(self, ticket: Ticket, event: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(ticket.events.put_nowait, event)

    def _previewer(self, ticket: Ticket, place: Place) -> Callable[..., Any]:
        """A `callback_on_step_end` that tells of evenly spread previews."""
        palette, job = Palette(place.studio.pipe.vae), ticket.jobs[0]
        steps = job.steps or call_defaults(place.studio.pipe)["num_inference_steps"]
        due = [round((k + 1) * steps / (ticket.previews + 1)) for k in range(ticket.previews)]
        about = ticket.form.event(f"{job.width}x{job.height}" if job.width else "auto")

        def show(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step + 1 in due:
                shown = b64encode(ticket.form.encode(palette.picture(values["latents"]))).decode()
                event = {"type": f"{ticket.kind}.partial_image", "b64_json": shown}
                self._tell(ticket, event | about | {"partial_image_index": due.index(step + 1)})
            return values

        return show
