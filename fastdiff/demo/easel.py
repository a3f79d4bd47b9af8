"""Draws a picture without and with acceleration, in a thread that tells how far it is and can be stopped."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Event, Lock, Thread
from typing import Any

from PIL import Image

from fastdiff.clock import Step
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.images import Sampling
from fastdiff.pipelines.loading import embedded
from fastdiff.report import RunReport
from fastdiff.studio.drawing import Drawn, Studio, described
from fastdiff.studio.previews import Palette
from fastdiff.studio.settings import early
from fastdiff.timing import settle

from .order import Order

PREVIEWS = 8  # pictures of the latents in a run, at most
PAUSE = 0.15  # seconds between two looks at a run
IDLE = 2.0  # seconds after which what is not new is said again


class Cancelled(Exception):
    """Somebody wants the run to stop."""


@dataclass(frozen=True)
class Progress:
    """How far a run is; `total` 0 where nobody knows."""

    doing: str
    done: int = 0
    total: int = 0
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Shot:
    """A picture with its report."""

    drawn: Drawn
    report: RunReport


@dataclass(frozen=True)
class Pair:
    """What was asked for: plain and accelerated, and things the user should know."""

    plain: Shot
    fast: Shot
    again: bool  # whether the plain one was drawn for an earlier order
    on_gpu: bool
    warnings: tuple[str, ...] = ()


Said = Progress | Pair


class Easel:
    """One model in memory, one picture at a time. `models`, if given, are all that may be loaded."""

    def __init__(self, models: Sequence[str] | None = None) -> None:
        self.models = models
        self._lock = Lock()
        self._studio: Studio | None = None
        self._loaded = ""
        self._palette: Palette | None = None
        self._plain: tuple[Sampling, Shot] | None = None
        self._warm: tuple[int, int] | None = None

    def draw(self, order: Order, stop: Event) -> Generator[Said, None, None]:
        """What happens, the pair last. Closing the iterator or setting `stop` ends the denoising before its next call
        of the denoiser. Raises Cancelled, or FastdiffError for what cannot be drawn."""
        said: queue.SimpleQueue[Said | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                while not self._lock.acquire(timeout=PAUSE):
                    if stop.is_set():
                        raise Cancelled
                try:
                    said.put(self._pair(order, stop, said.put))
                finally:
                    self._lock.release()
            except BaseException as error:
                said.put(error)
            finally:
                said.put(None)

        Thread(target=work, name="denoising", daemon=True).start()
        try:
            yield from _latest(said)
        finally:
            stop.set()  # and no waiting for the thread: this may run in the server's event loop

    def _pair(self, order: Order, stop: Event, tell: Callable[[Said], None]) -> Pair:
        if self.models is not None and order.model not in self.models:
            raise BadConfig(f"model {order.model!r} is not served here; choose one of {', '.join(self.models)}")
        early(order.layers, described(order.model), order.model)
        studio = self._load(order.model, tell)
        studio.check([order.sampling], None)
        self._warm_up(studio, order.sampling, stop, tell)
        tell(Progress("Installing the settings"))
        studio.use(order.layers)
        if studio.fast.config.compile.enabled:
            self._shot(studio, order.sampling, "Compiling", stop, tell)
        fast = self._shot(studio, order.sampling, "Accelerated", stop, tell)
        warnings = tuple(_warnings(studio, order.sampling, fast))
        again = self._plain is not None and self._plain[0] == order.sampling
        plain = self._plain_shot(studio, order.sampling, stop, tell)
        return Pair(plain, fast, again, studio.pipe.device.type == "cuda", warnings)

    def _load(self, model: str, tell: Callable[[Said], None]) -> Studio:
        if self._studio is None or self._loaded != model:
            tell(Progress(f"Loading {model}"))
            self._studio = self._palette = self._plain = self._warm = None  # never two models in memory
            self._studio = Studio(model, [], None)
            self._studio.only("picture", "video")
            self._loaded = model
            self._studio.pipe.set_progress_bar_config(disable=True)
            vae = getattr(self._studio.pipe, "vae", None)
            self._palette = Palette(vae) if vae is not None and hasattr(vae.config, "scaling_factor") else None
        return self._studio

    def _warm_up(self, studio: Studio, asked: Sampling, stop: Event, tell: Callable[[Said], None]) -> None:
        """The first run of a size is slower, which would be counted against whichever comes first."""
        size = (asked.width or 0, asked.height or 0)
        if self._warm != size:
            studio.use([])
            self._shot(studio, asked.model_copy(update={"steps": 2}), "Warming up", stop, tell)
            self._warm = size

    def _plain_shot(self, studio: Studio, asked: Sampling, stop: Event, tell: Callable[[Said], None]) -> Shot:
        """Without acceleration; drawn once for orders that differ in their settings only."""
        studio.use([])
        if self._plain is not None and self._plain[0] == asked:
            return self._plain[1]
        shot = self._shot(studio, asked, "Without acceleration", stop, tell)
        self._plain = (asked, shot)
        return shot

    def _shot(self, studio: Studio, asked: Sampling, doing: str, stop: Event, tell: Callable[[Said], None]) -> Shot:
        watch = _Watch(doing, self._palette, stop, tell)
        clock = studio.fast.clock
        clock.on_call.append(watch.call)
        clock.on_tick.append(lambda index: watch.tick(index, clock.run.total if clock.run else 0))
        shows = self._palette is not None and "callback_on_step_end" in studio.known
        drawn = studio.draw(asked, watch.show if shows else None)
        seconds = drawn.seconds - watch.seconds
        return Shot(Drawn(drawn.image, drawn.made, seconds, drawn.summary, drawn.idle), studio.fast.report)


class _Watch:
    """Tells of one run, stops it, and knows how long its own previews took."""

    def __init__(self, doing: str, palette: Palette | None, stop: Event, tell: Callable[[Said], None]) -> None:
        self.doing, self.palette, self.stop, self.tell = doing, palette, stop, tell
        self.total, self.seconds = 0, 0.0

    def call(self, step: Step) -> None:
        if self.stop.is_set():
            raise Cancelled

    def tick(self, index: int, total: int) -> None:
        self.total = total
        self.tell(Progress(self.doing, index + 1, total))

    def show(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        every = max(1, self.total // PREVIEWS)
        if self.palette is not None and (step + 1) % every == 0 and "latents" in values:
            settle(values["latents"].device)  # what the step takes is not the preview's
            began = time.perf_counter()
            try:
                picture = self.palette.picture(values["latents"])
                self.tell(Progress(self.doing, step + 1, self.total, picture))
            except FastdiffError:
                self.palette = None  # latents that are no picture: go on without
            self.seconds += time.perf_counter() - began
        return values


def _latest(said: queue.SimpleQueue[Said | BaseException | None]) -> Iterator[Said]:
    """What was said last, a few times a second; seldom where nothing is new: only then can a reader leave, and telling
    all who wait keeps the server from its work."""
    last: Said = Progress("Waiting for another picture")
    patience = PAUSE
    while True:
        found: list[Said | BaseException | None] = []
        with suppress(queue.Empty):
            found.append(said.get(timeout=patience))
            time.sleep(PAUSE)
        patience, preview = IDLE, None
        while found or not said.empty():
            item = found.pop() if found else said.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                yield last
                return
            preview = item.preview if isinstance(item, Progress) and item.preview else preview
            last = item
        yield last if isinstance(last, Pair) or last.preview else replace(last, preview=preview)


def _warnings(studio: Studio, asked: Sampling, fast: Shot) -> Iterator[str]:
    if studio.too_long(asked.prompt):
        yield "The model reads only the beginning of this prompt: it is too long."
    if fast.drawn.idle:
        yield f"Nothing was cached: {fast.drawn.idle} computed all {fast.report.steps} steps with these settings."


def offered(named: Sequence[str]) -> list[str]:
    """Models to choose from: those named when the page was started, then the embedded ones."""
    return list(dict.fromkeys([*named, "shapes-unet", *embedded()]))
