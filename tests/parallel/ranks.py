"""Real processes that form groups over gloo and run checks; what each says comes back through files.

One process of each worker imports what they need, and forks them: importing takes longer than most checks.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Said = dict[str, list[Any]]
ABSENT = "did not run"
GRACE = 20.0  # seconds that others have once a check of one rank failed: they may wait for it


def start(module: str, groups: Sequence[tuple[Sequence[str], int]], timeout: float = 3600) -> list[Said]:
    """For each group (checks, which are functions of `module`, and a number of ranks): what each rank returned or
    raised, by check; `ABSENT` of a rank that was killed, or came to a check after one that failed. Seconds of each
    check are in the error output."""
    with tempfile.TemporaryDirectory() as folder:
        asked = importer()
        assert asked.stdin and asked.stdout
        print(json.dumps([folder, module, groups]), file=asked.stdin, flush=True)
        assert select.select([asked.stdout], [], [], timeout)[0], f"{module}: no answer in {timeout} s"
        assert asked.stdout.readline() == "0\n", f"{module}: its process broke off"
        found = []
        for number, (names, ranks) in enumerate(groups):
            files = [Path(folder) / f"{number}.{rank}.json" for rank in range(ranks)]
            told = [json.loads(file.read_text()) if file.exists() else {} for file in files]
            found.append({name: [one.get(name, ABSENT) for one in told] for name in names})
        return found


@cache
def importer() -> subprocess.Popen[str]:
    """Ends with the process that asked first: its input is closed then."""
    command, environment = [sys.executable, "-m", "tests.parallel.ranks"], {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)


def main() -> None:
    warnings.simplefilter("ignore")
    import logging

    import torch

    from . import checks  # noqa: F401  with all that they import

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.dup2(2, 1)  # what checks print is no answer
            _start(*json.loads(line))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _start(folder: str, module: str, groups: list[Any]) -> None:
    checks = importlib.import_module(module)
    for number, (names, ranks) in enumerate(groups):
        children = []
        for rank in range(ranks):
            child = os.fork()
            if not child:
                _rank(Path(folder), number, checks, names, rank, ranks)
            children.append(child)
        _reap(children)


def _reap(children: list[int]) -> None:
    """Wait for all; who hangs on purpose is killed once the others are done, who waits for one that failed after a
    while."""
    left, stopped, failed = set(children), set[int](), None
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(child)
            elif done:
                left.discard(child)
                if (code := os.waitstatus_to_exitcode(status)) < 0:
                    print(f"rank {children.index(child)} was ended by signal {-code}", file=sys.stderr)
                failed = time.monotonic() if code > 0 and failed is None else failed
        if left <= stopped or (failed is not None and time.monotonic() > failed + GRACE):
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def _rank(folder: Path, number: int, checks: Any, names: Sequence[str], rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist

    from tests.forks import renew_threads

    faulthandler.enable()
    renew_threads()
    store = dist.FileStore(str(folder / f"{number}.store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    said: dict[str, Any] = {}
    failed = False
    for name in names:
        torch.manual_seed(0)
        began = time.perf_counter()
        try:
            said[name] = getattr(checks, name)(rank, ranks)
        except BaseException:
            said[name], failed = traceback.format_exc(), True
        part = folder / f".{number}.{rank}"
        part.write_text(json.dumps(said))
        part.rename(folder / f"{number}.{rank}.json")
        if rank == 0:
            print(f"{checks.__name__}.{name}, {ranks} ranks: {time.perf_counter() - began:.1f} s", file=sys.stderr)
        if failed:
            break  # the others may wait for this one: what it said would be lost
    os._exit(failed)


if __name__ == "__main__":
    main()
