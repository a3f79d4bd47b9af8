"""Ranks that are killed or stopped in the middle of a picture; run by real processes, see ranks.py."""

from __future__ import annotations

import gc
import os
import signal
import time
from typing import Any

import torch

import fastdiff
from fastdiff.errors import PeerLost
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.mesh import Topology

from .checks import latents, moved, pipeline


def _lost(
    rank: int, last: int, name: str, how: signal.Signals, at: int = 2, solver: bool = False, off: int = 9,
    own: dict[str, Any] | None = None, **parallel: Any,
) -> list[Any]:  # fmt: skip
    """The last rank goes after step `at`, or when its solver is about to take it: what the others get, and how long
    they waited for it. From step `off` on there is no guidance; `own` is what this rank alone is asked for."""
    pipe, began = pipeline(name), [0.0]

    def gone(step: int, given: Any) -> Any:
        if step == at:
            began[0] = time.monotonic()
            if rank == last:
                os.kill(os.getpid(), how)
        return given

    def unguided(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        if step + 1 == off:
            pipe._guidance_scale = 1.0
        return kwargs

    def goes(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        return unguided(pipe, step, timestep, kwargs if solver else gone(step, kwargs))

    alone = latents(pipe, name, 6, callback_on_step_end=unguided)
    handle = fastdiff.accelerate(pipe, parallel=parallel)
    if solver:
        handle.clock.before_step.insert(0, gone)
    try:
        found = latents(pipe, name, 6, callback_on_step_end=goes, **own or {})
    except PeerLost as error:
        waited = time.monotonic() - began[0]
        handle.restore()
        assert torch.equal(latents(pipe, name, 6), alone), "the pipeline is clean"
        return ["PeerLost", str(error), waited]
    return ["finished", handle.report.notes, moved(found, alone)]


def killed(rank: int, ranks: int) -> list[Any]:
    return _lost(rank, ranks - 1, "sd15", signal.SIGKILL, method="distrifusion", warmup_steps=1)


def killed_in_a_cycle(rank: int, ranks: int) -> list[Any]:
    return _lost(rank, ranks - 1, "sd15", signal.SIGKILL, method="parastep", warmup_steps=1)


def stopped(rank: int, ranks: int) -> list[Any]:
    return _lost(rank, ranks - 1, "sd15", signal.SIGSTOP, method="patch", timeout=6)


def killed_patches_go_on(rank: int, ranks: int) -> list[Any]:
    return _lost(rank, ranks - 1, "sd15", signal.SIGKILL, method="patch", on_peer_loss="local")


def killed_displaced_go_on(rank: int, ranks: int) -> list[Any]:
    """In its first step with old values: what waits in bundles to be sent is for nobody."""
    more = {"method": "distrifusion", "warmup_steps": 2, "on_peer_loss": "local"}
    return _lost(rank, ranks - 1, "sd15", signal.SIGKILL, **more)


def killed_tokens_go_on(rank: int, ranks: int) -> list[Any]:
    return _lost(rank, ranks - 1, "sd3", signal.SIGKILL, method="ulysses", on_peer_loss="local", vae=True)


def killed_turns_go_on(rank: int, ranks: int) -> list[Any]:
    """In the middle of two call stacks."""
    return _lost(rank, ranks - 1, "sd3", signal.SIGKILL, method="patch", halves=True, on_peer_loss="local")


def killed_half_goes_on(rank: int, ranks: int) -> list[Any]:
    return _lost(rank, ranks - 1, "flux", signal.SIGKILL, method="cfg", on_peer_loss="local")


def killed_first_half_goes_on(rank: int, ranks: int) -> list[Any]:
    """Whoever is left has handed out what the other was to fill in."""
    return _lost(rank, 0, "flux", signal.SIGKILL, method="cfg", on_peer_loss="local")


def stopped_half_goes_on(rank: int, ranks: int) -> list[Any]:
    return _lost(rank, ranks - 1, "sd15", signal.SIGSTOP, method="cfg", on_peer_loss="local", timeout=6)


def killed_cycle_goes_on(rank: int, ranks: int) -> list[Any]:
    return _lost(rank, ranks - 1, "sd15", signal.SIGKILL, 1, method="parastep", warmup_steps=1, on_peer_loss="local")


def killed_before_first_latents_go_on(rank: int, ranks: int) -> list[Any]:
    """The first rank computed its step and goes before it shows its latents."""
    return _lost(rank, 0, "sd15", signal.SIGKILL, 0, solver=True, method="patch", on_peer_loss="local")


def killed_first_with_the_only_half_goes_on(rank: int, ranks: int) -> list[Any]:
    """Who is left has handed out no numbers, and nobody else was to compute any."""
    return _lost(rank, 0, "wan", signal.SIGKILL, 2, solver=True, off=2, method="cfg", on_peer_loss="local")


def killed_idle_half_goes_on(rank: int, ranks: int) -> list[Any]:
    return _lost(rank, 1, "wan", signal.SIGKILL, 2, solver=True, off=2, method="cfg", on_peer_loss="local")


def killed_with_a_prompt_of_its_own(rank: int, ranks: int) -> list[Any]:
    """Who is left does not know what rank 0 was asked for, but in the branch without a prompt."""
    more = {"own": {"prompt": f"prompt {rank}"}, "method": "patch", "on_peer_loss": "local"}
    return _lost(rank, 0, "flux", signal.SIGKILL, **more)


def _told(rank: int, late: int | None = None, name: str = "sd15", step: int = 1, **parallel: Any) -> list[Any]:
    """Rank 0 raises; the others of its half and of its place know by it, the last one by them: though they keep the
    error, and nobody collects garbage, their connections are closed. One that comes late finds that its messages
    cannot even leave, while the last one waits."""
    pipe, kept = pipeline(name), list[BaseException]()

    def fails(pipe: Any, index: int, timestep: Any, kwargs: dict) -> dict:
        if index == step and rank == 0:
            raise KeyError("a mistake in a callback")
        if index == step and rank == late:
            time.sleep(0.5)
        return kwargs

    gc.disable()
    with fastdiff.accelerate(pipe, parallel={"cfg": 2, "timeout": 20, **parallel}):
        try:
            latents(pipe, name, 5, callback_on_step_end=fails)
        except (KeyError, PeerLost) as error:
            kept.append(error)
        torch.distributed.barrier()
    return [str(error) for error in kept]


def told_by_one_that_was_told(rank: int, ranks: int) -> list[Any]:
    return _told(rank, method="patch")


def told_by_one_that_was_late(rank: int, ranks: int) -> list[Any]:
    return _told(rank, 1, method="patch")


def told_while_old_values_travel(rank: int, ranks: int) -> list[Any]:
    return _told(rank, 1, step=3, method="distrifusion", warmup_steps=1)


def told_while_heads_travel(rank: int, ranks: int) -> list[Any]:
    return _told(rank, 1, "sd3", method="ulysses")


def asked_whether_it_lives(rank: int, ranks: int) -> list[Any]:
    """What a rank with a GPU asks its peer over gloo while the GPU waits: letters that nobody ever takes."""
    bus, end = Bus(Topology(cfg=1, step=1, patch=ranks, rank=rank), 60.0), time.monotonic() + 60
    bus.begin()
    alive = not bus._gone({1 - rank})
    mean = float(bus.mean(torch.tensor(float(rank)), ("patch",)))  # others are not in their way
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while not bus._gone({1 - rank}) and time.monotonic() < end:
        time.sleep(0.05)
    return [alive, mean, bus._gone({1 - rank})]


def hangs(which: int) -> None:
    """What a started rank does: one hangs, the other ends well or says who did not answer."""
    rank = torch.distributed.get_rank()
    if rank == which:
        os.kill(os.getpid(), signal.SIGSTOP)
    if which == 0:
        raise PeerLost(f"rank {which} did not answer: rank {rank} waited")
