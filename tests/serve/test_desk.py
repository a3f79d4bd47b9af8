"""The queue: full, late, abandoned, closing, failing; whatever happens, the next request gets its picture."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from openai import DEFAULT_CONNECTION_LIMITS

from fastdiff.cli import run
from fastdiff.cli.serve import shelf
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.serve.app import Options
from fastdiff.serve.door import read_keys
from tests.forks import renew_threads

from .conftest import LIMITS, Server, serving, wait_for


def later(server: Server, pool: ThreadPoolExecutor, **body: Any):
    return pool.submit(server.draw, **body)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as found:
        yield found


def test_full_queue(server: Server, gate: threading.Event, pool: ThreadPoolExecutor) -> None:
    running = later(server, pool)
    wait_for(lambda: server.desk.drawing)
    waiting = [later(server, pool, seed=n) for n in (2, 3)]
    wait_for(lambda: server.desk.waiting == 2)
    status, reply = server.draw()
    assert (status, reply["error"]["code"]) == (429, "queue_full")
    assert server.call("/health")[1] == {"status": "ok", "model": "tiny-sd", "drawing": True, "waiting": 2}
    gate.set()
    assert [answer.result()[0] for answer in (running, *waiting)] == [200] * 3
    assert server.draw()[0] == 200


def test_time_out(server: Server, gate: threading.Event, pool: ThreadPoolExecutor, monkeypatch) -> None:
    """Also of those that wait; both give up their place."""
    monkeypatch.setattr(server.desk, "limits", LIMITS.model_copy(update={"timeout": 0.3}))
    answers = [later(server, pool, seed=n) for n in (1, 2)]
    assert [answer.result()[0] for answer in answers] == [504] * 2
    assert answers[0].result()[1]["error"]["message"] == "not done within 0.3 s; ask for fewer steps or images"
    monkeypatch.undo()
    server.idle()
    gate.set()
    assert server.draw()[0] == 200


def ask(server: Server, **body: Any) -> http.client.HTTPConnection:
    link = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=600)
    body = {"prompt": "a cat", "steps": 400, "seed": 1} | body
    link.request("POST", "/v1/images/generations", json.dumps(body), {"content-type": "application/json"})
    return link


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_the_drawing(server: Server, stream: bool) -> None:
    server.idle()
    expected = server.draw(steps=3)[1]["data"][0]["b64_json"]
    images, calls = server.metric("images_total"), []
    clocks = server.clocks()
    for clock in clocks:
        clock.on_call.append(calls.append)
    try:
        link = ask(server, stream=stream)
        wait_for(lambda: len(calls) >= 3)
        link.close()
        server.idle()
        assert len(calls) < 400
        stopped_at = len(calls)
        time.sleep(0.2)
        assert len(calls) == stopped_at
    finally:
        for clock in clocks:
            clock.on_call.remove(calls.append)
    assert server.metric("images_total") == images
    assert server.draw(steps=3)[1]["data"][0]["b64_json"] == expected


def test_a_client_that_goes_away_frees_its_place(server: Server, gate: threading.Event, pool) -> None:
    running = later(server, pool)
    wait_for(lambda: server.desk.drawing)
    links = [ask(server) for _ in range(2)]
    wait_for(lambda: server.desk.waiting == 2)
    links[0].close()
    wait_for(lambda: server.desk.waiting == 1)
    links[1].close()
    wait_for(lambda: server.desk.waiting == 0)
    gate.set()
    assert running.result()[0] == 200


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (BadConfig("no such thing"), 400, "no such thing"),
        (FastdiffError("out of memory"), 500, "out of memory"),
        (RuntimeError("/secret/path"), 500, "drawing failed; the server's log says why"),
    ],
)
def test_failures(server: Server, monkeypatch, error: Exception, status: int, message: str) -> None:
    expected = server.draw(steps=3)[1]

    def fail(step: object) -> None:
        raise error

    clocks = server.clocks()
    for clock in clocks:
        clock.on_call.append(fail)
    try:
        found, reply = server.draw(steps=3)
        streamed = server.draw(steps=3, stream=True)
    finally:
        for clock in clocks:
            clock.on_call.remove(fail)
    assert (found, reply["error"]["message"]) == (status, message)
    assert (streamed[0], message in streamed[1]) == (200, True)
    assert server.draw(steps=3)[1]["data"][0]["b64_json"] == expected["data"][0]["b64_json"]


def test_keys(model: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key-of-sixteen\nsecond-key-of-sixteen\n")
    options = Options(model, {"lossless": shelf(["lossless"], [], [])["lossless"]}, limits=LIMITS, keys=read_keys(file))
    with serving(options) as server:
        for key in ("first-key-of-sixteen", "second-key-of-sixteen"):
            assert server.call("/v1/models", authorization=f"Bearer {key}")[0] == 200
        for wrong in ({}, {"authorization": "Bearer x"}, {"authorization": "first-key-of-sixteen"},
                      {"authorization": "Basic first-key-of-sixteen"}, {"authorization": "Bearer \xe9"}):  # fmt: skip
            for path in ("/v1/models", "/metrics"):
                status, reply = server.call(path, **wrong)
                assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
            assert server.call("/v1/images/generations", {"prompt": "x"}, **wrong)[0] == 401
        assert server.call("/health")[0] == 200
    for text, message in (("", "holds no key"), ("short", "fewer than 16 characters"), ("\xff", "cannot be read")):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(BadConfig, match=message):
            read_keys(file)


def fork(model: str, *options: str) -> Any:
    """`fastdiff serve` in a process of its own, without the seconds that importing everything takes."""

    def serve() -> None:
        os.setsid()
        renew_threads()
        out = os.open("out", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1)
        with Path("err").open("w") as err, redirect_stderr(err):
            import sys

            sys.stdout = os.fdopen(1, "w")
            code = run(["serve", "-m", model, "--preset", "lossless", "--port", "0", *options])
        os._exit(code)

    process = get_context("fork").Process(target=serve)
    process.start()
    wait_for(lambda: Path("out").exists() and Path("out").read_text().endswith("\n"))
    return process


def stays_open(server: Server) -> bool:
    """A connection on which nothing is asked for longer than the official client keeps one: where the server is the
    first to close it, a request that is just on its way is lost."""
    kept = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=900)
    kept.connect()
    before = kept.sock
    for pause in (0.0, DEFAULT_CONNECTION_LIMITS.keepalive_expiry + 1):
        time.sleep(pause)
        kept.request("GET", "/health")
        assert kept.getresponse().read()
    return kept.sock is before


@pytest.mark.parametrize("grace", ["600", "0"])  # seconds; ample on a busy machine, and none
def test_shutdown_finishes_or_fails_what_is_in_flight(cli, model: str, grace: str, pool) -> None:
    process = fork(model, "--grace", grace)
    try:
        server = Server(Path("out").read_text().strip(), None)  # type: ignore[arg-type]
        if grace == "600":
            assert stays_open(server)
        answers = [later(server, pool, steps=60, seed=n) for n in range(3)]
        busy = {"drawing": True, "waiting": 2}
        wait_for(lambda: busy.items() <= server.call("/health")[1].items())
        os.kill(process.pid, signal.SIGTERM)
        replies = [answer.result() for answer in answers]
        process.join(900)
    finally:
        process.kill()
    assert process.exitcode == 0
    statuses = [status for status, _ in replies]
    if grace == "600":
        assert statuses == [200] * 3
    else:
        assert statuses == [503] * 3
        assert replies[0][1]["error"]["message"] == "the server is shutting down; ask another one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "rey"], "unknown engine 'rey', did you mean 'ray'?"),
        (["--replicas", "2"], "--replicas 2 needs --engine ray"),
        (["--preset", "fats"], "unknown preset 'fats', did you mean 'fast'?"),
        (["--config", "none.toml"], "config file 'none.toml' does not exist"),
        (["--preset", "fast", "--preset", "fast"], "two settings are called 'fast'"),
        (["--api-key-file", "none"], "--api-key-file none cannot be read"),
        (["--host", "256.1.1.1", "--api-key-file", "keys"], "cannot listen on http://256.1.1.1:8000"),
        (["--port", "99999"], "less than or equal to 65535"),
        (["--queue", "0"], "--queue"),
    ],
)
def test_bad_command_lines(cli, arguments: list[str], message: str) -> None:
    Path("keys").write_text("a key that is long enough".replace(" ", "-"))
    done = cli("serve", *arguments)
    assert done.code in (1, 2)
    assert message in done.err
    assert done.out == ""


def test_a_port_that_is_taken(cli, server: Server) -> None:
    port = urlsplit(server.url).port
    assert f"cannot listen on http://127.0.0.1:{port}: Address already in use" in cli("serve", "--port", port).err
