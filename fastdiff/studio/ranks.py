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

from fastdiff import threads

from .guard import guarded

GRACE = 15.0  # seconds that ranks have to notice that rank 0, which speaks for all, has ended or does not answer


def launched() -> bool:
    """Whether this process is one of several already."""
    import torch.distributed as dist

    return dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())


def launch(devices: int, timeout: float, work: Callable[..., Any], *arguments: Any) -> int:
    """Run `work(*arguments)` in `devices` new processes that form a group; the exit code of rank 0, or of who failed.

    What other ranks than 0 have to say is told once they have failed, and once only. Two runs never want the same port:
    the ranks meet through a file.
    """
    threads.settle()
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, devices, folder, timeout, work, arguments), daemon=False)
            for rank in range(devices)
        ]
        for process in ranks:
            process.start()
        hung: list[int] = []
        try:
            _wait(ranks, Path(folder))
            hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        said = _said(Path(folder))
    codes = [process.exitcode or 0 for process in ranks]
    for rank, code in enumerate(codes):
        text = said.get(str(rank), "")
        if rank in hung:
            typer.echo(f"error: rank {rank} hung and was ended", err=True)
        elif code < 0:
            typer.echo(f"error: rank {rank} was killed (signal {-code})", err=True)
        elif code and rank and text != said.get("0"):
            typer.echo(f"error: rank {rank}: {text}", err=True)
    return codes[0] if codes[0] > 0 else 1 if codes[0] else 0


def _wait(ranks: list[Any], folder: Path) -> None:
    """Until all have ended, or rank 0 has, or does not answer the others, and who is left had time to notice."""
    ended: float | None = None
    while any(process.is_alive() for process in ranks) and (ended is None or time.monotonic() - ended < GRACE):
        time.sleep(0.05)
        silent = any("rank 0" in text and "did not answer" in text for text in _said(folder).values())
        if ended is None and (silent or ranks[0].exitcode is not None):
            ended = time.monotonic()


def _said(folder: Path) -> dict[str, str]:
    """What went wrong, by rank."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.error"))}


def _rank(rank: int, devices: int, folder: str, timeout: float, work: Callable[..., Any], arguments: tuple) -> None:
    import datetime

    import torch
    import torch.distributed as dist

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
