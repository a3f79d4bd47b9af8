"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastdiff.studio.drawing import Drawn

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Meters:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self._registry, "namespace": "fastdiff"}
        self.answers = Counter("answers", "Answered requests for images by HTTP status", ["status"], **known)
        self.images = Counter("images", "Images drawn", **known)
        self.steps = Counter("steps", "Denoising steps by kind", ["kind"], **known)
        self.waited = Histogram("waited_seconds", "Seconds in the queue", buckets=_SECONDS, **known)
        self.drawn = Histogram("drawn_seconds", "Seconds an image took", buckets=_SECONDS, **known)
        self._waiting = Gauge("waiting", "Requests in the queue", **known)
        self._drawing = Gauge("drawing", "Requests being drawn", **known)

    def watch(self, waiting: Callable[[], float], drawing: Callable[[], float]) -> None:
        self._waiting.set_function(waiting)
        self._drawing.set_function(drawing)

    def drew(self, drawn: Drawn) -> None:
        self.images.inc()
        self.drawn.observe(drawn.seconds)
        for kind in ("computed", "cached"):
            self.steps.labels(kind).inc(drawn.made.report[kind])

    def page(self) -> bytes:
        return generate_latest(self._registry)
