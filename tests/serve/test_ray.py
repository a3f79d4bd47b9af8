"""Replicas on Ray Serve: two of them on this machine, one of which is killed."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastdiff.cli.serve import shelf
from fastdiff.errors import FastdiffError
from fastdiff.serve.app import Options
from fastdiff.serve.host import serve_on_ray
from tests.clusters import running

from .conftest import LIMITS, Server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def options(model: str) -> Options:
    return Options(model, {"lossless": shelf(["lossless"], [], [])["lossless"]}, limits=LIMITS)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (1, r"^the replicas did not come up: model directory '.*none' does not exist$"),
        (3, r"^3 replicas need a CPU each, the Ray cluster has 2 free$"),
    ],
)
def test_what_cannot_come_up_ends_with_a_sentence(tmp_path: Path, replicas: int, message: str) -> None:
    with pytest.raises(FastdiffError, match=message):
        serve_on_ray(options(str(tmp_path / "none")), "127.0.0.1", free_port(), replicas, pytest.fail)


def test_replicas(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # unlike the cluster: replicas get what holds here
    seen: dict[str, Any] = {}

    def ask(address: str) -> None:
        try:
            server = Server(address, None)  # type: ignore[arg-type]
            with ThreadPoolExecutor(4) as pool:
                seen["first"] = list(pool.map(lambda n: server.draw(seed=n % 4, steps=4), range(12)))
            seen["environments"] = running("ServeReplica")
            seen["replicas"] = list(seen["environments"])
            os.kill(seen["replicas"][0], signal.SIGKILL)
            deadline = time.monotonic() + 120
            while len(set(running("ServeReplica")) - {seen["replicas"][0]}) < 2 and time.monotonic() < deadline:
                time.sleep(0.2)
            seen["replaced"] = set(running("ServeReplica")) - set(seen["replicas"])
            seen["bad"] = server.draw(n=7)
            seen["again"] = server.draw(seed=0, steps=4)
            seen["stream"] = server.draw(seed=0, steps=4, stream=True, progress=True)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    def ready(address: str) -> None:
        threading.Thread(target=ask, args=(address,)).start()

    serve_on_ray(options(model), "127.0.0.1", free_port(), 2, ready)
    assert capsys.readouterr().out == ""  # Ray prints its messages where only the address should be
    assert [status for status, _ in seen["first"]] == [200] * 12
    images = [reply["data"][0]["b64_json"] for _, reply in seen["first"]]
    assert images[:4] == images[4:8] == images[8:]  # whichever replica drew them
    assert all("OMP_WAIT_POLICY=ACTIVE" in environment for environment in seen["environments"].values())
    assert len(seen["replicas"]) == 2 and len(seen["replaced"]) == 1
    assert seen["stream"][1].count("image_generation.progress\n") == 4 and images[0] in seen["stream"][1]
    assert seen["bad"][0] == 400
    assert seen["again"][1]["data"][0]["b64_json"] == images[0]
