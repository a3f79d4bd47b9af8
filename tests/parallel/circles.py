"""Ring, TokenRing and teams of heads on real ranks; run by real processes, see ranks.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff.parallel import REGISTRY
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.split import Split
from fastdiff.parallel.travel import passed_on

from .checks import EXACT, exact, latents, moved, pipeline

WIDTH, BATCH = 8, 2
LENGTHS = {2: [(5, 4), (1, 7), (0, 3)], 3: [(5, 6, 1), (4, 0, 4)], 4: [(3, 4, 1, 2)], 5: [(1, 9, 3, 2, 6)]}


def meeting(method: str, rank: int, ranks: int, **fields: Any) -> tuple[Split, Any]:
    """One layer of a method on all ranks, without a model."""
    asks = REGISTRY[method](method=method, **fields)
    bus = Bus(asks.topology(ranks, rank), 60.0)
    bus.begin()
    split = Split(asks, bus, None)
    return split, split.exchange("layer", "kv")


def told_apart(lengths: tuple[int, ...], heads: int, text: int, dtype: torch.dtype) -> tuple[list[Tensor], list[slice]]:
    """Queries, keys and values of all tokens, the text's last, the same on every rank; and each rank's places."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads + text)
    shape = (BATCH, heads, sum(lengths) + text, WIDTH)
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return whole, [slice(end - count, end) for end, count in zip(ends, lengths, strict=True)]


def attended(method: str, rank: int, lengths: tuple[int, ...], heads: int, text: int, first: bool, **more: Any) -> Any:
    """How far this rank's rows are from those of attention on one device, and the bytes that it sent."""
    dtype = more.pop("dtype", torch.float64)
    split, exchange = meeting(method, rank, len(lengths), **more)
    whole, places = told_apart(lengths, heads, text, dtype)
    count, total = lengths[rank], sum(lengths)

    def mine(x: Tensor) -> Tensor:
        picture, words = x[..., places[rank], :], x[..., total:, :]
        return torch.cat([words, picture] if first else [picture, words], -2)

    own = slice(text, text + count) if first else slice(0, count)
    layout: Any = SimpleNamespace(counts=lambda _: list(lengths))
    assert split.method.attend is not None
    found = split.method.attend(split, exchange, layout, own, *(mine(x) for x in whole), {})
    far = (found - mine(F.scaled_dot_product_attention(*whole))).abs().max() if count + text else torch.zeros(())
    split.bus.abort()
    return float(far), split.bus.traffic.sent["kv"]


def lengths(rank: int, ranks: int) -> dict[str, list[float]]:
    """Uneven and empty shares, five heads, with and without text, before and behind the picture."""
    found = {}
    for method in ("ring", "token_ring"):
        for counts in LENGTHS[ranks]:
            for text in (0, 3):
                far, sent = attended(method, rank, counts, 5, text, first=bool(text) and rank >= 0)
                assert far < EXACT, (method, counts, text, far)
                found[f"{method} {counts} {text}"] = [far, sent]
            assert attended(method, rank, counts, 5, 2, first=False)[0] < EXACT
            assert attended(method, rank, counts, 2, 3, first=True, dtype=torch.float32)[0] < 3e-6
            assert attended(method, rank, counts, 2, 3, first=True, dtype=torch.bfloat16)[0] < 5e-2
    return found


def teams(rank: int, ranks: int) -> dict[str, list[float]]:
    """Heads and tokens at once; heads that ranks do not divide."""
    found = {}
    for method, fields in (("ulysses", {}), ("ring", {"ulysses": 2}), ("token_ring", {"ulysses": 2})):
        if fields and ranks % 2:
            continue
        for text in (0, 3):
            counts = LENGTHS[ranks][0]
            far, sent = attended(method, rank, counts, 5, text, first=bool(text), **fields)
            assert far < EXACT, (method, text, far)
            found[f"{method} {text}"] = [far, sent]
    return found


def coded(rank: int, ranks: int) -> None:
    """A block is coded once, by its own rank: all others have the same of it, step after step."""
    for codec, bound in (("int8", 2e-2), ("residual", 0.2)):
        split, exchange = meeting("ring", rank, ranks, codec=codec)
        counts = [3 + k for k in range(ranks)]
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            blocks = [torch.randn(1, 2, n, WIDTH, generator=generator) * 0.1 + 1 for n in counts]
            got = [block.clone() for block in passed_on(split, exchange, blocks[rank], split.ranks, counts)]
            owners = [(rank - s) % ranks for s in range(ranks)]
            assert [tuple(one.shape) for one in got] == [tuple(blocks[o].shape) for o in owners]
            seen = dict(zip(owners, got, strict=True))
            for owner in range(ranks):
                told = split.bus.tell(seen[owner].tolist())
                others = [one for k, one in enumerate(told) if k != owner]
                assert all(one == others[0] for one in others), "two ranks have different blocks of a third"
            for owner, block in seen.items():
                assert moved(block, blocks[owner]) < bound, (codec, owner)
                assert owner == rank or codec == "residual" or not torch.equal(block, blocks[owner])
        split.bus.abort()


