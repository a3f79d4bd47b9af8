"""The pictures of a soak of parallel runs: sizes, methods and faults, by chance but the same each time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tests import tiny

RANKS, STEPS = 4, 6
SIZES = {  # height, width: rows of latents that four ranks share evenly, and that they do not
    "sd15": ((128, 64), (152, 64), (192, 64)),
    "sd3": ((64, 64), (96, 64), (64, 96)),
    "flux": ((64, 64), (96, 64), (64, 96)),
}
EXACT: dict[str, dict[str, Any]] = {
    "patch": {"method": "patch"},
    "patch cfg": {"method": "patch", "cfg": 2},
    "ring": {"method": "ring"},
    "ring teams": {"method": "ring", "ulysses": 2},
    "token_ring": {"method": "token_ring"},
    "ulysses cfg": {"method": "ulysses", "cfg": 2},
}
NEAR: dict[str, dict[str, Any]] = {
    "distrifusion": {"method": "distrifusion", "warmup_steps": 1},
    "distrifusion residual": {"method": "distrifusion", "warmup_steps": 1, "codec": "residual"},
    "pcpp": {"method": "pcpp", "warmup_steps": 1, "refresh": 3},
    "parastep": {"method": "parastep", "warmup_steps": 1},
    "parastep cfg": {"method": "parastep", "warmup_steps": 1, "cfg": 2},
    "pipefusion": {"method": "pipefusion"},
}
METHODS = EXACT | NEAR
FAULTS = ("killed", "stopped")


@dataclass(frozen=True)
class Draw:
    """One picture; `fault`: what becomes of rank `who` after step `at`, or within it where `depth` says how deep."""

    model: str
    size: tuple[int, int]
    seed: int
    method: str
    loss: str = "raise"
    fault: str = ""
    who: int = 0
    at: int = 0
    depth: float | None = None

    @property
    def picture(self) -> str:
        return f"{self.model} {self.size[0]}x{self.size[1]} {self.seed}"

    def call(self) -> dict[str, Any]:
        height, width = self.size
        return tiny.arguments(self.model, STEPS, self.seed) | {"height": height, "width": width}


def fits(model: str, method: str) -> bool:
    unet = "pipefusion" in method or "ulysses" in method or "teams" in method
    return model != "sd15" or not unet


def plan(seed: int, number: int, count: int) -> list[Draw]:
    """The pictures of a round, the same each time."""
    chance, draws = random.Random(f"{seed} {number}"), []
    for k in range(count):
        model = chance.choice([*SIZES])
        method = chance.choice([name for name in METHODS if fits(model, name)])
        fault = "" if number == 0 or k < count - 1 else chance.choice(FAULTS)
        if number == 0 and k % 7 == 6:
            fault = "raised"
        # two calls a step, of which one was displaced and one alone, are neither of what is compared
        both = method != "pipefusion" and (model != "flux" or method in EXACT)
        depth = chance.random() if chance.random() < 0.5 else None
        draws.append(
            Draw(
                model, chance.choice(SIZES[model]), chance.randrange(2), method,
                chance.choice(["raise", "local"]) if both else "raise", fault, chance.randrange(RANKS),
                chance.randrange(STEPS - 1), depth,
            )
        )  # fmt: skip
    return draws
