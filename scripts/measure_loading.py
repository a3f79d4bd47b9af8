"""What memory a model takes while it is loaded and quantized; writes benchmarks/quant-loading.json.

python scripts/measure_loading.py

A UNet of random weights, 3.5 GB as float32. Each row is a process of its own. `peak_mb` is the most that it held beyond
what it held before loading, looked at each 2 ms; `own_peak_mb` of it is memory of its own: floats used as they
lie in a file are mapped, and the system may take their pages back and read them again. `held_mb` is what is left of its
own. Linux only.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure_quant_memory import disk, mb, saved

import fastdiff
from fastdiff import output
from fastdiff.bench.row import command, environment

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "quant-loading.json"
WAYS = ("float", "load, then quantize", "quantized while read")


def main(
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the numbers go.")] = OUTPUT,
    width: Annotated[int, typer.Option(help="Channels of the first level; 448 makes 3.5 GB.")] = 448,
    schemes: Annotated[str, typer.Option(help="with commas between them")] = "w8a16,w4a16",
    look: Annotated[str, typer.Option(help="DIRECTORY,WAY,SCHEME: load so, and print what it took.")] = "",
) -> None:
    torch.set_num_threads(1)
    if look:
        print(json.dumps(taken(*look.split("|"))))
        return
    with tempfile.TemporaryDirectory() as folder:
        pipe = saved(Path(folder) / "large", (width, 2 * width, 4 * width))
        floats, told = disk(Path(folder) / "large"), environment(pipe)
        del pipe
        gc.collect()
        asked = [("float", "none"), *((way, scheme) for scheme in schemes.split(",") for way in WAYS[1:])]
        rows = [
            {"scheme": scheme, "way": way, **process(f"{folder}/large|{way}|{scheme}")} for way, scheme in asked
        ]  # fmt: skip
    found = {"command": command(), "float_mb": mb(floats), "environment": told, "rows": rows}
    output.write(file, lambda part: part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8"))


def process(look: str) -> dict[str, float]:
    own = [sys.executable, __file__, "--look", look]
    done = subprocess.run(own, check=True, capture_output=True, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(look.partition("|")[2], row, flush=True)
    return row


def taken(folder: str, way: str, scheme: str) -> dict[str, float]:
    fastdiff.load("shapes-unet", quant={"quant": {"method": "w8a16", "speed": "smallest"}})  # all imports are made
    gc.collect()
    before, peaks, ended = resident(), [0, 0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            peaks[:] = map(max, peaks, resident())

    threading.Thread(target=watch, daemon=True).start()
    began, small = time.perf_counter(), {"quant": {"method": scheme, "speed": "smallest"}}
    pipe = fastdiff.load(folder, quant=small if way == WAYS[2] else None)
    if way == WAYS[1]:
        fastdiff.quantize(pipe, small)
    if way == WAYS[0]:
        assert all(bool(p.isfinite().all()) for p in pipe.unet.parameters())  # all pages are read
    seconds = time.perf_counter() - began
    ended.set()
    gc.collect()
    own, whole = (mb(most - was) for most, was in zip(peaks, before, strict=True))
    return {
        "peak_mb": whole,
        "own_peak_mb": own,
        "held_mb": mb(resident()[0] - before[0]),
        "seconds": round(seconds, 1),
    }


def resident() -> tuple[int, int]:
    """Bytes of memory of its own, and of all that this process has in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    own, whole = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "VmRSS"))
    assert own is not None and whole is not None
    return int(own[1]) * 1024, int(whole[1]) * 1024


if __name__ == "__main__":
    typer.run(main)
