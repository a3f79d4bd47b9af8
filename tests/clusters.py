"""A Ray cluster of two workers on this machine, and the processes that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'fastdiff[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def running(name: str) -> dict[int, str]:
    """Numbers of the processes that hold an actor of a class, with the environment that each was started in."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"ray::{name}".encode() in (folder / "cmdline").read_bytes():
                found[int(folder.name)] = (folder / "environ").read_text(errors="replace")
        except OSError:
            continue
    return found
