"""Many clients at once against `fastdiff serve`: does each get its own picture, is none lost, does memory stay flat?

python -c "from tests.tiny import make; make('sd15').save_pretrained('build/tiny-sd')"
python scripts/load_serve.py -m build/tiny-sd --json benchmarks/serve.json
"""

from __future__ import annotations

import hashlib
import http.client
import json as jsonlib
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from fastdiff import output
from fastdiff.bench.row import command
from fastdiff.machine import cpu_name, package_version

PROMPTS = ("a large red circle above a small blue square", "a green triangle", "two small yellow circles", "x " * 200)
PRESETS = ("balanced", "lossless")


def main(
    json: Annotated[Path | None, typer.Option(help="write the result here; it is printed too")] = None,
    requests: Annotated[int, typer.Option(min=1)] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="at the same time")] = 8,
    model: Annotated[str, typer.Option("-m", "--model")] = "shapes-unet",
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    output.check([json], overwrite)
    with serving(model) as (url, process):
        result = measure(url, process, requests, clients)
    packages = {name: package_version(name) for name in ("fastdiff", "torch", "diffusers", "fastapi", "uvicorn")}
    result = {"model": model, **result, "cpu": cpu_name(), "packages": packages, "command": command()}
    text = jsonlib.dumps(result, indent=2)
    if json is not None:
        output.write(json, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    print(text)


@contextmanager
def serving(model: str) -> Iterator[tuple[str, int]]:
    """A server of its own process: its address and its number."""
    options = [word for name in PRESETS for word in ("--preset", name)]
    words = [sys.executable, "-m", "fastdiff", "serve", "-m", model, "--port", "0", "--queue", "16", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield (process.stdout.readline().strip() if process.stdout else ""), process.pid
        finally:
            process.terminate()
            process.wait(60)


def menu() -> list[dict[str, Any]]:
    """Requests that differ in all that could leak from one into another."""
    chosen, found = random.Random(0), []
    for number in range(24):
        body = {
            "prompt": chosen.choice(PROMPTS), "seed": number % 5, "steps": chosen.choice((2, 3, 4)),
            "size": chosen.choice(("auto", "64x64", "48x64", "96x64")), "preset": chosen.choice(PRESETS),
            "n": chosen.choice((1, 1, 1, 2)), "guidance_scale": chosen.choice((1.0, 3.0)),
        }  # fmt: skip
        found.append(body | ({"negative_prompt": "blue"} if number % 3 == 0 else {}))
    return found


def measure(url: str, process: int, requests: int, clients: int) -> dict[str, Any]:
    """What each request gives when it is alone, then all of them from many clients; some of those hang up."""
    bodies = menu()
    alone = [digest(ask(url, body)[1]) for body in bodies]
    memory, statuses, seconds = [resident_mb(process)], Counter[str](), list[float]()
    lock, wrong = threading.Lock(), 0

    def client(number: int) -> None:
        nonlocal wrong
        which = (number * 7) % len(bodies)
        if number % 20 == 19:
            hang_up(url, bodies[which] | {"steps": 100, "stream": number % 40 == 39})
            status, same = "hung up", True
        else:
            began = time.perf_counter()
            code, answer = ask(url, bodies[which])
            status, same = str(code), code != 200 or digest(answer) == alone[which]
            with lock:
                seconds.append(time.perf_counter() - began)
        with lock:
            statuses[status] += 1
            wrong += not same
            if sum(statuses.values()) % max(1, requests // 20) == 0:
                memory.append(resident_mb(process))

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(requests)))
    took = time.perf_counter() - began
    burst = Counter(ThreadPoolExecutor(60).map(lambda _: str(ask(url, bodies[0])[0]), range(60)))
    settled = memory[len(memory) // 4 :]
    return {
        "requests": requests, "clients": clients, "seconds": round(took, 1),
        "requests_per_second": round(requests / took, 2), "statuses": dict(statuses),
        "lost": requests - sum(statuses.values()), "bytes_differ": wrong,
        "latency_s": {"median": round(statistics.median(seconds), 3), "p95": round(quantile(seconds, 0.95), 3)},
        "burst_of_60": dict(burst), "memory_mb": [round(value, 1) for value in memory],
        "memory_growth_mb": round(settled[-1] - settled[0], 1),
        "still_working": ask(url, bodies[0])[0] == 200, "health": jsonlib.loads(get(url, "/health")),
    }  # fmt: skip


def connection(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)


def send(link: http.client.HTTPConnection, body: dict[str, Any]) -> None:
    link.request("POST", "/v1/images/generations", jsonlib.dumps(body), {"content-type": "application/json"})


def ask(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    link = connection(url)
    send(link, body)
    answer = link.getresponse()
    return answer.status, jsonlib.loads(answer.read())


def get(url: str, path: str) -> bytes:
    link = connection(url)
    link.request("GET", path)
    return link.getresponse().read()


def hang_up(url: str, body: dict[str, Any]) -> None:
    """Ask, wait a moment, and go away."""
    link = connection(url)
    send(link, body)
    time.sleep(0.3)
    link.close()


def digest(answer: dict[str, Any]) -> str:
    return hashlib.sha256("".join(picture["b64_json"] for picture in answer["data"]).encode()).hexdigest()


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def resident_mb(process: int) -> float:
    """Memory that a process holds now."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    typer.run(main)