def pictures(rank: int, ranks: int) -> dict:
    """Whole pipelines: text in joint attention before and behind the picture, apart from it, and a UNet's rows."""
    return whole(ranks, "ring", "token_ring")


def pictures_the_other_way(rank: int, ranks: int) -> dict:
    return whole(ranks, "token_ring", "ring")


def whole(ranks: int, *methods: str) -> dict:
    """The methods take turns."""
    names = {2: ("sd3", "flux", "pixart", "wan", "sd15"), 3: ("sd3", "flux", "pixart", "wan")}[ranks]
    return {f"{name} {methods[k % 2]}": exact(name, methods[k % 2]) for k, name in enumerate(names)}


def more_ranks_than_heads(rank: int, ranks: int) -> dict:
    """Flux and Wan have two heads: four ranks are two teams of two."""
    return {
        "flux usp": exact("flux", {"method": "ring", "ulysses": 2}),
        "wan usp": exact("wan", {"method": "token_ring", "ulysses": 2}),
        "sd3 cfg x ring": exact("sd3", {"method": "ring", "cfg": 2}),
        "flux ring": exact("flux", "ring"),
        "sd3 token_ring": exact("sd3", "token_ring"),
    }


def uneven_heads(rank: int, ranks: int) -> dict:
    """Four heads on three ranks."""
    return {name: exact(name, "ulysses") for name in ("sd3", "pixart")}


def unequal(rank: int, ranks: int) -> dict:
    """Rows, tokens and heads by speed: the picture stays that of one device."""
    pairs = (("sd3", "patch"), ("flux", "ring"), ("sd3", "ulysses"), ("wan", "token_ring"), ("sd15", "patch"))
    found = {f"{name} {method}": exact(name, {"method": method, "shares": [3, 1]}) for name, method in pairs}
    pipe = pipeline("sd3")
    alone = latents(pipe, "sd3")
    with fastdiff.accelerate(pipe, parallel={"method": "patch", "shares": "measured"}) as handle:
        speeds: list[list[float]] = []
        for _ in range(2):
            assert handle.crew is not None
            speeds.append(handle.crew.bus.speeds.values)
            assert moved(latents(pipe, "sd3"), alone) < EXACT
    assert len(speeds[0]) == ranks and speeds[0] != speeds[1], "what the first run took counts in the second"
    return found


def refusals(rank: int, ranks: int) -> dict[str, str]:
    said = {}
    for label, name, method in (
        ("team", "sd3", {"method": "ring", "ulysses": 2}),
        ("heads", "flux", {"method": "ulysses"}),
        ("rows", "sd15", {"method": "ring", "ulysses": 3}),
        ("speeds", "sd3", {"method": "patch", "shares": [2, 1]}),
        ("nothing", "sd3", {"method": "patch", "shares": [2, 1, 0]}),
    ):
        pipe = pipeline(name)
        try:
            fastdiff.accelerate(pipe, parallel=method)
            said[label] = "went through"
        except fastdiff.errors.FastdiffError as error:
            said[label] = str(error)
    return said


def with_caches_and_graphs(rank: int, ranks: int) -> dict:
    from .checks import CACHES, compiled

    pipe = pipeline("flux")
    with fastdiff.accelerate(pipe, cache=CACHES["first_block"]) as handle:
        alone, skipped = latents(pipe, "flux", 6), handle.report.cached
    for method in ("ring", "token_ring"):
        with fastdiff.accelerate(pipe, cache=CACHES["first_block"], parallel=method) as handle:
            assert moved(latents(pipe, "flux", 6), alone) < 1e-11 and handle.report.cached == skipped > 0
    return {method: compiled("sd3", method, 2) for method in ("ring", "token_ring")}


def under_way(rank: int, ranks: int) -> list[list[float]]:
    """When blocks left, when they were waited for, and when they were there: seconds of each transfer and wait."""
    pipe = pipeline("flux", torch.float32)
    with fastdiff.accelerate(pipe, parallel="ring") as handle:
        latents(pipe, "flux", 2)
        spans = [span for span in handle.report.spans if "attn" in span.layer]
    transfers = [span for span in spans if span.kind == "transfer"]
    waits = [span for span in spans if span.kind == "wait"]
    return [[t.start, w.start, t.end] for t, w in zip(transfers, waits, strict=True)]
