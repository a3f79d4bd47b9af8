"""Runs the application: in this process under uvicorn, or as replicas on Ray Serve."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from types import FrameType
from typing import Any

import uvicorn

from fastdiff import threads
from fastdiff.errors import FastdiffError

from .app import Options, build
from .desk import Desk

_MORE_GRACE = 5.0  # seconds for answers to go out after the last picture
_CONNECTIONS = 1000
_KEPT = 75  # seconds that an idle connection is kept: the official client closes it after 5, and must be the first
_SPARE = 8  # requests of a replica beyond its queue: for health, metrics, and those that it refuses itself


class _Server(uvicorn.Server):
    """Closes the queue with the first signal, so that what waits is finished, or fails within the grace."""

    desk: Desk

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.desk.close()
        super().handle_exit(sig, frame)


def serve(options: Options, host: str, port: int, ready: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is told the address."""
    with _bind(host, port) as listener:
        app = build(options)
        grace = int(options.limits.grace + _MORE_GRACE)
        server = _Server(uvicorn.Config(
            app, log_config=None, server_header=False, timeout_graceful_shutdown=grace, timeout_keep_alive=_KEPT,
            limit_concurrency=_CONNECTIONS,
        ))  # fmt: skip
        server.desk = app.state.desk
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done
        try:
            ready(_address(host, listener.getsockname()[1]))
            asyncio.run(server.serve([listener]))
        finally:
            signal.signal(signal.SIGTERM, before)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise FastdiffError(f"cannot listen on {_address(host, port)}: {error.strerror or error}") from None


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_on_ray(options: Options, host: str, port: int, replicas: int, ready: Callable[[str], object]) -> None:
    """Replicas on Ray Serve until SIGINT or SIGTERM: on the cluster of RAY_ADDRESS, the one that runs
    here, or a new one.

    Each replica loads the model once and has a queue of its own. A replica that dies is replaced.
    """
    import ray
    from ray import serve as ray_serve

    if not ray.is_initialized():
        ray.init()
    limits, kind = options.limits, "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    if replicas > (free := ray.available_resources().get(kind, 0)):
        raise FastdiffError(f"{replicas} replicas need a {kind} each, the Ray cluster has {free:g} free")
    resources: Any = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    resources["runtime_env"] = {"env_vars": threads.waiting()}
    ray_serve.start(http_options={"host": host, "port": port})
    deployment: Any = ray_serve.deployment(
        name="fastdiff", num_replicas=replicas, ray_actor_options=resources, max_constructor_retry_count=1,
        max_ongoing_requests=limits.queue + _SPARE, graceful_shutdown_timeout_s=limits.grace + _MORE_GRACE,
    )(ray_serve.ingress(lambda: build(options))())  # fmt: skip
    stopped = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)  # which interrupt the start
    before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    with redirect_stdout(sys.stderr):  # Ray's own threads print, and stdout has the address only
        try:
            ray_serve.run(deployment.bind(), name="fastdiff", route_prefix="/")
            for number in signals:
                signal.signal(number, lambda *_: stopped.set())
            ready(_address(host, port))
            stopped.wait()
            _drain(ray_serve, limits.grace + 2 * _MORE_GRACE)
        except RuntimeError:
            raise FastdiffError(f"the replicas did not come up: {_reason(ray_serve)}") from None
        finally:
            ray_serve.shutdown()
            for number, handler in before.items():
                signal.signal(number, handler)


def _drain(ray_serve: Any, seconds: float) -> None:
    """Lets the replicas finish what they have; `shutdown` alone gives them 30 seconds, whatever the grace."""
    ray_serve.delete("fastdiff", _blocking=False)
    end = time.monotonic() + seconds
    while "fastdiff" in ray_serve.status().applications and time.monotonic() < end:
        time.sleep(0.2)


def _reason(ray_serve: Any) -> str:
    """Why a replica did not come up: the last line of the traceback that Ray Serve keeps."""
    app = ray_serve.status().applications.get("fastdiff")
    lines = [line for each in (app.deployments.values() if app else ()) for line in each.message.split("\n") if line]
    return re.sub(r"^fastdiff\.errors\.\w+: ", "", lines[-1]) if lines else "Ray's messages above say why"
