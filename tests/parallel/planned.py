"""What each rank of a group sends, and what its rehearsal says that it would; run by real processes, see ranks.py."""

from __future__ import annotations

from typing import Any

import fastdiff
from fastdiff.parallel import REGISTRY
from fastdiff.parallel.rehearsal import rehearse
from fastdiff.pipelines.plan import observe
from tests import tiny

STEPS, WARMUP = 4, 1
CASES = {
    2: [("sd15", "distrifusion"), ("sd3", "distrifusion"), ("sd3", "pcpp int8")],
    3: [
        ("sd15", "pcpp"),
        ("sd3", "ring"),
        ("flux", "token_ring"),
        ("sd15", "ring"),
        ("sd3", "ulysses"),
        ("flux", "pipefusion"),
    ],
}  # fmt: skip


def sent(rank: int, ranks: int) -> dict[str, Any]:
    """Bytes by kind of a run, and those that its steps add up to."""
    found = {}
    for name, label in CASES[ranks]:
        pipe, size = tiny.make(name), 192 if name in tiny.UNETS else 64
        anatomy, calls, _ = observe(pipe, size)
        method, _, codec = label.partition(" ")
        asked = {"method": method, "warmup_steps": WARMUP, "codec": codec or "raw"}
        played = REGISTRY[method](**asked)
        part = rehearse(anatomy, calls, played, played.topology(ranks, rank), rounds=1)
        with fastdiff.accelerate(pipe, parallel=asked) as handle:
            pipe("a photo", height=size, width=size, num_inference_steps=STEPS, output_type="latent")
            real = handle.report.ranks[rank]["sent"]
        waits = played.fresh(STEPS) or played.split is not None  # its old values were never sent
        each, later = +part.fresh.sent, part.stale.sent
        alike = {kind: STEPS * size for kind, size in each.items()}
        found[f"{name} {label}"] = [real, alike if waits else expected(each, later)]
    return found


def expected(fresh: dict[str, int], stale: dict[str, int]) -> dict[str, int]:
    """The last step sends nothing for one after it."""
    total = {kind: (WARMUP + 1) * size + (STEPS - WARMUP - 2) * stale[kind] for kind, size in fresh.items()}
    return total | {"output": STEPS * fresh["output"]}
