from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from fastdiff.cli.serve import shelf
from fastdiff.pipelines.accelerate import restore
from fastdiff.serve.app import Options, build
from fastdiff.serve.desk import Desk
from fastdiff.serve.protocol import Limits
from tests.cli.conftest import cli, model
from tests.clusters import cluster

__all__ = ["cli", "cluster", "model"]

CACHED = shelf(["lossless"], [], ["cache.method=deepcache", "cache.interval=2"])["lossless"]
LIMITS = Limits(images=2, side=64, steps=400, queue=2, timeout=600, grace=5)


@dataclass(frozen=True)
class Server:
    """A server of a tiny model in this process."""

    url: str
    desk: Desk

    def call(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and parsed answer; `body` is JSON, or bytes as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        heads = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        asked = urllib.request.Request(self.url + path, data, heads)
        try:
            with urllib.request.urlopen(asked, timeout=900) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode()

    def edit(self, files: dict[str, Any], **fields: Any) -> tuple[int, Any]:
        """The same of a form with pictures."""
        sent = [(name, (f"{name}.png", data)) for name, given in files.items()
                for data in (given if isinstance(given, list) else [given])]  # fmt: skip
        body = {"prompt": "a cat", "steps": 1, "seed": 1} | fields
        answer = httpx.post(f"{self.url}/v1/images/edits", data=body, files=sent or {"mask": b""}, timeout=900)
        return answer.status_code, answer.json()

    def clocks(self) -> list[Any]:
        """Of each place, with the first preset; listeners stay as long as that does."""
        self.idle()
        for place in self.desk.places:
            self.desk._suit(place, frozenset(), next(iter(self.desk.shelf)), {})
        return [place.studio.fast.clock for place in self.desk.places]

    def draw(self, **body: Any) -> tuple[int, Any]:
        return self.call("/v1/images/generations", {"prompt": "a cat", "steps": 1, "seed": 1} | body)

    def metric(self, name: str) -> float:
        lines = self.call("/metrics")[1].split("\n")
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"fastdiff_{name} ")), 0.0)

    def idle(self) -> None:
        """Returns when nothing is drawn or waits."""
        wait_for(lambda: not self.desk.drawing and not self.desk.waiting)


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def serving(options: Options) -> Iterator[Server]:
    app = build(options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.desk)
    finally:
        server.should_exit = True
        thread.join()
        for place in app.state.desk.places:
            restore(place.studio.pipe)


@pytest.fixture(scope="package")
def server(model: str) -> Iterator[Server]:
    presets = {"lossless": shelf(["lossless"], [], [])["lossless"], "cached": CACHED}
    with serving(Options(model, presets, limits=LIMITS, hosts=("127.0.0.1", "localhost"))) as found:
        yield found


@pytest.fixture
def gate(server: Server) -> Iterator[threading.Event]:
    """As long as it is not set, the denoiser waits before every call."""
    opened = threading.Event()
    clocks = server.clocks()

    def wait(step: object) -> None:
        begun = server.desk._turns.begun
        while not opened.wait(0.005) and not any(ticket.stopped for ticket in begun):
            pass

    for clock in clocks:
        clock.on_call.append(wait)
    yield opened
    opened.set()
    server.idle()
    for clock in clocks:
        clock.on_call.remove(wait)
