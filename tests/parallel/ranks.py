"""Real processes that form a group over gloo and run checks; what each says comes back through files."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(module: str, names: list[str], ranks: int, timeout: float = 400) -> dict[str, list[Any]]:
    """For each check (a function of `module`, called with rank and ranks), what each rank returned or raised."""
    with tempfile.TemporaryDirectory() as folder:
        processes = launch(module, names, ranks, folder)
        for process in processes:
            process.wait(timeout)
        said = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    if len(said) != ranks:
        raise AssertionError(f"{len(said)} of {ranks} ranks came back: {[p.returncode for p in processes]}")
    return {name: [one.get(name, "did not run") for one in said] for name in names}


def launch(module: str, names: list[str], ranks: int, folder: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.parallel.ranks", folder, module, *names]
    common = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    return [subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(rank)}) for rank in range(ranks)]


def main(folder: str, module: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    import logging

    import torch
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    said: dict[str, Any] = {}
    checks = importlib.import_module(module)
    for name in names:
        torch.manual_seed(0)
        try:
            said[name] = getattr(checks, name)(rank, ranks)
        except BaseException:
            said[name] = traceback.format_exc()
            break  # the group may be broken
    part = Path(folder) / f".{rank}"
    part.write_text(json.dumps(said))
    part.rename(Path(folder) / f"{rank}.json")
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
