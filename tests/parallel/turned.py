"""Halves of a batch and groups of heads that take turns, on real ranks; run by real processes, see ranks.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import fastdiff
from fastdiff.errors import BadConfig, FastdiffError

from .checks import digest, exact, latents, moved, pipeline
from .paced import PAIR, UNIT, Link

Order = list[tuple[str, str, list[int], list[int]]]


def halves(rank: int, ranks: int) -> dict[str, Any]:
    """Every exact method, a UNet and transformers, text in joint attention and apart; also under other splits."""
    asked = [("sd3", "patch"), ("pixart", "ring"), ("sd3", "token_ring"), ("sd15", "patch"), ("sd3", "ulysses")]
    asked = asked if ranks == 2 else [("sd3", "ring"), ("pixart", "ulysses")]
    found = {f"{name} {method}": exact(name, {"method": method, "halves": True}) for name, method in asked}
    for name, method in asked[:1]:
        found[f"{name} {method} whole"] = exact(name, method)
    return found


def three_pictures(rank: int, ranks: int) -> dict[str, Any]:
    """A distilled model has no guidance to halve, but pictures; one alone is computed as it is, and that is said."""
    changes: dict[str, Any] = {"prompt": ["a red cat", "a dog", "a house"], "negative_prompt": ["bad"] * 3}
    several = exact("flux", {"method": "patch", "halves": True}, **changes)
    return {"three": several, "one": exact("flux", {"method": "patch", "halves": True})}


def coded(rank: int, ranks: int) -> float:
    """What a codec remembers of one half is not mixed with the other's."""
    pipe = pipeline("sd3")
    with fastdiff.accelerate(pipe, parallel={"method": "patch", "codec": "residual"}):
        whole = latents(pipe, "sd3", 6)
    with fastdiff.accelerate(pipe, parallel={"method": "patch", "codec": "residual", "halves": True}):
        return moved(latents(pipe, "sd3", 6), whole)


def groups(rank: int, ranks: int) -> dict[str, Any]:
    """Attention is by heads: in groups it is the same to the bit, and as many bytes are sent."""
    found: dict[str, Any] = {}
    for name in ("sd3", "pixart"):  # four heads
        pipe = pipeline(name)
        for count in (1, 2, 9):
            with fastdiff.accelerate(pipe, parallel={"method": "ulysses", "groups": count}) as fast:
                made = digest(latents(pipe, name))
            own = fast.report.ranks[fast.rank]
            found[f"{name} {count}"] = [made, own["sent"]["kv"], own["messages"]["kv"]]
    return found


def order(rank: int, ranks: int) -> Order:
    """What is sent, in what order, to whom."""
    pipe, said = pipeline("sd3"), []
    with fastdiff.accelerate(pipe, parallel={"method": "ulysses", "groups": 2, "halves": True}) as fast:
        assert fast.crew is not None
        bus: Any = fast.crew.bus
        post = bus.post

        def told(kind: str, layer: str, sends: Any, sizes: Any, later: bool = False) -> Any:
            said.append((kind, f"{layer} {bus.turns.part}", sorted(x.numel() for x in sends.values()), sorted(sizes)))
            return post(kind, layer, sends, sizes, later)

        bus.post = told
        latents(pipe, "sd3", 2)
    return [(kind, layer, sent, []) for kind, layer, sent, _ in said]


def broken(rank: int, ranks: int) -> str:
    """A layer that raises in the second half's turn ends both; the next call is as if nothing had been."""
    pipe = pipeline("sd3")
    with fastdiff.accelerate(pipe, parallel={"method": "patch", "halves": True}) as fast:
        good = latents(pipe, "sd3")
        assert fast.crew is not None
        turns = fast.crew.bus.turns

        def fails(*_: Any) -> None:
            if turns.part == 1:
                raise ValueError("the second half")

        hook = pipe.transformer.transformer_blocks[1].register_forward_hook(fails)
        with pytest.raises(ValueError, match="the second half"):
            latents(pipe, "sd3")
        hook.remove()
        assert torch.equal(latents(pipe, "sd3"), good)
    with pytest.raises(BadConfig, match=r"parallel\.halves runs each block twice"):
        fastdiff.accelerate(pipe, parallel={"method": "patch", "halves": True, "shard": "blocks"})
    with pytest.raises(FastdiffError, match=r"once for each half; set parallel\.halves"):
        fastdiff.accelerate(pipe, parallel={"method": "patch", "halves": True}, cache="fora")
    with pytest.raises(BadConfig, match="which no graph can"):
        fastdiff.accelerate(pipe, parallel={"method": "patch", "halves": True}, compile={"enabled": True})
    return digest(good)


class Queued(Link):
    """Messages that are waited for travel one after the other, too."""

    def __init__(self, bus: Any, rate: float) -> None:
        super().__init__(bus, rate)
        self.near = 0.0

    def post(self, *args: Any, later: bool = False, **kwargs: Any) -> list[Any]:
        found = super().post(*args, later=later, **kwargs)
        for item in () if later else found:
            self.near = max(self.near, self.now) + item.buffer.numel() / self.rate
            self.due[id(item)] = self.near
        return found


class Attends(TorchFunctionMode):
    """Whole attention takes a virtual time for each pair of a query and a key."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link = link

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.link.now += PAIR * args[0].shape[:-1].numel() * args[1].shape[-2]
        return func(*args, **(kwargs or {}))


def drawn(name: str, method: dict[str, Any], rate: float) -> dict[str, float]:
    """Virtual seconds of a run: waiting in layers, computing (of a leaf, a time for each picture) and transfers."""
    pipe, steps = pipeline(name, torch.float32), 3
    with fastdiff.accelerate(pipe, parallel=method) as fast:
        assert fast.crew is not None
        link, computed = Queued(fast.crew.bus, rate), [0.0]

        def compute(_: Any, given: Any, output: Any) -> None:
            rows = next((len(x) for x in given if isinstance(x, torch.Tensor) and x.ndim > 2), 0)
            link.now += UNIT * rows
            computed[0] += UNIT * rows

        hooks = [m.register_forward_hook(compute) for m in pipe.transformer.modules() if not list(m.children())]
        with Attends(link):
            latents(pipe, name, steps)
        for hook in hooks:
            hook.remove()
    sent = fast.report.ranks[fast.rank]["sent"]["kv"]
    return {"waited": sum(link.waited.values()), "computed": computed[0], "bytes": sent}


def paced(rank: int, ranks: int) -> dict[str, dict[str, float]]:
    """PixArt, where the exchange takes a half, nine tenths and twice of the computing."""
    found = {}
    for method in ("patch", "ring", "ulysses"):
        free = drawn("pixart", {"method": method}, 1e30)
        for share in (0.5, 0.9, 2.0):
            rate = free["bytes"] / (share * free["computed"])
            ways: dict[str, dict[str, Any]] = {"whole": {}, "halves": {"halves": True}}
            if method == "ulysses":
                ways["groups"] = {"groups": 2}
            for name, more in ways.items():
                found[f"{method} {name} {share}"] = drawn("pixart", {"method": method} | more, rate)
    return found
