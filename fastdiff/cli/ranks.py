"""Starts the processes of a parallel run on this machine and waits for them; torchrun does it across machines."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer

GRACE = 15.0  # seconds that the other ranks have, beyond their time-out, once one has failed


def launched() -> bool:
    """Whether this process is one of several already."""
    import torch.distributed as dist

    return dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())


def own_device() -> None:
    """Under torchrun on GPUs each process of a machine takes another one, before a model is loaded."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() and dist.is_available() and dist.is_torchelastic_launched():
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))


def launch(devices: int, timeout: float, work: Callable[..., Any], *arguments: Any) -> int:
    """Run `work(*arguments)` in `devices` new processes that form a group; the exit code of rank 0, or of who failed.

    What other ranks than 0 have to say is told once they have failed, and once only. Two runs never want the same port:
    the ranks meet through a file.
    """
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, devices, folder, timeout, work, arguments), daemon=False)
            for rank in range(devices)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        said = {path.stem: path.read_text() for path in sorted(Path(folder).glob("*.error"))}
    codes = [process.exitcode or 0 for process in ranks]
    for rank, code in enumerate(codes):
        text = said.get(str(rank), "")
        if code < 0:
            typer.echo(f"error: rank {rank} was killed (signal {-code})", err=True)
        elif code and rank and text != said.get("0"):
            typer.echo(f"error: rank {rank}: {text}", err=True)
    return codes[0] if codes[0] > 0 else 1 if codes[0] else 0


def _wait(ranks: list[Any], timeout: float) -> None:
    """Until all have ended, or those that are left had time to notice that one failed."""
    failed: float | None = None
    while any(process.is_alive() for process in ranks):
        time.sleep(0.05)
        if failed is None and any(process.exitcode not in (None, 0) for process in ranks):
            failed = time.monotonic()
        late = failed is not None and time.monotonic() - failed > timeout + GRACE
        if late and ranks[0].exitcode is not None:
            return


def _rank(rank: int, devices: int, folder: str, timeout: float, work: Callable[..., Any], arguments: tuple) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    from . import guarded

    def joined() -> Any:
        cuda = torch.cuda.device_count() >= devices
        if cuda:
            torch.cuda.set_device(rank)
        elif not torch.cuda.is_available():
            torch.set_num_threads(max(1, torch.get_num_threads() // devices))
        store = dist.FileStore(str(Path(folder) / "store"), devices)
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=devices, timeout=limit)
        return work(*arguments)

    def told(message: str) -> None:
        part = Path(folder) / f".{rank}"
        part.write_text(message, encoding="utf-8")
        part.rename(Path(folder) / f"{rank}.error")

    if rank:  # rank 0 speaks for all
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            code = guarded(joined, told)
    else:
        code = guarded(joined, told)
    sys.exit(code)
