"""How many threads OpenMP takes and what they do while they wait; it reads both once, when torch is loaded.

Its threads spin by default, for milliseconds. Where other processes want the processor too, a thread spins away the
time slice of the very one that it waits for, and a step takes many times as long. Threads that sleep at once must be
woken at each of a small model's thousand operations. A spin of some microseconds costs neither (benchmarks/busy.json).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

WAITING, SPINS, THREADS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"
BRIEFLY = {WAITING: "PASSIVE", SPINS: "1000"}  # the second, in GNU's library alone, goes before the first: 10 us or so
ON_ERRORS, LEAVE_THEM = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"


def settle(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Let threads wait briefly, then sleep, and be no more than a container may run; what the user has set stays. And
    let transformers not warn, when it is loaded, of picture processors that nothing here uses.

    To be called before torch is loaded; for processes that are started afterwards it is never too late.
    """
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    environment.update(waiting(environment))
    quota = processor_quota(root)
    if quota is not None and quota < processors():
        environment.setdefault(THREADS, str(math.ceil(quota)))


def waiting(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """How threads wait: as the user has set, else briefly. For workers too, whose number of threads is their own."""
    own = {name: environment[name] for name in BRIEFLY if name in environment}
    return own or BRIEFLY


@contextmanager
def survivable(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Process groups that are made inside leave it to their user what a lost peer means; by default NCCL ends the
    whole process. What the user has set stays, and groups made elsewhere are as they were."""
    ours = ON_ERRORS not in environment
    environment.setdefault(ON_ERRORS, LEAVE_THEM)
    try:
        yield
    finally:
        if ours:
            del environment[ON_ERRORS]


def processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_quota(root: Path = Path("/")) -> float | None:
    """Processors whose time the control groups of this process may use up; None for no limit. `root` is for tests."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    mounts = root / "sys/fs/cgroup"
    found: list[float] = []
    for number, kinds, path in (line.split(":", 2) for line in lines):
        if number == "0":  # version 2
            found += _limits(mounts, path, ("cpu.max",))
        elif "cpu" in kinds.split(","):
            for name in {kinds, "cpu"}:
                found += _limits(mounts / name, path, ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return min(found, default=None)


def _limits(mount: Path, path: str, files: tuple[str, ...]) -> Iterator[float]:
    """Quota over period of a group and of all above it. In a container the path may be the host's, and not be there."""
    group = PurePosixPath(path)
    for place in (group, *group.parents):
        try:
            text = " ".join((mount / str(place).lstrip("/") / name).read_text(encoding="utf-8") for name in files)
            quota, period = map(int, text.replace("max", "-1").split())
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:
            yield quota / period
