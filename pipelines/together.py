"""What a cache cannot do where ranks share a step out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdiff.caching.base import CacheMethod
from fastdiff.caching.methods.faster_diffusion import FasterDiffusion
from fastdiff.caching.methods.joint import Joint
from fastdiff.caching.methods.tgate import TGate
from fastdiff.errors import BadConfig

if TYPE_CHECKING:
    from fastdiff.parallel.mesh import Topology


def check_shared(method: CacheMethod, topology: Topology, by_turns: bool = False) -> None:
    """Raises BadConfig where each rank sees less of a step than the cache has to.

    A gate leaves out one half of guidance, and with cfg = 2 no rank has both; several steps that are decoded as one
    batch are rows of no rank. by_turns: whether the halves of a batch take turns in all that is cached.
    """
    own: Any = method
    if by_turns:
        raise BadConfig(
            f"{own.method} keeps what a block made of the whole batch, and with parallel.halves each block runs "
            "once for each half; set parallel.halves = false, or leave the cache out"
        )
    if own.guard == "verify" and topology.step > 1:
        raise BadConfig(
            'cache.guard = "verify" needs all steps of a run on each rank, where parastep gives each its own; set '
            "cache.guard = none, or a parallel method that splits the picture or guidance"
        )
    if own.guard == "speca":
        raise BadConfig(
            'cache.guard = "speca" runs a block more in some steps, which parallel methods do not expect; set '
            'cache.guard = "verify"'
        )
    if isinstance(own, Joint) and topology.step > 1:
        raise BadConfig(
            "joint says of each step of a run what it leaves out, and parastep gives each rank steps of its own; take "
            "a parallel method that splits the picture or guidance"
        )
    halves = (isinstance(own, TGate) and own.guidance != "keep") or (
        isinstance(own, Joint) and "conditional" in own.kinds
    )
    if halves and topology.cfg > 1:
        instead = 'cache.guidance = "keep"' if isinstance(own, TGate) else "kinds without conditional"
        raise BadConfig(
            f"{own.method} leaves out one half of guidance, and parallel.cfg = 2 gives each half its own ranks; set "
            f"{instead}, or a parallel method with cfg = 1"
        )
    if isinstance(own, FasterDiffusion) and own.max_parallel > 1 and topology.patch > 1:
        raise BadConfig(
            f"faster_diffusion decodes up to {own.max_parallel} steps in one forward, which ranks that split the "
            "picture cannot; set cache.max_parallel = 1"
        )
