"""A link of limited rate in virtual time: real ranks, real messages, but what waiting costs is counted, not slept.

Computing takes a fixed virtual time for each leaf of the denoiser that runs. What is for the next step is carried in
order; what is waited for has a connection of its own, which takes half of the wire while the other has something to
carry. Nothing depends on how busy the machine is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import fastdiff
from fastdiff.parallel.partial import attend_part

from .checks import latents, pipeline

STEPS, WARMUP = 18, 2
LATE = range(11, 16)  # the queue is as long as it gets, and the last step, which sends nothing on, is not there yet
METHODS: dict[str, Any] = {
    "patch": {"method": "patch"},
    "distrifusion": {"method": "distrifusion", "warmup_steps": WARMUP},
    "pcpp": {"method": "pcpp", "portion": 0.5, "warmup_steps": WARMUP},
}
EVEN = {"sd15": {"height": 128}}  # both ranks have as much to do
UNIT = 1e-3  # virtual seconds that a leaf computes
PAIR = 1e-6  # and for a query and a key


class Link:
    """The virtual clock of one rank and the wire that leads to it, put around its bus."""

    def __init__(self, bus: Any, rate: float) -> None:
        self.bus, self.rate, self.now, self.free = bus, rate, 0.0, 0.0
        self.waited, self.carried = Counter[int](), Counter[int]()  # of what travels for the next step, by step
        self.output = Counter[int]()  # waited for what every step has to end with
        self.due: dict[int, float] = {}
        self._post, self._wait = bus.post, bus.wait
        bus.post, bus.wait = self.post, self.wait

    def post(self, *args: Any, later: bool = False, **kwargs: Any) -> list[Any]:
        found = self._post(*args, later=later, **kwargs)
        for item in found:
            taken = item.buffer.numel() / self.rate
            self.carried[self.bus.where()] += item.buffer.numel()
            if later:
                self.free = max(self.free, self.now) + taken
                self.due[id(item)] = self.free
                continue
            # the other connection has half of the wire until then, and what it carries comes so much later
            busy = self.free > self.now
            self.free += taken if busy else 0.0
            self.due = {key: due + taken * (due > self.now) for key, due in self.due.items()}
            self.due[id(item)] = self.now + taken * (1 + busy)
        return found

    def wait(self, pending: Any, kind: str = "") -> dict[int, torch.Tensor]:
        found = self._wait(pending, kind)
        for item in pending:
            due = self.due.pop(id(item))
            (self.output if kind in ("output", "decision") else self.waited)[self.bus.where()] += max(
                0.0, due - self.now
            )
            self.now = max(self.now, due)
        return found


def drawn(name: str, method: dict[str, Any], rate: float) -> dict[str, float]:
    """Virtual seconds of a late step, on average: computing, what its bytes take, and waiting."""
    pipe = pipeline(name, torch.float32)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    with fastdiff.accelerate(pipe, parallel=method | {"devices": 2}) as fast:
        assert fast.crew is not None
        link, computed = Link(fast.crew.bus, rate), Counter[int]()

        def compute(*_: Any) -> None:
            link.now += UNIT
            computed[link.bus.where()] += UNIT

        hooks = [m.register_forward_hook(compute) for m in denoiser.modules() if not list(m.children())]
        latents(pipe, name, STEPS, **EVEN.get(name, {}))
        for hook in hooks:
            hook.remove()
    counts = {"computed": computed, "bytes": link.carried, "waited": link.waited, "output": link.output}
    mean = {what: sum(some[k] for k in LATE) / len(LATE) for what, some in counts.items()}
    return mean | {"transfer": mean["bytes"] / rate}


class Attends(TorchFunctionMode):
    """Attention takes a virtual time for each pair of a query and a key, in parts or as a whole."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link, self.costs = link, list[float]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (attend_part, F.scaled_dot_product_attention):
            self.costs.append(PAIR * args[0].shape[:-1].numel() * args[1].shape[-2])
            self.link.now += self.costs[-1]
        return found


def circled(name: str, method: str, rate: float) -> dict[str, Any]:
    """Virtual seconds of a run: waiting for keys, values and the like; each attention; and the bytes that came."""
    pipe = pipeline(name, torch.float32)
    with fastdiff.accelerate(pipe, parallel=method) as fast:
        assert fast.crew is not None
        link = Link(fast.crew.bus, rate)
        with Attends(link) as attends:
            latents(pipe, name, 2)
        sent = fast.report.ranks[fast.rank]["sent"]
    return {"waited": sum(link.waited.values()), "costs": attends.costs, "bytes": sent.get("kv", 0)}


def circles(rank: int, ranks: int) -> dict[str, dict[str, Any]]:
    """PixArt, whose text is apart: 16 tokens, 8 on each rank, 4 blocks. Keys and values of a layer travel in a half, in
    all and in twice the time that a rank's queries take for as many keys."""
    found = {}
    block = circled("pixart", "ring", 1e30)
    own = min(block["costs"])  # the text is longer
    for share in (0.5, 1.0, 2.0):
        rate = block["bytes"] / (2 * 4) / (share * own)
        found |= {f"{name} {share}": circled("pixart", name, rate) for name in ("patch", "ring", "token_ring")}
    return found


def sd15(rank: int, ranks: int) -> dict[str, dict[str, float]]:
    return at_rates("sd15")


def sd3(rank: int, ranks: int) -> dict[str, dict[str, float]]:
    return at_rates("sd3")


def at_rates(name: str) -> dict[str, dict[str, float]]:
    """Each method where the synchronous exchange takes a half, about all, and twice of the computing."""
    found, free = {}, drawn(name, METHODS["patch"], 1e30)
    for share in (0.5, 0.95, 2.0):
        rate = free["bytes"] / (share * free["computed"])
        found |= {f"{method} {share}": drawn(name, METHODS[method], rate) for method in METHODS}
    return found
