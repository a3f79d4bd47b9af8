"""What each rank of a group sends, and what its rehearsal says that it would; run by real processes, see ranks.py."""

from __future__ import annotations

from typing import Any

import fastdiff
from fastdiff.parallel import REGISTRY
from fastdiff.parallel.rehearsal import rehearse
from fastdiff.pipelines.plan import observe
from tests import tiny

STEPS, WARMUP = 5, 1


def sent(rank: int, ranks: int) -> dict[str, Any]:
    """Bytes by kind of a run, and those that its steps add up to."""
    found = {}
    for name in ("sd15", "sd3"):
        pipe = tiny.make(name)
        size = 192 if name in tiny.UNETS else 64
        anatomy, calls, _ = observe(pipe, size)
        for label in ("patch", "distrifusion", "pcpp", "pcpp int8", "distrifusion residual"):
            method, _, codec = label.partition(" ")
            asked = {"method": method, "warmup_steps": WARMUP, "codec": codec or "raw"}
            played = REGISTRY[method](**asked)
            part = rehearse(anatomy, calls, played, played.topology(ranks, rank), rounds=1)
            handle = fastdiff.accelerate(pipe, parallel=asked)
            pipe("a photo", height=size, width=size, num_inference_steps=STEPS, output_type="latent")
            real = handle.report.ranks[rank]["sent"]
            handle.restore()
            found[f"{name} {label}"] = [real, expected(part.fresh.sent, part.stale.sent, method == "patch", codec)]
    return found


def expected(fresh: dict[str, int], stale: dict[str, int], always: bool, codec: str) -> dict[str, Any]:
    """The last step sends nothing for one after it; the first message of residuals is whole and not of interest."""
    waits = STEPS if always else WARMUP + 1
    later = STEPS - waits - 1
    total = {kind: waits * size + (later * stale[kind] if not always else 0) for kind, size in fresh.items()}
    total["output"] = STEPS * fresh["output"]
    if codec == "residual":
        del total["kv"]
    return total
