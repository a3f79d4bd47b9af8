"""Many clients at once against `fastdiff serve`: does each get its own picture, is none lost, does memory stay flat,
and how long do those wait who want little? Two servers: one draws in the order of arrival, the other in turns.

python scripts/load_serve.py --json benchmarks/serve.json
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json as jsonlib
import math
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import openai
import typer
from PIL import Image

from fastdiff import output
from fastdiff.bench.row import command
from fastdiff.machine import cpu_name, package_version

PROMPTS = ("a large red circle above a small blue square", "a green triangle", "two small yellow circles", "x " * 200)
PRESETS = ("balanced", "lossless")
SIZES = ("auto", "64x64", "48x64", "96x64")
ORDERS = {"as they came": ("--in-progress", "1"), "in turns": ()}
PATIENCE = 3600  # seconds; nothing is late on a machine that others use, too
KINDS = ("short",) * 13 + ("long",) * 4 + ("edit",) * 2 + ("cancel",)  # of twenty
Body = dict[str, Any]


def main(
    json: Annotated[Path | None, typer.Option(help="write the result here; it is printed too")] = None,
    requests: Annotated[int, typer.Option(min=20, help="to each server")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="at the same time")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="in which the servers take turns")] = 10,
    minutes: Annotated[
        float, typer.Option(min=0, help="after which no round begins; the result says how far it came")
    ] = math.inf,
    model: Annotated[str, typer.Option("-m", "--model")] = "shapes-unet",
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    output.check([json], overwrite)
    names = ("fastdiff", "torch", "diffusers", "fastapi", "uvicorn", "openai")
    packages = {name: package_version(name) for name in names}

    def written(result: dict[str, Any]) -> str:
        more = {"cpu": cpu_name(), "packages": packages, "command": command()}
        text = jsonlib.dumps({"model": model, **result, **more}, indent=2)
        if json is not None:
            output.write(json, lambda part: part.write_text(text + "\n", encoding="utf-8"))
        return text

    with ExitStack() as stack:
        servers = {name: stack.enter_context(serving(model, options)) for name, options in ORDERS.items()}
        print(written(measure(servers, requests, clients, rounds, minutes, written)))


@contextmanager
def serving(model: str, more: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """A server of its own process: its address and its number."""
    options = [word for name in PRESETS for word in ("--preset", name)]
    words = [
        sys.executable, "-m", "fastdiff", "serve", "-m", model, "--port", "0", "--queue", "16",
        "--timeout", str(PATIENCE), *options, *more,
    ]  # fmt: skip
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield (process.stdout.readline().strip() if process.stdout else ""), process.pid
        finally:
            process.terminate()
            process.wait(60)


def menu() -> list[tuple[str, Body]]:
    """Requests by kind, that differ in all that could leak from one into another."""
    chosen, found = random.Random(0), []
    for number, kind in enumerate(KINDS * 3):
        steps = {"short": chosen.choice((2, 3, 4)), "long": 50, "edit": 8, "cancel": 100}[kind]
        body: Body = {
            "prompt": chosen.choice(PROMPTS), "seed": number % 5, "steps": steps, "size": chosen.choice(SIZES),
            "preset": chosen.choice(PRESETS), "n": chosen.choice((1, 1, 1, 2)) if kind == "short" else 1,
            "guidance_scale": chosen.choice((1.0, 3.0)),
        }  # fmt: skip
        body |= {"negative_prompt": "blue"} if number % 3 == 0 else {}
        found.append((kind, body | ({"strength": 0.5} if kind == "edit" else {})))
    chosen.shuffle(found)
    return found


@dataclass
class Told:
    """What one server did."""

    url: str
    process: int
    alone: list[str] = field(default_factory=list)  # what each of the menu gives when nothing else is asked for
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    memory: list[float] = field(default_factory=list)
    wrong: int = 0
    took: float = 0.0

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE)
        self.lock = threading.Lock()

    def ask(self, kind: str, body: Body) -> tuple[str, str]:
        """The status, and a digest of the pictures."""
        own = {name: body[name] for name in ("prompt", "n", "size")}
        more = {name: value for name, value in body.items() if name not in own}
        try:
            if kind == "edit":
                reply = self.client.images.edit(**own, image=photo(), extra_body=more)
            else:
                reply = self.client.images.generate(**own, extra_body=more)
        except openai.APIStatusError as error:
            return str(error.status_code), ""
        data = "".join(picture.b64_json or "" for picture in reply.data or ())
        return "200", hashlib.sha256(data.encode()).hexdigest()

    def one(self, number: int, kind: str, body: Body) -> None:
        if kind == "cancel":
            self.hang_up(body | {"stream": number % 2 == 1})
            status, same = "hung up", True
        else:
            began = time.perf_counter()
            status, found = self.ask(kind, body)
            same = status != "200" or found == self.alone[number]
            with self.lock:
                self.seconds[kind].append(time.perf_counter() - began)
        with self.lock:
            self.statuses[status] += 1
            self.wrong += not same

    def round(self, numbers: range, asked: Sequence[tuple[str, Body]], clients: int) -> None:
        """These requests, of which `clients` are on their way at a time."""
        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda n: self.one(n % len(asked), *asked[n % len(asked)]), numbers))
        self.took += time.perf_counter() - began

    def hang_up(self, body: Body) -> None:
        """Ask, wait a moment, and go away."""
        link = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE)
        link.request("POST", "/v1/images/generations", jsonlib.dumps(body), {"content-type": "application/json"})
        time.sleep(0.3)
        link.close()

    def get(self, path: str) -> bytes:
        link = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE)
        link.request("GET", path)
        return link.getresponse().read()

    def summary(self, requests: int) -> dict[str, Any]:
        settled = self.memory[len(self.memory) // 4 :]
        return {
            "statuses": dict(self.statuses), "lost": requests - sum(self.statuses.values()), "bytes_differ": self.wrong,
            "seconds": round(self.took, 1), "requests_per_second": round(requests / self.took, 2),
            "latency_s": {kind: spread(values) for kind, values in sorted(self.seconds.items())},
            "memory_mb": [round(value, 1) for value in self.memory],
            "memory_growth_mb": round(settled[-1] - settled[0], 1), "health": jsonlib.loads(self.get("/health")),
        }  # fmt: skip


def measure(
    servers: Mapping[str, tuple[str, int]], requests: int, clients: int, rounds: int, minutes: float = math.inf,
    kept: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """What each request gives when it is alone, then all of them from many clients; some of those hang up. The servers
    get the same requests in rounds, one after the other, so that what else the machine does is the same for them.

    minutes: after which no round begins. kept: is given what is known after each round.
    """
    asked = menu()[:requests]
    told = {name: Told(*server) for name, server in servers.items()}
    for server in told.values():
        server.alone = ["" if kind == "cancel" else server.ask(kind, body)[1] for kind, body in asked]
    began, done, setting = time.monotonic(), 0, {"requests_wanted": requests, "clients": clients, "rounds": rounds}
    while done < requests and time.monotonic() - began <= 60 * minutes:
        part = range(done, min(requests, done + math.ceil(requests / rounds)))
        for server in told.values():
            server.memory.append(resident_mb(server.process))
            server.round(part, asked, clients)
        done = part.stop
        kept(setting | compared(told, done))
    first = next(body for kind, body in asked if kind == "short")
    last = [*told.values()][-1]
    with ThreadPoolExecutor(60) as pool:
        burst = Counter(pool.map(lambda _: last.ask("short", first)[0], range(60)))
    for server in told.values():
        server.memory.append(resident_mb(server.process))
    working = all(server.ask("short", first)[0] == "200" for server in told.values())
    return setting | compared(told, done) | {"burst_of_60": dict(burst), "still_working": working}


def compared(told: Mapping[str, Told], requests: int) -> dict[str, Any]:
    """What the servers did with the first of the requests, and how long the short ones took in one and the other."""
    ends = next(iter(told.values())), [*told.values()][-1]
    short = [quantile(server.seconds["short"], 0.95) for server in ends]
    return {
        "requests": requests, "servers": {name: server.summary(requests) for name, server in told.items()},
        "bytes_differ_between_servers": sum(a != b for a, b in zip(*(server.alone for server in ends), strict=True)),
        "short_p95_ratio": round(short[0] / short[-1], 2),
    }  # fmt: skip


def photo() -> bytes:
    """A picture to draw over."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "p95": round(quantile(values, 0.95), 3)}


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def resident_mb(process: int) -> float:
    """Memory that a process holds now."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    typer.run(main)
